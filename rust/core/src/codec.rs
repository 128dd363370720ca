//! Blocks of elements between memory of any dtype and layout, and dense scratch in the compute type.
//!
//! A loop that finds its operand in another dtype, out of order or unaligned works on such a block
//! while it lies in the first-level cache. Another encoding of state is another codec here.

use std::marker::PhantomData;
use std::ops::Range;

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
                type $type = half::bf16;
                $call
            }
            DType::F16 => {
                type $type = half::f16;
                $call
            }
            DType::E4M3 | DType::E5M3 | DType::E8M0 => {
                unreachable!("what means nothing without its scale is read with it")
            }
        }
    };
}
pub(crate) use with_element;

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

/// What is written, and how: each slice is as long as the first.
#[derive(Clone, Copy)]
pub(crate) struct Written<'a, C> {
    pub source: &'a [C],
    /// Where it is false, an element keeps its very bits.
    pub active: Option<&'a [bool]>,
    /// Rounds at random where there is one, else to the nearest.
    pub random: Option<Random<'a>>,
}

/// A word of random bits for each element, of which a number's rounding uses 16.
#[derive(Clone, Copy)]
pub(crate) struct Random<'a> {
    pub words: &'a [u32],
    pub shift: u32,
}

impl<'a, C> Written<'a, C> {
    /// All elements, rounded to the nearest.
    pub(crate) fn all(source: &'a [C]) -> Self {
        Self { source, active: None, random: None }
    }

    fn part(self, part: Range<usize>) -> Self {
        Self {
            source: &self.source[part.clone()],
            active: self.active.map(|active| &active[part.clone()]),
            random: self.random.map(|random| Random { words: &random.words[part], ..random }),
        }
    }
}

/// Writes to the elements `span` of `operand`, in logical order.
///
/// # Safety
/// `operand`, walked by `steps`, is readable and writable at each index of `span`, and as many are
/// written.
pub(crate) unsafe fn encode<C: Compute>(
    operand: Operand,
    steps: Steps<'_>,
    span: Range<usize>,
    written: Written<'_, C>,
    isa: Isa,
) {
    with_element!(operand.dtype, T => {
        let ptr: *mut T = operand.ptr.cast();
        for run in steps.runs(span) {
            isa.run(EncodeRun { ptr, written: written.part(run.target.clone()), run });
        }
    });
}

/// Each number as a tensor of this dtype holds it.
pub(crate) fn round_to<C: Compute>(dtype: DType, numbers: &mut [C], isa: Isa) {
    with_element!(dtype, T => isa.run(RoundTo { numbers, dtype: PhantomData::<T> }));
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

/// Made only by `encode`, whose contract makes the run readable and writable.
struct EncodeRun<'a, T, C> {
    ptr: *mut T,
    run: Run,
    written: Written<'a, C>,
}

impl<T: Element, C: Compute> Kernel for EncodeRun<'_, T, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Written { source, active, random } = self.written;
        match (active, random) {
            (None, None) => self.put(source.iter().map(|x| move |_| x.encode())),
            (Some(active), None) => self.put(
                source
                    .iter()
                    .zip(active)
                    .map(|(x, &active)| move |old| if active { x.encode() } else { old }),
            ),
            (None, Some(Random { words, shift })) => {
                self.put(
                    source
                        .iter()
                        .zip(words)
                        .map(|(x, word)| move |_| x.encode_at_random(word >> shift & 0xffff)),
                );
            }
            (Some(active), Some(Random { words, shift })) => {
                let all = source.iter().zip(active).zip(words);
                self.put(all.map(|((x, &active), word)| {
                    let bits = word >> shift & 0xffff;
                    move |old| if active { x.encode_at_random(bits) } else { old }
                }));
            }
        }
    }
}

impl<T: Element, C: Compute> EncodeRun<'_, T, C> {
    /// Gives each element of the run what its function makes of it.
    #[inline(always)]
    fn put<F: FnOnce(T) -> T>(&self, news: impl Iterator<Item = F>) {
        // SAFETY: the run starts inside the operand, as `encode`'s contract says.
        let first = unsafe { self.ptr.offset(self.run.offset) };
        if self.run.stride == 1 && first.is_aligned() {
            let len = self.written.source.len();
            // SAFETY: these are consecutive, aligned elements, ours by `encode`'s contract; scratch,
            // which is read meanwhile, is memory of our own.
            let target = unsafe { std::slice::from_raw_parts_mut(first, len) };
            for (y, new) in target.iter_mut().zip(news) {
                *y = new(*y);
            }
            return;
        }
        for (i, new) in news.enumerate() {
            // SAFETY: element `i` of the run lies inside the operand.
            let y = unsafe { first.offset(i as isize * self.run.stride) };
            // SAFETY: it is readable; nothing is asked of its alignment.
            let old = unsafe { y.read_unaligned() };
            // SAFETY: it is writable.
            unsafe { y.write_unaligned(new(old)) };
        }
    }
}

struct RoundTo<'a, T, C> {
    numbers: &'a mut [C],
    dtype: PhantomData<T>,
}

impl<T: Element, C: Compute> Kernel for RoundTo<'_, T, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for x in self.numbers {
            *x = C::decode(x.encode::<T>());
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
