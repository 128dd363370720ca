//! What holds of stored results whatever the numbers are: for shards, for parameters that do not
//! move, under bounds, over many steps.

mod precision_twin;
mod reference;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use paramstate::{
    Adam, AdamTask, Bounds, DType, Decay, Element, Execution, Layout, Order, OwnedBuffer, ParamId,
    Precision, Rounding, Scales, Stream, View, ViewLayout, adam_step, bf16, f16,
};
use precision_twin::case::{Case, Kind, Memory};
use precision_twin::{Key, split_mix};
use proptest::prelude::*;
use reference::{assert_same, get, operand_at, set};

fn execution() -> Execution {
    Execution::new(NonZeroUsize::new(2).unwrap())
}

fn run(tasks: &[AdamTask]) {
    // SAFETY: every test gives each task buffers of its own, which live until the call returns.
    unsafe { adam_step(tasks, Order::Parallel, &execution()) }
}

/// A flat tensor of finite numbers, AdamW without decay.
fn plain(value: DType, moments: DType, kind: Kind, len: usize, seed: u64) -> Case {
    Case {
        dtypes: [value, value, moments, moments, moments],
        blockwise: moments.is_blockwise(),
        shape: [1, len, 1],
        strides: None,
        skip: 0,
        kind,
        random_moments: true,
        key: Key { seed, id: 3, step: 9 },
        first: 0,
        indices: None,
        adam: Adam { decay: Decay::Decoupled, ..Adam::default() },
        coefficient: 1.0,
        bounds: Bounds::default(),
        rows: None,
        limits: None,
        wild: false,
        seed,
    }
}

fn any_plain(lens: std::ops::Range<usize>) -> impl Strategy<Value = Case> {
    use DType::{Bf16, E4M3, F16, F32};
    let types = vec![(F32, Bf16), (Bf16, Bf16), (F16, F16), (Bf16, F32), (F32, E4M3), (Bf16, E4M3)];
    let kinds = vec![Kind::Stochastic, Kind::Kahan];
    let kind = prop::sample::select(kinds);
    (prop::sample::select(types), kind, lens, any::<u64>())
        .prop_map(|((value, moments), kind, len, seed)| plain(value, moments, kind, len, seed))
}

fn stepped(case: &Case, before: &Memory) -> Memory {
    let after = before.copy();
    run(&[case.task(&after, &case.limit_views(), &Arc::new(AtomicUsize::new(0)))]);
    after
}

/// The elements from `start` on, as a parameter by itself.
fn part_of(memory: &Memory, start: usize, len: usize) -> Memory {
    let part = |buffer: &OwnedBuffer, start: usize, len: usize| {
        let numbers: Vec<f64> = (start..start + len).map(|i| get(buffer, i)).collect();
        reference::filled(buffer.dtype(), numbers.into_iter())
    };
    Memory {
        sides: memory.sides.each_ref().map(|side| part(side, start, len)),
        scales: memory.scales.each_ref().map(|side| part(side, start / 128, len.div_ceil(128))),
    }
}

proptest! {
    #[test]
    fn shards_give_what_the_whole_gives(case in any_plain(1..700), cut in 0usize..700) {
        let len = case.len();
        // A scale's elements are of one shard.
        let cut = if case.blockwise { cut / 128 * 128 } else { cut }.min(len);
        let before = case.memory();
        let whole = stepped(&case, &before);
        for (start, len) in [(0, cut), (cut, len - cut)] {
            if case.blockwise && start % 128 != 0 {
                continue;
            }
            let shard = Case { shape: [1, len, 1], first: start as u64, ..case.clone() };
            let after = stepped(&shard, &part_of(&before, start, len));
            let expected = part_of(&whole, start, len);
            for (actual, expected) in after.sides.iter().zip(&expected.sides) {
                assert_same(actual, expected, "a shard's side");
            }
            for (actual, expected) in after.scales.iter().zip(&expected.scales) {
                assert_same(actual, expected, "a shard's scales");
            }
        }
    }

    /// Rows of ten columns; the shard has columns 2 to 6 of rows 1 to 3.
    #[test]
    fn a_shard_of_columns_gives_what_the_whole_gives(case in any_plain(60..61)) {
        prop_assume!(!case.blockwise);
        let before = case.memory();
        let whole = stepped(&case, &before);
        let places: Vec<usize> = (1..4).flat_map(|row| (2..7).map(move |x| row * 10 + x)).collect();
        let shard_of = |memory: &Memory| Memory {
            sides: memory.sides.each_ref().map(|side| {
                let numbers: Vec<f64> = places.iter().map(|&i| get(side, i)).collect();
                reference::filled(side.dtype(), numbers.into_iter())
            }),
            scales: memory.scales.each_ref().map(reference::copy),
        };
        let indices = Some(vec![0, 10, 1]);
        let shard = Case { shape: [1, 3, 5], first: 12, indices, ..case.clone() };
        let after = stepped(&shard, &shard_of(&before));
        for (actual, expected) in after.sides.iter().zip(&shard_of(&whole).sides) {
            assert_same(actual, expected, "a shard's side");
        }
    }

    /// Minus zero alone may become zero, as in torch: it does where the direction is negative.
    #[test]
    fn without_a_learning_rate_every_value_keeps_its_bits(case in any_plain(1..400)) {
        let case = Case { adam: Adam { lr: 0.0, ..case.adam }, ..case };
        let mut before = case.memory();
        for i in 0..case.len() {
            let x = get(&before.sides[0], i);
            set(&mut before.sides[0], i, x + 0.0); // of minus zero, zero
        }
        let after = stepped(&case, &before);
        assert_same(&after.sides[0], &before.sides[0], "value");
    }

    #[test]
    fn bounds_hold_for_what_is_stored(case in any_plain(1..400), a in -0.4..0.4f64, b in -0.4..0.4f64) {
        let bounds = Bounds::new(Some(a.min(b)), Some(a.max(b))).unwrap();
        let adam = Adam { lr: 0.1, ..case.adam };
        let case = Case { adam, bounds, ..case };
        let after = stepped(&case, &case.memory());
        let stored = |bound: Option<f64>| reference::stored(case.dtype(0), bound.unwrap());
        for i in 0..case.len() {
            let x = get(&after.sides[0], i);
            prop_assert!(stored(bounds.min) <= x && x <= stored(bounds.max), "{x} in {bounds:?}");
        }
    }

    /// Of 8-bit moments what is read stays, where no neighbour outgrows it.
    #[test]
    fn rows_that_take_no_step_keep_all_they_have(case in any_plain(40..400), seed in any::<u64>()) {
        let skipped = |row: usize| split_mix(seed ^ row as u64).is_multiple_of(2);
        let rows = (0..case.len()).map(|row| (0, skipped(row))).collect();
        let case = Case { rows: Some((1, rows)), ..case };
        let mut before = case.memory();
        if case.blockwise {
            // Moments of about one size.
            let code = |i: usize, least: u64| (least + split_mix(seed ^ i as u64) % 32) as f64;
            for i in 0..before.sides[2].len() {
                set(&mut before.sides[2], i, code(i, 80));
                set(&mut before.sides[3], i, code(i, 200));
            }
            for i in 0..before.scales[0].len() {
                set(&mut before.scales[0], i, 122.0);
                set(&mut before.scales[1], i, 108.0);
            }
        }
        let after = stepped(&case, &before);
        let read = |memory: &Memory, side: usize, i: usize| match case.dtype(side) {
            dtype if dtype.is_blockwise() => precision_twin::decoded(
                dtype,
                get(&memory.sides[side], i) as u8,
                get(&memory.scales[side - 2], i / 128) as u8,
            ),
            _ => get(&memory.sides[side], i),
        };
        for side in [0, 2, 3, 5] {
            for i in (0..case.len()).filter(|&i| skipped(i)) {
                let (now, then) = (read(&after, side, i), read(&before, side, i));
                prop_assert_eq!(now.to_bits(), then.to_bits(), "side {} [{}]", side, i);
            }
        }
    }
}

/// Many steps of one tensor of ones whose gradients are ones, and the mean of its values after each.
fn means<T: Element>(
    kind: Kind,
    blockwise: bool,
    len: usize,
    (steps, lr): (u64, f64),
    mut look: impl FnMut(u64, &[T], f64, f64),
) {
    let one = |dtype| reference::filled(dtype, vec![1.0; len].into_iter());
    let (value, grad) = (one(T::DTYPE), one(T::DTYPE));
    let rest = OwnedBuffer::zeroed(T::DTYPE, len);
    let dtypes = if blockwise { [DType::E4M3, DType::E5M3] } else { [T::DTYPE; 2] };
    let moments = dtypes.map(|dtype| OwnedBuffer::zeroed(dtype, len));
    let scales = [0, 1].map(|_| OwnedBuffer::zeroed(DType::E8M0, len.div_ceil(128)));
    let adam = Adam { lr, ..Adam::default() };
    let layout = ViewLayout::Flat { len };
    let mut stream = Stream::new(5, ParamId::new(8).unwrap(), 0, layout.clone());
    for step in 1..=steps {
        stream.at_step(step);
        let view = View { operand: rest.operand(), layout: layout.clone() };
        let precision = Precision {
            value: match kind {
                Kind::Nearest => Rounding::Nearest,
                Kind::Stochastic => Rounding::Stochastic,
                Kind::Kahan => Rounding::Kahan(view),
            },
            random_moments: true,
            stream: stream.clone(),
            scales: blockwise.then(|| Scales {
                exp_avg: scales[0].operand(),
                exp_avg_sq: scales[1].operand(),
                max_exp_avg_sq: None,
            }),
        };
        run(&[AdamTask {
            value: operand_at(&value, 0),
            grad: grad.operand(),
            exp_avg: moments[0].operand(),
            exp_avg_sq: moments[1].operand(),
            max_exp_avg_sq: None,
            layout: Layout::Flat { len },
            scalars: adam.scalars(step as f64, 1.0),
            bounds: Bounds::default(),
            particulars: None,
            precision: Some(Box::new(precision)),
        }]);
        let mean =
            |buffer: &OwnedBuffer| (0..len).map(|i| get(buffer, i)).sum::<f64>() / len as f64;
        look(step, value.as_slice::<T>().unwrap(), mean(&value), mean(&rest));
    }
}

/// The gradient is 1 in each step, so that each step is as long as the learning rate.
#[test]
fn updates_far_below_a_place_are_not_lost() {
    const STEPS: u64 = 400;
    for kind in [Kind::Stochastic, Kind::Kahan] {
        for blockwise in [false, true] {
            let lr = 2f64.powi(-9) * 1e-2; // of half a place of bf16 below 1
            means::<bf16>(kind, blockwise, 4_096, (STEPS, lr), |step, _, mean, rest| {
                let (moved, expected) = (1.0 - mean - rest, lr * step as f64);
                assert!(
                    (moved - expected).abs() < 0.15 * lr * STEPS as f64,
                    "{kind:?} {step} {moved:e}"
                );
            });
        }
    }
    means::<bf16>(Kind::Nearest, false, 64, (STEPS, 2f64.powi(-9) * 1e-2), |_, _, mean, _| {
        assert_eq!(mean, 1.0); // what the others are for
    });
}

/// Ten thousand updates make up one place; moments are of `f32` in both, so that they are equal.
#[test]
fn a_value_and_its_compensation_follow_an_f32_value() {
    fn check<T: Element>(place: f64) {
        const STEPS: u64 = 600;
        let (len, lr) = (300, place * 1e-4);
        let ones = |dtype| reference::filled(dtype, vec![1.0; len].into_iter());
        let (value, twin) = (ones(T::DTYPE), ones(DType::F32));
        let rest = OwnedBuffer::zeroed(T::DTYPE, len);
        let moments = [0, 1, 2, 3].map(|_| OwnedBuffer::zeroed(DType::F32, len));
        let layout = ViewLayout::Flat { len };
        for step in 1..=STEPS {
            let numbers: Vec<f64> =
                (0..len as u64).map(|i| (split_mix(step ^ i << 32) >> 40) as f64 - 4e6).collect();
            let grad = reference::filled(DType::F32, numbers.into_iter());
            let view = View { operand: rest.operand(), layout: layout.clone() };
            let stream = Stream::new(0, ParamId::new(1).unwrap(), 0, layout.clone());
            let value_rounding = Rounding::Kahan(view);
            let kahan =
                Precision { value: value_rounding, random_moments: false, stream, scales: None };
            let task = |value: &OwnedBuffer, m: usize, precision| AdamTask {
                value: value.operand(),
                grad: grad.operand(),
                exp_avg: moments[m].operand(),
                exp_avg_sq: moments[m + 1].operand(),
                max_exp_avg_sq: None,
                layout: Layout::Flat { len },
                scalars: Adam { lr, ..Adam::default() }.scalars(step as f64, 1.0),
                bounds: Bounds::default(),
                particulars: None,
                precision,
            };
            run(&[task(&value, 0, Some(Box::new(kahan))), task(&twin, 2, None)]);
        }
        let mut moved: f64 = 0.0;
        for i in 0..len {
            let (sum, x) = (get(&value, i) + get(&rest, i), get(&twin, i));
            moved = moved.max((x - 1.0).abs());
            assert!((sum - x).abs() < 0.02 * place, "[{i}] {sum} {x}");
        }
        assert!(moved > 0.005 * place);
    }
    check::<bf16>(2f64.powi(-8));
    check::<f16>(2f64.powi(-11));
}

/// Of all elements alike, the mean goes where the number would have gone.
#[test]
fn rounding_at_random_is_right_on_average_over_elements_and_steps() {
    let lr = 2f64.powi(-11) * 0.037;
    let len = 1 << 14;
    means::<f16>(Kind::Stochastic, false, len, (40, lr), |step, values, mean, _| {
        // The standard deviation of a mean of so many, after so many steps of less than a place.
        let place = 2f64.powi(-11);
        let tolerance = 5.0 * place * (0.04 * step as f64 / len as f64).sqrt();
        let off = (1.0 - mean) - lr * step as f64;
        assert!(off.abs() < tolerance + 0.02 * lr * step as f64, "{step} {off:e}");
        assert!(values.iter().all(|x| (1.0 - f64::from(x.to_f32())) <= place * step as f64));
    });
}
