//! The sum of squares over many tensors, and the global-norm clip made of it.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::codec::BLOCK;
use crate::element::Compute;
use crate::isa::Kernel;
use crate::operands::Operands;
use crate::parallel::{CHUNK, Plan};
use crate::rows::{ROOM, Rows};
use crate::side::{Scratch, Side};
use crate::{AdamTask, DType, Execution, Isa, RowSteps, View};

/// Partial sums per block; element `i` of a chunk goes to lane `i % LANES`, on every machine.
const LANES: usize = 16;

/// Places of a block that are read side by side.
const STREAMS: usize = 4;

/// The sum of the squares of all elements, accumulated in `f64`. Lanes, chunk borders and the order
/// of additions are fixed by the list of views alone: every [`Execution`] gives the same bits.
///
/// # Safety
/// Until the call returns, every element of every view is readable and not written. Strides are as
/// many as the shape's dimensions; they may be 0. Alignment is not required.
///
/// ```
/// use std::num::NonZeroUsize;
/// use paramstate::{DType, Execution, Operand, View, ViewLayout, sum_of_squares};
///
/// let grad = [3.0f32, 4.0];
/// let operand = Operand { ptr: grad.as_ptr().cast_mut().cast(), dtype: DType::F32 };
/// let view = View { operand, layout: ViewLayout::Flat { len: 2 } };
/// // SAFETY: two elements of an array that lives until the end.
/// let sum = unsafe { sum_of_squares(&[view], &Execution::new(NonZeroUsize::MIN)) };
/// assert_eq!(sum, 25.0);
/// ```
#[must_use]
pub unsafe fn sum_of_squares(views: &[View], execution: &Execution) -> f64 {
    let sum = |view: usize, span, scratch: &mut Scratch| {
        // SAFETY: the caller's contract.
        unsafe { sum_span(&views[view], span, scratch, execution.isa) }
    };
    sum_in_order(views.len(), |view| views[view].layout.len(), sum, execution)
}

/// The sum of the squares of all gradients, as [`sum_of_squares`] has it for their views. The
/// gradients of rows that a task skips count as zeros.
///
/// # Safety
/// Until the call returns, every element of every task's gradient is readable and not written.
#[must_use]
pub unsafe fn gradient_squares(tasks: &[AdamTask], execution: &Execution) -> f64 {
    let sum = |task: usize, span, scratch: &mut Scratch| {
        // SAFETY: the caller's contract.
        unsafe { sum_gradient(&tasks[task], span, scratch, execution.isa) }
    };
    sum_in_order(tasks.len(), |task| tasks[task].layout.len(), sum, execution)
}

/// Adds up what `sum` gives for each part of each tensor.
fn sum_in_order(
    tensors: usize,
    len_of: impl Fn(usize) -> usize + Sync,
    sum: impl Fn(usize, Range<usize>, &mut Scratch) -> f64 + Sync,
    execution: &Execution,
) -> f64 {
    let plan = Plan::new((0..tensors).map(&len_of));
    // The bits of one `f64` for each unit of work: each is written by whoever runs that unit.
    let sums: Vec<AtomicU64> = (0..plan.units()).map(|_| AtomicU64::new(0)).collect();
    plan.run(execution.threads, Scratch::default, |scratch, unit| {
        let parts = plan.parts(unit, &len_of);
        let sum = parts.map(|(tensor, span)| sum(tensor, span, scratch)).sum();
        sums[unit].store(f64::to_bits(sum), Ordering::Relaxed);
    });
    sums.into_iter().map(|sum| f64::from_bits(sum.into_inner())).sum()
}

/// What gradients of this norm are multiplied by so that it becomes at most `max_norm`:
/// `min(1, max_norm / (norm + 1e-6))` as in `torch.nn.utils.clip_grad_norm_`. NaN if the norm is.
///
/// ```
/// use paramstate::clip_coefficient;
///
/// assert_eq!(clip_coefficient(0.5, 1.0), 1.0);
/// assert!((clip_coefficient(4.0, 1.0) - 0.25).abs() < 1e-6);
/// assert!(clip_coefficient(f64::NAN, 1.0).is_nan());
/// ```
#[must_use]
pub fn clip_coefficient(norm: f64, max_norm: f64) -> f64 {
    let coefficient = max_norm / (norm + 1e-6);
    if coefficient > 1.0 { 1.0 } else { coefficient }
}

/// # Safety
/// As [`sum_of_squares`], for the elements `span` of this view.
unsafe fn sum_span(view: &View, span: Range<usize>, scratch: &mut Scratch, isa: Isa) -> f64 {
    if view.operand.dtype == DType::F64 {
        let block = &mut scratch.double.get_or_insert_default().grad;
        // SAFETY: the caller's contract.
        unsafe { sum_span_in::<f64>(view, span, block, isa) }
    } else {
        let block = &mut scratch.single.get_or_insert_default().grad;
        // SAFETY: the caller's contract.
        unsafe { sum_span_in::<f32>(view, span, block, isa) }
    }
}

/// # Safety
/// As [`gradient_squares`], for the elements `span` of this task.
unsafe fn sum_gradient(
    task: &AdamTask,
    span: Range<usize>,
    scratch: &mut Scratch,
    isa: Isa,
) -> f64 {
    if task.grad.dtype == DType::F64 {
        let block = &mut scratch.double.get_or_insert_default().grad;
        // SAFETY: the caller's contract.
        unsafe { sum_gradient_in::<f64>(task, span, block, isa) }
    } else {
        let block = &mut scratch.single.get_or_insert_default().grad;
        // SAFETY: the caller's contract.
        unsafe { sum_gradient_in::<f32>(task, span, block, isa) }
    }
}

/// # Safety
/// As [`sum_gradient`].
unsafe fn sum_gradient_in<C: Compute>(
    task: &AdamTask,
    span: Range<usize>,
    scratch: &mut [C; BLOCK],
    isa: Isa,
) -> f64 {
    let side = Operands::grad::<C>(task);
    let rows = task.particulars.as_ref().and_then(|particulars| particulars.rows.as_ref());
    match rows.map(RowSteps::rows).filter(|rows| rows.cohorts.skips_rows()) {
        // SAFETY: the caller's contract.
        None => unsafe { sum_side(&side, span, scratch, isa) },
        // SAFETY: the caller's contract.
        Some(rows) => unsafe { sum_rows(&side, rows, span, scratch, isa) },
    }
}

/// # Safety
/// As [`sum_gradient`].
unsafe fn sum_rows<C: Compute>(
    side: &Side<'_>,
    rows: &Rows,
    span: Range<usize>,
    scratch: &mut [C; BLOCK],
    isa: Isa,
) -> f64 {
    let mut room = [true; ROOM];
    let mut lanes = [0.0; LANES];
    for start in span.clone().step_by(BLOCK) {
        let part = start..span.end.min(start + BLOCK);
        let Some(active) = rows.activity(&part, &mut room, isa) else {
            // SAFETY: the caller's contract.
            let values = unsafe { side.read(part, scratch, isa) };
            lanes = isa.run(AddSquares { values, lanes });
            continue;
        };
        // SAFETY: the caller's contract.
        unsafe { side.copy(part, scratch, isa) };
        let values = &mut scratch[..active.len()];
        for (x, active) in values.iter_mut().zip(active) {
            *x = if *active { *x } else { C::default() };
        }
        lanes = isa.run(AddSquares { values, lanes });
    }
    lanes.into_iter().sum()
}

/// # Safety
/// As [`sum_span`].
pub(crate) unsafe fn sum_span_in<C: Compute>(
    view: &View,
    span: Range<usize>,
    scratch: &mut [C; BLOCK],
    isa: Isa,
) -> f64 {
    let side = Side::new::<C>(view.operand, view.layout.steps());
    // SAFETY: the caller's contract.
    unsafe { sum_side(&side, span, scratch, isa) }
}

/// # Safety
/// As [`sum_span`].
unsafe fn sum_side<C: Compute>(
    side: &Side<'_>,
    span: Range<usize>,
    scratch: &mut [C; BLOCK],
    isa: Isa,
) -> f64 {
    let block = if side.in_place { CHUNK } else { BLOCK };
    let mut lanes = [0.0; LANES];
    for start in span.clone().step_by(block) {
        let part = start..span.end.min(start + block);
        // SAFETY: the caller's contract.
        let values = unsafe { side.read(part, scratch, isa) };
        lanes = isa.run(AddSquares { values, lanes });
    }
    lanes.into_iter().sum()
}

/// Blocks are whole multiples of the lanes but for the last, so lanes keep their elements.
struct AddSquares<'a, C> {
    values: &'a [C],
    lanes: [f64; LANES],
}

const _: () = assert!(BLOCK.is_multiple_of(LANES) && CHUNK.is_multiple_of(LANES));

impl<C: Compute> Kernel for AddSquares<'_, C> {
    type Output = [f64; LANES];

    #[inline(always)]
    fn run(self) -> [f64; LANES] {
        let mut lanes = self.lanes;
        let (rows, tail) = self.values.as_chunks::<LANES>();
        // Read from several places at once: memory answers one stream slower than it could.
        let (together, rest) = rows.split_at(rows.len() / STREAMS * STREAMS);
        let length = together.len() / STREAMS;
        for row in 0..length {
            for stream in 0..STREAMS {
                lanes = add_squares(&together[stream * length + row], lanes);
            }
        }
        for row in rest {
            lanes = add_squares(row, lanes);
        }
        // A lane that the tail does not reach gets the square of zero, which changes no bit of it.
        let mut row = [C::default(); LANES];
        row[..tail.len()].copy_from_slice(tail);
        add_squares(&row, lanes)
    }
}

#[inline(always)]
fn add_squares<C: Compute>(row: &[C; LANES], lanes: [f64; LANES]) -> [f64; LANES] {
    std::array::from_fn(|lane| {
        let x = row[lane].to_f64();
        x.mul_add(x, lanes[lane])
    })
}
