//! A value as the sum of two numbers of its dtype: itself, and what its rounding left over.

use std::marker::PhantomData;

use crate::codec::with_element;
use crate::element::Compute;
use crate::isa::{Isa, Kernel};
use crate::slices::Slices;
use crate::update::Scalars;
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
            *x = completed::<T, C>(*x, left_over);
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
            let (stored, left_over) = divided::<T, C>(*x, former.encode());
            (*x, *former) = (C::decode(stored), left_over);
        }
    }
}

/// The update in one loop: each value is completed, stepped and divided while it is at hand.
pub(crate) struct StepCompensated<'a, V, M> {
    pub slices: Slices<'a, V, M>,
    /// As long as these.
    pub left_over: &'a mut [V],
    pub scalars: Scalars<f32>,
}

impl<V: Element, M: Element> Kernel for StepCompensated<'_, V, M> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { slices: Slices { value, grad, exp_avg, exp_avg_sq }, left_over, scalars } = self;
        if scalars.has_l2_decay() {
            step::<V, M, true>(value, grad, exp_avg, exp_avg_sq, left_over, scalars);
        } else {
            step::<V, M, false>(value, grad, exp_avg, exp_avg_sq, left_over, scalars);
        }
    }
}

#[inline(always)]
fn step<V: Element, M: Element, const L2: bool>(
    value: &mut [V],
    grad: &[V],
    exp_avg: &mut [M],
    exp_avg_sq: &mut [M],
    left_over: &mut [V],
    scalars: Scalars<f32>,
) {
    let moments = exp_avg.iter_mut().zip(exp_avg_sq);
    for (((value, grad), (exp_avg, exp_avg_sq)), left_over) in
        value.iter_mut().zip(grad).zip(moments).zip(left_over)
    {
        let p = completed::<V, f32>(f32::decode(*value), f32::decode(*left_over));
        let (m, v) = scalars.moments::<L2>(
            p,
            f32::decode(*grad),
            f32::decode(*exp_avg),
            f32::decode(*exp_avg_sq),
        );
        let (stored, left) = divided::<V, f32>(scalars.value(p, m, v), *value);
        *value = stored;
        *exp_avg = m.encode();
        *exp_avg_sq = v.encode();
        *left_over = left.encode();
    }
}

/// The value of which `x` is stored and `left_over` was left.
#[inline(always)]
fn completed<T: Element, C: Compute>(x: C, left_over: C) -> C {
    let sum = x + left_over;
    let is_of_this = distance(sum, x) <= distance(sum, rounded::<T, C>(sum));
    if is_of_this { sum } else { x }
}

/// What is stored of `sum`, where `former` was stored before, and what is left over.
#[inline(always)]
fn divided<T: Element, C: Compute>(sum: C, former: T) -> (T, C) {
    let nearest: T = sum.encode();
    let near = C::decode(nearest);
    // From infinity every number is equally far.
    let stays = is_finite(near) & (distance(sum, C::decode(former)) <= distance(sum, near));
    let stored = if stays { former } else { nearest };
    let left_over = sum - C::decode(stored);
    (stored, if is_finite(left_over) { left_over } else { C::default() })
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
    (a - b).abs()
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    fn completed_in(dtype: DType, value: f32, left_over: f32) -> f32 {
        let mut sum = [value];
        complete(dtype, &mut sum, &[left_over], Isa::detect());
        sum[0]
    }

    /// What is stored, and what is left over.
    fn divided_in(dtype: DType, sum: f32, former: f32) -> (f32, f32) {
        let (mut value, mut left_over) = ([sum], [former]);
        split(dtype, &mut value, &mut left_over, Isa::detect());
        (value[0], left_over[0])
    }

    #[test]
    fn a_sum_that_was_split_is_completed_to_itself() {
        for bits in (0..0x7f7f_0000u32).step_by(0x1_2345) {
            for (dtype, greatest) in [(DType::Bf16, f32::MAX), (DType::F16, 65_504.0)] {
                let sum = f32::from_bits(bits);
                let (value, left_over) = divided_in(dtype, sum, 0.0);
                if sum <= greatest && bits >= 1 << 23 {
                    assert_eq!(completed_in(dtype, value, left_over), sum, "{dtype} {bits:#x}");
                }
            }
        }
    }

    #[test]
    fn what_another_value_left_over_moves_nothing() {
        let place = 2f32.powi(-7); // of bf16 from 1 on
        assert_eq!(completed_in(DType::Bf16, 1.0, place * 0.51), 1.0);
        assert_eq!(completed_in(DType::Bf16, 1.0, place * 0.5), 1.0 + place * 0.5);
        assert_eq!(completed_in(DType::Bf16, 1.0, place * -0.25), 1.0 - place * 0.25);
        assert_eq!(completed_in(DType::Bf16, 1.0, place * -0.26), 1.0);
        assert_eq!(completed_in(DType::F16, 3.0, -4.0), 3.0);
        assert_eq!(completed_in(DType::F16, 0.0, 1e-3), 0.0);
        assert_eq!(completed_in(DType::Bf16, 1.0, f32::NAN), 1.0);
        assert_eq!(completed_in(DType::Bf16, 1.0, f32::INFINITY), 1.0);
        assert_eq!(completed_in(DType::Bf16, f32::INFINITY, 1.0), f32::INFINITY);
    }

    #[test]
    fn a_value_stays_where_no_other_is_nearer() {
        let place = 2f32.powi(-7);
        let odd = 1.0 + place; // a tie goes to the even neighbour
        assert_eq!(divided_in(DType::Bf16, odd + place * 0.5, odd), (odd, place * 0.5));
        let even = odd + place;
        assert_eq!(divided_in(DType::Bf16, odd + place * 0.5, 9.0), (even, place * -0.5));
        assert_eq!(divided_in(DType::Bf16, odd + place * 0.51, odd).0, even);
        assert_eq!(divided_in(DType::Bf16, 0.0, -0.0).0.to_bits(), (-0.0f32).to_bits());
    }

    #[test]
    fn what_is_too_large_becomes_infinite_and_leaves_nothing_over() {
        for former in [0.0, 1.0, 65_504.0] {
            assert_eq!(divided_in(DType::F16, 65_520.0, former), (f32::INFINITY, 0.0));
            assert_eq!(divided_in(DType::F16, -1e9, former), (f32::NEG_INFINITY, 0.0));
            assert_eq!(divided_in(DType::Bf16, f32::MAX, former), (f32::INFINITY, 0.0));
        }
        assert_eq!(divided_in(DType::F16, 65_519.0, 1.0), (65_504.0, 15.0));
        let (value, left_over) = divided_in(DType::Bf16, f32::NAN, 1.0);
        assert!(value.is_nan() && left_over == 0.0);
    }

    #[test]
    fn what_is_left_over_is_at_most_half_a_place() {
        for bits in (0..0x7c00u16).step_by(7) {
            let (low, high) = (f16::from_bits(bits).to_f32(), f16::from_bits(bits + 1).to_f32());
            let sum = low + (high - low) * 0.4;
            if high.is_finite() {
                assert_eq!(divided_in(DType::F16, sum, high).0, low);
                assert!(divided_in(DType::F16, sum, high).1 <= (high - low) * 0.5);
            }
            let stored = bf16::from_bits(bits).to_f32();
            assert_eq!(divided_in(DType::Bf16, stored, 7.0), (stored, 0.0));
        }
    }
}
