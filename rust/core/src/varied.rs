//! The update where scalars differ from element to element: rows of several ages, bounds of their
//! own. The equations are those of `update`; what differs is read beside the elements.

#[cfg(target_arch = "x86_64")]
use std::any::Any;
use std::ops::Range;

use crate::bounds::Interval;
use crate::element::Compute;
use crate::isa::Kernel;
#[cfg(target_arch = "x86_64")]
use crate::mixed_rows::MixedRows;
#[cfg(target_arch = "x86_64")]
use crate::row_lanes::{Avx2, Avx512, Lanes};
use crate::row_strip::{Corrections, RowReader, STRIP, Strip};
use crate::update::{Block, Scalars, maximum};

/// The bounds of each element, NaN where there is none; as long as the block.
#[derive(Clone, Copy, Default)]
pub(crate) struct Limits<'a, C> {
    pub min: &'a [C],
    pub max: &'a [C],
    /// Whether the first moment is zeroed where a bound holds the value back.
    pub zero: bool,
}

impl<C> Limits<'_, C> {
    #[inline(always)]
    fn part(self, part: Range<usize>) -> Self {
        Self { min: &self.min[part.clone()], max: &self.max[part], zero: self.zero }
    }
}

/// The update of one block. Without `limits` the bounds are those of the scalars.
pub(crate) struct VariedUpdate<'a, C> {
    pub block: Block<'a, C>,
    pub scalars: &'a Scalars<C>,
    pub rows: Option<RowReader<'a, C>>,
    pub limits: Option<Limits<'a, C>>,
}

impl<C: Compute> Kernel for VariedUpdate<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { block, scalars, rows, limits } = self;
        let Some(mut rows) = rows else {
            return update::<C, ALIKE>(block, scalars, Corrections::default(), limits);
        };
        let mut strip = Strip::default();
        let mut rest = block;
        let mut at = 0;
        while !rest.value.is_empty() {
            let len = rest.value.len().min(STRIP);
            let (now, later) = rest.split_at(len);
            let limits = limits.map(|limits| limits.part(at..at + len));
            let corrections = rows.read(len, &mut strip);
            if corrections.active.is_empty() {
                update::<C, AGES>(now, scalars, corrections, limits);
            } else {
                update::<C, SKIPS>(now, scalars, corrections, limits);
            }
            (rest, at) = (later, at + len);
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn run_avx2(self) {
        // SAFETY: the caller's contract.
        self.run_with(unsafe { Avx2::new() });
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn run_avx512(self) {
        // SAFETY: the caller's contract.
        self.run_with(unsafe { Avx512::new() });
    }
}

#[cfg(target_arch = "x86_64")]
impl<C: Compute> VariedUpdate<'_, C> {
    /// Where all is in fp32, only rows differ and AMSGrad is not asked for, there is a faster loop.
    #[inline(always)]
    fn run_with(self, lanes: impl Lanes) {
        let only_rows = self.limits.is_none() && self.block.max_exp_avg_sq.is_none();
        let scalars = (self.scalars as &dyn Any).downcast_ref();
        let (Some(scalars), Some(rows), true) = (scalars, self.rows, only_rows) else {
            return self.run();
        };
        let (Some(block), Some(rows)) = (self.block.singles(), rows.singles()) else {
            unreachable!("scalars in fp32 are of an update in fp32")
        };
        MixedRows { block, scalars, rows }.run(lanes);
    }
}

/// What a loop is compiled for: elements of one age; of several; of several, of which some are left
/// as they are.
const ALIKE: u8 = 0;
const AGES: u8 = 1;
const SKIPS: u8 = 2;

#[inline(always)]
fn update<C: Compute, const ROWS: u8>(
    block: Block<'_, C>,
    scalars: &Scalars<C>,
    corrections: Corrections<'_, C>,
    limits: Option<Limits<'_, C>>,
) {
    match (limits, block.max_exp_avg_sq.is_some()) {
        (None, false) => vary_block::<C, ROWS, false, false>(block, scalars, corrections, limits),
        (None, true) => vary_block::<C, ROWS, false, true>(block, scalars, corrections, limits),
        (Some(_), false) => vary_block::<C, ROWS, true, false>(block, scalars, corrections, limits),
        (Some(_), true) => vary_block::<C, ROWS, true, true>(block, scalars, corrections, limits),
    }
}

#[inline(always)]
fn vary_block<C: Compute, const ROWS: u8, const LIMITS: bool, const MAX: bool>(
    block: Block<'_, C>,
    scalars: &Scalars<C>,
    corrections: Corrections<'_, C>,
    limits: Option<Limits<'_, C>>,
) {
    let Block { value, grad, exp_avg, exp_avg_sq, max_exp_avg_sq } = block;
    let Corrections { change, eps, active } = corrections;
    let Limits { min, max, zero } = limits.unwrap_or_default();
    let greatest = max_exp_avg_sq.unwrap_or_default();
    vary::<C, ROWS, LIMITS, MAX>(
        value,
        grad,
        exp_avg,
        exp_avg_sq,
        greatest,
        change,
        eps,
        active,
        min,
        max,
        (*scalars, zero),
    );
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "only arguments are taken to be free of aliases")]
fn vary<C: Compute, const ROWS: u8, const LIMITS: bool, const MAX: bool>(
    value: &mut [C],
    grad: &[C],
    exp_avg: &mut [C],
    exp_avg_sq: &mut [C],
    max_exp_avg_sq: &mut [C],
    change: &[C],
    eps: &[C],
    active: &[u8],
    min: &[C],
    max: &[C],
    (scalars, zero): (Scalars<C>, bool),
) {
    // All of one length, which the compiler then need not ask about element by element.
    let len = value.len();
    let used = |used: bool| if used { len } else { 0 };
    let (grad, exp_avg, exp_avg_sq) = (&grad[..len], &mut exp_avg[..len], &mut exp_avg_sq[..len]);
    let max_exp_avg_sq = &mut max_exp_avg_sq[..used(MAX)];
    let (change, eps) = (&change[..used(ROWS != ALIKE)], &eps[..used(ROWS != ALIKE)]);
    let active = &active[..used(ROWS == SKIPS)];
    let (min, max) = (&min[..used(LIMITS)], &max[..used(LIMITS)]);
    let l2 = scalars.has_l2_decay();
    for i in 0..len {
        let (p, m, v) = (value[i], exp_avg[i], exp_avg_sq[i]);
        let (mut new_m, new_v) = if l2 {
            scalars.moments::<true>(p, grad[i], m, v)
        } else {
            scalars.moments::<false>(p, grad[i], m, v)
        };
        let second = if MAX { maximum(max_exp_avg_sq[i], new_v) } else { new_v };
        let correction = if ROWS == ALIKE { scalars.correction() } else { [change[i], eps[i]] };
        let acts = ROWS != SKIPS || active[i] != 0;
        let moved = scalars.moved(p, new_m, second, correction);
        let new_p = if LIMITS {
            let held = (moved < min[i]) | (moved > max[i]);
            new_m = if held & zero { C::default() } else { new_m };
            Interval { min: min[i], max: max[i] }.clamp(moved)
        } else {
            scalars.bounds().clamp(moved)
        };
        value[i] = if acts { new_p } else { p };
        exp_avg[i] = if acts { new_m } else { m };
        exp_avg_sq[i] = if acts { new_v } else { v };
        if MAX {
            max_exp_avg_sq[i] = if acts { second } else { max_exp_avg_sq[i] };
        }
    }
}
