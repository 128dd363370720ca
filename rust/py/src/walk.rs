//! One step over a torch optimizer's tensors: read all, check, run.
//!
//! Everything is read anew on each step, for any client of the optimizer may have changed anything since the last one. If
//! anything is wrong, nothing is written. While the kernels run the interpreter is free for other threads; every object
//! whose memory is used is held until then.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, TryLockError};

use paramstate::{Adam, Decay, Direction, SecondMoment};
use pyo3::exceptions::PyRuntimeError;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::findings::{Findings, Room};
use crate::foresight::Foresight;
use crate::memory::Memory;
use crate::outcome::Outcome;
use crate::reading::{Group, Reader};
use crate::roster::Roster;
use crate::running::{Request, Run};
use crate::slots::{Link, Slot, Slots};
use crate::state::{Cursor, Names};
use crate::store::Store;
use crate::tensor::Torch;
use crate::{lending, scaling};

/// lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize.
type Settings = (f64, f64, f64, f64, f64, bool, bool, bool);

/// One step over a torch optimizer's tensors: read all, check, run.
#[pyclass(frozen, module = "paramstate._core")]
pub struct Walk {
    store: Py<Store>,
    names: Names,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    roster: Roster,
    memory: Memory,
    foresight: Foresight,
    room: Room,
    slots: Slots,
}

#[pymethods]
impl Walk {
    #[new]
    fn new(py: Python<'_>, store: Py<Store>) -> Self {
        Self { store, names: Names::new(py), inner: Mutex::default() }
    }

    /// Sets the roster: for each group its parameters and their IDs.
    fn enroll(
        &self,
        py: Python<'_>,
        params: Vec<Bound<'_, PyList>>,
        ids: Vec<Vec<u64>>,
    ) -> PyResult<()> {
        let mut roster = Roster::new(&params, &ids)?;
        let former = {
            let mut inner = self.enter()?;
            roster.succeed(&inner.roster);
            roster.renew(py, self.store.get());
            inner.memory = Memory::default();
            std::mem::replace(&mut inner.roster, roster)
        };
        drop(former);
        Ok(())
    }

    /// Steps every parameter that has a gradient.
    #[pyo3(signature = (params, state, settings, *, threads, max_grad_norm, grad_scale, elsewhere_squares))]
    #[expect(clippy::too_many_arguments, reason = "they are the keywords of the Python method")]
    fn step(
        &self,
        py: Python<'_>,
        params: Vec<Bound<'_, PyList>>,
        state: Bound<'_, PyDict>,
        settings: Vec<Settings>,
        threads: NonZeroUsize,
        max_grad_norm: Option<f64>,
        grad_scale: Option<f64>,
        elsewhere_squares: Option<f64>,
    ) -> PyResult<Outcome> {
        let request = Request { threads, max_grad_norm, grad_scale, elsewhere_squares };
        let groups: Vec<Group> = settings.into_iter().enumerate().map(Group::from).collect();
        let mut inner = self.enter()?;
        if !inner.roster.matches(&params) || groups.len() != params.len() {
            return Ok(Outcome::stale(py));
        }
        let mut findings = self.read(&mut inner, state, &groups)?;
        let order = inner.memory.judge(&mut findings);
        let unscale = match grad_scale {
            Some(_) => scaling::of_gradients(&mut findings),
            None => Vec::new(),
        };
        let passes_elsewhere = findings.elsewhere.is_empty() || elsewhere_squares.is_some();
        if !(findings.may_run() && passes_elsewhere) {
            let none = || PyList::empty(py);
            let outcome = Outcome::new(&mut findings, none(), none(), None);
            findings.vacate(&mut inner.room);
            return outcome;
        }
        let Findings { tasks, counters, .. } = &mut findings;
        let run = Run { tasks, counters, groups: &groups, unscale, order, request };
        // SAFETY: everything was just read, `findings` holds the objects, and `judge` gave the order. Another thread that
        // used these tensors at the same time would race with any operation of torch, too.
        let grad_norm = py.detach(|| unsafe { run.run() });
        inner.conclude(py, self.store.get(), findings, grad_scale.is_some(), grad_norm)
    }

    /// Lends the store what `state` holds now for every enrolled parameter, whatever its keys; returns whether anything
    /// changed.
    fn refresh(&self, py: Python<'_>, state: &Bound<'_, PyDict>) -> PyResult<bool> {
        let mut inner = self.enter()?;
        lending::refresh(py, &mut inner.roster, self.store.get(), state)
    }

    /// Sets the places that `moved` looks at: (module, attribute, tensor), and (parent, name, child). Modules by weak
    /// reference.
    fn watch(&self, slots: Vec<Slot>, links: Vec<Link>) -> PyResult<()> {
        let former = std::mem::replace(&mut self.enter()?.slots, Slots { slots, links });
        drop(former);
        Ok(())
    }

    /// The indices of the watched slots, and of the links, that no longer hold what they held.
    fn moved(&self, py: Python<'_>) -> PyResult<(Vec<usize>, Vec<usize>)> {
        self.enter()?.slots.moved(py)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        visit.call(&self.store)?;
        // Whoever holds the lock is using these objects: they are not garbage.
        let Ok(inner) = self.inner.try_lock() else { return Ok(()) };
        inner.roster.rows.iter().try_for_each(|row| visit.call(&row.parameter))?;
        inner.roster.all.iter().try_for_each(|all| visit.call(all))?;
        inner.slots.traverse(&visit)
    }

    fn __clear__(&self) {
        let inner = self.inner.try_lock().map(|mut inner| std::mem::take(&mut *inner));
        drop(inner);
    }
}

impl Walk {
    /// Enters; an error while another thread is in here. What a panic left behind is used on: it is read anew.
    fn enter(&self) -> PyResult<MutexGuard<'_, Inner>> {
        match self.inner.try_lock() {
            Ok(inner) => Ok(inner),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(PyRuntimeError::new_err(
                "this optimizer is being stepped by another thread; wait for that step to end",
            )),
        }
    }

    fn read<'py>(
        &self,
        inner: &mut Inner,
        state: Bound<'py, PyDict>,
        groups: &[Group],
    ) -> PyResult<Findings<'py>> {
        let py = state.py();
        let Inner { roster, memory, foresight, room, .. } = inner;
        roster.renew(py, self.store.get());
        memory.begin();
        foresight.resize(roster.rows.len());
        let mut findings = Findings::within(room);
        let (torch, names, cursor) = (Torch::get(py)?, &self.names, Cursor::new());
        let mut reader = Reader { torch, names, state, cursor, memory, foresight };
        for (group, rows) in groups.iter().zip(&roster.groups) {
            for (index, row) in rows.clone().enumerate() {
                let place = (group.index, index);
                reader.foresight.look_ahead(&roster.rows, row);
                reader.read((place, row, &roster.rows[row]), group, &mut findings)?;
            }
        }
        Ok(findings)
    }
}

impl Inner {
    /// After the step: what was written, and what the store is lent from now on.
    fn conclude(
        &mut self,
        py: Python<'_>,
        store: &Store,
        mut findings: Findings<'_>,
        wrote_grads: bool,
        grad_norm: Option<f64>,
    ) -> PyResult<Outcome> {
        for (origin, task) in findings.origins.iter().zip(&findings.tasks) {
            self.roster.rows[origin.row].dtype = Some(task.value.dtype);
        }
        let rows = &self.roster.rows;
        let written = findings.origins.iter();
        let updated = match &self.roster.all {
            Some(all) if written.len() == rows.len() => all.bind(py).clone(),
            _ => PyList::new(py, written.clone().map(|origin| &rows[origin.row].parameter))?,
        };
        let grads: Vec<_> =
            if wrote_grads { written.map(|origin| &origin.grad).collect() } else { Vec::new() };
        let written_grads = PyList::new(py, grads)?;
        lending::lend(py, &mut self.roster, store, &mut findings.origins)?;
        let outcome = Outcome::new(&mut findings, updated, written_grads, grad_norm);
        findings.vacate(&mut self.room);
        outcome
    }
}

impl From<(usize, Settings)> for Group {
    fn from((index, settings): (usize, Settings)) -> Self {
        let (lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize) = settings;
        let decay = if decoupled { Decay::Decoupled } else { Decay::L2 };
        let direction = if maximize { Direction::Maximize } else { Direction::Minimize };
        let second_moment = if amsgrad { SecondMoment::Maximum } else { SecondMoment::Running };
        let adam = Adam { lr, beta1, beta2, eps, weight_decay, decay, direction, second_moment };
        Self { index, adam, scalars: adam.scalars(1.0, 1.0) }
    }
}
