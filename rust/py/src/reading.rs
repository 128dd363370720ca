//! Reading: everything that a step needs to know of each parameter, and nothing written.
//!
//! For each parameter with a gradient, first whatever may run Python code (`.grad`, the look-ups in `state`), then the
//! tensors themselves in one go, so that what was read of one is still true when the next is read.

use paramstate::{
    AdamTask, BLOCK_LEN, DType, Layout, Operand, Scales, SecondMoment, StridedLayout,
    overlaps_itself,
};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::declared::Declarations;
use crate::findings::{Findings, Origin};
use crate::foresight::{Descriptions, Foresight};
use crate::geometry::Density;
use crate::group::Group;
use crate::memory::Memory;
use crate::particular::{self, Look, Particular, Versions};
use crate::precision::{Kind, Known, Requested};
use crate::problem::{Place, Problem};
use crate::roster::{KEYS, Row};
use crate::running::Counter;
use crate::state::{Cursor, Moments, Names};
use crate::tensor::{self, Blockwise, Element, Reading, Torch};
use crate::written_memory::written;

/// What all of one step is read with.
pub struct Reader<'py, 'a> {
    pub torch: &'a Torch,
    pub names: &'a Names,
    pub state: Bound<'py, PyDict>,
    pub cursor: Cursor,
    pub memory: &'a mut Memory,
    pub foresight: &'a mut Foresight,
    pub declarations: &'a mut Declarations,
    pub rounding: Requested,
}

/// All that was read of one parameter.
struct Entry {
    task: AdamTask,
    counter: Counter,
    descriptions: Descriptions,
    particular: Option<Box<Particular>>,
}

/// Whether a parameter's tensors were asked for a pending negation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Negation {
    Unknown,
    None,
}

/// What moments in 8 bits consist of, for those that are.
type Codes<'py> = [Option<Blockwise<'py>>; 3];

/// Why a parameter with a gradient gets no task.
enum Otherwise {
    Missing,
    Retyped,
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
        let codes = Self::codes(&moments)?;
        let is_new = lent(row, &moments) != row.lent;
        let result = if is_new {
            self.task_once_asked(row, &grad, (&moments, &codes), group)
        } else {
            self.task(row, &grad, (&moments, &codes), group, Negation::Unknown)
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
                findings.codes.extend(codes.into_iter().flatten().flatten());
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
            Err(Otherwise::Retyped) => findings.retyped.push(place),
            Err(Otherwise::Elsewhere) => findings.elsewhere.push(place),
            Err(Otherwise::Refused(problem)) => {
                findings.problems.push(Problem { group: place.0, index: place.1, ..*problem });
            }
        }
        Ok(())
    }

    /// What moments in 8 bits consist of.
    #[inline]
    fn codes([_, m, v, max, _]: &Moments<'py>) -> PyResult<Codes<'py>> {
        let mut codes = Codes::default();
        for (codes, moment) in codes.iter_mut().zip([m, v, max]) {
            if let Some(moment) = moment {
                *codes = tensor::blockwise(moment)?;
            }
        }
        Ok(codes)
    }

    /// For tensors that are used for the first time, and those whose layout leaves a pending negation open.
    #[cold]
    fn task_once_asked(
        &mut self,
        row: &Row,
        grad: &Bound<'py, PyAny>,
        (moments, codes): (&Moments<'py>, &Codes<'py>),
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
        self.task(row, grad, (moments, codes), group, Negation::None)
    }

    /// # Safety
    ///
    /// As for `Torch::read`.
    #[inline]
    unsafe fn read_one<'a>(&self, object: &'a Bound<'py, PyAny>) -> Result<Reading<'a>, Otherwise> {
        // SAFETY: the caller's contract.
        unsafe { self.torch.read(object.as_borrowed()) }.ok_or(Otherwise::Elsewhere)
    }

    /// A moment, and the scales of one in 8 bits.
    ///
    /// # Safety
    ///
    /// As for `Torch::read`.
    #[inline]
    unsafe fn read_moment<'a>(
        &self,
        object: &'a Bound<'py, PyAny>,
        codes: &'a Option<Blockwise<'py>>,
        dtype: DType,
    ) -> Result<(Reading<'a>, Option<Operand>), Otherwise> {
        let Some([codes, scales]) = codes else {
            // SAFETY: the caller's contract.
            return unsafe { self.read_one(object) }.map(|reading| (reading, None));
        };
        // SAFETY: the caller's contract.
        let codes = unsafe { self.read_one(codes) }?;
        // SAFETY: the caller's contract.
        blockwise(codes, unsafe { self.read_one(scales) }?, dtype)
    }

    #[inline]
    fn task(
        &mut self,
        row: &Row,
        grad: &Bound<'py, PyAny>,
        (moments, codes): (&Moments<'py>, &Codes<'py>),
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
            [Some(step), Some(m), Some(v), ..] if !needs_max => (step, m, v, None),
            [Some(step), Some(m), Some(v), Some(max), _] => (step, m, v, Some(max)),
            _ => {
                floating(&value)?;
                floating(&gradient)?;
                return Err(Otherwise::Missing);
            }
        };
        let keeps = self.rounding.keeps_what_is_left_over(floating(&value)?.dtype);
        let left_over = match &moments[4] {
            Some(left_over) if keeps => Some(read(left_over)?),
            None if keeps => return Err(Otherwise::Missing),
            // A wider value leaves nothing over, and what a former one has left over is not its own.
            Some(_) if self.rounding.kind == Kind::Kahan => return Err(Otherwise::Retyped),
            _ => None,
        };
        let step = read(step)?;
        if !Counter::can_count(&step) {
            return Err(Otherwise::Elsewhere);
        }
        // SAFETY: as above.
        let moment = |object, codes, dtype| unsafe { self.read_moment(object, codes, dtype) };
        let (exp_avg, first) = moment(exp_avg, &codes[0], DType::E4M3)?;
        let (exp_avg_sq, second) = moment(exp_avg_sq, &codes[1], DType::E5M3)?;
        let max = max_exp_avg_sq.map(|max| moment(max, &codes[2], DType::E5M3)).transpose()?;
        let (max_exp_avg_sq, third) = max.unzip();
        let scales = scales(first, second, third)?;
        let tensors = Tensors {
            value,
            grad: gradient,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq,
            left_over,
            scales,
        };
        if negation == Negation::Unknown && tensors.may_be_negated() {
            return self.task_once_asked(row, grad, (moments, codes), group);
        }
        tensors.check()?;
        if row.stored_as.is_some_and(|dtype| tensors.is_stored_otherwise(dtype)) {
            return Err(Otherwise::Retyped);
        }
        let Tensors { value, exp_avg, exp_avg_sq, .. } = &tensors;
        let descriptions = [value, &step, exp_avg, exp_avg_sq].map(|reading| reading.described_at);
        let counter = Counter::new(&step, group.index);
        let task = tensors.task(row, group, self.rounding)?;
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
    row.stored_as.is_none()
        && row.dtype.is_some_and(|former| former != dtype)
        && written(task).any(|(_, operand)| operand.dtype.size_of() < dtype.size_of())
}

fn lent(row: &Row, moments: &Moments<'_>) -> [usize; 6] {
    let address =
        |moment: &Option<Bound<'_, PyAny>>| moment.as_ref().map_or(0, |m| m.as_ptr().addr());
    let [step, exp_avg, exp_avg_sq, max_exp_avg_sq, left_over] = moments;
    [
        row.parameter.as_ptr().addr(),
        address(step),
        address(exp_avg),
        address(exp_avg_sq),
        address(max_exp_avg_sq),
        address(left_over),
    ]
}

fn floating(reading: &Reading<'_>) -> Result<Operand, Otherwise> {
    reading.operand().ok_or(Otherwise::Elsewhere)
}

/// A moment in 8 bits, as its codes' tensor, and its scales.
#[cold]
fn blockwise<'a>(
    codes: Reading<'a>,
    scales: Reading<'a>,
    dtype: DType,
) -> Result<(Reading<'a>, Option<Operand>), Otherwise> {
    let is_byte = |reading: &Reading<'_>| {
        reading.element == Element::Byte && reading.density == Density::Contiguous
    };
    let fits = scales.len == codes.len.div_ceil(BLOCK_LEN);
    if !(is_byte(&codes) && is_byte(&scales) && fits) {
        return Err(Otherwise::Elsewhere);
    }
    let scales = Operand { ptr: scales.ptr, dtype: DType::E8M0 };
    Ok((Reading { element: Element::Float(dtype), ..codes }, Some(scales)))
}

/// The scales of all moments, or of none.
fn scales(
    exp_avg: Option<Operand>,
    exp_avg_sq: Option<Operand>,
    max_exp_avg_sq: Option<Option<Operand>>,
) -> Result<Option<Scales>, Otherwise> {
    match (exp_avg, exp_avg_sq, max_exp_avg_sq) {
        (None, None, None | Some(None)) => Ok(None),
        (Some(exp_avg), Some(exp_avg_sq), None) => {
            Ok(Some(Scales { exp_avg, exp_avg_sq, max_exp_avg_sq: None }))
        }
        (Some(exp_avg), Some(exp_avg_sq), Some(Some(max))) => {
            Ok(Some(Scales { exp_avg, exp_avg_sq, max_exp_avg_sq: Some(max) }))
        }
        _ => Err(Otherwise::Retyped),
    }
}

/// The tensors of one parameter that share its shape.
struct Tensors<'a> {
    value: Reading<'a>,
    grad: Reading<'a>,
    exp_avg: Reading<'a>,
    exp_avg_sq: Reading<'a>,
    max_exp_avg_sq: Option<Reading<'a>>,
    /// What the value's rounding left over.
    left_over: Option<Reading<'a>>,
    /// Where moments are in 8 bits.
    scales: Option<Scales>,
}

impl<'a> Tensors<'a> {
    /// Whether a moment has another dtype than is declared for the first.
    fn is_stored_otherwise(&self, declared: DType) -> bool {
        let wanted = |second: bool| match declared {
            DType::E4M3 if second => DType::E5M3,
            dtype => dtype,
        };
        let differs =
            |reading: &Reading<'_>, second| reading.element != Element::Float(wanted(second));
        differs(&self.exp_avg, false)
            || differs(&self.exp_avg_sq, true)
            || self.max_exp_avg_sq.as_ref().is_some_and(|max| differs(max, true))
    }

    /// A value or a moment of one element was asked when it was first used.
    #[inline]
    fn may_be_negated(&self) -> bool {
        let sparse = |(_, reading): (_, &Reading<'_>)| reading.density == Density::Sparse;
        self.grad.may_be_negated() || self.written().any(sparse)
    }

    #[inline]
    fn task(&self, row: &Row, group: &Group, requested: Requested) -> Result<AdamTask, Otherwise> {
        let value = floating(&self.value)?;
        let exp_avg = floating(&self.exp_avg)?;
        let exp_avg_sq = floating(&self.exp_avg_sq)?;
        let max_exp_avg_sq = self.max_exp_avg_sq.as_ref().map(floating).transpose()?;
        let layout = self.layout();
        let known = Known {
            requested,
            id: row.id,
            value: &self.value,
            value_dtype: value.dtype,
            moments: [
                Some(exp_avg.dtype),
                Some(exp_avg_sq.dtype),
                max_exp_avg_sq.map(|max| max.dtype),
            ],
            left_over: self.left_over.as_ref(),
            scales: self.scales,
            layout: &layout,
        };
        let precision = known.precision();
        Ok(AdamTask {
            value,
            grad: floating(&self.grad)?,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq,
            layout,
            scalars: group.scalars,
            bounds: row.bounds,
            particulars: None,
            precision,
        })
    }

    /// The tensors that are written, with the names that `Problem` gives them.
    fn written(&self) -> impl Iterator<Item = (&'static str, &Reading<'a>)> {
        let [value, _, exp_avg, exp_avg_sq, max_exp_avg_sq, left_over] = KEYS;
        [(value, &self.value), (exp_avg, &self.exp_avg), (exp_avg_sq, &self.exp_avg_sq)]
            .into_iter()
            .chain(self.max_exp_avg_sq.as_ref().map(|reading| (max_exp_avg_sq, reading)))
            .chain(self.left_over.as_ref().map(|reading| (left_over, reading)))
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
        if self.scales.is_some() && !others().all(contiguous) {
            return self.strided(); // the codes lie in the logical order, whatever that of the value
        }
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
