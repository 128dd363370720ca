//! One step over many parameters: from raw memory to blocks, and back.

use std::ops::Range;

use crate::codec::BLOCK;
use crate::element::Compute;
use crate::fused;
use crate::operands::Operands;
use crate::parallel::{CHUNK, Plan};
use crate::particulars;
use crate::prefetch::{LINES, prefetch_start};
use crate::side::{Blocks, Scratch, Varied};
use crate::update::{Scalars, Update};
use crate::{
    AdamScalars, Bounds, DType, Execution, Isa, Layout, Operand, Particulars, Precision,
    Projection, project,
};

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
    /// What is not the same for all elements; nearly always nothing.
    pub particulars: Option<Box<Particulars>>,
    /// How the results are stored, if not each as its dtype's nearest number.
    pub precision: Option<Box<Precision>>,
}

impl AdamTask {
    /// The bounds, so that what holds before the value is stored holds afterwards, too.
    pub(crate) fn bounds_to_hold(&self) -> Bounds {
        match &self.precision {
            Some(precision) => precision.bounds(self.bounds, self.value.dtype),
            None => self.bounds,
        }
    }
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
/// * Bounds of each element are readable at every element, and rows are as many as the layout has.
/// * What a [`Precision`] names is as the moments are: a compensation at every element of the task,
///   8-bit floats one after another, a scale for every 128 of them begun.
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
///     particulars: None,
///     precision: None,
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
    let mut any_particulars = false;
    let plan = Plan::new(tasks.iter().map(|task| {
        any_particulars |= task.particulars.is_some();
        task.layout.len()
    }));
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
    if any_particulars {
        let particulars = tasks.iter().filter_map(|task| task.particulars.as_ref());
        let projections: Vec<&Projection> =
            particulars.filter_map(|particulars| particulars.projection.as_ref()).collect();
        // SAFETY: the caller's contract; the updates are finished.
        unsafe { project(&projections, execution) }
    }
}

/// How many tasks ahead memory is asked for.
const AHEAD: usize = 2;

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
        let (blocks, varied) = (scratch.double.get_or_insert_default(), &mut scratch.double_varied);
        // SAFETY: the caller's contract.
        unsafe { run_span_in::<f64>(task, span, blocks, varied, isa) }
    // SAFETY: the caller's contract.
    } else if !unsafe { fused::run_span(task, &span, isa) } {
        let (blocks, varied) = (scratch.single.get_or_insert_default(), &mut scratch.single_varied);
        // SAFETY: the caller's contract.
        unsafe { run_span_in::<f32>(task, span, blocks, varied, isa) }
    }
}

/// # Safety
/// As [`run_span`].
unsafe fn run_span_in<C: Compute>(
    task: &AdamTask,
    span: Range<usize>,
    blocks: &mut Blocks<C>,
    varied: &mut Option<Box<Varied<C>>>,
    isa: Isa,
) {
    if let Some(particulars) = &task.particulars {
        let room = (blocks, &mut **varied.get_or_insert_default());
        // SAFETY: the caller's contract.
        return unsafe { particulars::run_span(task, particulars, span, room, isa) };
    }
    let scalars = Scalars::<C>::new(&task.scalars, task.bounds_to_hold());
    // SAFETY: the caller's contract.
    unsafe { update_alike(&Operands::new::<C>(task), span, &scalars, blocks, isa) }
}

/// The update of elements that all take the same scalars.
///
/// # Safety
/// As [`run_span`].
pub(crate) unsafe fn update_alike<C: Compute>(
    operands: &Operands<'_>,
    span: Range<usize>,
    scalars: &Scalars<C>,
    blocks: &mut Blocks<C>,
    isa: Isa,
) {
    let block = if operands.in_place() { CHUNK } else { BLOCK };
    for start in span.clone().step_by(block) {
        let part = start..span.end.min(start + block);
        // SAFETY: the caller's contract; a part that goes through scratch is no longer than it.
        let block = unsafe { operands.open(&part, blocks, isa) };
        isa.run(Update { block, scalars });
        // SAFETY: the same part and blocks.
        unsafe { operands.close(&part, blocks, None, isa) };
    }
}
