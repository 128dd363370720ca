//! Updates whose results are not each dtype's nearest number, against a slow twin, for every
//! instruction set that this machine has.

mod precision_twin;
mod reference;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use paramstate::{Adam, DType, Order, OwnedBuffer, SecondMoment, adam_step};
use precision_twin::Key;
use precision_twin::case::{Case, Kind, Limits, Memory, NAMES, SIDES};
use proptest::prelude::*;
use reference::{
    any_adam, any_bounds, any_dtype, any_grad_strides, any_strides, assert_same, executions, get,
    set,
};

/// A NaN of the signed format has two codes; here it has one.
fn known(buffer: &OwnedBuffer) -> OwnedBuffer {
    let mut buffer = reference::copy(buffer);
    if buffer.dtype() == DType::E4M3 {
        for i in 0..buffer.len() {
            let code = get(&buffer, i);
            set(&mut buffer, i, if code == 255.0 { 127.0 } else { code });
        }
    }
    buffer
}

fn assert_memory(actual: &Memory, expected: &Memory, what: &str) {
    for ((actual, expected), name) in actual.sides.iter().zip(&expected.sides).zip(NAMES) {
        assert_same(&known(actual), &known(expected), &format!("{name} {what}"));
    }
    for (i, (actual, expected)) in actual.scales.iter().zip(&expected.scales).enumerate() {
        assert_same(actual, expected, &format!("scales of {} {what}", NAMES[i + 2]));
    }
}

/// Runs the cases in one call for each execution, and in reverse order, against the slow twin.
fn check(cases: &[Case]) {
    let before: Vec<_> = cases.iter().map(Case::memory).collect();
    let expected: Vec<_> = cases.iter().zip(&before).map(|(c, b)| c.expected(b)).collect();
    let limits: Vec<_> = cases.iter().map(Case::limit_views).collect();
    for execution in executions() {
        for reversed in
            [false, true].into_iter().take(if execution.threads.get() == 2 { 2 } else { 1 })
        {
            let actual: Vec<_> = before.iter().map(Memory::copy).collect();
            let counts: Vec<_> = cases.iter().map(|_| Arc::new(AtomicUsize::new(0))).collect();
            let mut tasks: Vec<_> = (0..cases.len())
                .map(|i| cases[i].task(&actual[i], &limits[i], &counts[i]))
                .collect();
            if reversed {
                tasks.reverse();
            }
            // SAFETY: every task has buffers of its own, as long as its offsets reach.
            unsafe { adam_step(&tasks, Order::Parallel, &execution) };
            for (i, (expected, count)) in expected.iter().enumerate() {
                assert_memory(&actual[i], expected, &format!("on {execution:?}"));
                if cases[i].limits.is_some() {
                    assert_eq!(counts[i].load(Ordering::Relaxed), *count, "{execution:?}");
                }
            }
        }
    }
}

type Types = ([DType; SIDES - 1], bool);

/// Value and moments for which there is a loop of their own, with each rounding that it takes.
fn fused(of: &Case) -> Vec<Case> {
    use DType::{Bf16, E4M3, F16, F32};
    let types =
        [(F32, Bf16), (Bf16, Bf16), (Bf16, F32), (F16, F16), (F16, F32), (F32, E4M3), (Bf16, E4M3)];
    let kinds = [Kind::Nearest, Kind::Stochastic, Kind::Kahan];
    let all = types.into_iter().flat_map(|types| kinds.map(|kind| (types, kind)));
    let all = all.flat_map(|how| [false, true].map(|random_moments| (how, random_moments)));
    all.map(|(((value, moments), kind), random_moments)| Case {
        dtypes: [value, value, moments, moments, moments],
        blockwise: moments.is_blockwise(),
        kind,
        random_moments,
        indices: None,
        adam: Adam { second_moment: SecondMoment::Running, ..of.adam },
        ..of.clone()
    })
    .collect()
}

/// What models are trained in: 16-bit moments, or those of 8 bits, or `f32`.
fn usual_types() -> impl Strategy<Value = Types> {
    use DType::{Bf16, F16, F32};
    let of = |value, moments, blockwise| ([value, value, moments, moments, moments], blockwise);
    let types = vec![
        of(F32, Bf16, false),
        of(Bf16, Bf16, false),
        of(Bf16, F32, false),
        of(F16, F16, false),
        of(F16, F32, false),
        of(F32, F32, true),
        of(Bf16, F32, true),
    ];
    (prop::sample::select(types), prop::option::weighted(0.3, any_dtype())).prop_map(
        |((mut dtypes, blockwise), grad)| {
            dtypes[1] = grad.unwrap_or(dtypes[1]);
            (dtypes, blockwise)
        },
    )
}

fn any_types() -> impl Strategy<Value = Types> {
    prop_oneof![3 => usual_types(), 1 => (prop::array::uniform5(any_dtype()), any::<bool>())]
}

type Place = ([usize; 3], Option<[Vec<isize>; SIDES]>);

fn flat(lens: impl Strategy<Value = usize>) -> impl Strategy<Value = Place> {
    lens.prop_map(|len| ([1, len, 1], None))
}

fn rows(shape: impl Strategy<Value = [usize; 3]>) -> impl Strategy<Value = Place> {
    shape.prop_map(|shape| (shape, None))
}

fn strided(size: std::ops::Range<usize>) -> impl Strategy<Value = Place> {
    prop::array::uniform3(size).prop_flat_map(|shape| {
        let sides = (
            any_strides(shape),
            any_grad_strides(shape),
            any_strides(shape),
            any_strides(shape),
            any_strides(shape),
            any_strides(shape),
        );
        sides.prop_map(move |(a, b, c, d, e, f)| (shape, Some([a, b, c, d, e, f])))
    })
}

fn any_kind() -> impl Strategy<Value = Kind> {
    prop::sample::select(vec![Kind::Nearest, Kind::Stochastic, Kind::Kahan])
}

fn any_key() -> impl Strategy<Value = Key> {
    (any::<u64>(), 1u64.., prop_oneof![9 => 4u64..100, 1 => Just(1 << 40)])
        .prop_map(|(seed, id, step)| Key { seed, id: id & (u64::MAX >> 1) | 1, step })
}

/// The first index, often near a border of 32 bits.
fn any_first() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), (0u64..1 << 34), (0u64..2_000).prop_map(|back| (1 << 32) - back)]
}

/// A case whose elements are all alike.
fn plain_case(
    types: impl Strategy<Value = Types>,
    place: impl Strategy<Value = Place>,
) -> impl Strategy<Value = Case> {
    (types, place).prop_flat_map(|((dtypes, blockwise), (shape, strides))| {
        let indices = prop::option::weighted(0.3, any_strides(shape));
        let stream = (any_key(), any_first(), indices);
        let how = (any_kind(), any::<bool>(), 0usize..3);
        let coefficient = prop_oneof![6 => Just(1.0), 2 => Just(0.25), 1 => Just(f64::NAN)];
        let update = (any_adam(), any_bounds(), coefficient);
        let data = (prop::bool::weighted(0.4), any::<u64>());
        (how, stream, update, data).prop_map(move |(how, stream, update, (wild, seed))| {
            let (kind, random_moments, skip) = how;
            let (key, first, indices) = stream;
            let (adam, bounds, coefficient) = update;
            Case {
                dtypes,
                blockwise,
                shape,
                strides: strides.clone(),
                skip,
                kind,
                random_moments,
                key,
                first,
                indices,
                adam,
                coefficient,
                bounds,
                rows: None,
                limits: None,
                wild,
                seed,
            }
        })
    })
}

/// Blocks of rows that differ, or rows in any order; a few offsets or one for each row.
fn any_rows(count: usize) -> impl Strategy<Value = Vec<(i64, bool)>> {
    let row = (0i64..4, prop::bool::weighted(0.3));
    let blocks = prop::collection::vec((1usize..200, row.clone()), 1..8).prop_map(move |blocks| {
        let rows = blocks.into_iter().cycle().flat_map(|(len, row)| std::iter::repeat_n(row, len));
        rows.take(count).collect::<Vec<_>>()
    });
    let distinct = any::<u64>().prop_map(move |seed| {
        (0..count as i64)
            .map(|row| ((row * 37) % 613 - 610, (row as u64 ^ seed).is_multiple_of(3)))
            .collect()
    });
    prop_oneof![4 => blocks, 4 => prop::collection::vec(row, count), 1 => distinct]
}

fn any_limits() -> impl Strategy<Value = Limits> {
    let varies = || prop::option::weighted(0.7, prop::array::uniform3(any::<bool>()));
    (any_dtype(), varies(), varies(), any::<bool>()).prop_map(|(dtype, low, high, zero)| Limits {
        dtype,
        low,
        high,
        zero,
    })
}

/// A case with rows of several ages, bounds of each element, or both.
fn particular_case(place: impl Strategy<Value = Place>) -> impl Strategy<Value = Case> {
    plain_case(any_types(), place).prop_flat_map(|case| {
        let shape = case.shape;
        let rows = (0usize..3)
            .prop_flat_map(move |dim| any_rows(shape[dim]).prop_map(move |rows| (dim, rows)));
        (prop::option::weighted(0.8, rows), prop::option::of(any_limits()))
            .prop_map(move |(rows, limits)| Case { rows, limits, ..case.clone() })
    })
}

/// Around the borders of a shared scale and of a block of scratch.
fn short() -> impl Strategy<Value = usize> {
    prop_oneof![3 => 0usize..140, 1 => 250usize..262, 1 => 1_020usize..1_030, 1 => 2_040usize..2_060]
}

/// Around the border of a chunk, long enough for workers to wake up.
fn long() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 65_530usize..65_542, 1 => 131_070usize..131_075]
}

/// Short rows and long ones, beyond a block of scratch in all.
fn shapes() -> impl Strategy<Value = [usize; 3]> {
    prop_oneof![
        4 => [0usize..5, 0usize..40, 1usize..5],
        2 => [1usize..3, 0usize..900, 1usize..4],
        1 => [1usize..3, 1usize..9, 120usize..1_100],
    ]
}

/// Few of the cases that take long. `PROPTEST_CASES` sets the number of all.
fn fewer() -> ProptestConfig {
    let config = ProptestConfig::default();
    ProptestConfig { cases: config.cases.div_ceil(32), ..config }
}

proptest! {
    #[test]
    fn every_loop_of_its_own_equals_the_slow_twin(
        case in plain_case(usual_types(), flat(0usize..140))
    ) {
        check(&fused(&case));
    }

    #[test]
    fn a_flat_tensor_of_the_usual_types_equals_the_slow_twin(
        case in plain_case(usual_types(), flat(short()))
    ) {
        check(&[case]);
    }

    #[test]
    fn any_types_and_any_layout_equal_the_slow_twin(
        case in plain_case(any_types(), prop_oneof![flat(short()), strided(0..6), strided(9..13)])
    ) {
        check(&[case]);
    }

    #[test]
    fn rows_of_several_ages_and_bounds_of_each_element_equal_the_slow_twin(
        case in particular_case(prop_oneof![rows(shapes()), strided(0..6), strided(9..13)])
    ) {
        check(&[case]);
    }
}

proptest! {
    #![proptest_config(fewer())]

    #[test]
    fn any_threads_and_any_order_of_parameters_give_the_same_bits(
        long in prop::collection::vec(plain_case(usual_types(), flat(long())), 1..3),
        short in prop::collection::vec(plain_case(any_types(), flat(short())), 1..20),
        strided in plain_case(any_types(), strided(39..43)),
        rows in particular_case(rows([1usize..2, 65_000usize..70_000, 1usize..3])),
    ) {
        let mut cases = long;
        cases.extend(short);
        cases.push(strided);
        cases.push(rows);
        check(&cases);
    }
}
