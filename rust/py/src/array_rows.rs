//! Rows of NumPy arrays: the new values are made by NumPy, everything else follows in the core.

use std::collections::HashSet;

use numpy::PyUntypedArray;
use paramstate::{Buffer, Label, NewValue, ParamId, RowChange};
use pyo3::exceptions::{PyRuntimeError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyMapping, PyTuple};

use crate::array;
use crate::arrays::{Chosen, axis, borrow, label, value};
use crate::error::to_python;
use crate::lookup::Key;
use crate::row_index::{RowIndex, as_array};
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
        let axis = axis(py, store, id, &shape, dim)?;
        Ok(Self { id, value, shape, axis })
    }

    fn all(py: Python<'py>, store: &Store, keys: &[Key], dim: isize) -> PyResult<Vec<Self>> {
        keys.iter().map(|key| Self::new(py, store, key, dim)).collect()
    }

    fn rows(&self) -> usize {
        self.shape[self.axis]
    }

    fn dtype(&self) -> PyResult<Bound<'py, PyAny>> {
        self.value.getattr(intern!(self.value.py(), "dtype"))
    }

    /// So many rows of one number.
    fn filled(&self, count: usize, number: f64) -> PyResult<Bound<'py, PyAny>> {
        let (py, mut shape) = (self.value.py(), self.shape.clone());
        shape[self.axis] = count;
        let numpy = py.import(intern!(py, "numpy"))?;
        let shape = PyTuple::new(py, shape)?;
        numpy.call_method1(intern!(py, "full"), (shape, number, self.dtype()?))
    }

    /// These of its rows.
    fn taken(&self, index: &[usize]) -> PyResult<Bound<'py, PyAny>> {
        let py = self.value.py();
        let numpy = py.import(intern!(py, "numpy"))?;
        let indices = numpy.call_method1(intern!(py, "array"), (index, intern!(py, "intp")))?;
        numpy.call_method1(intern!(py, "take"), (&self.value, indices, self.axis))
    }

    /// All of these one after another.
    fn joined(&self, parts: Vec<Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyAny>> {
        let py = self.value.py();
        let numpy = py.import(intern!(py, "numpy"))?;
        numpy.call_method1(intern!(py, "concatenate"), (parts, self.axis))
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
    rows: &Bound<'_, PyAny>,
    dim: isize,
) -> PyResult<()> {
    let edits = Edit::all(py, store, keys, dim)?;
    let rows = shared(py, store, &edits, rows)?;
    let edits = edits.into_iter().map(|edit| (edit, None)).collect();
    run(py, store, edits, RowChange::Reset(&rows))
}

/// Adds rows at the end: values, numbers of rows, or copies; with the state of rows, or as new.
pub fn append(
    py: Python<'_>,
    store: &Store,
    rows: &Bound<'_, PyAny>,
    dim: isize,
    [copy_of, state_of]: [Option<&Bound<'_, PyAny>>; 2],
) -> PyResult<()> {
    let given = rows.cast::<PyMapping>();
    let (edits, added) = match (given, copy_of) {
        (Ok(rows), None) => appended(py, store, rows, dim)?,
        (Err(_), Some(copy_of)) => copied(py, store, &rows.extract::<Vec<Key>>()?, copy_of, dim)?,
        _ => {
            return Err(PyTypeError::new_err(
                "append_rows takes a mapping from parameters to their new rows, or a list of parameters and copy_of=",
            ));
        }
    };
    let Some((first, _)) = edits.first() else { return Ok(()) };
    let state = match state_of {
        Some(rows) => {
            let edits = edits.iter().map(|(edit, _)| edit);
            shared(py, store, edits, rows)?.into_iter().map(Some).collect()
        }
        None => vec![None; added.len()],
    };
    if state.len() != added.len() {
        return Err(PyValueError::new_err(format!(
            "{} gets {} new rows, and state_of names {}; name one for each",
            label(py, store, first.id),
            added.len(),
            state.len()
        )));
    }
    if added.iter().chain(&state).all(Option::is_none) {
        return run(py, store, edits, RowChange::Append(added.len()));
    }
    if let Some((edit, _)) = edits.iter().find(|(edit, _)| edit.rows() != first.rows()) {
        return Err(PyValueError::new_err(format!(
            "{} has {} rows, and others {}; copy_of and state_of are for parameters with the same rows",
            label(py, store, edit.id),
            edit.rows(),
            first.rows()
        )));
    }
    let present = (0..first.rows()).map(Some);
    let values: Vec<Option<usize>> = present.clone().chain(added).collect();
    let state: Vec<Option<usize>> = present.chain(state).collect();
    run(py, store, edits, RowChange::From { values: &values, state: &state })
}

/// Each parameter with its new array, and for each row that is added the row whose copy it is.
type Appended<'py> = (Vec<(Edit<'py>, Option<Bound<'py, PyAny>>)>, Vec<Option<usize>>);

fn appended<'py>(
    py: Python<'py>,
    store: &Store,
    rows: &Bound<'py, PyMapping>,
    dim: isize,
) -> PyResult<Appended<'py>> {
    let (mut edits, mut count) = (Vec::new(), None);
    for item in rows.items()?.iter() {
        let (key, rows): (Key, Bound<'_, PyAny>) = item.cast::<PyTuple>()?.extract()?;
        let edit = Edit::new(py, store, &key, dim)?;
        let rows = match rows.extract::<isize>().map(usize::try_from) {
            Ok(Ok(count)) => edit.filled(count, 0.0)?,
            Ok(Err(_)) => {
                let label = label(py, store, edit.id);
                return Err(PyValueError::new_err(format!("{label} cannot get {rows} new rows")));
            }
            Err(_) => as_array(py, &rows)?,
        };
        check_new_rows(py, store, &edit, &rows)?;
        let added = array::shape(&rows)[edit.axis];
        if *count.get_or_insert(added) != added {
            let label = label(py, store, edit.id);
            return Err(PyValueError::new_err(format!(
                "{label} would get {added} new rows, and others {}; add as many to each",
                count.unwrap_or_default()
            )));
        }
        let new = edit.joined(vec![edit.value.clone().into_any(), rows])?;
        edits.push((edit, Some(new)));
    }
    Ok((edits, vec![None; count.unwrap_or_default()]))
}

fn copied<'py>(
    py: Python<'py>,
    store: &Store,
    keys: &[Key],
    copy_of: &Bound<'py, PyAny>,
    dim: isize,
) -> PyResult<Appended<'py>> {
    let edits = Edit::all(py, store, keys, dim)?;
    let index = shared(py, store, &edits, copy_of)?;
    let joined = |edit: Edit<'py>| {
        let new = edit.joined(vec![edit.value.clone().into_any(), edit.taken(&index)?])?;
        Ok((edit, Some(new)))
    };
    let edits = edits.into_iter().map(joined).collect::<PyResult<Vec<_>>>()?;
    Ok((edits, index.into_iter().map(Some).collect()))
}

/// That new rows are shaped as those that are there, and of their dtype.
fn check_new_rows(
    py: Python<'_>,
    store: &Store,
    edit: &Edit<'_>,
    rows: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (label, dtype, axis) = (label(py, store, edit.id), edit.dtype()?, edit.axis);
    let got = rows.getattr(intern!(py, "dtype"))?;
    if !got.eq(&dtype)? {
        return Err(PyTypeError::new_err(format!(
            "{label} has dtype {dtype}, and its new rows {got}; cast them first"
        )));
    }
    let got = array::shape(rows);
    let size = |(place, size): (usize, &usize)| {
        if place == axis { "n".to_owned() } else { size.to_string() }
    };
    let shape = |shape: &[usize]| shape.iter().enumerate().map(size).collect::<Vec<_>>();
    let expected = shape(&edit.shape);
    if shape(&got) == expected {
        return Ok(());
    }
    Err(PyValueError::new_err(format!(
        "{label}: new rows along dimension {axis} must have shape [{}], got {got:?}",
        expected.join(", ")
    )))
}

/// Adds rows of one number at both ends.
pub fn pad(
    py: Python<'_>,
    store: &Store,
    keys: &[Key],
    ends: [isize; 2],
    number: f64,
    dim: isize,
) -> PyResult<()> {
    let [Ok(before), Ok(after)] = ends.map(usize::try_from) else {
        let [before, after] = ends;
        return Err(PyValueError::new_err(format!(
            "pad_rows adds rows: before and after must be at least 0, got {before} and {after}"
        )));
    };
    let mut edits = Vec::with_capacity(keys.len());
    for edit in Edit::all(py, store, keys, dim)? {
        let old = edit.value.clone().into_any();
        let parts = vec![edit.filled(before, number)?, old, edit.filled(after, number)?];
        let new = edit.joined(parts)?;
        edits.push((edit, Some(new)));
    }
    run(py, store, edits, RowChange::Pad { before, after })
}

/// Drops the last rows, or adds rows of one number behind them.
pub fn resize(
    py: Python<'_>,
    store: &Store,
    keys: &[Key],
    size: isize,
    number: f64,
    dim: isize,
) -> PyResult<()> {
    let Ok(size) = usize::try_from(size) else {
        return Err(PyValueError::new_err(format!(
            "resize_rows takes a number of rows, got {size}"
        )));
    };
    let mut edits = Vec::with_capacity(keys.len());
    for edit in Edit::all(py, store, keys, dim)? {
        let kept: Vec<usize> = (0..edit.rows().min(size)).collect();
        let new = size.saturating_sub(edit.rows());
        let new = edit.joined(vec![edit.taken(&kept)?, edit.filled(new, number)?])?;
        edits.push((edit, Some(new)));
    }
    run(py, store, edits, RowChange::Resize(size))
}

/// Freezes these rows.
pub fn freeze(
    py: Python<'_>,
    store: &Store,
    keys: &[Key],
    rows: &Bound<'_, PyAny>,
    dim: isize,
) -> PyResult<()> {
    let edits = Edit::all(py, store, keys, dim)?;
    let Some(axis) = common_axis(py, store, edits.iter())? else { return Ok(()) };
    let rows = shared(py, store, &edits, rows)?;
    let ids: Vec<ParamId> = edits.iter().map(|edit| edit.id).collect();
    store.lock(py).core.freeze_rows(&ids, axis, &rows).map_err(to_python)
}

/// Lets these frozen rows be updated again, or all.
pub fn unfreeze(
    py: Python<'_>,
    store: &Store,
    keys: &[Key],
    rows: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let ids = keys.iter().map(|key| store.find(py, key)).collect::<PyResult<Vec<ParamId>>>()?;
    let Some(rows) = rows else {
        return store.lock(py).core.unfreeze_rows(&ids, None).map_err(to_python);
    };
    let mut index = None;
    for &id in &ids {
        let frozen =
            store.lock(py).core.frozen_rows(id).map_err(to_python)?.map(|(_, rows)| rows.len());
        if let Some(count) = frozen {
            let label = label(py, store, id);
            let given = RowIndex::read(py, rows, &label)?;
            same(&mut index, given.among(count, &label)?, &label)?;
        }
    }
    let index = index.unwrap_or_default();
    store.lock(py).core.unfreeze_rows(&ids, Some(&index)).map_err(to_python)
}

/// The rows that a step is for, of all parameters that were named.
pub fn chosen(
    py: Python<'_>,
    store: &Store,
    rows: Option<&Bound<'_, PyMapping>>,
    dim: isize,
) -> PyResult<Vec<Chosen>> {
    let (mut all, mut seen) = (Vec::new(), HashSet::new());
    for item in rows.map(|rows| rows.items()).transpose()?.iter().flatten() {
        let (key, rows): (Key, Bound<'_, PyAny>) = item.cast::<PyTuple>()?.extract()?;
        let edit = Edit::new(py, store, &key, dim)?;
        let label = label(py, store, edit.id);
        if !seen.insert(edit.id) {
            return Err(PyValueError::new_err(format!(
                "{label}: step(rows=...) names it twice; give all of its rows at once"
            )));
        }
        let flags = RowIndex::read(py, &rows, &label)?.flags(edit.rows(), &label)?;
        all.push(Chosen { id: edit.id, axis: edit.axis, flags });
    }
    Ok(all)
}

/// The rows that are meant of each of these parameters, which are the same for all.
fn shared<'a, 'py: 'a>(
    py: Python<'py>,
    store: &Store,
    edits: impl IntoIterator<Item = &'a Edit<'py>>,
    rows: &Bound<'py, PyAny>,
) -> PyResult<Vec<usize>> {
    let mut index = None;
    for edit in edits {
        let label = label(py, store, edit.id);
        let given = RowIndex::read(py, rows, &label)?;
        same(&mut index, given.among(edit.rows(), &label)?, &label)?;
    }
    Ok(index.unwrap_or_default())
}

fn same(held: &mut Option<Vec<usize>>, index: Vec<usize>, called: &Label) -> PyResult<()> {
    match held {
        Some(held) if *held != index => Err(PyValueError::new_err(format!(
            "rows are counted from the end, and are others in {called} than in the first; count them from the front"
        ))),
        _ => {
            *held = Some(index);
            Ok(())
        }
    }
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
    let mut changed = Vec::with_capacity(edits.len());
    for edit in edits {
        let rows = edit.shape[edit.axis];
        if let Some(&row) = index.iter().find(|&&row| row >= rows) {
            let parameter = label(py, store, edit.id);
            return Err(to_python(paramstate::Error::NoSuchRow { parameter, row, rows }));
        }
        let new = edit.taken(index)?;
        changed.push((edit, Some(new)));
    }
    run(py, store, changed, RowChange::Gather(index))
}

/// The dimension that is meant in all of them.
fn common_axis<'a, 'py: 'a>(
    py: Python<'_>,
    store: &Store,
    mut edits: impl Iterator<Item = &'a Edit<'py>>,
) -> PyResult<Option<usize>> {
    let Some(axis) = edits.next().map(|edit| edit.axis) else { return Ok(None) };
    match edits.find(|edit| edit.axis != axis) {
        Some(edit) => Err(PyValueError::new_err(format!(
            "dim counts from the end, and for {} leads to another dimension than for the first; change it apart",
            label(py, store, edit.id)
        ))),
        None => Ok(Some(axis)),
    }
}

/// Lets the core change all of them, each with its new array if it gets one.
fn run(
    py: Python<'_>,
    store: &Store,
    edits: Vec<(Edit<'_>, Option<Bound<'_, PyAny>>)>,
    change: RowChange<'_>,
) -> PyResult<()> {
    let Some(axis) = common_axis(py, store, edits.iter().map(|(edit, _)| edit))? else {
        return Ok(());
    };
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
                    (edit.id, NewValue::Replaced(buffer))
                }
                None => (edit.id, NewValue::Stays),
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
