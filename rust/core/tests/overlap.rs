//! The exact check of shared memory against a list of every byte.

use std::collections::HashSet;

use paramstate::{Extent, overlapping, overlaps_itself};
use proptest::prelude::*;

/// The addresses of all bytes, one list for each element.
fn elements(extent: &Extent) -> Vec<Vec<i64>> {
    let mut starts = vec![extent.start as i64];
    for (&size, &stride) in extent.shape.iter().zip(&extent.strides) {
        starts = starts
            .iter()
            .flat_map(|start| {
                (0..size as i64).map(move |i| start + i * stride as i64 * extent.itemsize as i64)
            })
            .collect();
    }
    starts.into_iter().map(|start| (start..start + extent.itemsize as i64).collect()).collect()
}

fn bytes(extent: &Extent) -> HashSet<i64> {
    elements(extent).into_iter().flatten().collect()
}

fn any_extent() -> impl Strategy<Value = Extent> {
    let dimension = (prop_oneof![8 => 1usize..5, 1 => Just(0usize)], -13isize..14);
    (
        1_000usize..1_120,
        prop::sample::select(vec![1usize, 2, 4, 8]),
        prop::collection::vec(dimension, 0..4),
    )
        .prop_map(|(start, itemsize, dimensions)| {
            let (shape, strides) = dimensions.into_iter().unzip();
            Extent { start, itemsize, shape, strides }
        })
}

proptest! {
    #[test]
    fn the_pairs_are_those_that_share_a_byte(extents in prop::collection::vec(any_extent(), 0..7)) {
        let bytes: Vec<_> = extents.iter().map(bytes).collect();
        let mut expected = Vec::new();
        for i in 0..extents.len() {
            for j in i + 1..extents.len() {
                if !bytes[i].is_disjoint(&bytes[j]) {
                    expected.push((i, j));
                }
            }
        }
        prop_assert_eq!(overlapping(&extents), expected);
    }

    #[test]
    fn a_tensor_overlaps_itself_where_two_indices_meet(extent in any_extent()) {
        let starts: Vec<i64> = elements(&extent).iter().map(|bytes| bytes[0]).collect();
        let distinct: HashSet<i64> = starts.iter().copied().collect();
        prop_assert_eq!(overlaps_itself(&extent), distinct.len() < starts.len());
    }
}

#[test]
fn interleaved_columns_of_a_large_matrix_are_apart() {
    let columns = |first: usize| Extent {
        start: 4 * first,
        itemsize: 4,
        shape: vec![1 << 20, 500],
        strides: vec![1_000, 2],
    };
    assert_eq!(overlapping(&[columns(0), columns(1)]), []);
    assert_eq!(overlapping(&[columns(0), columns(1), columns(2)]), [(0, 2)]);
}

#[test]
fn a_thousand_tensors_side_by_side_are_apart() {
    let extents: Vec<Extent> = (0..1_000)
        .map(|i| Extent { start: i * 400, itemsize: 4, shape: vec![10, 10], strides: vec![10, 1] })
        .collect();
    assert_eq!(overlapping(&extents), []);
}
