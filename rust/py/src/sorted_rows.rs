//! Rows in cohorts, kept from one step to the next.

use std::sync::Arc;

use paramstate::Cohorts;

/// Rows sorted by their offsets, and what they were sorted from: as long as that stays, they stay.
pub struct Sorted {
    pub source: [Source; 2],
    pub cohorts: Arc<Cohorts>,
    /// The greatest offset of the rows that are not skipped.
    pub greatest: i64,
}

/// The memory of a tensor in one state.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Source {
    pub address: usize,
    pub rows: usize,
    pub version: u64,
}
