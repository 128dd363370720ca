//! The dense operands of a task as slices of Rust types.

use std::ops::Range;

use crate::prefetch::prefetch_ahead;
use crate::{AdamTask, Operand};

/// Elements that a loop works on before it looks ahead again.
const STRIDE: usize = 64;

/// The elements of a task that a loop takes: values and gradients of one type, moments of one type.
pub(crate) struct Slices<'a, V, M> {
    pub value: &'a mut [V],
    pub grad: &'a [V],
    pub exp_avg: &'a mut [M],
    pub exp_avg_sq: &'a mut [M],
}

impl<V, M> Slices<'_, V, M> {
    /// `None` where one does not lie as its type has to.
    ///
    /// # Safety
    /// As [`adam_step`](crate::adam_step), for these elements; of these types there are as many as `span` says in each operand.
    pub(crate) unsafe fn of(task: &AdamTask, span: &Range<usize>) -> Option<Self> {
        let AdamTask { value, grad, exp_avg, exp_avg_sq, .. } = task;
        let aligned = is_aligned::<V>(value)
            && is_aligned::<V>(grad)
            && is_aligned::<M>(exp_avg)
            && is_aligned::<M>(exp_avg_sq);
        if !aligned {
            return None;
        }
        Some(Self {
            // SAFETY: the caller's contract: dense, aligned elements of this type, ours to read and write.
            value: unsafe { slice(value, span) },
            // SAFETY: readable, and not written meanwhile: its memory is not the value's.
            grad: unsafe { read_slice(grad, span) },
            // SAFETY: as for the value.
            exp_avg: unsafe { slice(exp_avg, span) },
            // SAFETY: as for the value.
            exp_avg_sq: unsafe { slice(exp_avg_sq, span) },
        })
    }
}

impl<'a, V, M> Slices<'a, V, M> {
    /// One stride after another, each once the memory beyond it was asked for; and what is left, less than a stride.
    #[inline(always)]
    pub(crate) fn strides(self) -> (impl Iterator<Item = Self>, Self) {
        let (values, value) = self.value.as_chunks_mut::<STRIDE>();
        let (grads, grad) = self.grad.as_chunks::<STRIDE>();
        let (exp_avgs, exp_avg) = self.exp_avg.as_chunks_mut::<STRIDE>();
        let (exp_avg_sqs, exp_avg_sq) = self.exp_avg_sq.as_chunks_mut::<STRIDE>();
        let moments = exp_avgs.iter_mut().zip(exp_avg_sqs);
        let strides = values.iter_mut().zip(grads).zip(moments);
        let strides = strides.map(|((value, grad), (exp_avg, exp_avg_sq))| {
            prefetch_ahead(value);
            prefetch_ahead(grad);
            prefetch_ahead(exp_avg);
            prefetch_ahead(exp_avg_sq);
            Slices { value, grad, exp_avg, exp_avg_sq }
        });
        (strides, Slices { value, grad, exp_avg, exp_avg_sq })
    }
}

pub(crate) fn is_aligned<T>(operand: &Operand) -> bool {
    operand.ptr.addr().is_multiple_of(align_of::<T>())
}

/// # Safety
/// Dense, aligned `T`s from the operand's address on, no one else's while the slice lives.
pub(crate) unsafe fn slice<'a, T>(operand: &Operand, span: &Range<usize>) -> &'a mut [T] {
    let first = operand.ptr.cast::<T>().wrapping_add(span.start);
    // SAFETY: the caller's contract.
    unsafe { std::slice::from_raw_parts_mut(first, span.len()) }
}

/// # Safety
/// Dense, aligned `T`s from the operand's address on, which nobody writes while the slice lives.
pub(crate) unsafe fn read_slice<'a, T>(operand: &Operand, span: &Range<usize>) -> &'a [T] {
    let first = operand.ptr.cast_const().cast::<T>().wrapping_add(span.start);
    // SAFETY: the caller's contract.
    unsafe { std::slice::from_raw_parts(first, span.len()) }
}
