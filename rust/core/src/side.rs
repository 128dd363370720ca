//! One operand of a loop: used where it lies if the loop can, else through a block of scratch.

use std::ops::Range;

use crate::blockwise::{self, BLOCK_LEN};
use crate::codec::{self, BLOCK, Written};
use crate::element::Compute;
use crate::isa::Isa;
use crate::layout::Steps;
use crate::rows::ROOM;
use crate::{DType, Operand};

/// An operand, how its elements follow each other, and whether a loop in the compute type may work
/// on the memory itself.
pub(crate) struct Side<'a> {
    operand: Operand,
    steps: Steps<'a>,
    /// Of the blocks, where each shares one; the elements then lie in the order of the walk.
    scales: Option<Operand>,
    pub in_place: bool,
}

impl<'a> Side<'a> {
    pub(crate) fn new<C: Compute>(operand: Operand, steps: Steps<'a>) -> Self {
        let in_place = operand.dtype == C::DTYPE
            && matches!(steps, Steps::Dense)
            && operand.ptr.cast::<C>().is_aligned();
        Self { operand, steps, scales: None, in_place }
    }

    /// 8-bit floats, dense in the order of the walk, and the scales of their blocks.
    pub(crate) fn blockwise(operand: Operand, scales: Operand) -> Self {
        debug_assert!(operand.dtype.is_blockwise() && scales.dtype == DType::E8M0);
        Self { operand, steps: Steps::Dense, scales: Some(scales), in_place: false }
    }

    pub(crate) fn dtype(&self) -> DType {
        self.operand.dtype
    }

    /// Goes through scratch if it is the memory of `other`, so that no slice of it is alive while
    /// the other is written.
    pub(crate) fn apart_from(mut self, other: Operand) -> Self {
        self.in_place &= self.operand.ptr != other.ptr;
        self
    }

    /// The elements `span`, for reading.
    ///
    /// # Safety
    /// They are readable, and nothing writes them while the slice lives. `C` is the type given to
    /// `new`. Unless the side is in place, `span` is no longer than the scratch.
    pub(crate) unsafe fn read<'b, C: Compute>(
        &self,
        span: Range<usize>,
        scratch: &'b mut [C; BLOCK],
        isa: Isa,
    ) -> &'b [C] {
        let len = span.len();
        if !self.in_place {
            let target = &mut scratch[..len];
            // SAFETY: the caller's contract.
            unsafe { self.decode(span, target, isa) };
            return target;
        }
        // SAFETY: in place means dense and of type `C`; the caller says that `span` is readable.
        let first = unsafe { self.operand.ptr.cast_const().cast::<C>().add(span.start) };
        // SAFETY: in place also means aligned.
        unsafe { std::slice::from_raw_parts(first, len) }
    }

    /// The elements `span`, copied into scratch wherever they lie.
    ///
    /// # Safety
    /// They are readable, and nothing writes them meanwhile. `span` is no longer than the scratch.
    pub(crate) unsafe fn copy<C: Compute>(
        &self,
        span: Range<usize>,
        scratch: &mut [C; BLOCK],
        isa: Isa,
    ) {
        let target = &mut scratch[..span.len()];
        // SAFETY: the caller's contract.
        unsafe { self.decode(span, target, isa) };
    }

    /// # Safety
    /// The elements `span` are readable, and nothing writes them meanwhile; there are as many targets.
    #[inline]
    unsafe fn decode<C: Compute>(&self, span: Range<usize>, target: &mut [C], isa: Isa) {
        let Some(scales) = self.scales else {
            // SAFETY: the caller's contract.
            return unsafe { codec::decode(self.operand, self.steps, span, target, isa) };
        };
        // SAFETY: the caller's contract; a block's codes and its scale are readable together.
        let (codes, scales) = unsafe { self.blocks(scales, &span) };
        isa.run(blockwise::Decode { dtype: self.operand.dtype, codes, scales, target });
    }

    /// The codes of `span` and the scales of its blocks.
    ///
    /// # Safety
    /// They are readable and writable, and no one else's while the slices live (or only readable,
    /// if they are only read).
    unsafe fn blocks<'b>(
        &self,
        scales: Operand,
        span: &Range<usize>,
    ) -> (&'b mut [u8], &'b mut [u8]) {
        debug_assert!(span.start.is_multiple_of(BLOCK_LEN), "a block is worked on as a whole");
        let first_scale = span.start / BLOCK_LEN;
        let count = span.len().div_ceil(BLOCK_LEN);
        // SAFETY: the caller's contract; the codes are dense, in the order of the walk.
        let codes = unsafe {
            std::slice::from_raw_parts_mut(self.operand.ptr.wrapping_add(span.start), span.len())
        };
        // SAFETY: as above; there is a scale for each block.
        let scales =
            unsafe { std::slice::from_raw_parts_mut(scales.ptr.wrapping_add(first_scale), count) };
        (codes, scales)
    }

    /// The elements `span`, for reading and writing; `close` ends it.
    ///
    /// # Safety
    /// They are readable and writable, and no one else's while the slice lives. `C` is the type
    /// given to `new`. Unless the side is in place, `span` is no longer than the scratch.
    pub(crate) unsafe fn open<'b, C: Compute>(
        &self,
        span: Range<usize>,
        scratch: &'b mut [C; BLOCK],
        isa: Isa,
    ) -> &'b mut [C] {
        let len = span.len();
        if !self.in_place {
            let target = &mut scratch[..len];
            // SAFETY: the caller's contract.
            unsafe { self.decode(span, target, isa) };
            return target;
        }
        // SAFETY: in place means dense and of type `C`; the caller says that `span` is ours.
        let first = unsafe { self.operand.ptr.cast::<C>().add(span.start) };
        // SAFETY: in place also means aligned.
        unsafe { std::slice::from_raw_parts_mut(first, len) }
    }

    /// Stores what was written to the slice that `open` gave, which is the source of `written`. In
    /// place there is nothing to do: the loop itself has left alone what is not active. Of blocks
    /// that share a scale all elements are stored, for those that were left alone stay what they are.
    ///
    /// # Safety
    /// `open` was called with the same span and scratch, and what it asks for still holds.
    pub(crate) unsafe fn close<C: Compute>(
        &self,
        span: Range<usize>,
        written: Written<'_, C>,
        isa: Isa,
    ) {
        if self.in_place {
            return;
        }
        let Some(scales) = self.scales else {
            // SAFETY: the caller's contract.
            return unsafe { codec::encode(self.operand, self.steps, span, written, isa) };
        };
        // SAFETY: the caller's contract.
        let (codes, scales) = unsafe { self.blocks(scales, &span) };
        let random = written.random.expect("8-bit floats are rounded at random");
        let (dtype, source) = (self.operand.dtype, written.source);
        isa.run(blockwise::Encode { dtype, source, random, codes, scales });
    }
}

/// A thread's scratch, made when a task first needs it.
#[derive(Default)]
pub(crate) struct Scratch {
    pub single: Option<Box<Blocks<f32>>>,
    pub double: Option<Box<Blocks<f64>>>,
    pub single_varied: Option<Box<Varied<f32>>>,
    pub double_varied: Option<Box<Varied<f64>>>,
}

/// One block for each operand of the update.
pub(crate) struct Blocks<C> {
    pub value: [C; BLOCK],
    pub grad: [C; BLOCK],
    pub exp_avg: [C; BLOCK],
    pub exp_avg_sq: [C; BLOCK],
    pub max_exp_avg_sq: [C; BLOCK],
    /// Empty until something is rounded at random.
    pub words: Vec<u32>,
}

impl<C: Compute> Default for Blocks<C> {
    fn default() -> Self {
        let zeros = || [C::default(); BLOCK];
        Self {
            value: zeros(),
            grad: zeros(),
            exp_avg: zeros(),
            exp_avg_sq: zeros(),
            max_exp_avg_sq: zeros(),
            words: Vec::new(),
        }
    }
}

/// One block for each thing that may differ from element to element.
pub(crate) struct Varied<C> {
    pub active: [bool; ROOM],
    pub min: [C; BLOCK],
    pub max: [C; BLOCK],
}

impl<C: Compute> Default for Varied<C> {
    fn default() -> Self {
        let zeros = || [C::default(); BLOCK];
        Self { active: [true; ROOM], min: zeros(), max: zeros() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_another_side_is_never_used_in_place() {
        let mut memory = [0.0f32; 2];
        let operand = Operand { ptr: memory.as_mut_ptr().cast(), dtype: DType::F32 };
        let other = Operand { ptr: operand.ptr.wrapping_add(4), ..operand };
        let side = || Side::new::<f32>(operand, Steps::Dense);
        assert!(side().apart_from(other).in_place);
        assert!(!side().apart_from(operand).in_place);
    }

    #[test]
    fn only_aligned_dense_memory_of_the_compute_type_is_used_in_place() {
        let mut memory = [0.0f32; 2];
        let operand = Operand { ptr: memory.as_mut_ptr().cast(), dtype: DType::F32 };
        let strided = Steps::Strided { shape: &[2], strides: &[1] };
        assert!(Side::new::<f32>(operand, Steps::Dense).in_place);
        assert!(!Side::new::<f64>(operand, Steps::Dense).in_place);
        assert!(!Side::new::<f32>(operand, strided).in_place);
        let odd = Operand { ptr: operand.ptr.wrapping_add(1), ..operand };
        assert!(!Side::new::<f32>(odd, Steps::Dense).in_place);
    }
}
