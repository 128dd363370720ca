//! One step over many parameters: from raw memory to blocks, and back.

use std::ops::Range;

use crate::codec::BLOCK;
use crate::element::Compute;
use crate::layout::Steps;
use crate::parallel::{CHUNK, Plan};
use crate::prefetch::prefetch_start;
use crate::side::{Blocks, Scratch, Side};
use crate::update::{Block, Scalars, Update};
use crate::{AdamScalars, Bounds, DType, Execution, Isa, Layout, Operand, StridedLayout};

/// The update of one parameter.
#[derive(Clone, Debug)]
pub struct AdamTask {
    /// Read and written.
    pub value: Operand,
    /// Read.
    pub grad: Operand,
    /// Read and written.
    pub exp_avg: Operand,
    /// Read and written.
    pub exp_avg_sq: Operand,
    /// With AMSGrad: read and written. What selects AMSGrad is that it is here.
    pub max_exp_avg_sq: Option<Operand>,
    /// Where the elements of all of them lie.
    pub layout: Layout,
    /// This step's scalars.
    pub scalars: AdamScalars,
    /// Hold for the new value.
    pub bounds: Bounds,
}

/// Whether the tasks of one call may overlap in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// They may.
    Parallel,
    /// One after another: one parameter that is listed twice steps twice. The chunks of one task
    /// may still run in parallel.
    InSequence,
}

/// Runs the tasks. The element types may be mixed freely: arithmetic runs in `f64` where an operand
/// of the task is `f64`, else in `f32`. The results have the same bits for every [`Execution`].
///
/// # Safety
/// For each task, and until the call returns:
/// * each operand, walked by its layout, is readable at every element, and all but `grad` are
///   writable; there each layout leads to an element once. Alignment is not required.
/// * `Strided`: every list of strides (that of `max_exp_avg_sq` if there is one) is as long as the shape.
/// * What is written overlaps nothing else that this call reads or writes, with two exceptions: the
///   gradient may be the very elements of its value (the same address, dtype and strides), and with
///   [`Order::InSequence`] different tasks may share anything.
/// * No other thread writes what is read here, or reads or writes what is written.
///
/// ```
/// use std::num::NonZeroUsize;
/// use paramstate::{Adam, AdamTask, Bounds, DType, Execution, Layout, Operand, Order, adam_step};
///
/// let (mut value, mut grad) = ([1.0f32, 2.0], [0.5f32, -0.5]);
/// let (mut exp_avg, mut exp_avg_sq) = ([0.0f32; 2], [0.0f32; 2]);
/// let operand = |array: &mut [f32; 2]| Operand { ptr: array.as_mut_ptr().cast(), dtype: DType::F32 };
/// let task = AdamTask {
///     value: operand(&mut value),
///     grad: operand(&mut grad),
///     exp_avg: operand(&mut exp_avg),
///     exp_avg_sq: operand(&mut exp_avg_sq),
///     max_exp_avg_sq: None,
///     layout: Layout::Flat { len: 2 },
///     scalars: Adam { lr: 0.1, ..Adam::default() }.scalars(1.0, 1.0),
///     bounds: Bounds::default(),
/// };
/// // SAFETY: four arrays of two elements, disjoint, and alive until the end.
/// unsafe { adam_step(&[task], Order::Parallel, &Execution::new(NonZeroUsize::MIN)) };
/// assert!((value[0] - 0.9).abs() < 1e-6 && (value[1] - 2.1).abs() < 1e-6);
/// ```
pub unsafe fn adam_step(tasks: &[AdamTask], order: Order, execution: &Execution) {
    match order {
        // SAFETY: the caller's contract.
        Order::Parallel => unsafe { run(tasks, execution) },
        Order::InSequence => {
            for task in tasks {
                // SAFETY: the caller's contract; the tasks before this one are finished.
                unsafe { run(std::slice::from_ref(task), execution) }
            }
        }
    }
}

/// # Safety
/// As [`adam_step`] with [`Order::Parallel`].
unsafe fn run(tasks: &[AdamTask], execution: &Execution) {
    let plan = Plan::new(tasks.iter().map(|task| task.layout.len()));
    plan.run(execution.threads, Scratch::default, |scratch, unit| {
        for (task, span) in plan.parts(unit, |task| tasks[task].layout.len()) {
            if let Some(next) = tasks.get(task + AHEAD) {
                prefetch_operands(next);
            }
            // SAFETY: the caller's contract; every element belongs to one part of one unit, and
            // every unit is run once.
            unsafe { run_span(&tasks[task], span, scratch, execution.isa) }
        }
    });
}

/// How many tasks ahead memory is asked for.
const AHEAD: usize = 2;

/// Lines of each operand that are asked for ahead: beyond, the hardware follows by itself.
const LINES: usize = 8;

/// Asks for the beginning of a task's operands, before their turn comes.
#[inline]
fn prefetch_operands(task: &AdamTask) {
    for operand in [task.value, task.grad, task.exp_avg, task.exp_avg_sq] {
        prefetch_start(operand.ptr, task.layout.len() * operand.dtype.size_of(), LINES);
    }
}

/// # Safety
/// As [`adam_step`], for the elements `span` of this task.
unsafe fn run_span(task: &AdamTask, span: Range<usize>, scratch: &mut Scratch, isa: Isa) {
    let operands = [Some(task.value), Some(task.grad), Some(task.exp_avg), Some(task.exp_avg_sq)];
    let mut operands = operands.into_iter().chain([task.max_exp_avg_sq]).flatten();
    if operands.any(|operand| operand.dtype == DType::F64) {
        // SAFETY: the caller's contract.
        unsafe { run_span_in::<f64>(task, span, scratch.double.get_or_insert_default(), isa) }
    } else {
        // SAFETY: the caller's contract.
        unsafe { run_span_in::<f32>(task, span, scratch.single.get_or_insert_default(), isa) }
    }
}

/// # Safety
/// As [`run_span`].
unsafe fn run_span_in<C: Compute>(
    task: &AdamTask,
    span: Range<usize>,
    blocks: &mut Blocks<C>,
    isa: Isa,
) {
    let scalars = Scalars::<C>::new(&task.scalars, task.bounds);
    let side = |operand, strides: StridesOf| Side::new::<C>(operand, steps(&task.layout, strides));
    let value = side(task.value, |layout| &layout.value);
    let grad = side(task.grad, |layout| &layout.grad).apart_from(task.value);
    let exp_avg = side(task.exp_avg, |layout| &layout.exp_avg);
    let exp_avg_sq = side(task.exp_avg_sq, |layout| &layout.exp_avg_sq);
    let max = task.max_exp_avg_sq.map(|max| side(max, |layout| &layout.max_exp_avg_sq));

    let sides = [Some(&value), Some(&grad), Some(&exp_avg), Some(&exp_avg_sq), max.as_ref()];
    let block = if sides.into_iter().flatten().all(|side| side.in_place) { CHUNK } else { BLOCK };
    let Blocks { value: a, grad: b, exp_avg: c, exp_avg_sq: d, max_exp_avg_sq: e } = blocks;
    for start in span.clone().step_by(block) {
        let part = start..span.end.min(start + block);
        let block = Block {
            // SAFETY: the caller's contract: ours alone to read and write; `a` serves no other side.
            value: unsafe { value.open(part.clone(), a, isa) },
            // SAFETY: the caller's contract: readable, and apart from what is written.
            grad: unsafe { grad.read(part.clone(), b, isa) },
            // SAFETY: as for the value.
            exp_avg: unsafe { exp_avg.open(part.clone(), c, isa) },
            // SAFETY: as for the value.
            exp_avg_sq: unsafe { exp_avg_sq.open(part.clone(), d, isa) },
            // SAFETY: as for the value.
            max_exp_avg_sq: max.as_ref().map(|max| unsafe { max.open(part.clone(), e, isa) }),
        };
        isa.run(Update { block, scalars: &scalars });
        // SAFETY: `open` had the same part and scratch, here and below.
        unsafe { value.close(part.clone(), a, isa) };
        // SAFETY: as above.
        unsafe { exp_avg.close(part.clone(), c, isa) };
        // SAFETY: as above.
        unsafe { exp_avg_sq.close(part.clone(), d, isa) };
        if let Some(max) = &max {
            // SAFETY: as above.
            unsafe { max.close(part, e, isa) };
        }
    }
}

/// Picks one operand's strides.
type StridesOf = fn(&StridedLayout) -> &Vec<isize>;

fn steps(layout: &Layout, strides: StridesOf) -> Steps<'_> {
    match layout {
        Layout::Flat { .. } => Steps::Dense,
        Layout::Strided(layout) => {
            Steps::Strided { shape: &layout.shape, strides: strides(layout) }
        }
    }
}
