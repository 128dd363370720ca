//! What one walk reports. All of it is data; the Python layer words the errors.

use std::sync::atomic::Ordering;

use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::findings::Findings;
use crate::problem::{Place, Problem};

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
    /// (group, index, count) of the updated parameters that were declared with `count_at_bound`: how many of their
    /// values are at a bound.
    pub at_bound: Vec<(usize, usize, usize)>,
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
            at_bound: Vec::new(),
        }
    }

    /// Of a step that was read, and that wrote `updated` and `written_grads`.
    pub fn new(
        findings: &mut Findings<'_>,
        updated: Bound<'_, PyList>,
        written_grads: Bound<'_, PyList>,
        grad_norm: Option<f64>,
    ) -> PyResult<Self> {
        let counted = findings.tasks.iter().zip(&findings.origins).filter_map(|(task, origin)| {
            let count = task.particulars.as_ref()?.at_bound.as_ref()?.load(Ordering::Relaxed);
            Some((origin.place.0, origin.place.1, count))
        });
        let at_bound = if updated.is_empty() { Vec::new() } else { counted.collect() };
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
            at_bound,
        })
    }
}
