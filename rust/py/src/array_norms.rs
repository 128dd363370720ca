//! Declared norms of NumPy arrays.

pub use paramstate::NormLimit;
use paramstate::{ParamId, Reach};
use pyo3::prelude::*;

use crate::array;
use crate::arrays::{axis, value};
use crate::error::to_python;
use crate::store::Store;

/// One dimension or several.
#[derive(FromPyObject)]
pub enum Dims {
    #[pyo3(annotation = "int")]
    One(isize),
    #[pyo3(annotation = "sequence of int")]
    Several(Vec<isize>),
}

/// "at_most" or "exactly", the limit, and the dimensions; None for one norm of the whole value.
pub type Declared = (&'static str, f64, Option<Vec<usize>>);

/// Declares a norm, or none, and scales the array.
pub fn set(
    py: Python<'_>,
    store: &Store,
    id: ParamId,
    limit: Option<NormLimit>,
    dims: Option<Dims>,
) -> PyResult<()> {
    let shape = array::shape(value(py, store, id)?.as_any());
    let dims = match dims {
        Some(Dims::One(dim)) => vec![dim],
        Some(Dims::Several(dims)) => dims,
        None => Vec::new(),
    };
    let over = dims.into_iter().map(|dim| axis(py, store, id, &shape, dim));
    let over = over.collect::<PyResult<Vec<usize>>>()?;
    py.detach(|| {
        let mut loans = store.lock_detached();
        loans.revise();
        loans.core.set_norm(id, limit, &over)?;
        loans.core.hold(id, Reach::Unfrozen)
    })
    .map_err(to_python)
}

/// What is declared.
pub fn get(py: Python<'_>, store: &Store, id: ParamId) -> PyResult<Option<Declared>> {
    let loans = store.lock(py);
    let norm = loans.core.norm(id).map_err(to_python)?;
    Ok(norm.map(|(limit, over)| {
        let over = (!over.is_empty()).then(|| over.to_vec());
        match limit {
            NormLimit::AtMost(limit) => ("at_most", limit, over),
            NormLimit::Exactly(limit) => ("exactly", limit, over),
        }
    }))
}
