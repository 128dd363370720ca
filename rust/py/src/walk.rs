//! One step over a torch optimizer's tensors: read all, check, run.
//!
//! Everything is read anew on each step, for any client of the optimizer may have changed anything since the last one. If
//! anything is wrong, nothing is written. While the kernels run the interpreter is free for other threads; every object
//! whose memory is used is held until then.

use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, TryLockError};

use paramstate::ParamId;
use pyo3::exceptions::{PyKeyError, PyRuntimeError};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::declared::{Declarations, Declared, Norm, NormArgument};
use crate::error::to_python;
use crate::findings::{Findings, Room};
use crate::foresight::Foresight;
use crate::group::{Group, Settings};
use crate::memory::Memory;
use crate::outcome::Outcome;
use crate::precision::Requested;
use crate::problem::Problem;
use crate::reading::Reader;
use crate::roster::Roster;
use crate::running::{Request, Run};
use crate::slots::{Link, Slot, Slots};
use crate::state::{Cursor, Names};
use crate::store::Store;
use crate::tensor::Torch;
use crate::{lending, scaling};

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
    declarations: Declarations,
    /// Whether the roster knows of the latest declarations.
    linked: bool,
}

#[pymethods]
impl Walk {
    #[new]
    fn new(py: Python<'_>, store: Py<Store>) -> Self {
        Self { store, names: Names::new(py), inner: Mutex::default() }
    }

    /// Sets the roster: for each group its parameters and their IDs; and, for all of them in turn, in what dtype moments
    /// are kept ("float32", "bfloat16", "8bit", ...), `None` where that is left open.
    #[pyo3(signature = (params, ids, stored_as=None))]
    fn enroll(
        &self,
        py: Python<'_>,
        params: Vec<Bound<'_, PyList>>,
        ids: Vec<Vec<u64>>,
        stored_as: Option<Vec<Option<String>>>,
    ) -> PyResult<()> {
        let mut roster = Roster::new(&params, &ids)?;
        if let Some(stored_as) = stored_as {
            roster.store_as(&stored_as)?;
        }
        let former = {
            let mut inner = self.enter()?;
            roster.succeed(&inner.roster);
            roster.renew(py, self.store.get());
            inner.memory = Memory::default();
            inner.linked = false;
            std::mem::replace(&mut inner.roster, roster)
        };
        drop(former);
        Ok(())
    }

    /// Declares for one ID, in the place of all that was declared for it; without arguments, nothing. It stays when the
    /// roster changes.
    ///
    /// Args:
    ///     id: the parameter's.
    ///     frozen: as if the parameter had no gradient.
    ///     dim: the dimension of the rows.
    ///     offsets: how many steps less than the parameter each row has taken: int64, one-dimensional, dense. Rows that a
    ///         step skips have theirs counted up in place, and the tensor's version is not.
    ///     frozen_rows: where it is true, a row keeps its very bits; bool, one-dimensional, dense.
    ///     min, max: bounds of each element, of any shape that broadcasts; in the place of the store's on that side.
    ///     count_at_bound: whether `Outcome.at_bound` tells how many values are at a bound.
    ///     zero_at_bound: whether exp_avg is zeroed where a bound holds a value back.
    ///     norm: ("at_most" or "exactly", the limit, the dimensions that the norm is over; None: all).
    ///
    /// Raises ValueError for a norm that cannot be held. The tensors are read at each step: see `Problem`.
    #[pyo3(signature = (id, *, frozen=false, dim=0, offsets=None, frozen_rows=None, min=None, max=None, count_at_bound=false, zero_at_bound=false, norm=None),
        text_signature = "($self, id, *, frozen=False, dim=0, offsets=None, frozen_rows=None, min=None, max=None, count_at_bound=False, zero_at_bound=False, norm=None)")]
    #[expect(clippy::too_many_arguments, reason = "they are the keywords of the Python method")]
    fn declare(
        &self,
        id: u64,
        frozen: bool,
        dim: isize,
        offsets: Option<Py<PyAny>>,
        frozen_rows: Option<Py<PyAny>>,
        min: Option<Py<PyAny>>,
        max: Option<Py<PyAny>>,
        count_at_bound: bool,
        zero_at_bound: bool,
        norm: Option<NormArgument>,
    ) -> PyResult<()> {
        let id = ParamId::new(id).map_err(to_python)?;
        let norm = norm.map(Norm::new).transpose()?;
        let (named, sorted) = (None, None);
        let declared = Declared {
            frozen,
            dim,
            offsets,
            frozen_rows,
            named,
            min,
            max,
            count_at_bound,
            zero_at_bound,
            norm,
            sorted,
        };
        let former = {
            let mut inner = self.enter()?;
            inner.linked = false;
            inner.declarations.replace(id, declared)
        };
        drop(former);
        Ok(())
    }

    /// The IDs for which anything is declared.
    fn declared(&self) -> PyResult<Vec<u64>> {
        Ok(self.enter()?.declarations.ids())
    }

    /// Steps every parameter that has a gradient. `rows` holds IDs, each with a mask of the rows that are updated this time.
    ///
    /// `rounding` is "nearest", "stochastic" or "kahan", with the seed of what is random: how values are rounded to 16 bits.
    #[pyo3(signature = (params, state, settings, *, threads, max_grad_norm, grad_scale, elsewhere_squares, rows=None, rounding=None))]
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
        rows: Option<Vec<(u64, Py<PyAny>)>>,
        rounding: Option<(String, u64)>,
    ) -> PyResult<Outcome> {
        let rounding = Requested::new(rounding)?;
        let request = Request { threads, max_grad_norm, grad_scale, elsewhere_squares };
        let groups: Vec<Group> = settings.into_iter().enumerate().map(Group::from).collect();
        let mut inner = self.enter()?;
        if !inner.roster.matches(&params) || groups.len() != params.len() {
            return Ok(Outcome::stale(py));
        }
        inner.link();
        let unnameable = match rows {
            Some(rows) => inner.name_rows(rows)?,
            None => Vec::new(),
        };
        let findings = self.read(&mut inner, state, &groups, rounding);
        // Held until the step is done.
        let _named = inner.declarations.unname();
        let mut findings = findings?;
        findings.problems.extend(unnameable);
        let order = inner.memory.judge(&mut findings);
        if !findings.borrowings.is_empty() {
            inner.memory.check_borrowings(&mut findings);
        }
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
        let Findings { tasks, counters, agings, .. } = &mut findings;
        let run = Run { tasks, counters, agings, groups: &groups, unscale, order, request };
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
        inner.declarations.traverse(&visit)?;
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
        rounding: Requested,
    ) -> PyResult<Findings<'py>> {
        let py = state.py();
        let Inner { roster, memory, foresight, room, declarations, .. } = inner;
        roster.renew(py, self.store.get());
        memory.begin();
        foresight.resize(roster.rows.len());
        let mut findings = Findings::within(room);
        let (torch, names, cursor) = (Torch::get(py)?, &self.names, Cursor::new());
        let mut reader =
            Reader { torch, names, state, cursor, memory, foresight, declarations, rounding };
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
    /// Tells the roster of new declarations.
    fn link(&mut self) {
        if !self.linked {
            self.roster.link(&self.declarations);
            self.linked = true;
        }
    }

    /// Notes the rows that this step is for; returns a problem for each parameter whose rows have no steps of their own.
    fn name_rows(&mut self, rows: Vec<(u64, Py<PyAny>)>) -> PyResult<Vec<Problem>> {
        let find = |(id, mask)| {
            let id = ParamId::new(id).map_err(to_python)?;
            let unknown = || PyKeyError::new_err(format!("no enrolled parameter has ID {id}"));
            Ok((id, mask, self.roster.place(id).ok_or_else(unknown)?))
        };
        let rows: Vec<_> = rows.into_iter().map(find).collect::<PyResult<_>>()?;
        let mut problems = Vec::new();
        for (id, mask, (group, index)) in rows {
            match self.declarations.place(id) {
                Some(place) => self.declarations.at(place).named = Some(mask),
                None => {
                    let problem = Problem::boxed("rows_undeclared", "rows", &[], &[]);
                    problems.push(Problem { group, index, ..*problem });
                }
            }
        }
        Ok(problems)
    }

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
