//! `paramstate.Store` as the rest of this crate sees it: the core's store behind a lock.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;
use pyo3::sync::MutexExt;

use crate::loans::Loans;

/// Keeps values, moments and step counts under stable parameter IDs, for NumPy arrays.
///
/// An array is registered once and updated in place from then on; its moments belong to the store. A parameter is named
/// by its name or by its ID. An ID is a positive integer below 2**63: derived from the name, or the caller's own, and
/// never changed afterwards. All methods may be called from several threads.
///
/// >>> import numpy as np
/// >>> from paramstate import Store
/// >>> store = Store()
/// >>> weight = np.ones((2, 3))
/// >>> _ = store.register("weight", weight)
/// >>> store.step({"weight": np.full((2, 3), 0.5)}, lr=0.1)
/// >>> weight
/// array([[0.9, 0.9, 0.9],
///        [0.9, 0.9, 0.9]])
/// >>> store.state("weight")["step"]
/// 1.0
#[pyclass(frozen, weakref, module = "paramstate._core")]
pub struct Store {
    pub loans: Mutex<Loans>,
}

impl Store {
    /// Locks, letting other threads run Python while it waits. The holder must not run Python code.
    pub fn lock(&self, py: Python<'_>) -> MutexGuard<'_, Loans> {
        self.loans.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks; for threads that are detached from the interpreter.
    pub fn lock_detached(&self) -> MutexGuard<'_, Loans> {
        self.loans.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
