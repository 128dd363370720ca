//! What was declared for single parameters, by ID: frozen or not, rows with steps of their own, bounds of each element,
//! norms. It stays through every change of the roster.

use std::collections::HashMap;

use paramstate::{NormLimit, ParamId};
use pyo3::exceptions::PyValueError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;

use crate::sorted_rows::Sorted;

/// A tensor that was declared.
type Held = Option<Py<PyAny>>;

/// What was declared for one parameter.
#[derive(Default)]
pub struct Declared {
    pub frozen: bool,
    /// The dimension of the rows, as it was given: it may be negative.
    pub dim: isize,
    /// How many steps less than the parameter each row has taken.
    pub offsets: Held,
    /// Which rows are frozen.
    pub frozen_rows: Held,
    /// Which rows this one step is for.
    pub named: Held,
    pub min: Held,
    pub max: Held,
    pub count_at_bound: bool,
    pub zero_at_bound: bool,
    pub norm: Option<Norm>,
    /// The rows as they were sorted last.
    pub sorted: Option<Sorted>,
}

/// A norm that is held.
pub struct Norm {
    pub limit: NormLimit,
    /// The dimensions that it is over, as they were given; all of them if there are none.
    pub dims: Option<Vec<isize>>,
}

/// "at_most" or "exactly", the limit, and the dimensions.
pub type NormArgument = (String, f64, Option<Vec<isize>>);

impl Norm {
    pub fn new((kind, limit, dims): NormArgument) -> PyResult<Self> {
        if !(limit >= 0.0 && limit.is_finite()) {
            return Err(PyValueError::new_err(format!(
                "a norm is held to {limit}; pass a finite number that is not negative"
            )));
        }
        let limit = match kind.as_str() {
            "at_most" => NormLimit::AtMost(limit),
            "exactly" => NormLimit::Exactly(limit),
            _ => {
                return Err(PyValueError::new_err(format!(
                    "a norm is held \"at_most\" or \"exactly\", not {kind:?}"
                )));
            }
        };
        Ok(Self { limit, dims })
    }
}

impl Declared {
    fn tensors(&self) -> impl Iterator<Item = &Py<PyAny>> {
        let Self { offsets, frozen_rows, named, min, max, .. } = self;
        [offsets, frozen_rows, named, min, max].into_iter().flatten()
    }

    /// Whether there is nothing in it.
    pub fn is_nothing(&self) -> bool {
        let asks = self.frozen || self.count_at_bound || self.zero_at_bound;
        !asks && self.norm.is_none() && self.tensors().next().is_none()
    }
}

/// All declarations.
#[derive(Default)]
pub struct Declarations {
    all: Vec<Declared>,
    places: HashMap<ParamId, usize>,
}

impl Declarations {
    /// Puts a declaration in the place of what was declared for this ID; returns what that was.
    pub fn replace(&mut self, id: ParamId, declared: Declared) -> Option<Declared> {
        match self.places.get(&id) {
            Some(&place) if declared.is_nothing() => {
                self.places.remove(&id);
                for later in self.places.values_mut().filter(|later| **later > place) {
                    *later -= 1;
                }
                Some(self.all.remove(place))
            }
            Some(&place) => Some(std::mem::replace(&mut self.all[place], declared)),
            None if declared.is_nothing() => None,
            None => {
                self.places.insert(id, self.all.len());
                self.all.push(declared);
                None
            }
        }
    }

    /// The IDs for which something is declared, in the order in which it was.
    pub fn ids(&self) -> Vec<u64> {
        let mut ids: Vec<_> = self.places.iter().collect();
        ids.sort_unstable_by_key(|(_, place)| **place);
        ids.into_iter().map(|(id, _)| id.get()).collect()
    }

    /// Where the declaration for an ID stands, until the next `replace`.
    pub fn place(&self, id: ParamId) -> Option<usize> {
        self.places.get(&id).copied()
    }

    pub fn at(&mut self, place: usize) -> &mut Declared {
        &mut self.all[place]
    }

    pub fn is_frozen(&self, place: usize) -> bool {
        self.all[place].frozen
    }

    /// Forgets the rows that the latest step was for.
    pub fn unname(&mut self) -> Vec<Py<PyAny>> {
        self.all.iter_mut().filter_map(|declared| declared.named.take()).collect()
    }

    /// Shows the garbage collector what is held.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        self.all.iter().flat_map(Declared::tensors).try_for_each(|tensor| visit.call(tensor))
    }
}
