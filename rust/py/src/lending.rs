//! Keeping the store's loans equal to what `optimizer.state` holds.

use paramstate::Error;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};

use crate::error::to_python;
use crate::findings::Origin;
use crate::lender::Loan;
use crate::roster::{KEYS, Roster};
use crate::state::lookup;
use crate::store::Store;

/// After a step: lends the tensors of those parameters whose tensors are other objects than before.
pub fn lend(
    py: Python<'_>,
    roster: &mut Roster,
    store: &Store,
    origins: &mut [Origin<'_>],
) -> PyResult<()> {
    let changed: Vec<_> = origins
        .iter_mut()
        .filter(|origin| origin.is_new)
        .map(|origin| {
            let value = roster.rows[origin.row].parameter.clone_ref(py);
            let [step, m, v, max, compensation] =
                std::mem::take(&mut origin.moments).map(|m| m.map(Bound::unbind));
            (origin.row, [Some(value), step, m, v, max, compensation])
        })
        .collect();
    if changed.is_empty() {
        return Ok(());
    }
    let mut returned: Vec<Loan> = Vec::new();
    let result = {
        let mut loans = store.lock(py);
        changed
            .into_iter()
            .try_for_each(|(row, objects)| roster.lend(&mut loans, row, objects, &mut returned))
    };
    drop(returned);
    result.map_err(to_python)
}

/// Lends everything that `state` holds for the enrolled parameters, and takes back what it no longer holds; returns
/// whether anything changed.
pub fn refresh(
    py: Python<'_>,
    roster: &mut Roster,
    store: &Store,
    state: &Bound<'_, PyDict>,
) -> PyResult<bool> {
    let torch = crate::tensor::Torch::get(py)?;
    let mut wanted = Vec::with_capacity(roster.rows.len());
    for row in &roster.rows {
        let parameter = row.parameter.bind(py);
        let mut tensors = vec![(KEYS[0].to_owned(), row.parameter.clone_ref(py))];
        let inner = lookup(state, parameter.as_borrowed())?;
        if let Some(inner) = inner.as_ref().and_then(|inner| inner.cast::<PyDict>().ok()) {
            for (key, tensor) in inner.iter() {
                if let Ok(key) = key.cast::<PyString>()
                    && torch.is_tensor(&tensor)?
                {
                    tensors.push((key.to_string(), tensor.unbind()));
                }
            }
        }
        wanted.push((row.id, tensors));
    }
    let mut returned: Vec<Loan> = Vec::new();
    let mut surplus: Vec<Py<PyAny>> = Vec::new();
    let result: Result<bool, Error> = (|| {
        let mut loans = store.lock(py);
        let mut changed = false;
        for (id, tensors) in wanted {
            for key in loans.lent_keys(id) {
                if !tensors.iter().any(|(wanted, _)| *wanted == key) {
                    returned.extend(loans.exchange(id, &key, None)?);
                    changed = true;
                }
            }
            for (key, tensor) in tensors {
                if loans.loan(id, &key).is_some_and(|loan| loan.object().is(&tensor)) {
                    surplus.push(tensor);
                } else {
                    returned.extend(loans.exchange(id, &key, Some(Loan::tensor(tensor)))?);
                    changed = true;
                }
            }
        }
        if changed {
            loans.revise();
        }
        Ok(changed)
    })();
    drop((returned, surplus));
    result.map_err(to_python)
}
