//! `optimizer.state` as the walk reads it: in its own order, comparing objects by identity.
//!
//! Looking a parameter up would hash it, and a tensor's hash is a Python function. The mapping is filled in the order of
//! the parameters, so the next entry is nearly always the one that is wanted; where it is not, a look-up answers.

use std::ptr;

use pyo3::prelude::*;
use pyo3::types::{PyDict, PyString};
use pyo3::{Borrowed, ffi};

/// How many entries of other keys are passed over before a look-up is made.
const PATIENCE: usize = 4;

/// A place in the mapping's order.
pub struct Cursor {
    position: ffi::Py_ssize_t,
}

/// One entry, borrowed from the dict.
pub struct Entry {
    pub key: *mut ffi::PyObject,
    pub value: *mut ffi::PyObject,
    /// The position of the entry after this one.
    pub next: ffi::Py_ssize_t,
}

/// The entry at a position of a dict's own order: 0, or an entry's `next`.
pub fn entry_at(dict: &Bound<'_, PyDict>, mut position: ffi::Py_ssize_t) -> Option<Entry> {
    let (mut key, mut value) = (ptr::null_mut(), ptr::null_mut());
    // SAFETY: `dict` is a dict, and any position is valid: CPython checks it against the table it finds on each call.
    let found =
        unsafe { ffi::PyDict_Next(dict.as_ptr(), &mut position, &mut key, &mut value) } != 0;
    found.then_some(Entry { key, value, next: position })
}

/// What `dict` holds under `key`; never `__missing__`, never a KeyError.
pub fn lookup<'py>(
    dict: &Bound<'py, PyDict>,
    key: Borrowed<'_, 'py, PyAny>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    // SAFETY: `dict` is a dict and `key` an object, both alive.
    let value = unsafe { ffi::PyDict_GetItemWithError(dict.as_ptr(), key.as_ptr()) };
    if value.is_null() {
        return PyErr::take(dict.py()).map_or(Ok(None), Err);
    }
    // SAFETY: not NULL, and borrowed from a dict in which nothing has run since.
    Ok(Some(unsafe { Bound::from_borrowed_ptr(dict.py(), value) }))
}

impl Cursor {
    pub const fn new() -> Self {
        Self { position: 0 }
    }

    /// Steps over the entry of a parameter that is not read this time, if it comes next.
    pub fn pass(&mut self, state: &Bound<'_, PyDict>, key: Borrowed<'_, '_, PyAny>) {
        if let Some(entry) = entry_at(state, self.position)
            && entry.key == key.as_ptr()
        {
            self.position = entry.next;
        }
    }

    /// What `state` holds for the object `key`.
    pub fn find<'py>(
        &mut self,
        state: &Bound<'py, PyDict>,
        key: Borrowed<'_, 'py, PyAny>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let mut position = self.position;
        for _ in 0..PATIENCE {
            let Some(entry) = entry_at(state, position) else { break };
            position = entry.next;
            if entry.key == key.as_ptr() {
                self.position = position;
                // SAFETY: a value that `PyDict_Next` just lent; nothing has run since.
                return Ok(Some(unsafe { Bound::from_borrowed_ptr(state.py(), entry.value) }));
            }
        }
        lookup(state, key)
    }
}

/// The names of the state tensors, in the order of `Moments`: torch's, and what a value's rounding left over.
pub const NAMES: [&str; 5] = ["step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "compensation"];

/// The names as Python strings: the very objects that a literal in Python code is.
pub struct Names([Py<PyString>; 5]);

/// What one parameter's inner dict holds under torch's names.
pub type Moments<'py> = [Option<Bound<'py, PyAny>>; 5];

impl Names {
    pub fn new(py: Python<'_>) -> Self {
        Self(NAMES.map(|name| PyString::intern(py, name).unbind()))
    }

    /// Reads the entries by identity of their keys, and by look-up where a key is an equal string but another object (as
    /// after unpickling).
    pub fn read<'py>(&self, inner: &Bound<'py, PyDict>) -> PyResult<Moments<'py>> {
        let mut moments = Moments::default();
        let (mut position, mut strangers) = (0, false);
        while let Some(entry) = entry_at(inner, position) {
            position = entry.next;
            match self.0.iter().position(|name| name.as_ptr() == entry.key) {
                Some(index) => {
                    // SAFETY: a value that `PyDict_Next` just lent; nothing has run since.
                    let value = unsafe { Bound::from_borrowed_ptr(inner.py(), entry.value) };
                    moments[index] = Some(value);
                }
                None => strangers = true,
            }
        }
        if strangers {
            self.look_up_the_rest(inner, &mut moments)?;
        }
        Ok(moments)
    }

    #[cold]
    fn look_up_the_rest<'py>(
        &self,
        inner: &Bound<'py, PyDict>,
        moments: &mut Moments<'py>,
    ) -> PyResult<()> {
        for (name, moment) in self.0.iter().zip(moments) {
            if moment.is_none() {
                *moment = lookup(inner, name.bind_borrowed(inner.py()).as_any().as_borrowed())?;
            }
        }
        Ok(())
    }
}
