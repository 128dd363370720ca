//! Questions about lists of tensors, and the one change that clipping by norm makes to them.

use std::collections::HashSet;
use std::num::NonZeroUsize;

use paramstate::{Execution, Extent, View, overlaps_itself};
use pyo3::prelude::*;

use crate::scaling::each_once;
use crate::tensor::{Torch, is_negated};

/// The views of the tensors that the host kernels take, and the indices of the others.
fn views(py: Python<'_>, tensors: &[Bound<'_, PyAny>]) -> PyResult<(Vec<View>, Vec<usize>)> {
    let torch = Torch::get(py)?;
    let (mut views, mut elsewhere) = (Vec::with_capacity(tensors.len()), Vec::new());
    for (index, tensor) in tensors.iter().enumerate() {
        // SAFETY: the reading is used up before Python code runs, but for the question about a pending negation, and
        // that is answered by C code.
        let reading = unsafe { torch.read(tensor.as_borrowed()) };
        let view = reading.and_then(|reading| {
            let operand = reading.operand()?;
            let layout = reading.geometry.view_layout();
            let negated = reading.may_be_negated() && is_negated(tensor.as_borrowed());
            (!negated).then_some(View { operand, layout })
        });
        match view {
            Some(view) => views.push(view),
            None => elsewhere.push(index),
        }
    }
    Ok((views, elsewhere))
}

/// The sum of the squares of all elements of the tensors that the host kernels take, and the indices of the others.
///
/// Accumulated in float64 in a fixed order: the same bits for any number of threads.
#[pyfunction]
#[pyo3(signature = (tensors, *, threads))]
pub fn sum_of_squares(
    py: Python<'_>,
    tensors: Vec<Bound<'_, PyAny>>,
    threads: NonZeroUsize,
) -> PyResult<(f64, Vec<usize>)> {
    let (views, elsewhere) = views(py, &tensors)?;
    let execution = Execution::new(threads);
    // SAFETY: the views were just read, and `tensors` holds the objects.
    let squares = py.detach(|| unsafe { paramstate::sum_of_squares(&views, &execution) });
    Ok((squares, elsewhere))
}

/// Multiplies every element of the tensors that the host kernels take, in place; returns the indices of the others.
///
/// An element that several of them share (a gradient listed twice, an expanded one) is multiplied once.
#[pyfunction]
#[pyo3(signature = (tensors, coefficient, *, threads))]
pub fn scale_(
    py: Python<'_>,
    tensors: Vec<Bound<'_, PyAny>>,
    coefficient: f64,
    threads: NonZeroUsize,
) -> PyResult<Vec<usize>> {
    let (views, mut elsewhere) = views(py, &tensors)?;
    let taken: Vec<usize> = (0..tensors.len()).filter(|index| !elsewhere.contains(index)).collect();
    let (views, left) = each_once(views.into_iter());
    elsewhere.extend(left.into_iter().map(|index| taken[index]));
    elsewhere.sort_unstable();
    let execution = Execution::new(threads);
    // SAFETY: the views were just read, no two of them share memory, and `tensors` holds the objects.
    py.detach(|| unsafe { paramstate::scale(&views, coefficient, &execution) });
    Ok(elsewhere)
}

/// The pairs of tensors that share at least one byte of the host's memory; one object listed twice is no pair. A tensor
/// several of whose elements are one in memory is a pair with itself.
#[pyfunction]
#[pyo3(signature = (tensors))]
pub fn overlapping(
    py: Python<'_>,
    tensors: Vec<Bound<'_, PyAny>>,
) -> PyResult<Vec<(usize, usize)>> {
    let mut seen = HashSet::with_capacity(tensors.len());
    let mut found = extents(py, &tensors)?;
    found.retain(|(index, _)| seen.insert(tensors[*index].as_ptr()));
    let (indices, extents): (Vec<usize>, Vec<Extent>) = found.into_iter().unzip();
    let itself = indices.iter().zip(&extents).filter(|(_, extent)| overlaps_itself(extent));
    let mut pairs: Vec<_> = itself.map(|(&index, _)| (index, index)).collect();
    let others = paramstate::overlapping(&extents).into_iter();
    pairs.extend(others.map(|(a, b)| (indices[a], indices[b])));
    Ok(pairs)
}

fn extents(py: Python<'_>, tensors: &[Bound<'_, PyAny>]) -> PyResult<Vec<(usize, Extent)>> {
    let torch = Torch::get(py)?;
    let extent = |(index, tensor): (usize, &Bound<'_, PyAny>)| {
        // SAFETY: the reading is converted before any Python code runs.
        let reading = unsafe { torch.read(tensor.as_borrowed()) }?;
        Some((index, reading.geometry.extent(reading.ptr.addr(), reading.itemsize())))
    };
    Ok(tensors.iter().enumerate().filter_map(extent).collect())
}
