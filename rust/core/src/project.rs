//! Norms that are held: of a whole tensor, or of each group of elements along some dimensions.

use std::sync::Arc;

use crate::norm_order::{Item, Ordered};
use crate::parallel::{CHUNK, Plan};
use crate::side::Scratch;
use crate::{Cohorts, Execution, Operand};

/// What a norm is held to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum NormLimit {
    /// Groups of a greater norm are scaled down to it.
    AtMost(f64),
    /// Every group is scaled to it.
    Exactly(f64),
}

impl NormLimit {
    /// What a group of this norm is multiplied by. A norm that is 0 or no finite number cannot be
    /// scaled to another: such a group stays as it is.
    #[inline(always)]
    pub(crate) fn factor(self, norm: f64) -> Option<f64> {
        let (limit, exceeds) = match self {
            Self::AtMost(limit) => (limit, norm > limit),
            Self::Exactly(limit) => (limit, norm > 0.0),
        };
        (exceeds && norm < f64::INFINITY).then_some(limit / norm)
    }
}

/// A tensor whose 2-norms are held to a limit.
#[derive(Clone, Debug)]
pub struct Projection {
    /// Its memory.
    pub operand: Operand,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Elements to the next index, for each dimension.
    pub strides: Vec<isize>,
    /// Whether the norm is over this dimension, for each; over all of them, it is the tensor's.
    pub over: Vec<bool>,
    /// What the norms are held to.
    pub limit: NormLimit,
    /// A dimension and its rows: elements of skipped ones count in a norm, and are not scaled.
    pub rows: Option<(usize, Arc<Cohorts>)>,
}

/// Scales the groups of elements whose norm is not what it is held to, in place. Squares are summed
/// in `f64`, in an order that the shape and the strides fix: every [`Execution`] gives the same bits.
///
/// # Safety
/// Until the call returns, every element of every tensor is readable and writable, belongs to no
/// other tensor and occurs once in its own, and no other thread touches it. Strides and `over` are
/// as many as the shape's dimensions, and cohorts have as many rows as their dimension.
///
/// ```
/// use std::num::NonZeroUsize;
/// use paramstate::{DType, Execution, NormLimit, Operand, Projection, project};
///
/// let mut rows = [3.0f32, 4.0, 0.3, 0.4];
/// let unit = Projection {
///     operand: Operand { ptr: rows.as_mut_ptr().cast(), dtype: DType::F32 },
///     shape: vec![2, 2],
///     strides: vec![2, 1],
///     over: vec![false, true],
///     limit: NormLimit::AtMost(1.0),
///     rows: None,
/// };
/// // SAFETY: four elements of an array that lives until the end.
/// unsafe { project(&[&unit], &Execution::new(NonZeroUsize::MIN)) };
/// assert_eq!(rows, [0.6, 0.8, 0.3, 0.4]);
/// ```
pub unsafe fn project(projections: &[&Projection], execution: &Execution) {
    let all: Vec<Ordered> = projections.iter().map(|projection| Ordered::new(projection)).collect();
    let (large, small): (Vec<&Ordered>, Vec<&Ordered>) =
        all.iter().filter(|held| !held.is_empty()).partition(|held| held.is_large());
    let items: Vec<(&Ordered, Item)> =
        small.into_iter().flat_map(|held| held.items().map(move |item| (held, item))).collect();
    let len_of = |item: usize| items[item].0.elements(&items[item].1).min(CHUNK);
    let plan = Plan::new((0..items.len()).map(len_of));
    plan.run(execution.threads, Scratch::default, |scratch, unit| {
        for (item, _) in plan.parts(unit, len_of) {
            let (held, item) = &items[item];
            // SAFETY: the caller's contract; every group belongs to one item, run once.
            unsafe { held.hold(item, scratch, execution.isa) }
        }
    });
    for held in large {
        for group in 0..held.outer {
            // SAFETY: the caller's contract.
            unsafe { held.hold_large(group, execution) }
        }
    }
}
