//! The update against its slow twin, for every instruction set that this machine has.

mod reference;

use paramstate::{
    Adam, AdamTask, Bounds, DType, Layout, Order, OwnedBuffer, SecondMoment, StridedLayout,
    adam_step, row_major,
};
use proptest::prelude::*;
use reference::{
    Point, any_adam, any_bounds, any_dtype, any_grad_strides, any_strides, assert_same, copy,
    executions, filled, get, numbers, offsets, operand_at, set, stored,
};

/// Value, gradient, first and second moment, maximum.
const SIDES: usize = 5;
const NAMES: [&str; SIDES] = ["value", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"];

/// One parameter: where its elements lie in which buffers, and how it is stepped.
#[derive(Debug)]
struct Case {
    dtypes: [DType; SIDES],
    shape: Vec<usize>,
    /// `None`: flat.
    strides: Option<[Vec<isize>; SIDES]>,
    /// Elements before the first; a value then begins off a vector's alignment.
    skip: usize,
    adam: Adam,
    step: f64,
    coefficient: f64,
    bounds: Bounds,
    seed: u64,
}

impl Case {
    fn len(&self) -> usize {
        self.shape.iter().product()
    }

    fn offsets(&self, side: usize) -> Vec<usize> {
        let dense = row_major(&self.shape);
        let strides = self.strides.as_ref().map_or(&dense, |strides| &strides[side]);
        offsets(&self.shape, strides).into_iter().map(|x| self.skip + x as usize).collect()
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

    fn maximal(&self) -> bool {
        self.adam.second_moment == SecondMoment::Maximum
    }

    fn task(&self, buffers: &[OwnedBuffer; SIDES]) -> AdamTask {
        let [value, grad, exp_avg, exp_avg_sq, max] =
            std::array::from_fn(|side| operand_at(&buffers[side], self.skip));
        let layout = match self.strides.clone() {
            None => Layout::Flat { len: self.len() },
            Some([value, grad, exp_avg, exp_avg_sq, max_exp_avg_sq]) => {
                let shape = self.shape.clone();
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
        AdamTask {
            value,
            grad,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq: self.maximal().then_some(max),
            layout,
            scalars: self.adam.scalars(self.step, self.coefficient),
            bounds: self.bounds,
            particulars: None,
            precision: None,
        }
    }

    fn expected(&self, before: &[OwnedBuffer; SIDES]) -> [OwnedBuffer; SIDES] {
        let used = if self.maximal() { SIDES } else { SIDES - 1 };
        let double = self.dtypes[..used].contains(&DType::F64);
        let sides: [Vec<usize>; SIDES] = std::array::from_fn(|side| self.offsets(side));
        let mut after = before.each_ref().map(copy);
        for i in 0..self.len() {
            let offsets = sides.each_ref().map(|offsets| offsets[i]);
            let at = |side: usize| get(&before[side], offsets[side]);
            let point = Point {
                value: at(0),
                grad: at(1),
                exp_avg: at(2),
                exp_avg_sq: at(3),
                max_exp_avg_sq: self.maximal().then(|| at(4)),
            };
            let new = reference::step(
                point,
                &self.adam,
                self.step,
                self.coefficient,
                self.bounds,
                double,
            );
            let news = [(0, new.value), (2, new.exp_avg), (3, new.exp_avg_sq)];
            for (side, x) in news.into_iter().chain(new.max_exp_avg_sq.map(|max| (4, max))) {
                set(&mut after[side], offsets[side], stored(self.dtypes[side], x));
            }
        }
        after
    }
}

/// Runs the cases in one call for each execution, and in reverse order, against the slow twin.
fn check(cases: &[Case]) {
    let before: Vec<_> = cases.iter().map(Case::buffers).collect();
    let expected: Vec<_> = cases.iter().zip(&before).map(|(c, b)| c.expected(b)).collect();
    for execution in executions() {
        let orders: &[bool] = if execution.threads.get() == 2 { &[false, true] } else { &[false] };
        for &reversed in orders {
            let actual: Vec<_> =
                before.iter().map(|buffers| buffers.each_ref().map(copy)).collect();
            let mut tasks: Vec<_> = cases.iter().zip(&actual).map(|(c, b)| c.task(b)).collect();
            if reversed {
                tasks.reverse();
            }
            // SAFETY: every task has buffers of its own, as long as its offsets reach.
            unsafe { adam_step(&tasks, Order::Parallel, &execution) };
            for (expected, actual) in expected.iter().zip(&actual) {
                for side in 0..SIDES {
                    let what = format!("{} on {execution:?}", NAMES[side]);
                    assert_same(&actual[side], &expected[side], &what);
                }
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

type Place = (Vec<usize>, Option<[Vec<isize>; SIDES]>);

fn flat(lens: impl Strategy<Value = usize>) -> impl Strategy<Value = Place> {
    lens.prop_map(|len| (vec![len], None))
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
        sides.prop_map(move |(a, b, c, d, e)| (shape.to_vec(), Some([a, b, c, d, e])))
    })
}

fn any_case(place: impl Strategy<Value = Place>) -> impl Strategy<Value = Case> {
    let step = prop_oneof![4 => (1u32..100).prop_map(f64::from), 1 => Just(0.0), 1 => Just(-3.0)];
    let coefficient = prop::sample::select(vec![1.0, 0.25, 1e-3, f64::NAN]);
    let numbers = (step, coefficient, any::<u64>());
    (any_dtypes(), place, 0usize..3, any_adam(), any_bounds(), numbers).prop_map(
        |(dtypes, (shape, strides), skip, adam, bounds, (step, coefficient, seed))| Case {
            dtypes,
            shape,
            strides,
            skip,
            adam,
            step,
            coefficient,
            bounds,
            seed,
        },
    )
}

/// Around a lane's tail and around the border of a block of scratch.
fn short() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 0usize..70, 1 => 1_020usize..1_030, 1 => 2_040usize..2_060]
}

/// Around the border of a chunk, long enough for workers to wake up.
fn long() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 65_530usize..65_542, 1 => 131_070usize..131_075]
}

/// Few of the cases that take long. `PROPTEST_CASES` sets the number of all.
fn fewer() -> ProptestConfig {
    let config = ProptestConfig::default();
    ProptestConfig { cases: config.cases.div_ceil(32), ..config }
}

proptest! {
    #[test]
    fn a_small_parameter_equals_the_slow_twin(
        case in any_case(prop_oneof![flat(short()), strided(0..6), strided(9..13)])
    ) {
        check(&[case]);
    }
}

proptest! {
    #![proptest_config(fewer())]

    #[test]
    fn any_threads_and_any_order_of_parameters_give_the_same_bits(
        long in prop::collection::vec(any_case(flat(long())), 1..3),
        short in prop::collection::vec(any_case(prop_oneof![flat(short()), strided(0..6)]), 1..40),
        strided in any_case(strided(39..43)),
    ) {
        let mut cases = long;
        cases.extend(short);
        cases.push(strided);
        check(&cases);
    }
}
