//! What reading a step's parameters found: the tasks that may run, and the reasons why others may not.

use std::collections::HashSet;

use paramstate::AdamTask;
use pyo3::ffi;
use pyo3::prelude::*;

use crate::particular::{Aging, Borrowing};
use crate::problem::{Place, Problem};
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
    /// What moments in 8 bits consist of, kept alive until the step is done.
    pub codes: Vec<Bound<'py, PyAny>>,
    pub missing: Vec<Place>,
    pub retyped: Vec<Place>,
    pub elsewhere: Vec<Place>,
    pub problems: Vec<Problem>,
    /// Of the rows that grow no older in this step.
    pub agings: Vec<Aging>,
    /// What was declared lies here, and belongs to the parameter at this place.
    pub borrowings: Vec<(Place, Borrowing)>,
}

/// The memory of the long lists, kept from one step to the next.
///
/// Were they allocated on each step, the allocator would take the occasion to sort all that a backward pass has freed,
/// which costs as much as reading the parameters.
#[derive(Default)]
pub struct Room {
    tasks: Vec<AdamTask>,
    counters: Vec<Counter>,
    origins: Vec<Seat>,
}

/// Of an origin's size: what an empty list of them is kept as, free of its lifetime.
type Seat = [usize; size_of::<Origin<'static>>() / size_of::<usize>()];

/// An empty list of another type in the same memory: the standard library collects in place where sizes are equal.
fn emptied<A, B>(mut list: Vec<A>) -> Vec<B> {
    list.clear();
    list.into_iter().map(|_| unreachable!("the list is empty")).collect()
}

impl Findings<'_> {
    /// Findings of nothing yet, in kept memory.
    pub fn within(room: &mut Room) -> Self {
        let Room { tasks, counters, origins } = std::mem::take(room);
        Self { tasks, counters, origins: emptied(origins), ..Self::default() }
    }

    /// Lets go of everything, and keeps the memory.
    pub fn vacate(mut self, room: &mut Room) {
        self.tasks.clear();
        self.counters.clear();
        *room = Room { tasks: self.tasks, counters: self.counters, origins: emptied(self.origins) };
    }

    /// Keeps an aging; returns its number.
    pub fn add_aging(&mut self, aging: Aging) -> usize {
        self.agings.push(aging);
        self.agings.len() - 1
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
