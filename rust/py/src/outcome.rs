//! What one walk reports. All of it is data; the Python layer words the errors.

use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::findings::Findings;

/// A parameter's place: the group, and the index in that group.
pub type Place = (usize, usize);

/// Why nothing was written, for one parameter.
#[pyclass(frozen, get_all, module = "paramstate._core")]
pub struct Problem {
    /// "state_shape", "grad_shape", "expanded", "overlap" or "state_overlap".
    pub kind: &'static str,
    /// The parameter's group.
    pub group: usize,
    /// The parameter's index in its group.
    pub index: usize,
    /// The tensor that it is about: "value", "grad", or a name of a state tensor.
    pub key: &'static str,
    /// The parameter's shape.
    pub expected: Vec<i64>,
    /// The shape of the tensor named by `key`.
    pub got: Vec<i64>,
    /// The parameter whose memory is shared, for the kinds that end in "overlap".
    pub other: Option<Place>,
}

#[pymethods]
impl Problem {
    fn __repr__(&self) -> String {
        let Self { kind, group, index, key, expected, got, other } = self;
        format!(
            "Problem(kind='{kind}', group={group}, index={index}, key='{key}', expected={expected:?}, got={got:?}, other={other:?})"
        )
    }
}

/// What one step found and did.
#[pyclass(frozen, get_all, module = "paramstate._core")]
pub struct Outcome {
    /// A list of parameters is not the enrolled one: nothing was written.
    pub stale: bool,
    /// (group, index) of parameters that have a gradient but lack state: nothing was written.
    pub missing: Vec<Place>,
    /// (group, index) of parameters whose dtype has changed since their last step, to a wider one than their moments':
    /// nothing was written.
    pub retyped: Vec<Place>,
    /// What forbids the step: nothing was written.
    pub problems: Vec<Py<Problem>>,
    /// (group, index) of parameters that have a gradient but that the host kernels do not take.
    pub elsewhere: Vec<Place>,
    /// The parameters that were written.
    pub updated: Py<PyList>,
    /// The gradients that were written: those of `updated` where `grad_scale` was given.
    pub written_grads: Py<PyList>,
    /// The global norm of the unscaled gradients, where `max_grad_norm` was given.
    pub grad_norm: Option<f64>,
}

impl Outcome {
    /// Of a step that read nothing.
    pub fn stale(py: Python<'_>) -> Self {
        let none = || PyList::empty(py).unbind();
        Self {
            stale: true,
            missing: Vec::new(),
            retyped: Vec::new(),
            problems: Vec::new(),
            elsewhere: Vec::new(),
            updated: none(),
            written_grads: none(),
            grad_norm: None,
        }
    }

    /// Of a step that was read, and that wrote `updated` and `written_grads`.
    pub fn new(
        findings: &mut Findings<'_>,
        updated: Bound<'_, PyList>,
        written_grads: Bound<'_, PyList>,
        grad_norm: Option<f64>,
    ) -> PyResult<Self> {
        let py = updated.py();
        let problems = findings.problems.drain(..).map(|problem| Py::new(py, problem));
        Ok(Self {
            stale: false,
            missing: std::mem::take(&mut findings.missing),
            retyped: std::mem::take(&mut findings.retyped),
            problems: problems.collect::<PyResult<_>>()?,
            elsewhere: std::mem::take(&mut findings.elsewhere),
            updated: updated.unbind(),
            written_grads: written_grads.unbind(),
            grad_norm,
        })
    }
}
