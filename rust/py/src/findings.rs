//! What reading a step's parameters found: the tasks that may run, and the reasons why others may not.

use std::collections::HashSet;

use paramstate::AdamTask;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::outcome::{Place, Problem};
use crate::running::Counter;
use crate::state::Moments;

/// Where a task came from, and the objects whose memory it uses, kept alive until it is done.
pub struct Origin<'py> {
    pub row: usize,
    pub place: Place,
    /// Tells apart two parameters, and one that is listed twice; never followed.
    pub parameter: *const ffi::PyObject,
    pub grad: Bound<'py, PyAny>,
    pub moments: Moments<'py>,
    /// Whether the store was lent other objects before.
    pub is_new: bool,
}

/// All that reading found.
#[derive(Default)]
pub struct Findings<'py> {
    pub tasks: Vec<AdamTask>,
    pub counters: Vec<Counter>,
    pub origins: Vec<Origin<'py>>,
    pub missing: Vec<Place>,
    pub retyped: Vec<Place>,
    pub elsewhere: Vec<Place>,
    pub problems: Vec<Problem>,
}

impl Findings<'_> {
    pub fn with_capacity(parameters: usize) -> Self {
        Self {
            tasks: Vec::with_capacity(parameters),
            counters: Vec::with_capacity(parameters),
            origins: Vec::with_capacity(parameters),
            ..Self::default()
        }
    }

    /// Whether nothing was found that forbids the step, gradients for others to step aside.
    pub fn may_run(&self) -> bool {
        self.missing.is_empty() && self.retyped.is_empty() && self.problems.is_empty()
    }

    /// Takes tasks out that the kernels cannot run after all.
    pub fn leave_to_torch(&mut self, tasks: &HashSet<usize>) {
        if tasks.is_empty() {
            return;
        }
        self.elsewhere.extend(tasks.iter().map(|&task| self.origins[task].place));
        self.elsewhere.sort_unstable();
        let stays = |index: &mut usize| {
            *index += 1;
            !tasks.contains(&(*index - 1))
        };
        let (mut task, mut counter, mut origin) = (0, 0, 0);
        self.tasks.retain(|_| stays(&mut task));
        self.counters.retain(|_| stays(&mut counter));
        self.origins.retain(|_| stays(&mut origin));
    }
}
