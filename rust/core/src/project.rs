//! Norms that are held: of a whole tensor, or of each group of elements along some dimensions.
//!
//! The dimensions are put into an order in which memory is walked well: those that the norm is not
//! over, then those that it is over, each with the widest strides first; but where the closest
//! neighbours in memory belong to different groups, their dimension comes last. Element `d` of
//! group `(o, k)` then stands at `(o * len + d) * width + k`, and a width of 1 means that each group
//! lies in one piece.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::codec::{BLOCK, Written};
use crate::element::Compute;
use crate::isa::Kernel;
use crate::norm::sum_span_in;
use crate::parallel::{CHUNK, Plan};
use crate::rows::Rows;
use crate::side::{Scratch, Side};
use crate::{Cohorts, DType, Execution, Isa, Operand, View, ViewLayout};

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
    fn factor(self, norm: f64) -> Option<f64> {
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

/// A projection with its dimensions in order.
struct Ordered {
    view: View,
    outer: usize,
    len: usize,
    width: usize,
    limit: NormLimit,
    rows: Option<Rows>,
}

/// What one thread does at a time.
enum Item {
    /// Whole groups, each in one piece.
    Groups(Range<usize>),
    /// Neighbouring groups of one outer index.
    Columns(usize, Range<usize>),
}

impl Ordered {
    fn new(projection: &Projection) -> Self {
        let Projection { operand, shape, strides, over, limit, rows } = projection;
        let mut dims: Vec<usize> = (0..shape.len()).filter(|&dim| shape[dim] != 1).collect();
        dims.sort_by_key(|&dim| std::cmp::Reverse(strides[dim].unsigned_abs()));
        let closest = dims.pop_if(|dim| !over[*dim]);
        let (within, between): (Vec<usize>, Vec<usize>) =
            dims.into_iter().partition(|&dim| over[dim]);
        // One group for all, or none over anything: any order will do.
        let (closest, between) = match closest {
            Some(dim) if within.is_empty() => (None, [between, vec![dim]].concat()),
            closest => (closest, between),
        };
        let size = |dims: &[usize]| dims.iter().map(|&dim| shape[dim]).product();
        let (outer, len) = (size(&between), size(&within));
        let width = closest.map_or(1, |dim| shape[dim]);
        let order: Vec<usize> = between.into_iter().chain(within).chain(closest).collect();
        let rows = rows.as_ref().map(|(dim, cohorts)| {
            let after = order.iter().skip_while(|place| *place != dim).skip(1);
            Rows { inner: after.map(|&dim| shape[dim]).product(), cohorts: Arc::clone(cohorts) }
        });
        let sizes = order.iter().map(|&dim| (shape[dim], strides[dim]));
        let view = View { operand: *operand, layout: ViewLayout::along(sizes) };
        Self { view, outer, len, width, limit: *limit, rows }
    }

    fn side<C: Compute>(&self) -> Side<'_> {
        Side::new::<C>(self.view.operand, self.view.layout.steps())
    }

    fn is_empty(&self) -> bool {
        self.outer * self.len * self.width == 0
    }

    /// Whether several threads had better share one group.
    fn is_large(&self) -> bool {
        self.width == 1 && self.len > CHUNK
    }

    fn items(&self) -> impl Iterator<Item = Item> {
        let groups = (CHUNK / self.len).max(1);
        let outer = self.outer;
        let whole = (0..if self.width == 1 { outer } else { 0 }).step_by(groups);
        let whole = whole.map(move |start| Item::Groups(start..outer.min(start + groups)));
        let width = self.width;
        let columns = (0..if width == 1 { 0 } else { outer }).flat_map(move |outer| {
            let tiles = (0..width).step_by(BLOCK);
            tiles.map(move |start| Item::Columns(outer, start..width.min(start + BLOCK)))
        });
        whole.chain(columns)
    }

    fn elements(&self, item: &Item) -> usize {
        match item {
            Item::Groups(groups) => groups.len() * self.len,
            Item::Columns(_, columns) => columns.len() * self.len,
        }
    }

    /// # Safety
    /// As for [`project`], for the groups of this item.
    unsafe fn hold(&self, item: &Item, scratch: &mut Scratch, isa: Isa) {
        if self.view.operand.dtype == DType::F64 {
            let block = &mut scratch.double.get_or_insert_default().value;
            // SAFETY: the caller's contract.
            unsafe { Holder { held: self, block, isa }.hold(item) }
        } else {
            let block = &mut scratch.single.get_or_insert_default().value;
            // SAFETY: the caller's contract.
            unsafe { Holder { held: self, block, isa }.hold(item) }
        }
    }

    /// One group, by all threads together.
    ///
    /// # Safety
    /// As for [`project`].
    unsafe fn hold_large(&self, group: usize, execution: &Execution) {
        let start = group * self.len;
        let plan = Plan::new(std::iter::once(self.len));
        let sums: Vec<AtomicU64> = (0..plan.units()).map(|_| AtomicU64::new(0)).collect();
        plan.run(execution.threads, Scratch::default, |scratch, unit| {
            for (_, part) in plan.parts(unit, |_| self.len) {
                let part = start + part.start..start + part.end;
                // SAFETY: the caller's contract.
                let sum = unsafe { self.sum(part, scratch, execution.isa) };
                sums[unit].store(sum.to_bits(), Ordering::Relaxed);
            }
        });
        let sum: f64 = sums.into_iter().map(|sum| f64::from_bits(sum.into_inner())).sum();
        let Some(factor) = self.limit.factor(sum.sqrt()) else { return };
        plan.run(execution.threads, Scratch::default, |scratch, unit| {
            for (_, part) in plan.parts(unit, |_| self.len) {
                let part = start + part.start..start + part.end;
                // SAFETY: the caller's contract; every element belongs to one part.
                unsafe { self.scale(part, factor, scratch, execution.isa) }
            }
        });
    }

    /// # Safety
    /// As for [`project`].
    unsafe fn sum(&self, span: Range<usize>, scratch: &mut Scratch, isa: Isa) -> f64 {
        if self.view.operand.dtype == DType::F64 {
            let block = &mut scratch.double.get_or_insert_default().value;
            // SAFETY: the caller's contract.
            unsafe { sum_span_in::<f64>(&self.view, span, block, isa) }
        } else {
            let block = &mut scratch.single.get_or_insert_default().value;
            // SAFETY: the caller's contract.
            unsafe { sum_span_in::<f32>(&self.view, span, block, isa) }
        }
    }

    /// # Safety
    /// As for [`project`].
    unsafe fn scale(&self, span: Range<usize>, factor: f64, scratch: &mut Scratch, isa: Isa) {
        if self.view.operand.dtype == DType::F64 {
            let block = &mut scratch.double.get_or_insert_default().value;
            // SAFETY: the caller's contract.
            unsafe { Holder { held: self, block, isa }.scale(span, &[factor]) }
        } else {
            let block = &mut scratch.single.get_or_insert_default().value;
            // SAFETY: the caller's contract.
            unsafe { Holder { held: self, block, isa }.scale(span, &[factor]) }
        }
    }
}

/// One thread's work on one projection in the compute type.
struct Holder<'a, C> {
    held: &'a Ordered,
    block: &'a mut [C; BLOCK],
    isa: Isa,
}

impl<C: Compute> Holder<'_, C> {
    /// # Safety
    /// As for [`project`], for the groups of this item. `C` is `f64` where the tensor is, else `f32`.
    unsafe fn hold(&mut self, item: &Item) {
        let len = self.held.len;
        match item {
            Item::Groups(groups) if len <= BLOCK => {
                for start in groups.clone().step_by(BLOCK / len) {
                    let end = groups.end.min(start + BLOCK / len);
                    // SAFETY: the caller's contract.
                    unsafe { self.hold_short(start * len..end * len) }
                }
            }
            Item::Groups(groups) => {
                for group in groups.clone() {
                    let span = group * len..(group + 1) * len;
                    let (view, isa) = (&self.held.view, self.isa);
                    // SAFETY: the caller's contract.
                    let sum = unsafe { sum_span_in::<C>(view, span.clone(), self.block, isa) };
                    if let Some(factor) = self.held.limit.factor(sum.sqrt()) {
                        // SAFETY: the caller's contract.
                        unsafe { self.scale(span, &[factor]) }
                    }
                }
            }
            Item::Columns(outer, columns) => {
                // SAFETY: the caller's contract.
                unsafe { self.hold_columns(*outer, columns.clone()) }
            }
        }
    }

    /// Which elements may be scaled; `None`: all.
    fn activity<'b>(&self, part: &Range<usize>, room: &'b mut [bool; BLOCK]) -> Option<&'b [bool]> {
        self.held.rows.as_ref()?.activity(part.clone(), room, self.isa)
    }

    /// Whole groups that fit into a block together.
    ///
    /// # Safety
    /// As for `hold`.
    unsafe fn hold_short(&mut self, part: Range<usize>) {
        let mut room = [true; BLOCK];
        let active = self.activity(&part, &mut room);
        let (len, limit) = (self.held.len, self.held.limit);
        let side = self.held.side::<C>();
        // SAFETY: the caller's contract.
        let values = unsafe { side.open(part.clone(), self.block, self.isa) };
        self.isa.run(HoldShort { values, len, limit, active });
        // SAFETY: the same part and scratch.
        unsafe {
            side.close(
                part.clone(),
                Written { source: &self.block[..part.len()], active, random: None },
                self.isa,
            )
        };
    }

    /// Groups that lie side by side: one row of all of them after another.
    ///
    /// # Safety
    /// As for `hold`.
    unsafe fn hold_columns(&mut self, outer: usize, columns: Range<usize>) {
        let mut sums = [0.0; BLOCK];
        let (held, width) = (self.held, columns.len());
        let sums = &mut sums[..width];
        let parts = held.parts(outer, columns);
        for part in parts.clone() {
            let side = held.side::<C>();
            // SAFETY: the caller's contract.
            let values = unsafe { side.read(part, self.block, self.isa) };
            self.isa.run(AddColumns { values, sums });
        }
        let factors = sums.iter().map(|sum| held.limit.factor(sum.sqrt()));
        let factors: Vec<f64> = factors.map(|factor| factor.unwrap_or(1.0)).collect();
        if factors.iter().any(|factor| *factor != 1.0) {
            for part in parts {
                // SAFETY: the caller's contract.
                unsafe { self.scale(part, &factors) }
            }
        }
    }

    /// Multiplies by the factors, again and again from the first.
    ///
    /// # Safety
    /// As for `hold`, for the elements `span`; where it is longer than a block, there is one factor.
    unsafe fn scale(&mut self, span: Range<usize>, factors: &[f64]) {
        let mut room = [true; BLOCK];
        for start in span.clone().step_by(BLOCK) {
            let part = start..span.end.min(start + BLOCK);
            let active = self.activity(&part, &mut room);
            let side = self.held.side::<C>();
            // SAFETY: the caller's contract.
            let values = unsafe { side.open(part.clone(), self.block, self.isa) };
            self.isa.run(ScaleColumns { values, factors, active });
            // SAFETY: the same part and scratch.
            unsafe {
                side.close(
                    part.clone(),
                    Written { source: &self.block[..part.len()], active, random: None },
                    self.isa,
                )
            };
        }
    }
}

impl Ordered {
    /// The elements of these columns, a block of them at a time: several rows where all columns of
    /// the row are among them.
    fn parts(
        &self,
        outer: usize,
        columns: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + Clone {
        let (len, width) = (self.len, self.width);
        let rows = if columns.len() == width { (BLOCK / width).max(1) } else { 1 };
        (0..len).step_by(rows).map(move |row| {
            let last = len.min(row + rows) - 1;
            let at = |row: usize, column: usize| (outer * len + row) * width + column;
            at(row, columns.start)..at(last, columns.end)
        })
    }
}

struct HoldShort<'a, C> {
    values: &'a mut [C],
    len: usize,
    limit: NormLimit,
    active: Option<&'a [bool]>,
}

impl<C: Compute> Kernel for HoldShort<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for (group, values) in self.values.chunks_exact_mut(self.len).enumerate() {
            let sum = values.iter().fold(0.0, |sum, x| x.to_f64().mul_add(x.to_f64(), sum));
            let Some(factor) = self.limit.factor(f64::sqrt(sum)) else { continue };
            for (i, x) in values.iter_mut().enumerate() {
                if self.active.is_none_or(|active| active[group * self.len + i]) {
                    *x = C::narrow(x.to_f64() * factor);
                }
            }
        }
    }
}

struct AddColumns<'a, C> {
    values: &'a [C],
    sums: &'a mut [f64],
}

impl<C: Compute> Kernel for AddColumns<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for row in self.values.chunks_exact(self.sums.len()) {
            for (x, sum) in row.iter().zip(&mut *self.sums) {
                *sum = x.to_f64().mul_add(x.to_f64(), *sum);
            }
        }
    }
}

struct ScaleColumns<'a, C> {
    values: &'a mut [C],
    factors: &'a [f64],
    active: Option<&'a [bool]>,
}

impl<C: Compute> Kernel for ScaleColumns<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let scaled = |x: C, factor: f64| C::narrow(x.to_f64() * factor);
        match (self.factors, self.active) {
            ([factor], None) => self.values.iter_mut().for_each(|x| *x = scaled(*x, *factor)),
            (factors, None) => {
                for row in self.values.chunks_exact_mut(factors.len()) {
                    row.iter_mut().zip(factors).for_each(|(x, factor)| *x = scaled(*x, *factor));
                }
            }
            (factors, Some(active)) => {
                let factors = factors.iter().cycle();
                for ((x, active), factor) in self.values.iter_mut().zip(active).zip(factors) {
                    *x = if *active { scaled(*x, *factor) } else { *x };
                }
            }
        }
    }
}
