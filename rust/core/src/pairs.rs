//! The update where everything is bfloat16, two elements at a time.
//!
//! A word of 32 bits holds two neighbours. Each half is a `f32` when the other is shifted out or masked, and goes back
//! the same way: nothing is widened or narrowed, which costs a vector of 16-bit numbers more than the arithmetic does.

use crate::element::{nearest_bf16, random_bf16};
use crate::fused::Keys;
use crate::isa::Kernel;
use crate::random::word;
use crate::slices::Slices;
use crate::update::Scalars;

/// Neighbours in memory, each pair in a word. Value and moments are rounded at random, or to the nearest.
pub(crate) struct Pairs<'a, const RANDOM: bool> {
    pub slices: Slices<'a, u32, u32>,
    pub scalars: Scalars<f32>,
    pub keys: Keys,
}

impl<const RANDOM: bool> Kernel for Pairs<'_, RANDOM> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { slices, scalars, keys } = self;
        if scalars.has_l2_decay() {
            steps::<RANDOM, true>(slices, scalars, keys);
        } else {
            steps::<RANDOM, false>(slices, scalars, keys);
        }
    }
}

#[inline(always)]
fn steps<const RANDOM: bool, const L2: bool>(
    slices: Slices<'_, u32, u32>,
    scalars: Scalars<f32>,
    mut keys: Keys,
) {
    let (strides, rest) = slices.strides();
    for Slices { value, grad, exp_avg, exp_avg_sq } in strides {
        let len = 2 * value.len();
        step::<RANDOM, L2>(value, grad, exp_avg, exp_avg_sq, scalars, keys);
        keys.first = keys.first.wrapping_add(len as u32);
    }
    let Slices { value, grad, exp_avg, exp_avg_sq } = rest;
    step::<RANDOM, L2>(value, grad, exp_avg, exp_avg_sq, scalars, keys);
}

/// The index, within its pair, of the element in the lower half of a word.
const LOWER: u32 = if cfg!(target_endian = "little") { 0 } else { 1 };

#[inline(always)]
fn step<const RANDOM: bool, const L2: bool>(
    value: &mut [u32],
    grad: &[u32],
    exp_avg: &mut [u32],
    exp_avg_sq: &mut [u32],
    scalars: Scalars<f32>,
    keys: Keys,
) {
    let all = value.iter_mut().zip(grad).zip(exp_avg).zip(exp_avg_sq).enumerate();
    for (i, (((value, grad), exp_avg), exp_avg_sq)) in all {
        let index = keys.first.wrapping_add(2 * i as u32);
        let old = [*value, *grad, *exp_avg, *exp_avg_sq];
        let lower = old.map(|word| word << 16);
        let upper = old.map(|word| word & UPPER);
        let lower = one::<RANDOM, L2>(lower, scalars, keys, index.wrapping_add(LOWER));
        let upper = one::<RANDOM, L2>(upper, scalars, keys, index.wrapping_add(1 - LOWER));
        *value = lower[0] >> 16 | upper[0] & UPPER;
        *exp_avg = lower[1] >> 16 | upper[1] & UPPER;
        *exp_avg_sq = lower[2] >> 16 | upper[2] & UPPER;
    }
}

const UPPER: u32 = 0xffff_0000;

/// Value, first and second moment of one element, each in the upper half of a word.
#[inline(always)]
fn one<const RANDOM: bool, const L2: bool>(
    old: [u32; 4],
    scalars: Scalars<f32>,
    keys: Keys,
    index: u32,
) -> [u32; 3] {
    let [p, grad, m, v] = old.map(f32::from_bits);
    let (m, v) = scalars.moments::<L2>(p, grad, m, v);
    let p = scalars.value(p, m, v);
    if !RANDOM {
        return [p, m, v].map(nearest_bf16);
    }
    let random = word(keys.moments, index);
    [
        random_bf16(p, word(keys.value, index) & 0xffff),
        random_bf16(m, random >> 16),
        random_bf16(v, random & 0xffff),
    ]
}
