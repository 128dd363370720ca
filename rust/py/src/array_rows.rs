//! Rows of NumPy arrays: the new values are made by NumPy, everything else follows in the core.

use numpy::PyUntypedArray;
use paramstate::{Buffer, NewValue, ParamId, RowChange};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping, PyTuple};

use crate::array;
use crate::arrays::{borrow, label, value};
use crate::error::to_python;
use crate::lookup::Key;
use crate::store::Store;

/// One parameter whose rows change.
struct Edit<'py> {
    id: ParamId,
    value: Bound<'py, PyUntypedArray>,
    shape: Vec<usize>,
    axis: usize,
}

impl<'py> Edit<'py> {
    fn new(py: Python<'py>, store: &Store, key: &Key, dim: isize) -> PyResult<Self> {
        let id = store.find(py, key)?;
        let value = value(py, store, id)?;
        let shape = array::shape(value.as_any());
        let place = if dim < 0 { dim + shape.len() as isize } else { dim };
        let axis = usize::try_from(place).ok().filter(|axis| *axis < shape.len());
        let axis = axis.ok_or_else(|| {
            let label = label(py, store, id);
            PyValueError::new_err(format!(
                "{label} has shape {shape:?}, which has no dimension {dim}"
            ))
        })?;
        Ok(Self { id, value, shape, axis })
    }

    fn all(py: Python<'py>, store: &Store, keys: &[Key], dim: isize) -> PyResult<Vec<Self>> {
        keys.iter().map(|key| Self::new(py, store, key, dim)).collect()
    }
}

/// Indices from any list or array of whole numbers.
pub fn indices(py: Python<'_>, index: &Bound<'_, PyAny>) -> PyResult<Vec<usize>> {
    let index = as_array(py, index)?;
    let kind: String =
        index.getattr(intern!(py, "dtype"))?.getattr(intern!(py, "kind"))?.extract()?;
    if kind == "b" {
        return Err(PyTypeError::new_err(
            "a mask was given for the indices of rows; keep_rows takes one",
        ));
    }
    index.call_method0(intern!(py, "tolist"))?.extract()
}

fn as_array<'py>(py: Python<'py>, list: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    py.import(intern!(py, "numpy"))?.call_method1(intern!(py, "asarray"), (list,))
}

/// Keeps the rows whose flag is set.
pub fn keep(
    py: Python<'_>,
    store: &Store,
    keys: &[Key],
    mask: &Bound<'_, PyAny>,
    dim: isize,
) -> PyResult<()> {
    let mask: Vec<bool> = as_array(py, mask)?.call_method0(intern!(py, "tolist"))?.extract()?;
    let edits = Edit::all(py, store, keys, dim)?;
    check_count(py, store, &edits, mask.len())?;
    let index: Vec<usize> = (0..mask.len()).filter(|&row| mask[row]).collect();
    gather_edits(py, store, edits, &index)
}

/// Takes these rows.
pub fn gather(
    py: Python<'_>,
    store: &Store,
    keys: &[Key],
    index: &[usize],
    dim: isize,
) -> PyResult<()> {
    gather_edits(py, store, Edit::all(py, store, keys, dim)?, index)
}

/// Takes every row once, in this order.
pub fn permute(
    py: Python<'_>,
    store: &Store,
    keys: &[Key],
    order: &[usize],
    dim: isize,
) -> PyResult<()> {
    let edits = Edit::all(py, store, keys, dim)?;
    check_count(py, store, &edits, order.len())?;
    let mut sorted = order.to_vec();
    sorted.sort_unstable();
    match edits.first() {
        Some(edit) if !sorted.iter().copied().eq(0..order.len()) => {
            let parameter = label(py, store, edit.id);
            Err(to_python(paramstate::Error::NoPermutation { parameter }))
        }
        _ => gather_edits(py, store, edits, order),
    }
}

/// Resets the state of these rows.
pub fn reset(
    py: Python<'_>,
    store: &Store,
    keys: &[Key],
    rows: &[usize],
    dim: isize,
) -> PyResult<()> {
    let edits = Edit::all(py, store, keys, dim)?;
    let edits = edits.into_iter().map(|edit| (edit, None)).collect();
    run(py, store, edits, RowChange::Reset(rows))
}

/// Adds rows at the end.
pub fn append(
    py: Python<'_>,
    store: &Store,
    rows: &Bound<'_, PyMapping>,
    dim: isize,
) -> PyResult<()> {
    let numpy = py.import(intern!(py, "numpy"))?;
    let casting = PyDict::new(py);
    casting.set_item(intern!(py, "casting"), intern!(py, "no"))?;
    let (mut edits, mut count) = (Vec::new(), None);
    for item in rows.items()?.iter() {
        let (key, rows): (Key, Bound<'_, PyAny>) = item.cast::<PyTuple>()?.extract()?;
        let edit = Edit::new(py, store, &key, dim)?;
        casting.set_item(intern!(py, "axis"), edit.axis)?;
        casting.set_item(intern!(py, "dtype"), edit.value.getattr(intern!(py, "dtype"))?)?;
        let both = ((&edit.value, rows),);
        let new = numpy.call_method(intern!(py, "concatenate"), both, Some(&casting))?;
        let added = array::shape(&new)[edit.axis] - edit.shape[edit.axis];
        if *count.get_or_insert(added) != added {
            let label = label(py, store, edit.id);
            return Err(PyValueError::new_err(format!(
                "{label} would get {added} new rows, and others {}; add as many to each",
                count.unwrap_or_default()
            )));
        }
        edits.push((edit, Some(new)));
    }
    run(py, store, edits, RowChange::Append(count.unwrap_or_default()))
}

fn check_count(py: Python<'_>, store: &Store, edits: &[Edit<'_>], got: usize) -> PyResult<()> {
    match edits.iter().find(|edit| edit.shape[edit.axis] != got) {
        Some(edit) => {
            let (parameter, expected) = (label(py, store, edit.id), edit.shape[edit.axis]);
            Err(to_python(paramstate::Error::RowValues { parameter, expected, got }))
        }
        None => Ok(()),
    }
}

fn gather_edits(
    py: Python<'_>,
    store: &Store,
    edits: Vec<Edit<'_>>,
    index: &[usize],
) -> PyResult<()> {
    let numpy = py.import(intern!(py, "numpy"))?;
    let mut changed = Vec::with_capacity(edits.len());
    for edit in edits {
        let rows = edit.shape[edit.axis];
        if let Some(&row) = index.iter().find(|&&row| row >= rows) {
            let parameter = label(py, store, edit.id);
            return Err(to_python(paramstate::Error::NoSuchRow { parameter, row, rows }));
        }
        let indices = numpy.call_method1(intern!(py, "array"), (index, intern!(py, "intp")))?;
        let arguments = (&edit.value, indices, edit.axis);
        let new = numpy.call_method1(intern!(py, "take"), arguments)?;
        changed.push((edit, Some(new)));
    }
    run(py, store, changed, RowChange::Gather(index))
}

/// Lets the core change all of them, each with its new array if it gets one.
fn run(
    py: Python<'_>,
    store: &Store,
    edits: Vec<(Edit<'_>, Option<Bound<'_, PyAny>>)>,
    change: RowChange<'_>,
) -> PyResult<()> {
    let Some(axis) = edits.first().map(|(edit, _)| edit.axis) else { return Ok(()) };
    if let Some((edit, _)) = edits.iter().find(|(edit, _)| edit.axis != axis) {
        return Err(PyValueError::new_err(format!(
            "dim counts from the end, and for {} leads to another dimension than for the first; change it apart",
            label(py, store, edit.id)
        )));
    }
    let mut lent = Vec::with_capacity(edits.len());
    for (edit, new) in edits {
        lent.push((edit, new.map(|new| borrow(new, None)).transpose()?));
    }
    let result = {
        let mut loans = store.lock(py);
        let same = |(edit, _): &(Edit<'_>, _)| {
            let loan = loans.loan(edit.id, "value");
            loan.is_some_and(|loan| loan.object().as_ptr() == edit.value.as_ptr())
        };
        if lent.iter().all(same) {
            loans.revise();
            let edits = lent.iter().map(|(edit, loan)| match loan {
                Some(loan) => {
                    let buffer = Buffer::Borrowed(Box::new(loan.clone()));
                    (edit.id, NewValue::Replaced(&edit.shape, buffer))
                }
                None => (edit.id, NewValue::Stays(&edit.shape)),
            });
            let edits = edits.collect();
            loans.core.edit_rows(edits, axis, change).and_then(|()| {
                let mut returned = Vec::new();
                for (edit, loan) in &lent {
                    if let Some(loan) = loan {
                        returned.push(loans.exchange(edit.id, "value", Some(loan.clone()))?);
                    }
                }
                Ok(Some(returned))
            })
        } else {
            Ok(None)
        }
    };
    match result.map_err(to_python)? {
        Some(returned) => {
            drop(returned);
            Ok(())
        }
        None => Err(PyRuntimeError::new_err(
            "another thread has changed these parameters meanwhile; call again",
        )),
    }
}
