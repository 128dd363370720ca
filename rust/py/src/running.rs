//! Running: the step itself, after everything was read and found right. From here on nothing can fail.

use std::num::NonZeroUsize;

use paramstate::{
    AdamTask, DType, Execution, Extent, Layout, Order, View, ViewLayout, adam_step,
    clip_coefficient, gradient_squares, prefetch, scale,
};

use crate::group::Group;
use crate::particular::Aging;
use crate::tensor::{Element, Reading};

/// A `step` tensor: one number, counted up in place.
#[derive(Clone, Copy)]
pub struct Counter {
    pub ptr: *mut u8,
    element: Element,
    /// The group whose settings the parameter's step takes.
    pub group: usize,
    /// Which of the agings goes with it.
    pub aging: Option<usize>,
}

// SAFETY: an address and two tags; who follows the address sees to it that nobody else does.
unsafe impl Send for Counter {}
// SAFETY: as above.
unsafe impl Sync for Counter {}

impl Counter {
    pub const fn new(step: &Reading<'_>, group: usize) -> Self {
        Self { ptr: step.ptr, element: step.element, group, aging: None }
    }

    /// Whether a tensor is one number that can be counted in without losing counts.
    pub fn can_count(step: &Reading<'_>) -> bool {
        let is_short = matches!(
            step.element,
            Element::Float(DType::Bf16 | DType::F16) | Element::Bool | Element::Byte
        );
        step.len == 1 && !is_short
    }

    pub fn extent(&self) -> Extent {
        let (start, itemsize) = (self.ptr.addr(), self.element.size());
        Extent { start, itemsize, shape: vec![1], strides: vec![1] }
    }

    /// The count.
    ///
    /// # Safety
    ///
    /// As for `count`.
    pub unsafe fn peek(self) -> f64 {
        match self.element {
            // SAFETY: the caller's contract, and the element was read to be an int64.
            Element::Int64 => unsafe { self.ptr.cast::<i64>().read_unaligned() as f64 },
            // SAFETY: the caller's contract, and the element was read to be an int32.
            Element::Int32 => unsafe { self.ptr.cast::<i32>().read_unaligned().into() },
            // SAFETY: the caller's contract, and the element was read to be a float64.
            Element::Float(DType::F64) => unsafe { self.ptr.cast::<f64>().read_unaligned() },
            // SAFETY: the caller's contract, and `can_count` leaves float32 alone of the others.
            Element::Float(_) => unsafe { self.ptr.cast::<f32>().read_unaligned().into() },
            Element::Bool | Element::Byte => unreachable!("`can_count` refuses them"),
        }
    }

    /// Counts one step and returns the new count.
    ///
    /// # Safety
    ///
    /// The tensor that was read is alive, and no other thread uses its element.
    unsafe fn count(self) -> f64 {
        match self.element {
            Element::Int64 => {
                let at = self.ptr.cast::<i64>();
                // SAFETY: the caller's contract, and the element was read to be an int64.
                let next = unsafe { at.read_unaligned() }.wrapping_add(1);
                // SAFETY: as above.
                unsafe { at.write_unaligned(next) };
                next as f64
            }
            Element::Int32 => {
                let at = self.ptr.cast::<i32>();
                // SAFETY: the caller's contract, and the element was read to be an int32.
                let next = unsafe { at.read_unaligned() }.wrapping_add(1);
                // SAFETY: as above.
                unsafe { at.write_unaligned(next) };
                next.into()
            }
            Element::Float(DType::F64) => {
                let at = self.ptr.cast::<f64>();
                // SAFETY: the caller's contract, and the element was read to be a float64.
                let next = unsafe { at.read_unaligned() } + 1.0;
                // SAFETY: as above.
                unsafe { at.write_unaligned(next) };
                next
            }
            Element::Float(_) => {
                let at = self.ptr.cast::<f32>();
                // SAFETY: the caller's contract, and `can_count` leaves float32 alone of the others.
                let next = unsafe { at.read_unaligned() } + 1.0;
                // SAFETY: as above.
                unsafe { at.write_unaligned(next) };
                next.into()
            }
            Element::Bool | Element::Byte => unreachable!("`can_count` refuses them"),
        }
    }
}

/// What the caller asked of one step beyond the groups' settings.
#[derive(Clone, Copy)]
pub struct Request {
    pub threads: NonZeroUsize,
    pub max_grad_norm: Option<f64>,
    pub grad_scale: Option<f64>,
    pub elsewhere_squares: Option<f64>,
}

/// How many counters ahead memory is asked for.
const AHEAD: usize = 16;

/// The step over all tasks, ready to run.
pub struct Run<'a> {
    pub tasks: &'a mut [AdamTask],
    pub counters: &'a [Counter],
    pub agings: &'a [Aging],
    pub groups: &'a [Group],
    /// The gradients to unscale in place, each memory once.
    pub unscale: Vec<View>,
    pub order: Order,
    pub request: Request,
}

impl Run<'_> {
    /// Norm, unscaling, counting, update. Returns the norm, if it was asked for.
    ///
    /// # Safety
    ///
    /// What was read of the tensors is still true, `order` is what `Memory::judge` allows, and no other thread uses
    /// them until the call returns.
    pub unsafe fn run(self) -> Option<f64> {
        let execution = Execution::new(self.request.threads);
        // SAFETY: the caller's contract.
        let grad_norm = unsafe { self.grad_norm(&execution) };
        if let Some(grad_scale) = self.request.grad_scale {
            // SAFETY: the caller's contract; no two of the views share memory.
            unsafe { scale(&self.unscale, 1.0 / grad_scale, &execution) };
        }
        let max_grad_norm = self.request.max_grad_norm;
        let clip = |(norm, max): (f64, f64)| clip_coefficient(norm, max);
        let coefficient = grad_norm.zip(max_grad_norm).map_or(1.0, clip);
        // One set of scalars serves all neighbours of the same group and count.
        let mut latest = (usize::MAX, f64::NAN, None);
        for (index, (task, counter)) in self.tasks.iter_mut().zip(self.counters).enumerate() {
            if let Some(next) = self.counters.get(index + AHEAD) {
                prefetch(next.ptr.addr());
            }
            // SAFETY: the caller's contract.
            let step = unsafe { counter.count() };
            if (latest.0, latest.1) != (counter.group, step) {
                let scalars = self.groups[counter.group].adam.scalars(step, coefficient);
                latest = (counter.group, step, Some(scalars));
            }
            task.scalars = latest.2.unwrap_or(task.scalars);
            if let Some(particulars) = &mut task.particulars {
                if let Some(rows) = &mut particulars.rows {
                    rows.correct(&self.groups[counter.group].adam, step);
                }
                if let Some(aging) = counter.aging {
                    // SAFETY: the caller's contract.
                    unsafe { self.agings[aging].age() };
                }
            }
            if let Some(precision) = &mut task.precision {
                precision.stream.at_step(step as i64 as u64);
            }
        }
        // SAFETY: the caller's contract.
        unsafe { adam_step(self.tasks, self.order, &execution) };
        grad_norm
    }

    /// The global norm of the unscaled gradients.
    ///
    /// # Safety
    ///
    /// As for `run`.
    unsafe fn grad_norm(&self, execution: &Execution) -> Option<f64> {
        self.request.max_grad_norm?;
        // SAFETY: the caller's contract.
        let squares = unsafe { gradient_squares(self.tasks, execution) };
        let elsewhere = self.request.elsewhere_squares.unwrap_or(0.0);
        Some((squares + elsewhere).sqrt() / self.request.grad_scale.unwrap_or(1.0))
    }
}

/// A task's gradient by itself.
pub fn gradient_view(task: &AdamTask) -> View {
    let layout = match &task.layout {
        Layout::Flat { len } => ViewLayout::Flat { len: *len },
        Layout::Strided(layout) => {
            ViewLayout::Strided { shape: layout.shape.clone(), strides: layout.grad.clone() }
        }
    };
    View { operand: task.grad, layout }
}
