//! Rows with steps of their own in the walk of an update: where each lies, and the scalars that it takes.
//!
//! In a walk over the elements, row `r` is `inner` neighbours; after the last row comes the first
//! again where there are dimensions before the rows'. Whole blocks of one cohort run in the
//! ordinary loop; only mixed blocks have their corrections written out element by element.

use std::ops::Range;
use std::sync::Arc;

use crate::codec::BLOCK;
use crate::cohorts::{Codes, SKIPPED};
use crate::element::Compute;
use crate::isa::Kernel;
use crate::parallel::CHUNK;
use crate::varied::FEW;
use crate::{Adam, AdamScalars, Cohorts, Isa};

/// Rows of so many elements are worth a call of the ordinary loop each.
const LONG_ROW: usize = 512;

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
    /// `change` and `eps` of each code; those of code 0 are never used.
    single: Vec<[f32; 2]>,
    double: Vec<[f64; 2]>,
}

impl RowSteps {
    /// `inner` is how many elements one row has next to each other, in the order in which the
    /// update's layout walks: the sizes of the dimensions after the rows' multiplied, or in a dense
    /// layout the rows' stride. `step` is the parameter's, this step counted in.
    #[must_use]
    pub fn new(inner: usize, cohorts: Arc<Cohorts>, adam: &Adam, step: f64) -> Self {
        let rows = Rows { inner, cohorts };
        let mut steps = Self { rows, corrected: None, single: Vec::new(), double: Vec::new() };
        steps.correct(adam, step);
        steps
    }

    /// Computes the corrections of every cohort, if it is for another step.
    pub fn correct(&mut self, adam: &Adam, step: f64) {
        if self.corrected.replace((*adam, step)) == Some((*adam, step)) {
            return;
        }
        let corrections = self.rows.cohorts.offsets().iter().map(|&offset| {
            let AdamScalars { change, eps, .. } = adam.scalars(step - offset as f64, 1.0);
            [change, eps]
        });
        self.double.clear();
        self.double.extend([[0.0; 2]].into_iter().chain(corrections));
        self.single.clear();
        self.single.extend(self.double.iter().map(|pair| pair.map(|x| x as f32)));
    }

    /// The rows without their scalars.
    #[must_use]
    pub(crate) fn rows(&self) -> &Rows {
        &self.rows
    }

    pub(crate) fn corrections<C: Compute>(&self) -> &[[C; 2]] {
        C::either(&self.single, &self.double)
    }

    /// The corrections of all ages, where they are few: `spell` then says which of them each element
    /// takes.
    pub(crate) fn few<C: Compute>(&self) -> Option<[[C; 2]; FEW]> {
        let all = self.corrections::<C>();
        let ages = 1..=FEW;
        let few = ages.contains(&self.rows.cohorts.offsets().len());
        few.then(|| std::array::from_fn(|place| all[(place + 1).min(all.len() - 1)]))
    }

    /// Writes out the corrections that each element of `span` takes.
    pub(crate) fn expand<C: Compute>(&self, span: Range<usize>, target: &mut [[C; 2]], isa: Isa) {
        let corrections = self.corrections::<C>();
        isa.run(Expand { rows: &self.rows, start: span.start, corrections, target });
    }
}

struct Spell<'a> {
    rows: &'a Rows,
    start: usize,
    codes: &'a mut [u8],
}

impl Kernel for Spell<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        if let Codes::Few(codes) = self.rows.cohorts.codes() {
            self.rows.each(codes, self.start, self.codes, |code| *code);
        }
    }
}

struct Expand<'a, C> {
    rows: &'a Rows,
    start: usize,
    corrections: &'a [[C; 2]],
    target: &'a mut [[C; 2]],
}

impl<C: Compute> Kernel for Expand<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { rows, start, corrections, target } = self;
        match rows.cohorts.codes() {
            Codes::Few(codes) => {
                rows.each(codes, start, target, |code| corrections[usize::from(*code)]);
            }
            Codes::Many(codes) => {
                rows.each(codes, start, target, |code| corrections[*code as usize]);
            }
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
    /// Some of this, some of that; at most a block.
    Mixed,
}

impl Rows {
    /// The first stretch of `span`, which is not empty, and where it ends.
    pub(crate) fn stretch(&self, span: Range<usize>) -> (Stretch, usize) {
        let mut end = self.block_end(&span);
        let code = self.code_of(span.start..end);
        while end < span.end && end - span.start < CHUNK && code.is_some() {
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

    /// A block, or as much of a long row as is left: such a row is never mixed.
    fn block_end(&self, span: &Range<usize>) -> usize {
        let block = span.end.min(span.start + BLOCK);
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
        span: Range<usize>,
        room: &'b mut [bool],
        isa: Isa,
    ) -> Option<&'b [bool]> {
        if !self.cohorts.skips_rows() {
            return None;
        }
        let active = &mut room[..span.len()];
        let all = isa.run(Activity { rows: self, start: span.start, active });
        (!all).then_some(active)
    }

    /// Writes out the code of each element of `span`, where codes are few.
    pub(crate) fn spell(&self, span: Range<usize>, codes: &mut [u8], isa: Isa) {
        isa.run(Spell { rows: self, start: span.start, codes });
    }

    /// Writes what `of` says of each row's code to all elements of the row, from element `start` of
    /// the walk on.
    #[inline(always)]
    fn each<T, X: Copy>(&self, codes: &[T], start: usize, target: &mut [X], of: impl Fn(&T) -> X) {
        let (mut row, mut within) = (start / self.inner % codes.len(), start % self.inner);
        let mut rest = target;
        while !rest.is_empty() {
            let (rows, each) = if within == 0 && rest.len() >= self.inner {
                ((rest.len() / self.inner).min(codes.len() - row), self.inner)
            } else {
                (1, (self.inner - within).min(rest.len()))
            };
            let (now, later) = rest.split_at_mut(rows * each);
            repeat(&codes[row..row + rows], each, now, &of);
            row = if row + rows == codes.len() { 0 } else { row + rows };
            (rest, within) = (later, 0);
        }
    }
}

/// Says which elements are active, and returns whether all of them are.
struct Activity<'a> {
    rows: &'a Rows,
    start: usize,
    active: &'a mut [bool],
}

impl Kernel for Activity<'_> {
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let Self { rows, start, active } = self;
        match rows.cohorts.codes() {
            Codes::Few(codes) => rows.each(codes, start, active, |code| *code != SKIPPED as u8),
            Codes::Many(codes) => rows.each(codes, start, active, |code| *code != SKIPPED),
        }
        active.iter().fold(true, |all, active| all & active)
    }
}

/// Writes `of` each code so many times. Where that is few times, the compiler knows how many.
#[inline(always)]
fn repeat<T, X: Copy>(codes: &[T], times: usize, target: &mut [X], of: impl Fn(&T) -> X) {
    match times {
        1 => codes.iter().zip(target).for_each(|(code, x)| *x = of(code)),
        2 => repeat_few::<_, _, 2>(codes, target, of),
        3 => repeat_few::<_, _, 3>(codes, target, of),
        4 => repeat_few::<_, _, 4>(codes, target, of),
        _ => {
            let rows = target.chunks_exact_mut(times);
            codes.iter().zip(rows).for_each(|(code, row)| row.fill(of(code)));
        }
    }
}

#[inline(always)]
fn repeat_few<T, X: Copy, const N: usize>(codes: &[T], target: &mut [X], of: impl Fn(&T) -> X) {
    let (rows, _) = target.as_chunks_mut::<N>();
    codes.iter().zip(rows).for_each(|(code, row)| *row = [of(code); N]);
}
