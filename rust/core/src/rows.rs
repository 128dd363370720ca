//! Rows with steps of their own in the walk of an update: where each lies, and the scalars that it takes.
//!
//! In a walk over the elements, row `r` is `inner` neighbours; after the last row comes the first
//! again where there are dimensions before the rows'. Stretches of one cohort run in the ordinary
//! loop; mixed ones take their corrections from their rows, in registers (`mixed_rows`) or a strip at
//! a time (`row_strip`).

use std::ops::Range;
use std::sync::Arc;

use crate::codec::BLOCK;
use crate::cohorts::{Codes, SKIPPED};
use crate::element::Compute;
use crate::isa::Kernel;
use crate::parallel::CHUNK;
use crate::row_strip::RowReader;
use crate::row_walk::{self, RowWalk};
use crate::{Adam, AdamScalars, Cohorts, Isa};

/// Rows of so many elements are worth a call of the ordinary loop each.
const LONG_ROW: usize = 512;

/// Short rows are looked at so many elements at a time: one answer, and one call of a loop, for all.
const STEP: usize = 4 * BLOCK;

/// The least length of a table; each is a power of two.
const SHORTEST_TABLE: usize = 16;

/// A block, and what may be written beyond it.
pub(crate) const ROOM: usize = BLOCK + row_walk::CHUNK;

/// The rows of one update: where they lie in the walk over its elements, and their scalars.
///
/// ```
/// use std::sync::Arc;
/// use paramstate::{Adam, Cohorts, RowSteps};
///
/// // A [3, 2] parameter at its step 9 whose last row is new.
/// let cohorts = Arc::new(Cohorts::new(&[0, 0, 8], |_| false));
/// let rows = RowSteps::new(2, cohorts, &Adam::default(), 9.0);
/// # let _ = rows;
/// ```
#[derive(Clone, Debug)]
pub struct RowSteps {
    rows: Rows,
    /// What the corrections were computed for.
    corrected: Option<(Adam, f64)>,
    single: Tables<f32>,
    double: Tables<f64>,
}

/// `change` and `eps` of each code in one compute type; those of code 0 are never used.
#[derive(Clone, Debug, Default)]
struct Tables<C> {
    change: Vec<C>,
    eps: Vec<C>,
}

impl<C: Compute> Tables<C> {
    fn fill(&mut self, corrections: &[[f64; 2]]) {
        let len = (corrections.len() + 1).next_power_of_two().max(SHORTEST_TABLE);
        for (part, table) in [&mut self.change, &mut self.eps].into_iter().enumerate() {
            table.clear();
            table.push(C::default());
            table.extend(corrections.iter().map(|correction| C::narrow(correction[part])));
            table.resize(len, C::default());
        }
    }
}

impl RowSteps {
    /// `inner` is how many elements one row has next to each other, in the order in which the
    /// update's layout walks: the sizes of the dimensions after the rows' multiplied, or in a dense
    /// layout the rows' stride. `step` is the parameter's, this step counted in.
    #[must_use]
    pub fn new(inner: usize, cohorts: Arc<Cohorts>, adam: &Adam, step: f64) -> Self {
        let rows = Rows { inner, cohorts };
        let (single, double) = (Tables::default(), Tables::default());
        let mut steps = Self { rows, corrected: None, single, double };
        steps.correct(adam, step);
        steps
    }

    /// Computes the corrections of every cohort, if it is for another step.
    pub fn correct(&mut self, adam: &Adam, step: f64) {
        if self.corrected.replace((*adam, step)) == Some((*adam, step)) {
            return;
        }
        let offsets = self.rows.cohorts.offsets().iter();
        let corrections = offsets.map(|&offset| {
            let AdamScalars { change, eps, .. } = adam.scalars(step - offset as f64, 1.0);
            [change, eps]
        });
        let corrections: Vec<[f64; 2]> = corrections.collect();
        self.single.fill(&corrections);
        self.double.fill(&corrections);
    }

    /// The rows without their scalars.
    #[must_use]
    pub(crate) fn rows(&self) -> &Rows {
        &self.rows
    }

    /// `change` and `eps` of each code.
    fn tables<C: Compute>(&self) -> [&[C]; 2] {
        let (single, double) = (&self.single, &self.double);
        [C::either(&single.change, &double.change), C::either(&single.eps, &double.eps)]
    }

    pub(crate) fn correction<C: Compute>(&self, code: usize) -> [C; 2] {
        self.tables().map(|table| table[code])
    }

    /// What each element takes from its row, from the walk's element `start` on.
    pub(crate) fn read<C: Compute>(&self, start: usize) -> RowReader<'_, C> {
        let (rows, cohorts) = (&self.rows, &self.rows.cohorts);
        RowReader {
            walk: rows.walk(start),
            codes: cohorts.codes(),
            tables: self.tables(),
            skips: cohorts.skips_rows(),
        }
    }
}

/// The rows of one parameter in a walk over its elements.
#[derive(Clone, Debug)]
pub(crate) struct Rows {
    /// Elements of one row that are neighbours.
    pub inner: usize,
    pub cohorts: Arc<Cohorts>,
}

/// Elements that are treated alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stretch {
    /// All are left as they are.
    Skipped,
    /// All take the scalars of this code.
    Alike(usize),
    /// Some of this, some of that.
    Mixed,
}

impl Rows {
    /// The first stretch of `span`, which is not empty, and where it ends.
    pub(crate) fn stretch(&self, span: Range<usize>) -> (Stretch, usize) {
        let mut end = self.block_end(&span);
        let code = self.code_of(span.start..end);
        while end < span.end && end - span.start < CHUNK {
            let next = self.block_end(&(end..span.end));
            if self.code_of(end..next) != code {
                break;
            }
            end = next;
        }
        let stretch = match code {
            None => Stretch::Mixed,
            Some(SKIPPED) => Stretch::Skipped,
            Some(code) => Stretch::Alike(code as usize),
        };
        (stretch, end)
    }

    /// So many elements, or as much of a long row as is left: such a row is never mixed.
    fn block_end(&self, span: &Range<usize>) -> usize {
        let block = span.end.min(span.start + STEP);
        if self.inner < LONG_ROW {
            return block;
        }
        block.min(span.start + self.inner - span.start % self.inner)
    }

    /// The code that all elements of `span` have, if there is one.
    fn code_of(&self, span: Range<usize>) -> Option<u32> {
        let (count, cohorts) = (self.cohorts.rows(), &self.cohorts);
        let first = span.start / self.inner % count;
        let rows = (span.end - 1) / self.inner - span.start / self.inner + 1;
        if rows >= count {
            return cohorts.code_of(0..count);
        }
        if first + rows <= count {
            return cohorts.code_of(first..first + rows);
        }
        let code = cohorts.code_of(first..count)?;
        (cohorts.code_of(0..first + rows - count)? == code).then_some(code)
    }

    /// Which elements of `span` are active, written to `room`; `None`: all of them are.
    pub(crate) fn activity<'b>(
        &self,
        span: &Range<usize>,
        room: &'b mut [bool; ROOM],
        isa: Isa,
    ) -> Option<&'b [bool]> {
        if !self.cohorts.skips_rows() {
            return None;
        }
        let codes = self.cohorts.codes();
        isa.run(Activity { walk: self.walk(span.start), codes, len: span.len(), active: room })
    }

    fn walk(&self, start: usize) -> RowWalk {
        RowWalk::new(self.inner, self.cohorts.rows(), start)
    }
}

/// Says of elements whether their rows take part; `None`: all do.
struct Activity<'a, 'b> {
    walk: RowWalk,
    codes: &'a Codes,
    len: usize,
    active: &'b mut [bool],
}

impl<'b> Kernel for Activity<'_, 'b> {
    type Output = Option<&'b [bool]>;

    #[inline(always)]
    fn run(self) -> Option<&'b [bool]> {
        let Self { mut walk, codes, len, active } = self;
        let first = match codes {
            Codes::Few(codes) => walk.write(codes, len, active, |code| code != SKIPPED as u8),
            Codes::Many(codes) => walk.write(codes, len, active, |code| code != SKIPPED),
        };
        let active = &active[first..first + len];
        let all = active.iter().fold(true, |all, active| all & active);
        (!all).then_some(active)
    }
}
