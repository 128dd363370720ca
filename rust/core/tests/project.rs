//! Norms that are held, against a slow twin that visits the groups one after another.

mod reference;

use std::collections::BTreeMap;
use std::sync::Arc;

use paramstate::{Cohorts, DType, NormLimit, OwnedBuffer, Projection, project, row_major};
use proptest::prelude::*;
use reference::{
    any_dtype, any_strides, assert_same, copy, executions, filled, get, numbers, offsets, set,
};

#[derive(Debug)]
struct Case {
    buffer: OwnedBuffer,
    shape: [usize; 3],
    strides: Vec<isize>,
    over: [bool; 3],
    limit: NormLimit,
    /// A dimension, and the rows of it that are skipped.
    skipped: Option<(usize, Vec<bool>)>,
}

impl Case {
    fn projection(&self, buffer: &OwnedBuffer) -> Projection {
        let cohorts = |(dim, skipped): &(usize, Vec<bool>)| {
            let offsets = vec![0; skipped.len()];
            (*dim, Arc::new(Cohorts::new(&offsets, |row| skipped[row])))
        };
        Projection {
            operand: buffer.operand(),
            shape: self.shape.to_vec(),
            strides: self.strides.clone(),
            over: self.over.to_vec(),
            limit: self.limit,
            rows: self.skipped.as_ref().map(cohorts),
        }
    }

    /// The index of each element along each dimension, and where it lies.
    fn elements(&self) -> impl Iterator<Item = ([usize; 3], usize)> {
        let [_, b, c] = self.shape;
        let index = move |i: usize| [i / (b * c), i / c % b, i % c];
        let all = offsets(&self.shape, &self.strides).into_iter().enumerate();
        all.map(move |(i, offset)| (index(i), offset as usize))
    }

    /// Each group by itself; in the tensor's own dtype, rounded once.
    fn expected(&self) -> OwnedBuffer {
        let mut groups: BTreeMap<[usize; 3], Vec<([usize; 3], usize)>> = BTreeMap::new();
        for (index, offset) in self.elements() {
            let key = [0, 1, 2].map(|dim| if self.over[dim] { 0 } else { index[dim] });
            groups.entry(key).or_default().push((index, offset));
        }
        let mut after = copy(&self.buffer);
        for group in groups.values() {
            let squares = group.iter().map(|(_, offset)| get(&self.buffer, *offset).powi(2));
            let norm = squares.sum::<f64>().sqrt();
            let factor = match self.limit {
                NormLimit::AtMost(limit) if norm > limit && norm.is_finite() => limit / norm,
                NormLimit::Exactly(limit) if norm > 0.0 && norm.is_finite() => limit / norm,
                _ => continue,
            };
            for (index, offset) in group {
                let is_skipped =
                    self.skipped.as_ref().is_some_and(|(dim, skipped)| skipped[index[*dim]]);
                if !is_skipped {
                    set(&mut after, *offset, get(&self.buffer, *offset) * factor);
                }
            }
        }
        after
    }
}

/// Equal to the last place or two: the sum is made in another order.
fn assert_close(actual: &OwnedBuffer, expected: &OwnedBuffer, case: &Case) {
    let tolerance = match actual.dtype() {
        DType::F64 => 1e-12,
        DType::F32 => 3e-7,
        DType::Bf16 => 1.6e-2,
        DType::F16 => 2e-3,
        other => unreachable!("{other}"),
    };
    for (index, offset) in case.elements() {
        let (a, b) = (get(actual, offset), get(expected, offset));
        let same =
            (a - b).abs() <= tolerance * b.abs() + 1e-7 || a == b || (a.is_nan() && b.is_nan());
        assert!(same, "{index:?}: {a:e} is not {b:e} in {case:?}");
    }
}

fn any_case(shape: impl Strategy<Value = [usize; 3]>) -> impl Strategy<Value = Case> {
    shape.prop_flat_map(|shape| {
        let strides = prop_oneof![Just(row_major(&shape)), any_strides(shape)];
        let limit =
            prop_oneof![Just(NormLimit::Exactly(1.0)), (0.1..3.0f64).prop_map(NormLimit::AtMost)];
        let skipped = (0usize..3).prop_flat_map(move |dim| {
            (Just(dim), prop::collection::vec(any::<bool>(), shape[dim]))
        });
        let skipped = prop::option::weighted(0.4, skipped);
        let over = prop::array::uniform3(any::<bool>());
        (any_dtype(), strides, over, limit, skipped, any::<u64>()).prop_map(
            move |(dtype, strides, over, limit, skipped, seed)| {
                let last = offsets(&shape, &strides).into_iter().max().unwrap_or(0);
                let numbers: Vec<f64> = numbers(seed, last as usize + 1).collect();
                // Squares of the largest 64-bit numbers have no sum.
                let numbers =
                    numbers.into_iter().map(|x| if x.abs() > 1e30 { x.signum() } else { x });
                Case { buffer: filled(dtype, numbers), shape, strides, over, limit, skipped }
            },
        )
    })
}

fn check(case: &Case) {
    let expected = case.expected();
    let mut first: Option<OwnedBuffer> = None;
    for execution in executions() {
        let actual = copy(&case.buffer);
        // SAFETY: a buffer as long as the offsets reach, which lives until the end.
        unsafe { project(&[&case.projection(&actual)], &execution) };
        match &first {
            None => {
                assert_close(&actual, &expected, case);
                first = Some(actual);
            }
            Some(first) => assert_same(&actual, first, &format!("{execution:?}")),
        }
    }
}

fn fewer() -> ProptestConfig {
    let config = ProptestConfig::default();
    ProptestConfig { cases: config.cases.div_ceil(16), ..config }
}

proptest! {
    #[test]
    fn norms_are_held_as_the_slow_twin_holds_them(case in any_case([0usize..6, 0usize..6, 0usize..12])) {
        check(&case);
    }
}

proptest! {
    #![proptest_config(fewer())]

    #[test]
    fn long_groups_and_wide_rows_of_groups_too(
        case in any_case(prop_oneof![
            [1usize..3, 1usize..4, 900usize..1_200],
            [1usize..3, 900usize..1_200, 1usize..4],
            [900usize..1_200, 1usize..3, 1usize..4],
            [1usize..3, 1usize..3, 66_000usize..66_100],
        ])
    ) {
        check(&case);
    }
}
