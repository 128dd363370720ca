//! Reading: everything that a step needs to know of each parameter, and nothing written.
//!
//! For each parameter with a gradient, first whatever may run Python code (`.grad`, the look-ups in `state`), then the
//! tensors themselves in one go, so that what was read of one is still true when the next is read.

use paramstate::{
    Adam, AdamScalars, AdamTask, Layout, Operand, SecondMoment, StridedLayout, overlaps_itself,
};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::declared::Declarations;
use crate::findings::{Findings, Origin};
use crate::foresight::{Descriptions, Foresight};
use crate::geometry::Density;
use crate::memory::{Memory, written};
use crate::outcome::{Place, Problem};
use crate::particular::{self, Look, Particular, Versions};
use crate::roster::{KEYS, Row};
use crate::running::Counter;
use crate::state::{Cursor, Moments, Names};
use crate::tensor::{self, Reading, Torch};

/// What all of one step is read with.
pub struct Reader<'py, 'a> {
    pub torch: &'a Torch,
    pub names: &'a Names,
    pub state: Bound<'py, PyDict>,
    pub cursor: Cursor,
    pub memory: &'a mut Memory,
    pub foresight: &'a mut Foresight,
    pub declarations: &'a mut Declarations,
}

/// All that was read of one parameter.
struct Entry {
    task: AdamTask,
    counter: Counter,
    descriptions: Descriptions,
    particular: Option<Box<Particular>>,
}

/// The settings of one group.
pub struct Group {
    pub index: usize,
    pub adam: Adam,
    /// Stands in a task until its step is known.
    pub scalars: AdamScalars,
}

/// Whether a parameter's tensors were asked for a pending negation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Negation {
    Unknown,
    None,
}

/// Why a parameter with a gradient gets no task.
enum Otherwise {
    Missing,
    Elsewhere,
    Refused(Box<Problem>),
}

impl<'py> Reader<'py, '_> {
    /// Reads one parameter into `findings`.
    #[inline]
    pub fn read(
        &mut self,
        (place, index, row): (Place, usize, &Row),
        group: &Group,
        findings: &mut Findings<'py>,
    ) -> PyResult<()> {
        let parameter = row.parameter.bind_borrowed(self.state.py());
        if row.declared.is_some_and(|place| self.declarations.is_frozen(place)) {
            self.cursor.pass(&self.state, parameter);
            return Ok(());
        }
        let Some(grad) = tensor::gradient(parameter)? else {
            self.cursor.pass(&self.state, parameter);
            return Ok(());
        };
        let moments = match self.cursor.find(&self.state, parameter)? {
            None => Moments::default(),
            Some(inner) => match inner.cast::<PyDict>() {
                Ok(inner) => self.names.read(inner)?,
                Err(_) => {
                    findings.elsewhere.push(place);
                    return Ok(());
                }
            },
        };
        let is_new = lent(row, &moments) != row.lent;
        let result = if is_new {
            self.task_once_asked(row, &grad, &moments, group)
        } else {
            self.task(row, &grad, &moments, group, Negation::Unknown)
        };
        match result {
            Ok(Entry { mut task, mut counter, descriptions, particular }) => {
                if let Some(particular) = particular {
                    let Particular { particulars, aging, borrowings } = *particular;
                    task.particulars = Some(particulars);
                    counter.aging = aging.map(|aging| findings.add_aging(aging));
                    let borrowings = borrowings.into_iter().map(|memory| (place, memory));
                    findings.borrowings.extend(borrowings);
                }
                self.foresight.remember(index, descriptions);
                if is_retyped(row, &task) {
                    findings.retyped.push(place);
                }
                self.memory.note(index, &task, &counter);
                findings.tasks.push(task);
                findings.counters.push(counter);
                let parameter = row.parameter.as_ptr();
                findings.origins.push(Origin {
                    row: index,
                    place,
                    parameter,
                    grad,
                    moments,
                    is_new,
                });
            }
            Err(Otherwise::Missing) => findings.missing.push(place),
            Err(Otherwise::Elsewhere) => findings.elsewhere.push(place),
            Err(Otherwise::Refused(problem)) => {
                findings.problems.push(Problem { group: place.0, index: place.1, ..*problem });
            }
        }
        Ok(())
    }

    /// For tensors that are used for the first time, and those whose layout leaves a pending negation open.
    #[cold]
    fn task_once_asked(
        &mut self,
        row: &Row,
        grad: &Bound<'py, PyAny>,
        moments: &Moments<'py>,
        group: &Group,
    ) -> Result<Entry, Otherwise> {
        let parameter = row.parameter.bind_borrowed(grad.py());
        let moments_alone = moments.iter().flatten().map(|moment| moment.as_borrowed());
        let negated = moments_alone
            .chain([parameter, grad.as_borrowed()])
            .any(|tensor| self.torch.is_plain(tensor) && tensor::is_negated(tensor));
        if negated {
            return Err(Otherwise::Elsewhere);
        }
        self.task(row, grad, moments, group, Negation::None)
    }

    /// # Safety
    ///
    /// As for `Torch::read`.
    #[inline]
    unsafe fn read_one<'a>(&self, object: &'a Bound<'py, PyAny>) -> Result<Reading<'a>, Otherwise> {
        // SAFETY: the caller's contract.
        unsafe { self.torch.read(object.as_borrowed()) }.ok_or(Otherwise::Elsewhere)
    }

    #[inline]
    fn task(
        &mut self,
        row: &Row,
        grad: &Bound<'py, PyAny>,
        moments: &Moments<'py>,
        group: &Group,
        negation: Negation,
    ) -> Result<Entry, Otherwise> {
        let versions = match row.declared {
            Some(place) => particular::versions(grad.py(), self.declarations.at(place)),
            None => Versions::default(),
        };
        // SAFETY: nothing below runs Python code before the last use of a reading, but for readings that fail, and then
        // none is used.
        let read = |object| unsafe { self.read_one(object) };
        let value = read(row.parameter.bind(grad.py()))?;
        let gradient = read(grad)?;
        let needs_max = group.adam.second_moment == SecondMoment::Maximum;
        let (step, exp_avg, exp_avg_sq, max_exp_avg_sq) = match moments {
            [Some(step), Some(m), Some(v), _] if !needs_max => (step, m, v, None),
            [Some(step), Some(m), Some(v), Some(max)] => (step, m, v, Some(max)),
            _ => {
                floating(&value)?;
                floating(&gradient)?;
                return Err(Otherwise::Missing);
            }
        };
        let step = read(step)?;
        if !Counter::can_count(&step) {
            return Err(Otherwise::Elsewhere);
        }
        let tensors = Tensors {
            value,
            grad: gradient,
            exp_avg: read(exp_avg)?,
            exp_avg_sq: read(exp_avg_sq)?,
            max_exp_avg_sq: max_exp_avg_sq.map(read).transpose()?,
        };
        if negation == Negation::Unknown && tensors.may_be_negated() {
            return self.task_once_asked(row, grad, moments, group);
        }
        tensors.check()?;
        let Tensors { value, exp_avg, exp_avg_sq, .. } = &tensors;
        let descriptions = [value, &step, exp_avg, exp_avg_sq].map(|reading| reading.described_at);
        let counter = Counter::new(&step, group.index);
        let task = tensors.task(row, group)?;
        let mut particular = None;
        if let Some(place) = row.declared {
            let (value, known) = (&tensors.value, (&task, &counter, versions));
            // SAFETY: no Python code has run since the value and the step were read.
            let found = unsafe { self.particular(grad.py(), place, value, known, group) };
            particular = Some(found?);
        }
        Ok(Entry { task, counter, descriptions, particular })
    }

    /// # Safety
    ///
    /// No Python code has run since the value was read, and the counter made.
    #[cold]
    unsafe fn particular(
        &mut self,
        py: Python<'py>,
        place: usize,
        value: &Reading<'_>,
        (task, counter, versions): (&AdamTask, &Counter, Versions),
        group: &Group,
    ) -> Result<Box<Particular>, Otherwise> {
        // SAFETY: the caller's contract.
        let step = unsafe { counter.peek() };
        let (torch, layout, adam, borrowings) = (self.torch, &task.layout, &group.adam, Vec::new());
        let look = Look { py, torch, value, layout, adam, step, versions, borrowings };
        // SAFETY: the caller's contract.
        let particular = unsafe { look.particular(self.declarations.at(place)) };
        particular.map(Box::new).map_err(Otherwise::Refused)
    }
}

/// Whether the value has another dtype than at its last step here, and a wider one than a moment.
#[inline]
fn is_retyped(row: &Row, task: &AdamTask) -> bool {
    let dtype = task.value.dtype;
    row.dtype.is_some_and(|former| former != dtype)
        && written(task).any(|(_, operand)| operand.dtype.size_of() < dtype.size_of())
}

fn lent(row: &Row, moments: &Moments<'_>) -> [usize; 5] {
    let address =
        |moment: &Option<Bound<'_, PyAny>>| moment.as_ref().map_or(0, |m| m.as_ptr().addr());
    let [step, exp_avg, exp_avg_sq, max_exp_avg_sq] = moments;
    [
        row.parameter.as_ptr().addr(),
        address(step),
        address(exp_avg),
        address(exp_avg_sq),
        address(max_exp_avg_sq),
    ]
}

fn floating(reading: &Reading<'_>) -> Result<Operand, Otherwise> {
    reading.operand().ok_or(Otherwise::Elsewhere)
}

/// The tensors of one parameter that share its shape.
struct Tensors<'a> {
    value: Reading<'a>,
    grad: Reading<'a>,
    exp_avg: Reading<'a>,
    exp_avg_sq: Reading<'a>,
    max_exp_avg_sq: Option<Reading<'a>>,
}

impl<'a> Tensors<'a> {
    /// A value or a moment of one element was asked when it was first used.
    #[inline]
    fn may_be_negated(&self) -> bool {
        let sparse = |(_, reading): (_, &Reading<'_>)| reading.density == Density::Sparse;
        self.grad.may_be_negated() || self.written().any(sparse)
    }

    #[inline]
    fn task(&self, row: &Row, group: &Group) -> Result<AdamTask, Otherwise> {
        Ok(AdamTask {
            value: floating(&self.value)?,
            grad: floating(&self.grad)?,
            exp_avg: floating(&self.exp_avg)?,
            exp_avg_sq: floating(&self.exp_avg_sq)?,
            max_exp_avg_sq: self.max_exp_avg_sq.as_ref().map(floating).transpose()?,
            layout: self.layout(),
            scalars: group.scalars,
            bounds: row.bounds,
            particulars: None,
        })
    }

    /// The tensors that are written, with the names that `Problem` gives them.
    fn written(&self) -> impl Iterator<Item = (&'static str, &Reading<'a>)> {
        let [value, _, exp_avg, exp_avg_sq, max_exp_avg_sq] = KEYS;
        [(value, &self.value), (exp_avg, &self.exp_avg), (exp_avg_sq, &self.exp_avg_sq)]
            .into_iter()
            .chain(self.max_exp_avg_sq.as_ref().map(|reading| (max_exp_avg_sq, reading)))
    }

    #[inline]
    fn check(&self) -> Result<(), Otherwise> {
        let shape = self.value.geometry.shape;
        if self.grad.geometry.shape != shape {
            return Err(self.refused("grad_shape", "grad", &self.grad));
        }
        for (key, reading) in self.written() {
            if reading.geometry.shape != shape {
                return Err(self.refused("state_shape", key, reading));
            }
            if reading.density == Density::Sparse && shares_elements(reading) {
                return Err(self.refused("expanded", key, reading));
            }
        }
        Ok(())
    }

    #[cold]
    fn refused(&self, kind: &'static str, key: &'static str, reading: &Reading<'_>) -> Otherwise {
        let (expected, got) = (self.value.geometry.shape.to_vec(), reading.geometry.shape.to_vec());
        Otherwise::Refused(Box::new(Problem {
            kind,
            group: 0,
            index: 0,
            key,
            expected,
            got,
            other: None,
        }))
    }

    #[inline]
    fn layout(&self) -> Layout {
        let value = &self.value;
        let contiguous = |reading: &Reading<'_>| reading.density == Density::Contiguous;
        let alike = |reading: &Reading<'_>| reading.geometry.same_strides(&value.geometry);
        let others = || self.written().map(|(_, reading)| reading).chain([&self.grad]);
        let flat =
            others().all(contiguous) || value.density != Density::Sparse && others().all(alike);
        if flat { Layout::Flat { len: value.len } } else { self.strided() }
    }

    #[cold]
    fn strided(&self) -> Layout {
        let strides = |reading: &Reading<'_>| reading.geometry.strides_vec();
        Layout::Strided(Box::new(StridedLayout {
            shape: self.value.geometry.shape_vec(),
            value: strides(&self.value),
            grad: strides(&self.grad),
            exp_avg: strides(&self.exp_avg),
            exp_avg_sq: strides(&self.exp_avg_sq),
            max_exp_avg_sq: self.max_exp_avg_sq.as_ref().map_or_else(Vec::new, strides),
        }))
    }
}

#[cold]
fn shares_elements(reading: &Reading<'_>) -> bool {
    overlaps_itself(&reading.geometry.extent(reading.ptr.addr(), reading.itemsize()))
}
