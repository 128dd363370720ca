//! Finding a parameter by its name or its ID, and what an error says where there is none.

use paramstate::{Error, ParamId};
use pyo3::exceptions::PyKeyError;
use pyo3::prelude::*;

use crate::error::to_python;
use crate::loans::Loans;
use crate::store::Store;

/// A parameter, by its name or by its ID.
#[derive(FromPyObject)]
pub enum Key {
    #[pyo3(annotation = "str")]
    Name(String),
    #[pyo3(annotation = "int")]
    Id(u64),
}

impl Store {
    /// The ID of a parameter that exists.
    pub fn find(&self, py: Python<'_>, key: &Key) -> PyResult<ParamId> {
        let names: Vec<String> = {
            let loans = self.lock(py);
            if let Some(id) = known(&loans, key) {
                return Ok(id);
            }
            all_names(&loans).into_iter().map(|(name, _)| name).collect()
        };
        Err(match key {
            Key::Id(id) => to_python(match ParamId::new(*id) {
                Ok(id) => Error::UnknownId { id },
                Err(error) => error,
            }),
            Key::Name(name) => unknown_name(py, name, names)?,
        })
    }
}

/// The ID, if the store knows the parameter.
pub fn known(loans: &Loans, key: &Key) -> Option<ParamId> {
    match key {
        Key::Id(id) => ParamId::new(*id).ok().filter(|&id| loans.core.contains(id)),
        Key::Name(name) => loans.core.id(name),
    }
}

/// A KeyError that lists the names nearest to the one that was asked for.
fn unknown_name(py: Python<'_>, name: &str, names: Vec<String>) -> PyResult<PyErr> {
    let difflib = py.import("difflib")?;
    let nearest: Vec<String> =
        difflib.call_method1("get_close_matches", (name, names))?.extract()?;
    if nearest.is_empty() {
        return Ok(to_python(Error::UnknownName { name: name.to_owned() }));
    }
    let nearest = nearest.join("', '");
    Ok(PyKeyError::new_err(format!("no parameter is called '{name}'; the nearest: '{nearest}'")))
}

/// Every name with its ID, parameters in the order of their registration.
pub fn all_names(loans: &Loans) -> Vec<(String, ParamId)> {
    let names_of = |id: ParamId| {
        let names = loans.core.names(id).unwrap_or_default();
        names.iter().map(move |name| (name.clone(), id))
    };
    loans.core.ids().flat_map(names_of).collect()
}
