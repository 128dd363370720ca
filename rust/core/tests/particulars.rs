//! Rows of several ages and bounds of each element, against a slow twin that steps every element as
//! a parameter of its own.

mod reference;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use paramstate::{
    Adam, AdamTask, Bounds, Cohorts, DType, Layout, Operand, Order, OwnedBuffer, Particulars,
    RowSteps, SecondMoment, StridedLayout, View, ViewLayout, WhenBound, adam_step,
    gradient_squares, row_major, sum_of_squares,
};
use proptest::prelude::*;
use reference::{
    Point, any_adam, any_bounds, any_dtype, any_grad_strides, any_strides, assert_same, copy,
    executions, filled, get, numbers, offsets, operand_at, set, stored,
};

/// Value, gradient, first and second moment, maximum.
const SIDES: usize = 5;

#[derive(Debug)]
struct Case {
    dtypes: [DType; SIDES],
    shape: [usize; 3],
    /// `None`: flat.
    strides: Option<[Vec<isize>; SIDES]>,
    adam: Adam,
    step: f64,
    coefficient: f64,
    bounds: Bounds,
    /// The dimension of the rows, and of each row its offset and whether it is skipped.
    rows: Option<(usize, Vec<(i64, bool)>)>,
    limits: Option<Limits>,
    seed: u64,
}

/// Bounds of each element, along some dimensions the same for all.
#[derive(Clone, Debug)]
struct Limits {
    dtype: DType,
    low: Option<[bool; 3]>,
    high: Option<[bool; 3]>,
    zero: bool,
    count: bool,
}

impl Case {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    fn offsets(&self, side: usize) -> Vec<usize> {
        let dense = row_major(&self.shape);
        let strides = self.strides.as_ref().map_or(&dense, |strides| &strides[side]);
        offsets(&self.shape, strides).into_iter().map(|x| x as usize).collect()
    }

    fn buffers(&self) -> [OwnedBuffer; SIDES] {
        std::array::from_fn(|side| {
            let len = self.offsets(side).into_iter().max().map_or(0, |last| last + 1) + 3;
            let numbers: Vec<f64> = numbers(self.seed ^ (side as u64 + 1) << 32, len).collect();
            let second = side >= 3; // no square is negative
            let numbers = numbers.into_iter().map(|x| if second { x.abs() } else { x });
            filled(self.dtypes[side], numbers)
        })
    }

    /// Some of the lower bounds are above 0, so that zeros are at a bound now and then.
    fn limit(&self, side: u64, varies: [bool; 3]) -> (OwnedBuffer, Vec<isize>) {
        let size = |dim: usize| if varies[dim] { self.shape[dim] } else { 1 };
        let sizes = [0, 1, 2].map(size);
        let dtype = self.limits.as_ref().expect("asked for").dtype;
        let offset = if side == 0 { -0.3 } else { 0.3 };
        let count = sizes.iter().product();
        let buffer = filled(
            dtype,
            numbers(self.seed ^ side, count)
                .map(clean)
                .map(|x| x * 0.5 + offset)
                .collect::<Vec<_>>()
                .into_iter(),
        );
        let dense = row_major(&sizes);
        let strides = (0..3).map(|dim| if varies[dim] { dense[dim] } else { 0 }).collect();
        (buffer, strides)
    }

    /// The number at an element of a bound, given the offset in it.
    fn limit_views(&self) -> [Option<(OwnedBuffer, Vec<isize>)>; 2] {
        let Some(limits) = &self.limits else { return [None, None] };
        [(0, limits.low), (1, limits.high)]
            .map(|(side, varies)| varies.map(|varies| self.limit(side, varies)))
    }

    fn cohorts(&self) -> Option<(usize, Arc<Cohorts>)> {
        let (dim, rows) = self.rows.as_ref()?;
        let offsets: Vec<i64> = rows.iter().map(|(offset, _)| *offset).collect();
        Some((*dim, Arc::new(Cohorts::new(&offsets, |row| rows[row].1))))
    }

    fn particulars(
        &self,
        limits: &[Option<(OwnedBuffer, Vec<isize>)>; 2],
        count: &Arc<AtomicUsize>,
    ) -> Particulars {
        let rows = self.cohorts().map(|(dim, cohorts)| {
            let inner = self.shape[dim + 1..].iter().product();
            RowSteps::new(inner, cohorts, &self.adam, self.step)
        });
        let view = |limit: &Option<(OwnedBuffer, Vec<isize>)>| {
            let (buffer, strides) = limit.as_ref()?;
            let same = *strides == row_major(&self.shape) && self.strides.is_none();
            let layout = if same {
                ViewLayout::Flat { len: self.len() }
            } else {
                ViewLayout::Strided { shape: self.shape.to_vec(), strides: strides.clone() }
            };
            Some(View { operand: buffer.operand(), layout })
        };
        let asked = self.limits.as_ref();
        let zero = asked.is_some_and(|limits| limits.zero);
        Particulars {
            rows,
            min: view(&limits[0]),
            max: view(&limits[1]),
            when_bound: if zero { WhenBound::ZeroMoment } else { WhenBound::KeepMoment },
            at_bound: asked.is_some_and(|limits| limits.count).then(|| Arc::clone(count)),
            projection: None,
        }
    }

    fn task(&self, buffers: &[OwnedBuffer; SIDES], particulars: Particulars) -> AdamTask {
        let [value, grad, exp_avg, exp_avg_sq, max]: [Operand; SIDES] =
            std::array::from_fn(|side| operand_at(&buffers[side], 0));
        let layout = match self.strides.clone() {
            None => Layout::Flat { len: self.len() },
            Some([value, grad, exp_avg, exp_avg_sq, max_exp_avg_sq]) => {
                let shape = self.shape.to_vec();
                Layout::Strided(Box::new(StridedLayout {
                    shape,
                    value,
                    grad,
                    exp_avg,
                    exp_avg_sq,
                    max_exp_avg_sq,
                }))
            }
        };
        let maximal = self.adam.second_moment == SecondMoment::Maximum;
        AdamTask {
            value,
            grad,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq: maximal.then_some(max),
            layout,
            scalars: self.adam.scalars(self.step, self.coefficient),
            bounds: self.bounds,
            particulars: Some(Box::new(particulars)),
            precision: None,
        }
    }

    /// What becomes of the buffers, and how many values are at a bound.
    fn expected(&self, before: &[OwnedBuffer; SIDES]) -> ([OwnedBuffer; SIDES], usize) {
        let maximal = self.adam.second_moment == SecondMoment::Maximum;
        let used = if maximal { SIDES } else { SIDES - 1 };
        let double = self.dtypes[..used].contains(&DType::F64);
        let sides: [Vec<usize>; SIDES] = std::array::from_fn(|side| self.offsets(side));
        let limits = self.limit_views();
        let limits = limits.each_ref().map(|limit| {
            limit.as_ref().map(|(buffer, strides)| {
                let offsets = offsets(&self.shape, strides).into_iter();
                offsets.map(|offset| get(buffer, offset as usize)).collect::<Vec<f64>>()
            })
        });
        let mut after = before.each_ref().map(copy);
        let mut count = 0;
        for i in 0..self.len() {
            let (age, skipped) = self.age(i);
            let offsets = sides.each_ref().map(|offsets| offsets[i]);
            let at = |side: usize| get(&before[side], offsets[side]);
            let bounds = Bounds {
                min: limits[0].as_ref().map(|limit| limit[i]).or(self.bounds.min),
                max: limits[1].as_ref().map(|limit| limit[i]).or(self.bounds.max),
            };
            if !skipped {
                let point = Point {
                    value: at(0),
                    grad: at(1),
                    exp_avg: at(2),
                    exp_avg_sq: at(3),
                    max_exp_avg_sq: maximal.then(|| at(4)),
                };
                let step = |bounds| {
                    reference::step(point, &self.adam, age, self.coefficient, bounds, double)
                };
                let (mut new, free) = (step(bounds), step(Bounds::default()));
                let held = new.value != free.value && !free.value.is_nan();
                if held && self.limits.as_ref().is_some_and(|limits| limits.zero) {
                    new.exp_avg = 0.0;
                }
                let news = [(0, new.value), (2, new.exp_avg), (3, new.exp_avg_sq)];
                for (side, x) in news.into_iter().chain(new.max_exp_avg_sq.map(|max| (4, max))) {
                    set(&mut after[side], offsets[side], stored(self.dtypes[side], x));
                }
            }
            let narrow =
                |x: f64| stored(self.dtypes[0], if double { x } else { (x as f32).into() });
            let bounds = [bounds.min, bounds.max].map(|bound| bound.map(narrow));
            count += usize::from(bounds.contains(&Some(get(&after[0], offsets[0]))));
        }
        (after, count)
    }

    /// The step that element `i` is at, and whether its row is skipped.
    fn age(&self, i: usize) -> (f64, bool) {
        let Some((dim, rows)) = &self.rows else { return (self.step, false) };
        let inner: usize = self.shape[dim + 1..].iter().product();
        let (offset, skipped) = rows[i / inner % self.shape[*dim]];
        (self.step - offset as f64, skipped)
    }
}

fn clean(x: f64) -> f64 {
    if x.is_finite() { x.clamp(-1.0, 1.0) } else { 0.0 }
}

/// Runs the cases in one call for each execution against the slow twin.
fn check(cases: &[Case]) {
    let before: Vec<_> = cases.iter().map(Case::buffers).collect();
    let expected: Vec<_> = cases.iter().zip(&before).map(|(c, b)| c.expected(b)).collect();
    let limits: Vec<_> = cases.iter().map(Case::limit_views).collect();
    for execution in executions() {
        let actual: Vec<_> = before.iter().map(|buffers| buffers.each_ref().map(copy)).collect();
        let counts: Vec<_> = cases.iter().map(|_| Arc::new(AtomicUsize::new(0))).collect();
        let tasks: Vec<_> = (0..cases.len())
            .map(|i| cases[i].task(&actual[i], cases[i].particulars(&limits[i], &counts[i])))
            .collect();
        // SAFETY: every task has buffers of its own, as long as its offsets reach.
        unsafe { adam_step(&tasks, Order::Parallel, &execution) };
        for (i, (expected, count)) in expected.iter().enumerate() {
            for side in 0..SIDES {
                let what = format!("side {side} on {execution:?}");
                assert_same(&actual[i][side], &expected[side], &what);
            }
            if cases[i].limits.as_ref().is_some_and(|limits| limits.count) {
                assert_eq!(counts[i].load(Ordering::Relaxed), *count, "{execution:?}");
            }
        }
    }
}

fn any_dtypes() -> impl Strategy<Value = [DType; SIDES]> {
    prop_oneof![
        Just([DType::F32; SIDES]),
        any_dtype().prop_map(|dtype| [dtype; SIDES]),
        prop::array::uniform5(any_dtype()),
    ]
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
            .map(|row| ((row * 37) % 613 - 300, (row as u64 ^ seed).is_multiple_of(3)))
            .collect()
    });
    let far = Just((0..count).map(|row| (row as i64 % 3 * (1 << 40), row % 5 == 0)).collect());
    prop_oneof![4 => blocks, 4 => prop::collection::vec(row, count), 1 => distinct, 1 => far]
}

fn any_limits() -> impl Strategy<Value = Limits> {
    let varies = || prop::option::weighted(0.7, prop::array::uniform3(any::<bool>()));
    (any_dtype(), varies(), varies(), any::<bool>(), any::<bool>())
        .prop_map(|(dtype, low, high, zero, count)| Limits { dtype, low, high, zero, count })
}

type Place = ([usize; 3], Option<[Vec<isize>; SIDES]>);

fn flat(shape: impl Strategy<Value = [usize; 3]>) -> impl Strategy<Value = Place> {
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
        );
        sides.prop_map(move |(a, b, c, d, e)| (shape, Some([a, b, c, d, e])))
    })
}

fn any_case(place: impl Strategy<Value = Place>) -> impl Strategy<Value = Case> {
    place.prop_flat_map(|(shape, strides)| {
        let rows = (0usize..3)
            .prop_flat_map(move |dim| any_rows(shape[dim]).prop_map(move |rows| (dim, rows)));
        let coefficient = prop::sample::select(vec![1.0, 0.25, f64::NAN]);
        let kinds = (prop::option::weighted(0.8, rows), prop::option::of(any_limits()));
        let numbers = ((4u32..100).prop_map(f64::from), coefficient, any::<u64>());
        let case = (any_dtypes(), any_adam(), any_bounds(), kinds, numbers);
        case.prop_map(move |(dtypes, adam, bounds, (rows, limits), (step, coefficient, seed))| {
            Case {
                dtypes,
                shape,
                strides: strides.clone(),
                adam,
                step,
                coefficient,
                bounds,
                rows,
                limits,
                seed,
            }
        })
    })
}

/// Short rows and long ones, beyond a block of scratch in all.
fn shapes() -> impl Strategy<Value = [usize; 3]> {
    prop_oneof![
        4 => [0usize..5, 0usize..40, 1usize..5],
        2 => [1usize..3, 0usize..900, 1usize..4],
        1 => [1usize..3, 1usize..9, 120usize..1_100],
    ]
}

fn one_in(number: u32) -> ProptestConfig {
    let config = ProptestConfig::default();
    ProptestConfig { cases: config.cases.div_ceil(number), ..config }
}

proptest! {
    #[test]
    fn rows_and_bounds_equal_the_slow_twin(
        case in any_case(prop_oneof![flat(shapes()), strided(0..6), strided(9..13)])
    ) {
        check(&[case]);
    }
}

/// Rows of so many ages, of which each is there if there are rows enough, with or without some that
/// are skipped: what the loops tell apart that keep all in registers.
fn mixed_rows(ages: u64, shape: [usize; 3], skips: Option<u64>, seed: u64) -> Case {
    let row = |row: u64| {
        let number = (row ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        let age = if row < ages { row } else { number % ages };
        (age as i64, skips.is_some_and(|every| (number >> 20).is_multiple_of(every)))
    };
    Case {
        dtypes: [DType::F32; SIDES],
        shape,
        strides: None,
        adam: Adam::default(),
        step: 700.0,
        coefficient: 1.0,
        bounds: Bounds::default(),
        rows: Some((1, (0..shape[1] as u64).map(row).collect())),
        limits: None,
        seed,
    }
}

fn any_mixed_rows() -> impl Strategy<Value = Case> {
    let ages = prop::sample::select(vec![1u64, 2, 15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 600]);
    let rows = prop_oneof![1 => 1usize..20, 4 => 1usize..900];
    let shape = (1usize..4, rows, prop_oneof![1usize..18, 18usize..70]);
    // A gradient that goes through scratch makes blocks, which begin anywhere in a row.
    let grad = prop::sample::select(vec![DType::F32, DType::Bf16]);
    let kinds = (ages, shape, prop::option::of(2u64..9), any::<u64>(), grad);
    let numbers = (any_adam(), any_bounds(), prop::sample::select(vec![1.0, 0.25]));
    (kinds, numbers).prop_map(|((ages, (outer, rows, inner), skips, seed, grad), numbers)| {
        let (adam, bounds, coefficient) = numbers;
        let shape = [outer, rows.min(9_000 / inner), inner];
        let dtypes = [DType::F32, grad, DType::F32, DType::F32, DType::F32];
        let adam = Adam { second_moment: SecondMoment::Running, ..adam };
        Case { dtypes, adam, bounds, coefficient, ..mixed_rows(ages, shape, skips, seed) }
    })
}

#[test]
fn as_many_ages_as_a_table_or_a_byte_holds_equal_the_slow_twin() {
    let borders = [15, 16, 31, 32, 63, 64, 127, 128, 255, 256, 257];
    let cases = borders.into_iter().flat_map(|ages| {
        [1, 3, 17].map(|inner| mixed_rows(ages, [2, ages as usize + 3, inner], None, ages))
    });
    check(&cases.collect::<Vec<_>>());
}

proptest! {
    #![proptest_config(one_in(4))]

    #[test]
    fn mixed_rows_of_any_length_and_ages_equal_the_slow_twin(case in any_mixed_rows()) {
        check(&[case]);
    }
}

proptest! {
    #![proptest_config(one_in(16))]

    #[test]
    fn any_threads_give_the_same_bits(
        long in any_case(flat([1usize..2, 65_000usize..70_000, 1usize..3])),
        short in prop::collection::vec(any_case(prop_oneof![flat(shapes()), strided(0..6)]), 1..20),
    ) {
        let mut cases = vec![long];
        cases.extend(short);
        check(&cases);
    }

    #[test]
    fn skipped_rows_count_as_zeros_in_the_norm(case in any_case(prop_oneof![flat(shapes()), strided(0..6)])) {
        let before = case.buffers();
        let limits = case.limit_views();
        let task = case.task(&before, case.particulars(&limits, &Arc::default()));
        let mut zeroed = filled(case.dtypes[1], (0..case.len()).map(|_| 0.0));
        for (i, offset) in case.offsets(1).into_iter().enumerate() {
            let skipped = case.age(i).1;
            set(&mut zeroed, i, if skipped { 0.0 } else { get(&before[1], offset) });
        }
        let view = View { operand: zeroed.operand(), layout: ViewLayout::Flat { len: case.len() } };
        for execution in executions() {
            // SAFETY: nothing is written.
            let actual = unsafe { gradient_squares(std::slice::from_ref(&task), &execution) };
            // SAFETY: as above.
            let expected = unsafe { sum_of_squares(std::slice::from_ref(&view), &execution) };
            prop_assert!(actual.to_bits() == expected.to_bits() || (actual.is_nan() && expected.is_nan()));
        }
    }
}

#[test]
fn a_nan_in_a_skipped_row_keeps_its_very_bits() {
    use paramstate::bf16;
    // A signalling NaN, which any arithmetic would make quiet.
    let signalling = bf16::from_bits(0x7f81);
    let mut value = OwnedBuffer::copy_of(&[signalling, bf16::from_f32(1.0)]);
    let [grad, exp_avg, exp_avg_sq] = [0, 1, 2].map(|_| OwnedBuffer::copy_of(&[signalling; 2]));
    let adam = Adam::default();
    let cohorts = Arc::new(Cohorts::new(&[0, 0], |row| row == 0));
    let task = AdamTask {
        value: value.operand(),
        grad: grad.operand(),
        exp_avg: exp_avg.operand(),
        exp_avg_sq: exp_avg_sq.operand(),
        max_exp_avg_sq: None,
        layout: Layout::Flat { len: 2 },
        scalars: adam.scalars(1.0, 1.0),
        bounds: Bounds::default(),
        particulars: Some(Box::new(Particulars {
            rows: Some(RowSteps::new(1, cohorts, &adam, 1.0)),
            ..Particulars::default()
        })),
        precision: None,
    };
    for execution in executions() {
        // SAFETY: four buffers of two elements that live until the end.
        unsafe { adam_step(std::slice::from_ref(&task), Order::Parallel, &execution) };
    }
    let bits = |buffer: &OwnedBuffer| buffer.as_slice::<bf16>().unwrap()[0].to_bits();
    assert_eq!([&value, &exp_avg, &exp_avg_sq].map(bits), [0x7f81; 3]);
    assert!(value.as_mut_slice::<bf16>().unwrap()[1].is_nan());
}

#[test]
fn a_nan_in_a_skipped_row_of_many_keeps_its_very_bits() {
    let signalling = f32::from_bits(0x7f80_0001);
    for inner in [1, 3, 17] {
        let (rows, adam) = (40, Adam::default());
        let numbers = vec![signalling; rows * inner];
        let buffers = [0, 1, 2, 3].map(|_| OwnedBuffer::copy_of(&numbers));
        let [value, grad, exp_avg, exp_avg_sq] = buffers.each_ref().map(OwnedBuffer::operand);
        let offsets: Vec<i64> = (0..rows as i64).map(|row| row % 5).collect();
        let cohorts = Arc::new(Cohorts::new(&offsets, |row| row % 2 == 0));
        let task = AdamTask {
            value,
            grad,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq: None,
            layout: Layout::Flat { len: rows * inner },
            scalars: adam.scalars(9.0, 1.0),
            bounds: Bounds::default(),
            particulars: Some(Box::new(Particulars {
                rows: Some(RowSteps::new(inner, cohorts, &adam, 9.0)),
                ..Particulars::default()
            })),
            precision: None,
        };
        for execution in executions() {
            // SAFETY: four buffers of as many elements that live until the end.
            unsafe { adam_step(std::slice::from_ref(&task), Order::Parallel, &execution) };
        }
        for buffer in [&buffers[0], &buffers[2], &buffers[3]] {
            for (i, x) in buffer.as_slice::<f32>().unwrap().iter().enumerate() {
                let is_skipped = i / inner % 2 == 0;
                assert_eq!(
                    x.to_bits() == signalling.to_bits(),
                    is_skipped,
                    "element {i} of {inner}"
                );
            }
        }
    }
}
