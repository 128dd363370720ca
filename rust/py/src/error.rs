//! The core's errors as Python exceptions: the message is the core's, the class is the one a Python user expects.

use paramstate::Error;
use pyo3::PyErr;
use pyo3::exceptions::{PyKeyError, PyRuntimeError, PyTypeError, PyValueError};

/// The exception for an error of the core.
pub fn to_python(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::UnknownId { .. } | Error::UnknownName { .. } | Error::MissingBuffer { .. } => {
            PyKeyError::new_err(message)
        }
        Error::DTypeMismatch { .. } | Error::NotOwned { .. } => PyTypeError::new_err(message),
        Error::LenderGone { .. } => PyRuntimeError::new_err(message),
        _ => PyValueError::new_err(message),
    }
}
