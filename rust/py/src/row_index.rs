//! Which rows are meant: a mask with a flag for each, or indices.

use numpy::{Element, PyArray1, PyArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::array;

/// Rows as a caller names them: of which parameter, that is not known yet.
pub enum RowIndex {
    Mask(Vec<bool>),
    /// Negative ones count from the end.
    Indices(Vec<i64>),
}

impl RowIndex {
    /// A mask or indices, from any list or array, or one index.
    pub fn read(py: Python<'_>, rows: &Bound<'_, PyAny>, called: &impl ToString) -> PyResult<Self> {
        let called = called.to_string();
        let rows = as_array(py, rows)?;
        let dtype = rows.getattr(intern!(py, "dtype"))?;
        let kind: String = dtype.getattr(intern!(py, "kind"))?.extract()?;
        let shape = array::shape(&rows);
        if shape.contains(&0) {
            return Ok(if kind == "b" {
                Self::Mask(Vec::new())
            } else {
                Self::Indices(Vec::new())
            });
        }
        match (kind.as_str(), shape.len()) {
            ("b", 1) => elements(&rows, "bool").map(Self::Mask),
            ("i" | "u", 0 | 1) => elements(&rows, "int64").map(Self::Indices),
            ("b" | "i" | "u", _) => Err(PyValueError::new_err(format!(
                "{called}: rows are named by a mask or by indices of one dimension, got shape {shape:?}"
            ))),
            _ => Err(PyTypeError::new_err(format!(
                "{called}: rows are named by a mask of bools or by integers, got {dtype}"
            ))),
        }
    }

    /// The indices, of so many rows of a parameter that is called so.
    pub fn among(&self, count: usize, called: &impl ToString) -> PyResult<Vec<usize>> {
        match self {
            Self::Mask(mask) if mask.len() == count => {
                Ok((0..count).filter(|&row| mask[row]).collect())
            }
            Self::Mask(mask) => Err(PyValueError::new_err(format!(
                "{} has {count} rows, and the mask has length {}; pass one flag for each row",
                called.to_string(),
                mask.len()
            ))),
            Self::Indices(indices) => indices
                .iter()
                .map(|&row| {
                    let place = if row < 0 { row + count as i64 } else { row };
                    usize::try_from(place).ok().filter(|place| *place < count).ok_or_else(|| {
                        PyValueError::new_err(format!(
                            "{} has {count} rows, and the index {row} points beyond them",
                            called.to_string()
                        ))
                    })
                })
                .collect(),
        }
    }

    /// A flag for each of so many rows.
    pub fn flags(&self, count: usize, called: &impl ToString) -> PyResult<Vec<bool>> {
        let mut flags = vec![false; count];
        self.among(count, called)?.into_iter().for_each(|row| flags[row] = true);
        Ok(flags)
    }
}

/// Any list or array as an array.
pub fn as_array<'py>(py: Python<'py>, list: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    py.import(intern!(py, "numpy"))?.call_method1(intern!(py, "asarray"), (list,))
}

fn elements<T: Element>(rows: &Bound<'_, PyAny>, dtype: &str) -> PyResult<Vec<T>> {
    let py = rows.py();
    let casting = PyDict::new(py);
    casting.set_item(intern!(py, "casting"), intern!(py, "safe"))?;
    let rows = rows.call_method0(intern!(py, "ravel"))?;
    let rows = rows.call_method(intern!(py, "astype"), (dtype,), Some(&casting))?;
    Ok(rows.cast_into::<PyArray1<T>>()?.to_vec()?)
}
