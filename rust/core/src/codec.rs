//! Blocks of elements between memory of any dtype and layout, and dense scratch in the compute type.
//!
//! A loop that finds its operand in another dtype, out of order or unaligned works on such a block
//! while it lies in the first-level cache. Another encoding of state is another codec here.

use std::ops::Range;

use half::{bf16, f16};

use crate::element::Compute;
use crate::isa::{Isa, Kernel};
use crate::layout::{Run, Steps};
use crate::{DType, Element, Operand};

/// Elements in a block: five of them in `f32` take 20 KiB.
pub(crate) const BLOCK: usize = 1024;

/// Calls `$call` with `$type` standing for the Rust type of `$dtype`.
macro_rules! with_element {
    ($dtype:expr, $type:ident => $call:expr) => {
        match $dtype {
            DType::F64 => {
                type $type = f64;
                $call
            }
            DType::F32 => {
                type $type = f32;
                $call
            }
            DType::Bf16 => {
                type $type = bf16;
                $call
            }
            DType::F16 => {
                type $type = f16;
                $call
            }
        }
    };
}

/// Reads the elements `span` of `operand`, in logical order, into `target`.
///
/// # Safety
/// `operand`, walked by `steps`, is readable at each index of `span`, and `target` is as long.
pub(crate) unsafe fn decode<C: Compute>(
    operand: Operand,
    steps: Steps<'_>,
    span: Range<usize>,
    target: &mut [C],
    isa: Isa,
) {
    with_element!(operand.dtype, T => {
        let ptr: *const T = operand.ptr.cast_const().cast();
        for run in steps.runs(span) {
            isa.run(DecodeRun { ptr, target: &mut target[run.target.clone()], run });
        }
    });
}

/// Writes `source` to the elements `span` of `operand`, in logical order.
///
/// # Safety
/// `operand`, walked by `steps`, is writable at each index of `span`, and `source` is as long.
pub(crate) unsafe fn encode<C: Compute>(
    operand: Operand,
    steps: Steps<'_>,
    span: Range<usize>,
    source: &[C],
    isa: Isa,
) {
    with_element!(operand.dtype, T => {
        let ptr: *mut T = operand.ptr.cast();
        for run in steps.runs(span) {
            isa.run(EncodeRun { ptr, source: &source[run.target.clone()], run });
        }
    });
}

/// As `encode`, but for the elements alone whose flag is set: the others keep their very bits.
///
/// # Safety
/// As for `encode`; there are as many flags.
pub(crate) unsafe fn encode_where<C: Compute>(
    operand: Operand,
    steps: Steps<'_>,
    span: Range<usize>,
    (source, active): (&[C], &[bool]),
    isa: Isa,
) {
    with_element!(operand.dtype, T => {
        let ptr: *mut T = operand.ptr.cast();
        for run in steps.runs(span) {
            let part = run.target.clone();
            isa.run(EncodeWhere { ptr, source: &source[part.clone()], active: &active[part], run });
        }
    });
}

/// The number of elements of `values` that are equal to an element of `min` or of `max` in the same
/// place, all of them as a tensor of this dtype stores them.
pub(crate) fn count_equal<C: Compute>(
    dtype: DType,
    values: &[C],
    min: &[C],
    max: &[C],
    isa: Isa,
) -> usize {
    with_element!(dtype, T => {
        isa.run(CountEqual { values, min, max, stored: |x: C| C::decode(x.encode::<T>()) })
    })
}

/// Made only by `decode`, whose contract makes the run readable.
struct DecodeRun<'a, T, C> {
    ptr: *const T,
    run: Run,
    target: &'a mut [C],
}

impl<T: Element, C: Compute> Kernel for DecodeRun<'_, T, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        // SAFETY: the run starts inside the operand, as `decode`'s contract says.
        let first = unsafe { self.ptr.offset(self.run.offset) };
        if self.run.stride == 1 && first.is_aligned() {
            // SAFETY: these are consecutive, aligned elements, readable by `decode`'s contract;
            // scratch, which is written meanwhile, is memory of our own.
            let source = unsafe { std::slice::from_raw_parts(first, self.target.len()) };
            for (x, y) in source.iter().zip(self.target) {
                *y = C::decode(*x);
            }
            return;
        }
        for (i, y) in self.target.iter_mut().enumerate() {
            // SAFETY: element `i` of the run lies inside the operand.
            let x = unsafe { first.offset(i as isize * self.run.stride) };
            // SAFETY: it is readable; nothing is asked of its alignment.
            *y = C::decode(unsafe { x.read_unaligned() });
        }
    }
}

/// Made only by `encode`, whose contract makes the run writable.
struct EncodeRun<'a, T, C> {
    ptr: *mut T,
    run: Run,
    source: &'a [C],
}

impl<T: Element, C: Compute> Kernel for EncodeRun<'_, T, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        // SAFETY: the run starts inside the operand, as `encode`'s contract says.
        let first = unsafe { self.ptr.offset(self.run.offset) };
        if self.run.stride == 1 && first.is_aligned() {
            // SAFETY: these are consecutive, aligned elements, writable by `encode`'s contract;
            // scratch, which is read meanwhile, is memory of our own.
            let target = unsafe { std::slice::from_raw_parts_mut(first, self.source.len()) };
            for (x, y) in self.source.iter().zip(target) {
                *y = x.encode();
            }
            return;
        }
        for (i, x) in self.source.iter().enumerate() {
            // SAFETY: element `i` of the run lies inside the operand.
            let y = unsafe { first.offset(i as isize * self.run.stride) };
            // SAFETY: it is writable; nothing is asked of its alignment.
            unsafe { y.write_unaligned(x.encode()) };
        }
    }
}

/// Made only by `encode_where`, whose contract makes the run readable and writable.
struct EncodeWhere<'a, T, C> {
    ptr: *mut T,
    run: Run,
    source: &'a [C],
    active: &'a [bool],
}

impl<T: Element, C: Compute> Kernel for EncodeWhere<'_, T, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        // SAFETY: the run starts inside the operand, as `encode_where`'s contract says.
        let first = unsafe { self.ptr.offset(self.run.offset) };
        if self.run.stride == 1 && first.is_aligned() {
            // SAFETY: these are consecutive, aligned elements, ours by `encode_where`'s contract;
            // scratch, which is read meanwhile, is memory of our own.
            let target = unsafe { std::slice::from_raw_parts_mut(first, self.source.len()) };
            for ((x, &active), y) in self.source.iter().zip(self.active).zip(target) {
                *y = if active { x.encode() } else { *y };
            }
            return;
        }
        let all = self.source.iter().zip(self.active).enumerate();
        for (i, (x, _)) in all.filter(|(_, (_, active))| **active) {
            // SAFETY: element `i` of the run lies inside the operand.
            let y = unsafe { first.offset(i as isize * self.run.stride) };
            // SAFETY: it is writable; nothing is asked of its alignment.
            unsafe { y.write_unaligned(x.encode()) };
        }
    }
}

struct CountEqual<'a, C, F> {
    values: &'a [C],
    min: &'a [C],
    max: &'a [C],
    stored: F,
}

impl<C: Compute, F: Fn(C) -> C> Kernel for CountEqual<'_, C, F> {
    type Output = usize;

    #[inline(always)]
    fn run(self) -> usize {
        let mut count: u32 = 0; // of one block
        for ((&x, &min), &max) in self.values.iter().zip(self.min).zip(self.max) {
            let x = (self.stored)(x);
            count += u32::from((x == (self.stored)(min)) | (x == (self.stored)(max)));
        }
        count as usize
    }
}
