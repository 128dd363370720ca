//! Norm, scale and clamp against their slow twins.

mod reference;

use std::num::NonZeroUsize;

use paramstate::{
    Bounds, DType, Execution, OwnedBuffer, View, ViewLayout, clamp, scale, sum_of_squares,
};
use proptest::prelude::*;
use reference::{
    any_bounds, any_dtype, assert_same, copy, executions, filled, get, numbers, offsets,
    operand_at, set, stored,
};

/// A dense tensor, or every third element of a transposed one.
#[derive(Debug)]
struct Case {
    buffer: OwnedBuffer,
    skip: usize,
    layout: ViewLayout,
}

impl Case {
    fn view(&self, buffer: &OwnedBuffer) -> View {
        View { operand: operand_at(buffer, self.skip), layout: self.layout.clone() }
    }

    fn offsets(&self) -> Vec<usize> {
        let offsets = match &self.layout {
            ViewLayout::Flat { len } => (0..*len as isize).collect(),
            ViewLayout::Strided { shape, strides } => offsets(shape, strides),
        };
        offsets.into_iter().map(|offset| offset as usize + self.skip).collect()
    }

    /// Each element changed by itself, in `f32` or `f64`.
    fn changed(&self, single: impl Fn(f32) -> f32, double: impl Fn(f64) -> f64) -> OwnedBuffer {
        let mut after = copy(&self.buffer);
        let dtype = self.buffer.dtype();
        for offset in self.offsets() {
            let x = get(&self.buffer, offset);
            let new = if dtype == DType::F64 { double(x) } else { single(x as f32).into() };
            set(&mut after, offset, stored(dtype, new));
        }
        after
    }
}

fn any_case() -> impl Strategy<Value = Case> {
    let len = prop_oneof![
        8 => 0usize..70,
        2 => 1_020usize..1_030,
        1 => 65_530usize..65_542,
        1 => 131_070usize..131_074
    ];
    (any_dtype(), len, any::<bool>(), 0usize..3, any::<u64>()).prop_map(
        |(dtype, len, strided, skip, seed)| {
            let layout = if strided && len < 60_000 {
                ViewLayout::Strided { shape: vec![2, len], strides: vec![1, 3] }
            } else {
                ViewLayout::Flat { len }
            };
            let numbers: Vec<f64> = numbers(seed, 3 * len + 8).collect();
            Case { buffer: filled(dtype, numbers.into_iter()), skip, layout }
        },
    )
}

fn any_cases() -> impl Strategy<Value = Vec<Case>> {
    prop::collection::vec(any_case(), 0..6)
}

fn fewer() -> ProptestConfig {
    let config = ProptestConfig::default();
    ProptestConfig { cases: config.cases.div_ceil(8), ..config }
}

proptest! {
    #![proptest_config(fewer())]

    #[test]
    fn scale_multiplies_each_element_once(cases in any_cases(), by in -2.0..2.0f64) {
        for execution in executions() {
            let actual: Vec<_> = cases.iter().map(|case| copy(&case.buffer)).collect();
            let views: Vec<_> = cases.iter().zip(&actual).map(|(c, b)| c.view(b)).collect();
            // SAFETY: every view has a buffer of its own, as long as its offsets reach.
            unsafe { scale(&views, by, &execution) };
            for (case, actual) in cases.iter().zip(&actual) {
                let expected = case.changed(|x| x * by as f32, |x| x * by);
                assert_same(actual, &expected, &format!("scale on {execution:?}"));
            }
        }
    }

    #[test]
    fn clamp_moves_what_lies_outside_and_leaves_nan(cases in any_cases(), bounds in any_bounds()) {
        let Bounds { min, max } = bounds;
        for execution in executions() {
            let actual: Vec<_> = cases.iter().map(|case| copy(&case.buffer)).collect();
            let views: Vec<_> = cases.iter().zip(&actual).map(|(c, b)| (c.view(b), bounds)).collect();
            // SAFETY: as above.
            unsafe { clamp(&views, &execution) };
            for (case, actual) in cases.iter().zip(&actual) {
                let single = |x: f32| if x.is_nan() { x } else {
                    x.clamp(min.map_or(f32::NEG_INFINITY, |x| x as f32), max.map_or(f32::INFINITY, |x| x as f32))
                };
                let double = |x: f64| if x.is_nan() { x } else {
                    x.clamp(min.unwrap_or(f64::NEG_INFINITY), max.unwrap_or(f64::INFINITY))
                };
                assert_same(actual, &case.changed(single, double), &format!("clamp on {execution:?}"));
            }
        }
    }

    #[test]
    fn the_sum_of_squares_has_one_value_for_all_executions(cases in any_cases()) {
        let views: Vec<_> = cases.iter().map(|case| case.view(&case.buffer)).collect();
        let elements: Vec<f64> =
            cases.iter().flat_map(|c| c.offsets().into_iter().map(|i| get(&c.buffer, i))).collect();
        let plain: f64 = elements.iter().map(|x| x * x).sum();
        let mut bits = Vec::new();
        for execution in executions() {
            // SAFETY: as above; nothing is written.
            let sum = unsafe { sum_of_squares(&views, &execution) };
            let close = (sum - plain).abs() <= 1e-12 * plain;
            prop_assert!(close || sum == plain || (sum.is_nan() && plain.is_nan()), "{sum} {plain}");
            bits.push(if sum.is_nan() { 0 } else { sum.to_bits() });
        }
        bits.dedup();
        prop_assert_eq!(bits.len(), 1);
    }
}

#[test]
fn squares_of_the_largest_float32_do_not_overflow() {
    let buffer = filled(DType::F32, vec![f64::from(f32::MAX); 3].into_iter());
    let view = View { operand: buffer.operand(), layout: ViewLayout::Flat { len: 3 } };
    // SAFETY: three elements of a buffer that lives until the end.
    let sum = unsafe { sum_of_squares(&[view], &Execution::new(NonZeroUsize::MIN)) };
    assert_eq!(sum, 3.0 * f64::from(f32::MAX).powi(2));
}
