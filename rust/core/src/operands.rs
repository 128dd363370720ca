//! The operands of one update as the loops take them, block by block.

use std::ops::Range;

use crate::codec::Written;
use crate::element::Compute;
use crate::layout::Steps;
use crate::side::{Blocks, Side};
use crate::update::Block;
use crate::{AdamTask, Isa, Layout, Precision, StridedLayout};

/// The sides of one task.
pub(crate) struct Operands<'a> {
    pub value: Side<'a>,
    pub grad: Side<'a>,
    exp_avg: Side<'a>,
    exp_avg_sq: Side<'a>,
    max_exp_avg_sq: Option<Side<'a>>,
    precision: Option<&'a Precision>,
}

impl<'a> Operands<'a> {
    pub(crate) fn new<C: Compute>(task: &'a AdamTask) -> Self {
        let side =
            |operand, strides: StridesOf| Side::new::<C>(operand, steps(&task.layout, strides));
        let value = side(task.value, |layout| &layout.value);
        let grad = Self::grad::<C>(task);
        let precision = task.precision.as_deref();
        if let Some(scales) = precision.and_then(|precision| precision.scales) {
            let max = task.max_exp_avg_sq.zip(scales.max_exp_avg_sq);
            return Self {
                value,
                grad,
                exp_avg: Side::blockwise(task.exp_avg, scales.exp_avg),
                exp_avg_sq: Side::blockwise(task.exp_avg_sq, scales.exp_avg_sq),
                max_exp_avg_sq: max.map(|(max, scales)| Side::blockwise(max, scales)),
                precision,
            };
        }
        Self {
            value,
            grad,
            exp_avg: side(task.exp_avg, |layout| &layout.exp_avg),
            exp_avg_sq: side(task.exp_avg_sq, |layout| &layout.exp_avg_sq),
            max_exp_avg_sq: task
                .max_exp_avg_sq
                .map(|max| side(max, |layout| &layout.max_exp_avg_sq)),
            precision,
        }
    }

    /// The gradient by itself.
    pub(crate) fn grad<C: Compute>(task: &'a AdamTask) -> Side<'a> {
        Side::new::<C>(task.grad, steps(&task.layout, |layout| &layout.grad)).apart_from(task.value)
    }

    /// Whether no block goes through scratch.
    pub(crate) fn in_place(&self) -> bool {
        self.written().all(|side| side.in_place) && self.grad.in_place
    }

    fn written(&self) -> impl Iterator<Item = &Side<'a>> {
        [&self.value, &self.exp_avg, &self.exp_avg_sq].into_iter().chain(&self.max_exp_avg_sq)
    }

    /// The elements `part`; `close` ends it.
    ///
    /// # Safety
    /// As [`adam_step`](crate::adam_step), for these elements of the task. `C` is the type given to
    /// `new`. Unless all is in place, `part` is no longer than a block of scratch.
    pub(crate) unsafe fn open<'b, C: Compute>(
        &self,
        part: &Range<usize>,
        blocks: &'b mut Blocks<C>,
        isa: Isa,
    ) -> Block<'b, C> {
        let Blocks { value: a, grad: b, exp_avg: c, exp_avg_sq: d, max_exp_avg_sq: e, .. } = blocks;
        // SAFETY: the caller's contract: ours alone to read and write; `a` serves no other side.
        let value = unsafe { self.value.open(part.clone(), a, isa) };
        if let Some(precision) = self.precision {
            // SAFETY: the caller's contract; the gradient comes into `b` only afterwards.
            unsafe { precision.complete(part, (&mut *value, self.value.dtype()), b, isa) };
        }
        Block {
            value,
            // SAFETY: the caller's contract: readable, and apart from what is written.
            grad: unsafe { self.grad.read(part.clone(), b, isa) },
            // SAFETY: as for the value.
            exp_avg: unsafe { self.exp_avg.open(part.clone(), c, isa) },
            // SAFETY: as for the value.
            exp_avg_sq: unsafe { self.exp_avg_sq.open(part.clone(), d, isa) },
            max_exp_avg_sq: self.max_exp_avg_sq.as_ref().map(|max| {
                // SAFETY: as for the value.
                unsafe { max.open(part.clone(), e, isa) }
            }),
        }
    }

    /// Stores what was written to the block that `open` gave; where `active` is false, nothing.
    ///
    /// # Safety
    /// `open` was called with the same part and blocks, and what it asks for still holds.
    #[inline]
    pub(crate) unsafe fn close<C: Compute>(
        &self,
        part: &Range<usize>,
        blocks: &mut Blocks<C>,
        active: Option<&[bool]>,
        isa: Isa,
    ) {
        if self.in_place() {
            return;
        }
        if let Some(precision) = self.precision {
            let moments =
                [Some(&self.exp_avg), Some(&self.exp_avg_sq), self.max_exp_avg_sq.as_ref()];
            // SAFETY: the caller's contract.
            return unsafe { precision.store((&self.value, moments), part, blocks, active, isa) };
        }
        let Blocks { value: a, exp_avg: c, exp_avg_sq: d, max_exp_avg_sq: e, .. } = blocks;
        for (side, scratch) in self.written().zip([a, c, d, e]) {
            let written = Written { source: &scratch[..part.len()], active, random: None };
            // SAFETY: the caller's contract.
            unsafe { side.close(part.clone(), written, isa) };
        }
    }
}

/// Picks one operand's strides.
type StridesOf = fn(&StridedLayout) -> &Vec<isize>;

fn steps(layout: &Layout, strides: StridesOf) -> Steps<'_> {
    match layout {
        Layout::Flat { .. } => Steps::Dense,
        Layout::Strided(layout) => {
            Steps::Strided { shape: &layout.shape, strides: strides(layout) }
        }
    }
}
