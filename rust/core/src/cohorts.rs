//! Which rows of a parameter are of one age, and which are skipped.
//!
//! A parameter has one step count `t`; where its rows differ along one dimension, row `r` has taken
//! `t - offset[r]` steps. Rows of one offset are a cohort: they take the same scalars, and a step
//! changes no offset of a row that takes it. So rows are sorted into cohorts when their offsets
//! change, and each step computes the bias corrections once per cohort.

use std::collections::HashMap;
use std::ops::Range;

use crate::row_walk::CHUNK;

/// Rows of one page are looked at once, when the cohorts are made.
const PAGE: usize = 256;

/// The most distinct offsets, from the least to the greatest, that a plain table is made for.
const TABLE: usize = 1 << 20;

/// The cohort of each row of one parameter.
///
/// ```
/// use paramstate::Cohorts;
///
/// // Five steps ago rows 2 and 3 were made; row 0 is skipped this time.
/// let cohorts = Cohorts::new(&[0, 0, 5, 5], |row| row == 0);
/// assert_eq!(cohorts.rows(), 4);
/// assert!(cohorts.skips_rows());
/// ```
#[derive(Clone, Debug)]
pub struct Cohorts {
    /// Of each row: 0 if it is skipped, else its cohort counted from 1.
    codes: Codes,
    rows: usize,
    /// The offset of each cohort.
    offsets: Vec<i64>,
    /// Whether any row is skipped.
    skips: bool,
    /// Of each page of rows: the code that all of them have.
    pages: Vec<Option<u32>>,
}

/// A code for each row, in as few bytes as will do. After the last come the first again, and again,
/// until there are a chunk more.
#[derive(Clone, Debug)]
pub(crate) enum Codes {
    Few(Vec<u8>),
    Many(Vec<u32>),
}

/// The code of rows that are skipped.
pub(crate) const SKIPPED: u32 = 0;

impl Cohorts {
    /// Sorts rows by their offsets; `skipped` names those that a step leaves as they are.
    #[must_use]
    pub fn new(offsets: &[i64], skipped: impl Fn(usize) -> bool) -> Self {
        let mut finder = Finder::new(offsets);
        let code = |(row, &offset)| if skipped(row) { SKIPPED } else { finder.code(offset) };
        let mut codes: Vec<u32> = offsets.iter().enumerate().map(code).collect();
        let page = |rows: &[u32]| rows.iter().all(|code| *code == rows[0]).then_some(rows[0]);
        let pages = codes.chunks(PAGE).map(page).collect();
        let (rows, offsets, skips) = (codes.len(), finder.offsets, codes.contains(&SKIPPED));
        let again: Vec<u32> = codes.iter().cycle().take(CHUNK).copied().collect();
        codes.extend(again);
        let codes = match u8::try_from(offsets.len()) {
            Ok(_) => Codes::Few(codes.into_iter().map(|code| code as u8).collect()),
            Err(_) => Codes::Many(codes),
        };
        Self { codes, rows, offsets, skips, pages }
    }

    /// How many rows there are.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The distinct offsets of the rows that are not skipped.
    #[must_use]
    pub fn offsets(&self) -> &[i64] {
        &self.offsets
    }

    /// Whether any row is skipped.
    #[must_use]
    pub fn skips_rows(&self) -> bool {
        self.skips
    }

    /// Of each row: 0 if it is skipped, else its cohort counted from 1.
    pub(crate) fn codes(&self) -> &Codes {
        &self.codes
    }

    /// The code that all of these rows have, if there is one; there is at least one row.
    pub(crate) fn code_of(&self, rows: Range<usize>) -> Option<u32> {
        let first = self.code(rows.start);
        let pages = rows.start / PAGE..=(rows.end - 1) / PAGE;
        let alike = pages.into_iter().all(|page| match self.pages[page] {
            Some(code) => code == first,
            None => {
                let start = rows.start.max(page * PAGE);
                self.all_are(first, start..rows.end.min((page + 1) * PAGE))
            }
        });
        alike.then_some(first)
    }

    fn code(&self, row: usize) -> u32 {
        match &self.codes {
            Codes::Few(codes) => codes[row].into(),
            Codes::Many(codes) => codes[row],
        }
    }

    fn all_are(&self, code: u32, rows: Range<usize>) -> bool {
        match &self.codes {
            Codes::Few(codes) => codes[rows].iter().all(|held| u32::from(*held) == code),
            Codes::Many(codes) => codes[rows].iter().all(|held| *held == code),
        }
    }
}

/// Numbers the distinct offsets in the order in which they are met.
struct Finder {
    least: i64,
    /// Codes by offset above the least; 0 for none yet.
    table: Vec<u32>,
    /// Instead, where the offsets lie too far apart.
    map: HashMap<i64, u32>,
    latest: (i64, u32),
    offsets: Vec<i64>,
}

impl Finder {
    fn new(offsets: &[i64]) -> Self {
        let (least, greatest) =
            offsets.iter().fold((i64::MAX, i64::MIN), |(a, b), &x| (a.min(x), b.max(x)));
        let reach = if offsets.is_empty() { 0 } else { greatest.abs_diff(least) };
        let len = if reach < TABLE as u64 { reach as usize + 1 } else { 0 };
        let table = vec![0; len];
        Self { least, table, map: HashMap::new(), latest: (0, SKIPPED), offsets: Vec::new() }
    }

    #[inline]
    fn code(&mut self, offset: i64) -> u32 {
        if self.latest.0 == offset && self.latest.1 != SKIPPED {
            return self.latest.1;
        }
        let next = self.offsets.len() as u32 + 1;
        let slot = match self.table.get_mut(offset.abs_diff(self.least) as usize) {
            Some(slot) => slot,
            None => self.map.entry(offset).or_insert(SKIPPED),
        };
        if *slot == SKIPPED {
            *slot = next;
            self.offsets.push(offset);
        }
        self.latest = (offset, *slot);
        *slot
    }
}
