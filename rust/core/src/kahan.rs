//! A value as the sum of two numbers of its dtype: itself, and what its rounding left over.

use std::marker::PhantomData;

use crate::codec::with_element;
use crate::element::Compute;
use crate::isa::{Isa, Kernel};
use crate::{DType, Element};

/// Adds what was left over, where it was left over by this very value: a value that somebody has
/// written since is taken as it is, unless it is as near to the sum as any other.
pub(crate) fn complete<C: Compute>(dtype: DType, value: &mut [C], left_over: &[C], isa: Isa) {
    with_element!(dtype, T => {
        isa.run(Complete { value, left_over, dtype: PhantomData::<T> });
    });
}

/// Splits each value into what is stored and what is left over, in the place of the former stored
/// value. That one stays where none is nearer, so that what did not change is not written anew.
pub(crate) fn split<C: Compute>(dtype: DType, value: &mut [C], left_over: &mut [C], isa: Isa) {
    with_element!(dtype, T => {
        isa.run(Split { value, left_over, dtype: PhantomData::<T> });
    });
}

struct Complete<'a, T, C> {
    value: &'a mut [C],
    left_over: &'a [C],
    dtype: PhantomData<T>,
}

impl<T: Element, C: Compute> Kernel for Complete<'_, T, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (x, &left_over) in self.value.iter_mut().zip(self.left_over) {
            let sum = *x + left_over;
            let is_of_this = distance(sum, *x) <= distance(sum, rounded::<T, C>(sum));
            *x = if is_of_this { sum } else { *x };
        }
    }
}

struct Split<'a, T, C> {
    value: &'a mut [C],
    /// Before, the stored value.
    left_over: &'a mut [C],
    dtype: PhantomData<T>,
}

impl<T: Element, C: Compute> Kernel for Split<'_, T, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (x, former) in self.value.iter_mut().zip(self.left_over) {
            let sum = *x;
            let nearest = rounded::<T, C>(sum);
            // From infinity every number is equally far.
            let stays = is_finite(nearest) & (distance(sum, *former) <= distance(sum, nearest));
            let stored = if stays { *former } else { nearest };
            let left_over = sum - stored;
            *x = stored;
            *former = if is_finite(left_over) { left_over } else { C::default() };
        }
    }
}

#[inline(always)]
fn rounded<T: Element, C: Compute>(x: C) -> C {
    C::decode(x.encode::<T>())
}

#[inline(always)]
fn is_finite<C: Compute>(x: C) -> bool {
    x * C::default() == C::default()
}

#[inline(always)]
fn distance<C: Compute>(a: C, b: C) -> C {
    if a < b { b - a } else { a - b }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    fn completed(dtype: DType, value: f32, left_over: f32) -> f32 {
        let mut sum = [value];
        complete(dtype, &mut sum, &[left_over], Isa::detect());
        sum[0]
    }

    /// What is stored, and what is left over.
    fn divided(dtype: DType, sum: f32, former: f32) -> (f32, f32) {
        let (mut value, mut left_over) = ([sum], [former]);
        split(dtype, &mut value, &mut left_over, Isa::detect());
        (value[0], left_over[0])
    }

    #[test]
    fn a_sum_that_was_split_is_completed_to_itself() {
        for bits in (0..0x7f7f_0000u32).step_by(0x1_2345) {
            for (dtype, greatest) in [(DType::Bf16, f32::MAX), (DType::F16, 65_504.0)] {
                let sum = f32::from_bits(bits);
                let (value, left_over) = divided(dtype, sum, 0.0);
                if sum <= greatest && bits >= 1 << 23 {
                    assert_eq!(completed(dtype, value, left_over), sum, "{dtype} {bits:#x}");
                }
            }
        }
    }

    #[test]
    fn what_another_value_left_over_moves_nothing() {
        let place = 2f32.powi(-7); // of bf16 from 1 on
        assert_eq!(completed(DType::Bf16, 1.0, place * 0.51), 1.0);
        assert_eq!(completed(DType::Bf16, 1.0, place * 0.5), 1.0 + place * 0.5);
        assert_eq!(completed(DType::Bf16, 1.0, place * -0.25), 1.0 - place * 0.25);
        assert_eq!(completed(DType::Bf16, 1.0, place * -0.26), 1.0);
        assert_eq!(completed(DType::F16, 3.0, -4.0), 3.0);
        assert_eq!(completed(DType::F16, 0.0, 1e-3), 0.0);
        assert_eq!(completed(DType::Bf16, 1.0, f32::NAN), 1.0);
        assert_eq!(completed(DType::Bf16, 1.0, f32::INFINITY), 1.0);
        assert_eq!(completed(DType::Bf16, f32::INFINITY, 1.0), f32::INFINITY);
    }

    #[test]
    fn a_value_stays_where_no_other_is_nearer() {
        let place = 2f32.powi(-7);
        let odd = 1.0 + place; // a tie goes to the even neighbour
        assert_eq!(divided(DType::Bf16, odd + place * 0.5, odd), (odd, place * 0.5));
        let even = odd + place;
        assert_eq!(divided(DType::Bf16, odd + place * 0.5, 9.0), (even, place * -0.5));
        assert_eq!(divided(DType::Bf16, odd + place * 0.51, odd).0, even);
        assert_eq!(divided(DType::Bf16, 0.0, -0.0).0.to_bits(), (-0.0f32).to_bits());
    }

    #[test]
    fn what_is_too_large_becomes_infinite_and_leaves_nothing_over() {
        for former in [0.0, 1.0, 65_504.0] {
            assert_eq!(divided(DType::F16, 65_520.0, former), (f32::INFINITY, 0.0));
            assert_eq!(divided(DType::F16, -1e9, former), (f32::NEG_INFINITY, 0.0));
            assert_eq!(divided(DType::Bf16, f32::MAX, former), (f32::INFINITY, 0.0));
        }
        assert_eq!(divided(DType::F16, 65_519.0, 1.0), (65_504.0, 15.0));
        let (value, left_over) = divided(DType::Bf16, f32::NAN, 1.0);
        assert!(value.is_nan() && left_over == 0.0);
    }

    #[test]
    fn what_is_left_over_is_at_most_half_a_place() {
        for bits in (0..0x7c00u16).step_by(7) {
            let (low, high) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
            let sum = low + (high - low) * 0.4;
            if high.is_finite() {
                assert_eq!(divided(DType::F16, sum, high).0, low);
                assert!(divided(DType::F16, sum, high).1 <= (high - low) * 0.5);
            }
            let stored = bf16::from_bits(bits).to_f32();
            assert_eq!(divided(DType::Bf16, stored, 7.0), (stored, 0.0));
        }
    }
}
