//! What is not the same for all elements of a parameter, and the update of one that has any of it.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::codec::{self, BLOCK};
use crate::element::Compute;
use crate::operands::Operands;
use crate::rows::Stretch;
use crate::side::{Blocks, Side, Varied};
use crate::task::update_alike;
use crate::update::Scalars;
use crate::varied::{Limits, VariedUpdate};
use crate::{AdamTask, DType, Isa, Projection, RowSteps, View};

/// What differs from row to row, or from element to element, and what is done beyond the update.
/// A task without any of it has none of these, and pays nothing.
///
/// A bound of each element is walked along with the task's own layout: `Flat` where it is as dense
/// as that, else by strides over the shape in that order, 0 where one bound serves many elements.
/// It takes the place of the task's scalar bound on its side; a NaN bounds nothing.
#[derive(Clone, Debug, Default)]
pub struct Particulars {
    /// Rows that have taken fewer steps than the parameter, and rows that take none now. Skipped
    /// rows keep their very bits.
    pub rows: Option<RowSteps>,
    /// No element is less than its own.
    pub min: Option<View>,
    /// No element is greater than its own.
    pub max: Option<View>,
    /// What happens to the first moment where a bound holds a value back.
    pub when_bound: WhenBound,
    /// To this is added how many elements are equal to one of their bounds after the update, all as
    /// they are stored, skipped rows too.
    pub at_bound: Option<Arc<AtomicUsize>>,
    /// Holds for the value after the update, its bounds and all else.
    pub projection: Option<Projection>,
}

/// What happens to the first moment where a bound holds a value back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenBound {
    /// It is kept.
    #[default]
    KeepMoment,
    /// It is zeroed, so that the value leaves its bound as soon as the gradient turns.
    ZeroMoment,
}

impl Particulars {
    /// Whether each element's bounds have to be at hand.
    fn has_limits(&self) -> bool {
        self.min.is_some()
            || self.max.is_some()
            || self.at_bound.is_some()
            || self.when_bound == WhenBound::ZeroMoment
    }
}

/// The bounds of a task's elements, a block at a time.
struct Bounding<'a> {
    min: Option<Side<'a>>,
    max: Option<Side<'a>>,
    /// To which they are rounded before they are held.
    dtype: Option<DType>,
    zero: bool,
    at_bound: Option<&'a AtomicUsize>,
}

impl<'a> Bounding<'a> {
    /// Bounds that are the same everywhere are written out once, for all blocks.
    fn new<C: Compute>(
        task: &AdamTask,
        particulars: &'a Particulars,
        varied: &mut Varied<C>,
    ) -> Option<Self> {
        if !particulars.has_limits() {
            return None;
        }
        let side = |view: &'a View| Side::new::<C>(view.operand, view.layout.steps());
        let everywhere = |bound: Option<f64>| C::narrow(bound.unwrap_or(f64::NAN));
        let bounds = task.bounds_to_hold();
        varied.min.fill(everywhere(bounds.min));
        varied.max.fill(everywhere(bounds.max));
        let precision = task.precision.as_deref();
        Some(Self {
            dtype: precision.and_then(|precision| precision.dtype_of_bounds(task.value.dtype)),
            min: particulars.min.as_ref().map(side),
            max: particulars.max.as_ref().map(side),
            zero: particulars.when_bound == WhenBound::ZeroMoment,
            at_bound: particulars.at_bound.as_deref(),
        })
    }

    /// # Safety
    /// As for [`run_span`]; `part` is no longer than a block.
    unsafe fn limits<'b, C: Compute>(
        &self,
        part: &Range<usize>,
        (min, max): (&'b mut [C; BLOCK], &'b mut [C; BLOCK]),
        isa: Isa,
    ) -> Limits<'b, C> {
        let [min, max] = [(&self.min, min), (&self.max, max)].map(|(side, room)| {
            match (side, self.dtype) {
                (None, _) => &room[..part.len()],
                // SAFETY: the caller's contract: readable, and nobody writes it.
                (Some(side), None) => unsafe { side.read(part.clone(), room, isa) },
                (Some(side), Some(dtype)) => {
                    // SAFETY: as above.
                    unsafe { side.copy(part.clone(), room, isa) };
                    codec::round_to(dtype, &mut room[..part.len()], isa);
                    &room[..part.len()]
                }
            }
        });
        Limits { min, max, zero: self.zero }
    }

    /// Counts the values that are at a bound, if that was asked for.
    ///
    /// # Safety
    /// As for [`run_span`]; `part` is no longer than a block.
    unsafe fn count<C: Compute>(
        &self,
        value: &Side<'_>,
        part: &Range<usize>,
        Limits { min, max, .. }: Limits<'_, C>,
        scratch: &mut [C; BLOCK],
        isa: Isa,
    ) {
        let Some(at_bound) = self.at_bound else { return };
        // SAFETY: the caller's contract.
        let values = unsafe { value.read(part.clone(), scratch, isa) };
        let count = codec::count_equal(value.dtype(), values, min, max, isa);
        at_bound.fetch_add(count, Ordering::Relaxed);
    }
}

fn blocks_of(span: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = span.end;
    span.step_by(BLOCK).map(move |start| start..end.min(start + BLOCK))
}

/// # Safety
/// As [`adam_step`](crate::adam_step), for the elements `span` of this task.
pub(crate) unsafe fn run_span<C: Compute>(
    task: &AdamTask,
    particulars: &Particulars,
    span: Range<usize>,
    (blocks, varied): (&mut Blocks<C>, &mut Varied<C>),
    isa: Isa,
) {
    let bounding = Bounding::new(task, particulars, varied);
    let operands = Operands::new::<C>(task);
    let scalars = Scalars::<C>::new(&task.scalars, task.bounds_to_hold());
    let mut work = Work { operands, rows: None, bounding, blocks, varied, isa };
    let Some(rows) = &particulars.rows else {
        // SAFETY: the caller's contract.
        return unsafe { work.update_blocks(span, &scalars) };
    };
    if task.precision.as_ref().is_some_and(|precision| precision.scales.is_some()) {
        // A scale's elements may be of several rows: they are worked on together.
        work.rows = Some(rows);
        // SAFETY: the caller's contract.
        return unsafe { work.update_blocks(span, &scalars) };
    }
    let mut rest = span;
    while !rest.is_empty() {
        let (stretch, end) = rows.rows().stretch(rest.clone());
        let part = rest.start..end;
        match stretch {
            Stretch::Skipped => {
                // SAFETY: the caller's contract.
                unsafe { work.count_blocks(part) }
            }
            Stretch::Alike(code) => {
                let scalars = scalars.corrected(rows.correction(code));
                work.rows = None;
                // SAFETY: the caller's contract.
                unsafe { work.update_blocks(part, &scalars) }
            }
            Stretch::Mixed => {
                work.rows = Some(rows);
                // SAFETY: the caller's contract.
                unsafe { work.update_blocks(part, &scalars) }
            }
        }
        rest.start = end;
    }
}

/// What one span is worked on with.
struct Work<'a, C> {
    operands: Operands<'a>,
    /// Where the rows of what is at hand are mixed.
    rows: Option<&'a RowSteps>,
    bounding: Option<Bounding<'a>>,
    blocks: &'a mut Blocks<C>,
    varied: &'a mut Varied<C>,
    isa: Isa,
}

impl<C: Compute> Work<'_, C> {
    /// # Safety
    /// As for [`run_span`].
    unsafe fn update_blocks(&mut self, span: Range<usize>, scalars: &Scalars<C>) {
        match (&self.bounding, self.rows) {
            (None, None) => {
                // SAFETY: the caller's contract.
                unsafe { update_alike(&self.operands, span, scalars, self.blocks, self.isa) }
            }
            (None, Some(_)) if self.operands.in_place() => {
                // SAFETY: the caller's contract; no scratch is in use.
                unsafe { self.update_block(&span, scalars) }
            }
            _ => {
                for part in blocks_of(span) {
                    // SAFETY: the caller's contract.
                    unsafe { self.update_block(&part, scalars) }
                }
            }
        }
    }

    /// # Safety
    /// As for [`run_span`]; `part` is no longer than a block, if anything goes through one.
    unsafe fn update_block(&mut self, part: &Range<usize>, scalars: &Scalars<C>) {
        let (Varied { active, min, max }, isa) = (&mut *self.varied, self.isa);
        let rows = self.rows.map(|rows| rows.read(part.start));
        let limits = self.bounding.as_ref().map(|bounding| {
            // SAFETY: the caller's contract.
            unsafe { bounding.limits(part, (min, max), isa) }
        });
        // SAFETY: the caller's contract.
        let block = unsafe { self.operands.open(part, self.blocks, isa) };
        isa.run(VariedUpdate { block, scalars, rows, limits });
        if !self.operands.in_place() {
            let active = self.rows.and_then(|rows| rows.rows().activity(part, active, isa));
            // SAFETY: the same part and blocks.
            unsafe { self.operands.close(part, self.blocks, active, isa) };
        }
        if let (Some(bounding), Some(limits)) = (&self.bounding, limits) {
            // SAFETY: the caller's contract.
            unsafe {
                bounding.count(&self.operands.value, part, limits, &mut self.blocks.value, isa)
            }
        }
    }

    /// Elements that are left as they are may be at a bound all the same.
    ///
    /// # Safety
    /// As for [`run_span`].
    unsafe fn count_blocks(&mut self, span: Range<usize>) {
        let Some(bounding) = self.bounding.as_ref().filter(|bounding| bounding.at_bound.is_some())
        else {
            return;
        };
        for part in blocks_of(span) {
            let Varied { min, max, .. } = self.varied;
            // SAFETY: the caller's contract.
            let limits = unsafe { bounding.limits(&part, (min, max), self.isa) };
            // SAFETY: the caller's contract.
            unsafe {
                bounding.count(
                    &self.operands.value,
                    &part,
                    limits,
                    &mut self.blocks.value,
                    self.isa,
                )
            }
        }
    }
}
