//! The update where scalars differ from element to element: rows of several ages, bounds of their
//! own. The equations are those of `update`; what differs is read beside the elements.

use crate::bounds::Interval;
use crate::element::Compute;
use crate::isa::Kernel;
use crate::update::{Block, Scalars, maximum};

/// More ages than so many are looked up, fewer are told apart by comparison, in vector code.
pub(crate) const FEW: usize = 4;

/// The bias corrections of each element (`change` and `eps`), and whether it takes part; as long as
/// the block.
#[derive(Clone, Copy)]
pub(crate) enum Corrections<'a, C> {
    /// Element `i` takes number `codes[i] - 1`; 0 takes no part.
    Few { codes: &'a [u8], table: [[C; 2]; FEW] },
    /// Each has its own.
    Each { corrections: &'a [[C; 2]], active: &'a [bool] },
}

/// The bounds of each element, NaN where there is none; as long as the block.
#[derive(Clone, Copy)]
pub(crate) struct Limits<'a, C> {
    pub min: &'a [C],
    pub max: &'a [C],
    /// Whether the first moment is zeroed where a bound holds the value back.
    pub zero: bool,
}

/// The update of one block. Without `limits` the bounds are those of the scalars.
pub(crate) struct VariedUpdate<'a, C> {
    pub block: Block<'a, C>,
    pub scalars: &'a Scalars<C>,
    pub rows: Option<Corrections<'a, C>>,
    pub limits: Option<Limits<'a, C>>,
}

impl<C: Compute> Kernel for VariedUpdate<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        match (self.rows, self.limits.is_some()) {
            (None, _) => self.run_with::<NONE, true>(),
            (Some(Corrections::Few { .. }), true) => self.run_with::<FEW_AGES, true>(),
            (Some(Corrections::Few { .. }), false) => self.run_with::<FEW_AGES, false>(),
            (Some(Corrections::Each { .. }), true) => self.run_with::<ANY_AGES, true>(),
            (Some(Corrections::Each { .. }), false) => self.run_with::<ANY_AGES, false>(),
        }
    }
}

/// What a loop is compiled for: elements of one age, of few, of any.
const NONE: u8 = 0;
const FEW_AGES: u8 = 1;
const ANY_AGES: u8 = 2;

impl<C: Compute> VariedUpdate<'_, C> {
    #[inline(always)]
    fn run_with<const ROWS: u8, const LIMITS: bool>(self) {
        let Block { value, grad, exp_avg, exp_avg_sq, max_exp_avg_sq } = self.block;
        let none = [[C::default(); 2]; FEW];
        let (codes, table, corrections, active): (&[u8], _, &[[C; 2]], &[bool]) = match self.rows {
            None => (&[], none, &[], &[]),
            Some(Corrections::Few { codes, table }) => (codes, table, &[], &[]),
            Some(Corrections::Each { corrections, active }) => (&[], none, corrections, active),
        };
        let none = Limits { min: &[], max: &[], zero: false };
        let Limits { min, max, zero } = self.limits.unwrap_or(none);
        let scalars = (*self.scalars, zero, table);
        match max_exp_avg_sq {
            None => {
                let greatest = &mut [];
                vary::<C, ROWS, LIMITS, false>(
                    value,
                    grad,
                    exp_avg,
                    exp_avg_sq,
                    greatest,
                    codes,
                    corrections,
                    active,
                    min,
                    max,
                    scalars,
                );
            }
            Some(greatest) => vary::<C, ROWS, LIMITS, true>(
                value,
                grad,
                exp_avg,
                exp_avg_sq,
                greatest,
                codes,
                corrections,
                active,
                min,
                max,
                scalars,
            ),
        }
    }
}

/// One of a few, by comparison: code 1 is the first.
#[inline(always)]
fn of_few<C: Compute>(table: [[C; 2]; FEW], code: u8) -> [C; 2] {
    let [first, rest @ ..] = table;
    let mut found = first;
    for (place, correction) in rest.into_iter().enumerate() {
        let is_it = code == place as u8 + 2;
        found = [0, 1].map(|part| if is_it { correction[part] } else { found[part] });
    }
    found
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "only arguments are taken to be free of aliases")]
fn vary<C: Compute, const ROWS: u8, const LIMITS: bool, const MAX: bool>(
    value: &mut [C],
    grad: &[C],
    exp_avg: &mut [C],
    exp_avg_sq: &mut [C],
    max_exp_avg_sq: &mut [C],
    codes: &[u8],
    corrections: &[[C; 2]],
    active: &[bool],
    min: &[C],
    max: &[C],
    (scalars, zero, table): (Scalars<C>, bool, [[C; 2]; FEW]),
) {
    // All of one length, which the compiler then need not ask about element by element.
    let len = value.len();
    let used = |used: bool| if used { len } else { 0 };
    let (grad, exp_avg, exp_avg_sq) = (&grad[..len], &mut exp_avg[..len], &mut exp_avg_sq[..len]);
    let max_exp_avg_sq = &mut max_exp_avg_sq[..used(MAX)];
    let codes = &codes[..used(ROWS == FEW_AGES)];
    let corrections = &corrections[..used(ROWS == ANY_AGES)];
    let active = &active[..used(ROWS == ANY_AGES)];
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
        let (correction, acts) = match ROWS {
            FEW_AGES => (of_few(table, codes[i]), codes[i] != 0),
            ANY_AGES => (corrections[i], active[i]),
            _ => (scalars.correction(), true),
        };
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
