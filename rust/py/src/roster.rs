//! The enrolled parameters: who they are, and what the store was lent for them.

use std::collections::HashMap;
use std::ops::Range;
use std::ptr;

use paramstate::{Bounds, DType, Error, ParamId};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::declared::Declarations;
use crate::lender::Loan;
use crate::loans::Loans;
use crate::problem::Place;
use crate::state::NAMES;
use crate::store::Store;

/// Under which keys the store is lent the tensors of a `Row`.
pub const KEYS: [&str; 6] = ["value", NAMES[0], NAMES[1], NAMES[2], NAMES[3], NAMES[4]];

/// One parameter.
pub struct Row {
    pub parameter: Py<PyAny>,
    pub id: ParamId,
    pub bounds: Bounds,
    /// Where something was declared for it: the place among the declarations.
    pub declared: Option<usize>,
    /// The dtype of the first moment, where one is declared.
    pub stored_as: Option<DType>,
    /// The value's dtype at its last step.
    pub dtype: Option<DType>,
    /// The addresses of the objects that the store was lent under `KEYS`; 0 for none. They are compared, never
    /// followed: as long as the store's revision is the remembered one, the store keeps these objects alive, so an
    /// address here is the address of that object and of no later one.
    pub lent: [usize; 6],
}

impl Row {
    fn new(parameter: Py<PyAny>, id: ParamId) -> Self {
        let (bounds, stored_as) = (Bounds::default(), None);
        Self { parameter, id, bounds, declared: None, stored_as, dtype: None, lent: [0; 6] }
    }
}

/// All groups, one after another.
#[derive(Default)]
pub struct Roster {
    pub rows: Vec<Row>,
    pub groups: Vec<Range<usize>>,
    /// All parameters in one list: what a step that leaves none out has updated.
    pub all: Option<Py<PyList>>,
    revision: Option<u64>,
}

impl Roster {
    pub fn new(params: &[Bound<'_, PyList>], ids: &[Vec<u64>]) -> PyResult<Self> {
        let mut roster = Self::default();
        if params.len() != ids.len() {
            return Err(PyValueError::new_err(format!(
                "{} lists of parameters came with {} lists of IDs",
                params.len(),
                ids.len()
            )));
        }
        for (group, (params, ids)) in params.iter().zip(ids).enumerate() {
            if params.len() != ids.len() {
                return Err(PyValueError::new_err(format!(
                    "group {group} has {} parameters and {} IDs",
                    params.len(),
                    ids.len()
                )));
            }
            let start = roster.rows.len();
            for (parameter, &id) in params.iter().zip(ids) {
                let id = ParamId::new(id).map_err(crate::error::to_python)?;
                let parameter = parameter.unbind();
                roster.rows.push(Row::new(parameter, id));
            }
            roster.groups.push(start..roster.rows.len());
        }
        if let Some(py) = params.first().map(Bound::py) {
            let all = roster.rows.iter().map(|row| &row.parameter);
            roster.all = Some(PyList::new(py, all)?.unbind());
        }
        Ok(roster)
    }

    /// Sets in what dtype moments are kept, for each parameter in turn; `None` leaves that open.
    pub fn store_as(&mut self, dtypes: &[Option<String>]) -> PyResult<()> {
        if dtypes.len() != self.rows.len() {
            return Err(PyValueError::new_err(format!(
                "{} parameters came with {} dtypes of moments",
                self.rows.len(),
                dtypes.len()
            )));
        }
        for (row, name) in self.rows.iter_mut().zip(dtypes) {
            row.stored_as = match name.as_deref() {
                None => None,
                Some("float64") => Some(DType::F64),
                Some("float32") => Some(DType::F32),
                Some("bfloat16") => Some(DType::Bf16),
                Some("float16") => Some(DType::F16),
                Some("8bit") => Some(DType::E4M3),
                Some(other) => {
                    return Err(PyValueError::new_err(format!(
                        "moments are not kept as {other:?}"
                    )));
                }
            };
        }
        Ok(())
    }

    /// Looks up what is declared for each parameter.
    pub fn link(&mut self, declarations: &Declarations) {
        for row in &mut self.rows {
            row.declared = declarations.place(row.id);
        }
    }

    /// The first place of a parameter.
    pub fn place(&self, id: ParamId) -> Option<Place> {
        let row = self.rows.iter().position(|row| row.id == id)?;
        let group = self.groups.iter().position(|group| group.contains(&row))?;
        Some((group, row - self.groups[group].start))
    }

    /// Whether `params` holds the enrolled objects, in the enrolled order.
    pub fn matches(&self, params: &[Bound<'_, PyList>]) -> bool {
        params.len() == self.groups.len()
            && params.iter().zip(&self.groups).all(|(params, group)| {
                params.len() == group.len()
                    && self.rows[group.clone()]
                        .iter()
                        .zip(params.iter())
                        .all(|(row, parameter)| ptr::eq(row.parameter.as_ptr(), parameter.as_ptr()))
            })
    }

    /// Takes over what the former roster remembered of the same parameters.
    pub fn succeed(&mut self, former: &Self) {
        let dtypes: HashMap<ParamId, Option<DType>> =
            former.rows.iter().map(|row| (row.id, row.dtype)).collect();
        for row in &mut self.rows {
            row.dtype = dtypes.get(&row.id).copied().flatten();
        }
    }

    /// Forgets what was remembered about the store, if anybody else has changed it since.
    pub fn renew(&mut self, py: Python<'_>, store: &Store) {
        let inner = store.lock(py);
        if self.revision == Some(inner.revision()) {
            return;
        }
        self.revision = Some(inner.revision());
        for row in &mut self.rows {
            row.lent = [0; 6];
            row.bounds = inner.core.bounds(row.id).unwrap_or_default();
        }
    }

    /// Lends the store the tensors of one row under `KEYS`. What was lent before is handed back in `returned`, to be
    /// dropped when the store is unlocked: dropping a Python object may run code that uses the store.
    pub fn lend(
        &mut self,
        loans: &mut Loans,
        index: usize,
        objects: [Option<Py<PyAny>>; 6],
        returned: &mut Vec<Loan>,
    ) -> Result<(), Error> {
        let row = &mut self.rows[index];
        for ((object, key), lent) in objects.into_iter().zip(KEYS).zip(&mut row.lent) {
            let address = object.as_ref().map_or(0, |object| object.as_ptr().addr());
            if address != *lent {
                returned.extend(loans.exchange(row.id, key, object.map(Loan::tensor))?);
                *lent = address;
            }
        }
        self.revision = Some(loans.revise());
        Ok(())
    }
}
