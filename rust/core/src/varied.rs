//! The update where scalars differ from element to element: rows of several ages, bounds of their
//! own. The equations are those of `update`; what differs is read beside the elements.

use crate::bounds::Interval;
use crate::element::Compute;
use crate::isa::Kernel;
use crate::update::{Block, Scalars, maximum};

/// The bias corrections of each element (`change` and `eps`), and whether it takes part (all do where
/// nothing is said); as long as the block.
pub(crate) struct Corrections<'a, C> {
    pub corrections: &'a [[C; 2]],
    pub active: Option<&'a [bool]>,
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
        let skips = self.rows.as_ref().is_some_and(|rows| rows.active.is_some());
        match (&self.rows, &self.limits) {
            (Some(_), Some(_)) if skips => self.run_with::<true, true, true>(),
            (Some(_), None) if skips => self.run_with::<true, true, false>(),
            (Some(_), Some(_)) => self.run_with::<true, false, true>(),
            (Some(_), None) => self.run_with::<true, false, false>(),
            (None, _) => self.run_with::<false, false, true>(),
        }
    }
}

impl<C: Compute> VariedUpdate<'_, C> {
    #[inline(always)]
    fn run_with<const ROWS: bool, const SKIPS: bool, const LIMITS: bool>(self) {
        let Block { value, grad, exp_avg, exp_avg_sq, max_exp_avg_sq } = self.block;
        let Corrections { corrections, active } =
            self.rows.unwrap_or(Corrections { corrections: &[], active: None });
        let active = active.unwrap_or(&[]);
        let none = Limits { min: &[], max: &[], zero: false };
        let Limits { min, max, zero } = self.limits.unwrap_or(none);
        let scalars = (*self.scalars, zero);
        match max_exp_avg_sq {
            None => vary::<C, ROWS, SKIPS, LIMITS, false>(
                value,
                grad,
                exp_avg,
                exp_avg_sq,
                &mut [],
                corrections,
                active,
                min,
                max,
                scalars,
            ),
            Some(greatest) => vary::<C, ROWS, SKIPS, LIMITS, true>(
                value,
                grad,
                exp_avg,
                exp_avg_sq,
                greatest,
                corrections,
                active,
                min,
                max,
                scalars,
            ),
        }
    }
}

#[inline(always)]
#[expect(clippy::too_many_arguments, reason = "only arguments are taken to be free of aliases")]
fn vary<C: Compute, const ROWS: bool, const SKIPS: bool, const LIMITS: bool, const MAX: bool>(
    value: &mut [C],
    grad: &[C],
    exp_avg: &mut [C],
    exp_avg_sq: &mut [C],
    max_exp_avg_sq: &mut [C],
    corrections: &[[C; 2]],
    active: &[bool],
    min: &[C],
    max: &[C],
    (scalars, zero): (Scalars<C>, bool),
) {
    // All of one length, which the compiler then need not ask about element by element.
    let len = value.len();
    let used = |used: bool| if used { len } else { 0 };
    let (grad, exp_avg, exp_avg_sq) = (&grad[..len], &mut exp_avg[..len], &mut exp_avg_sq[..len]);
    let max_exp_avg_sq = &mut max_exp_avg_sq[..used(MAX)];
    let (corrections, active) = (&corrections[..used(ROWS)], &active[..used(SKIPS)]);
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
        let correction = if ROWS { corrections[i] } else { scalars.correction() };
        let moved = scalars.moved(p, new_m, second, correction);
        let new_p = if LIMITS {
            let held = (moved < min[i]) | (moved > max[i]);
            new_m = if held & zero { C::default() } else { new_m };
            Interval { min: min[i], max: max[i] }.clamp(moved)
        } else {
            scalars.bounds().clamp(moved)
        };
        let acts = !SKIPS || active[i];
        value[i] = if acts { new_p } else { p };
        exp_avg[i] = if acts { new_m } else { m };
        exp_avg_sq[i] = if acts { new_v } else { v };
        if MAX {
            max_exp_avg_sq[i] = if acts { second } else { max_exp_avg_sq[i] };
        }
    }
}
