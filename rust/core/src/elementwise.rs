//! Passes that change each element of some tensors by itself: a factor, bounds.

use std::ops::Range;

use crate::bounds::Interval;
use crate::codec::{BLOCK, Written};
use crate::element::Compute;
use crate::isa::Kernel;
use crate::parallel::{CHUNK, Plan};
use crate::side::{Scratch, Side};
use crate::{Bounds, DType, Execution, Isa, View};

/// Multiplies every element in place. Arithmetic runs in `f64` for `f64` and in `f32` for the
/// others, with the coefficient rounded to that type.
///
/// # Safety
/// Until the call returns, every element of every view is readable and writable, belongs to no
/// other view and occurs once in its own, and no other thread touches it. Strides are as many as
/// the shape's dimensions. Alignment is not required.
///
/// ```
/// use std::num::NonZeroUsize;
/// use paramstate::{DType, Execution, Operand, View, ViewLayout, scale};
///
/// let mut grad = [1.0f32, 2.0, 3.0];
/// let operand = Operand { ptr: grad.as_mut_ptr().cast(), dtype: DType::F32 };
/// let view = View { operand, layout: ViewLayout::Flat { len: 3 } };
/// // SAFETY: three elements of an array that lives until the end.
/// unsafe { scale(&[view], 0.5, &Execution::new(NonZeroUsize::MIN)) };
/// assert_eq!(grad, [0.5, 1.0, 1.5]);
/// ```
pub unsafe fn scale(views: &[View], coefficient: f64, execution: &Execution) {
    // SAFETY: the caller's contract.
    unsafe { change(views, |view| (view, Factor(coefficient)), execution) }
}

/// Moves every element that lies outside its view's bounds to the nearer one.
///
/// # Safety
/// As for [`scale`].
///
/// ```
/// use std::num::NonZeroUsize;
/// use paramstate::{Bounds, DType, Execution, Operand, View, ViewLayout, clamp};
///
/// let mut values = [-1.0f32, 0.5, 3.0];
/// let operand = Operand { ptr: values.as_mut_ptr().cast(), dtype: DType::F32 };
/// let view = View { operand, layout: ViewLayout::Flat { len: 3 } };
/// let unit = Bounds::new(Some(0.0), Some(1.0))?;
/// // SAFETY: three elements of an array that lives until the end.
/// unsafe { clamp(&[(view, unit)], &Execution::new(NonZeroUsize::MIN)) };
/// assert_eq!(values, [0.0, 0.5, 1.0]);
/// # Ok::<(), paramstate::Error>(())
/// ```
pub unsafe fn clamp(views: &[(View, Bounds)], execution: &Execution) {
    // SAFETY: the caller's contract.
    unsafe { change(views, |(view, bounds)| (view, *bounds), execution) }
}

/// Moves every element that lies outside its own bounds, or where it has none on that side outside
/// those for all, to the nearer one.
///
/// # Safety
/// As for [`scale`]; the views of bounds are as long, readable, and not written.
pub(crate) unsafe fn clamp_each(
    view: &View,
    bounds: Bounds,
    limits: [Option<View>; 2],
    execution: &Execution,
) {
    let plan = Plan::new(std::iter::once(view.layout.len()));
    let scratch = || (Scratch::default(), Scratch::default(), Scratch::default());
    plan.run(execution.threads, scratch, |(a, b, c), unit| {
        for (_, span) in plan.parts(unit, |_| view.layout.len()) {
            if view.operand.dtype == DType::F64 {
                let rooms = [&mut *a, &mut *b, &mut *c]
                    .map(|room| &mut room.double.get_or_insert_default().value);
                // SAFETY: the caller's contract.
                unsafe { clamp_span::<f64>(view, bounds, &limits, span, rooms, execution.isa) }
            } else {
                let rooms = [&mut *a, &mut *b, &mut *c]
                    .map(|room| &mut room.single.get_or_insert_default().value);
                // SAFETY: the caller's contract.
                unsafe { clamp_span::<f32>(view, bounds, &limits, span, rooms, execution.isa) }
            }
        }
    });
}

/// # Safety
/// As for [`clamp_each`], for the elements `span`.
unsafe fn clamp_span<C: Compute>(
    view: &View,
    bounds: Bounds,
    limits: &[Option<View>; 2],
    span: Range<usize>,
    [room, min, max]: [&mut [C; BLOCK]; 3],
    isa: Isa,
) {
    let everywhere = |bound: Option<f64>| C::narrow(bound.unwrap_or(f64::NAN));
    min.fill(everywhere(bounds.min));
    max.fill(everywhere(bounds.max));
    for start in span.clone().step_by(BLOCK) {
        let part = start..span.end.min(start + BLOCK);
        for (limit, room) in limits.iter().zip([&mut *min, &mut *max]) {
            if let Some(limit) = limit {
                let limit = Side::new::<C>(limit.operand, limit.layout.steps());
                // SAFETY: the caller's contract.
                unsafe { limit.copy(part.clone(), room, isa) };
            }
        }
        let value = Side::new::<C>(view.operand, view.layout.steps());
        // SAFETY: the caller's contract.
        let values = unsafe { value.open(part.clone(), room, isa) };
        isa.run(ClampEach { values, min, max });
        // SAFETY: the same part and scratch.
        unsafe { value.close(part.clone(), Written::all(&room[..part.len()]), isa) };
    }
}

/// What happens to each element of a view: for each compute type a loop.
trait Change: Copy {
    fn apply<C: Compute>(self, values: &mut [C], isa: Isa);
}

#[derive(Clone, Copy)]
struct Factor(f64);

impl Change for Factor {
    fn apply<C: Compute>(self, values: &mut [C], isa: Isa) {
        isa.run(Scale { values, coefficient: C::narrow(self.0) });
    }
}

impl Change for Bounds {
    fn apply<C: Compute>(self, values: &mut [C], isa: Isa) {
        isa.run(Clamp { values, interval: self.narrow() });
    }
}

/// # Safety
/// As for [`scale`].
unsafe fn change<T: Sync, F: Change>(
    items: &[T],
    split: impl Fn(&T) -> (&View, F) + Sync,
    execution: &Execution,
) {
    let len_of = |item: usize| split(&items[item]).0.layout.len();
    let plan = Plan::new((0..items.len()).map(len_of));
    plan.run(execution.threads, Scratch::default, |scratch, unit| {
        for (item, span) in plan.parts(unit, len_of) {
            let (view, change) = split(&items[item]);
            if view.operand.dtype == DType::F64 {
                let block = &mut scratch.double.get_or_insert_default().value;
                // SAFETY: the caller's contract; every element belongs to one part of one unit.
                unsafe { change_span(view, change, span, block, execution.isa) }
            } else {
                let block = &mut scratch.single.get_or_insert_default().value;
                // SAFETY: as above.
                unsafe { change_span(view, change, span, block, execution.isa) }
            }
        }
    });
}

/// # Safety
/// As for [`scale`], for the elements `span`.
unsafe fn change_span<C: Compute>(
    view: &View,
    change: impl Change,
    span: Range<usize>,
    scratch: &mut [C; BLOCK],
    isa: Isa,
) {
    let side = Side::new::<C>(view.operand, view.layout.steps());
    let block = if side.in_place { CHUNK } else { BLOCK };
    for start in span.clone().step_by(block) {
        let part = start..span.end.min(start + block);
        // SAFETY: the caller's contract.
        let values = unsafe { side.open(part.clone(), scratch, isa) };
        change.apply(values, isa);
        // SAFETY: the same part and scratch.
        unsafe { side.close(part.clone(), Written::all(&scratch[..part.len().min(BLOCK)]), isa) };
    }
}

struct Scale<'a, C> {
    values: &'a mut [C],
    coefficient: C,
}

impl<C: Compute> Kernel for Scale<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for x in self.values {
            *x = *x * self.coefficient;
        }
    }
}

struct ClampEach<'a, C> {
    values: &'a mut [C],
    min: &'a [C],
    max: &'a [C],
}

impl<C: Compute> Kernel for ClampEach<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for ((x, &min), &max) in self.values.iter_mut().zip(self.min).zip(self.max) {
            *x = Interval { min, max }.clamp(*x);
        }
    }
}

struct Clamp<'a, C> {
    values: &'a mut [C],
    interval: Interval<C>,
}

impl<C: Compute> Kernel for Clamp<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for x in self.values {
            *x = self.interval.clamp(*x);
        }
    }
}
