//! Where the parameters live: whether each module still holds the tensors, and the child modules, that it held.

use pyo3::ffi;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString, PyWeakref, PyWeakrefMethods};

use crate::state::{entry_at, lookup};

/// A parameter's place: `module._parameters[attribute]` is `tensor`.
#[derive(FromPyObject)]
pub struct Slot {
    #[pyo3(item(0))]
    module: Py<PyWeakref>,
    #[pyo3(item(1))]
    attribute: Py<PyString>,
    #[pyo3(item(2))]
    tensor: Py<PyAny>,
}

/// A module's place: `parent._modules[name]` is `child`.
#[derive(FromPyObject)]
pub struct Link {
    #[pyo3(item(0))]
    parent: Py<PyWeakref>,
    #[pyo3(item(1))]
    name: Py<PyString>,
    #[pyo3(item(2))]
    child: Py<PyWeakref>,
}

/// The watched places.
#[derive(Default)]
pub struct Slots {
    pub slots: Vec<Slot>,
    pub links: Vec<Link>,
}

impl Slots {
    /// Shows the garbage collector what is held.
    pub fn traverse(&self, visit: &PyVisit<'_>) -> Result<(), PyTraverseError> {
        for Slot { module, tensor, .. } in &self.slots {
            visit.call(module)?;
            visit.call(tensor)?;
        }
        for Link { parent, child, .. } in &self.links {
            visit.call(parent)?;
            visit.call(child)?;
        }
        Ok(())
    }

    /// Indices of the slots and of the links whose module is alive but no longer holds what it held.
    pub fn moved(&self, py: Python<'_>) -> PyResult<(Vec<usize>, Vec<usize>)> {
        let (mut slots, mut links) = (Vec::new(), Vec::new());
        let mut parameters = Table::new(intern!(py, "_parameters"));
        for (index, slot) in self.slots.iter().enumerate() {
            if let Found::Other = parameters.find(&slot.module, &slot.attribute, &slot.tensor)? {
                slots.push(index);
            }
        }
        let mut modules = Table::new(intern!(py, "_modules"));
        for (index, link) in self.links.iter().enumerate() {
            let held = match link.child.bind(py).upgrade() {
                Some(child) => modules.find(&link.parent, &link.name, &child.unbind())?,
                None if link.parent.bind(py).upgrade().is_none() => Found::NoModule,
                None => Found::Other,
            };
            if let Found::Other = held {
                links.push(index);
            }
        }
        Ok((slots, links))
    }
}

enum Found {
    NoModule,
    Same,
    Other,
}

/// The table of one module, kept while the same module is asked about: slots of one module are neighbours.
struct Table<'py> {
    name: &'py Bound<'py, PyString>,
    module: *mut ffi::PyObject,
    entries: Option<Bound<'py, PyDict>>,
    /// In the order of `entries`: after the entry that was found last.
    position: ffi::Py_ssize_t,
}

impl<'py> Table<'py> {
    fn new(name: &'py Bound<'py, PyString>) -> Self {
        Self { name, module: std::ptr::null_mut(), entries: None, position: 0 }
    }

    fn find(
        &mut self,
        module: &Py<PyWeakref>,
        key: &Py<PyString>,
        expected: &Py<PyAny>,
    ) -> PyResult<Found> {
        let py = self.name.py();
        if module.as_ptr() != self.module {
            self.entries = match module.bind(py).upgrade() {
                Some(module) => Some(module.getattr(self.name)?.cast_into::<PyDict>()?),
                None => None,
            };
            self.module = module.as_ptr();
            self.position = 0;
        }
        let Some(entries) = &self.entries else { return Ok(Found::NoModule) };
        // Slots stand in the table's own order, so the next entry is nearly always the one; comparing addresses touches
        // neither the name nor the tensor, which are cold.
        if let Some(entry) = entry_at(entries, self.position)
            && entry.key == key.as_ptr()
        {
            self.position = entry.next;
            return Ok(if entry.value == expected.as_ptr() { Found::Same } else { Found::Other });
        }
        let held = lookup(entries, key.bind(py).as_any().as_borrowed())?;
        let is_same = held.is_some_and(|held| held.is(expected));
        Ok(if is_same { Found::Same } else { Found::Other })
    }
}
