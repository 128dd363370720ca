//! Norms held in groups: sums of squares, and the scaling of what has another norm.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::codec::{BLOCK, Written};
use crate::element::Compute;
use crate::isa::Kernel;
use crate::norm::sum_span_in;
use crate::norm_order::{Item, Ordered};
use crate::parallel::Plan;
use crate::rows::ROOM;
use crate::side::Scratch;
use crate::{DType, Execution, Isa, NormLimit};

impl Ordered {
    /// # Safety
    /// As for [`project`](crate::project()), for the groups of this item.
    pub(crate) unsafe fn hold(&self, item: &Item, scratch: &mut Scratch, isa: Isa) {
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
    /// As for [`project`](crate::project()).
    pub(crate) unsafe fn hold_large(&self, group: usize, execution: &Execution) {
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
    /// As for [`project`](crate::project()).
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
    /// As for [`project`](crate::project()).
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
    /// As for [`project`](crate::project()), for the groups of this item. `C` is `f64` where the tensor is, else `f32`.
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
    fn activity<'b>(&self, part: &Range<usize>, room: &'b mut [bool; ROOM]) -> Option<&'b [bool]> {
        self.held.rows.as_ref()?.activity(part, room, self.isa)
    }

    /// Whole groups that fit into a block together.
    ///
    /// # Safety
    /// As for `hold`.
    unsafe fn hold_short(&mut self, part: Range<usize>) {
        let mut room = [true; ROOM];
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
        let mut room = [true; ROOM];
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
