//! The update in one loop where it needs no scratch: dense, aligned tensors whose dtypes go together often. What comes
//! from memory is converted, stepped, rounded and stored element by element; the bits are those of the general way.

use std::ops::Range;

use half::{bf16, f16};

use crate::blockwise::{BLOCK_LEN, StepBlocks};
use crate::element::Compute;
use crate::isa::{Isa, Kernel};
use crate::random::{Use, word};
use crate::update::Scalars;
use crate::{AdamTask, Element, Layout, Operand, Rounding, Scales};

/// Takes the elements `span` of a task, if its tensors are of a kind that has a loop here.
///
/// # Safety
/// As [`adam_step`](crate::adam_step), for these elements of the task.
#[inline]
pub(crate) unsafe fn run_span(task: &AdamTask, span: &Range<usize>, isa: Isa) -> bool {
    if task.value.dtype == crate::DType::F32 && task.precision.is_none() {
        return false; // in place, or of rare kinds
    }
    let Some(Asked { random_value, random_moments, scales, keys }) = Asked::of(task, span) else {
        return false;
    };
    use crate::DType::{Bf16, F16, F32};
    let dtypes =
        [task.value, task.grad, task.exp_avg, task.exp_avg_sq].map(|operand| operand.dtype);
    macro_rules! run {
        ($value:ty, $moment:ty, $random_value:literal, $random_moments:literal) => {{
            let loop_over = Loop::<$value, $moment, $random_value, $random_moments> {
                task,
                span,
                keys,
                of: std::marker::PhantomData,
            };
            // SAFETY: the caller's contract, and the dtypes were compared.
            unsafe { loop_over.run(isa) }
        }};
    }
    if let Some(scales) = scales {
        let blocks = Blocks { task, span, keys, scales, random_value };
        return match dtypes[..2] {
            // SAFETY: the caller's contract, and the dtypes were compared.
            [F32, F32] => unsafe { blocks.run::<f32>(isa) },
            // SAFETY: as above.
            [Bf16, Bf16] => unsafe { blocks.run::<bf16>(isa) },
            _ => false,
        };
    }
    match (dtypes, random_value, random_moments) {
        ([Bf16, Bf16, Bf16, Bf16], false, false) => run!(bf16, bf16, false, false),
        ([Bf16, Bf16, Bf16, Bf16], true, true) => run!(bf16, bf16, true, true),
        ([Bf16, Bf16, F32, F32], false, _) => run!(bf16, f32, false, false),
        ([Bf16, Bf16, F32, F32], true, _) => run!(bf16, f32, true, false),
        ([F16, F16, F16, F16], false, false) => run!(f16, f16, false, false),
        ([F16, F16, F32, F32], false, _) => run!(f16, f32, false, false),
        ([F32, F32, Bf16, Bf16], _, true) => run!(f32, bf16, false, true),
        _ => false,
    }
}

/// What is asked of the loop.
struct Asked {
    random_value: bool,
    random_moments: bool,
    scales: Option<Scales>,
    keys: Keys,
}

/// The keys of the random words, and the index of the first element.
#[derive(Clone, Copy, Default)]
pub(crate) struct Keys {
    pub value: [u32; 2],
    pub moments: [u32; 2],
    pub first: u32,
}

impl Asked {
    /// `None` where the general way is needed.
    fn of(task: &AdamTask, span: &Range<usize>) -> Option<Self> {
        let is_plain = matches!(task.layout, Layout::Flat { .. })
            && task.particulars.is_none()
            && task.max_exp_avg_sq.is_none()
            && task.grad.ptr != task.value.ptr;
        if !is_plain {
            return None;
        }
        let Some(precision) = &task.precision else {
            return Some(Self {
                random_value: false,
                random_moments: false,
                scales: None,
                keys: Keys::default(),
            });
        };
        let random_value = match precision.value {
            Rounding::Nearest => false,
            Rounding::Stochastic => true,
            Rounding::Kahan(_) => return None,
        };
        let (first, value) = precision.stream.dense(Use::Value, span)?;
        let (_, moments) = precision.stream.dense(Use::Moments, span)?;
        let keys = Keys { value, moments, first };
        let random_moments = precision.random_moments;
        Some(Self { random_value, random_moments, scales: precision.scales, keys })
    }
}

/// The elements `span` of a task whose moments are 8-bit floats.
struct Blocks<'a> {
    task: &'a AdamTask,
    span: &'a Range<usize>,
    keys: Keys,
    scales: Scales,
    random_value: bool,
}

impl Blocks<'_> {
    /// # Safety
    /// As [`run_span`]; value and gradient are `V`s.
    unsafe fn run<V: Element>(&self, isa: Isa) -> bool {
        let AdamTask { value, grad, exp_avg, exp_avg_sq, .. } = self.task;
        if !(is_aligned::<V>(value) && is_aligned::<V>(grad)) {
            return false;
        }
        let blocks = self.span.start / BLOCK_LEN..self.span.end.div_ceil(BLOCK_LEN);
        // SAFETY: the caller's contract: dense, aligned elements of this type, ours to read and write.
        let value = unsafe { slice::<V>(value, self.span) };
        // SAFETY: readable, and not written meanwhile: its memory is not the value's.
        let grad = unsafe { read_slice::<V>(grad, self.span) };
        // SAFETY: the caller's contract: a byte for each element.
        let m = unsafe { slice::<u8>(exp_avg, self.span) };
        // SAFETY: as above.
        let v = unsafe { slice::<u8>(exp_avg_sq, self.span) };
        // SAFETY: the caller's contract: a byte for each block.
        let m_scales = unsafe { slice::<u8>(&self.scales.exp_avg, &blocks) };
        // SAFETY: as above.
        let v_scales = unsafe { slice::<u8>(&self.scales.exp_avg_sq, &blocks) };
        let scalars = Scalars::<f32>::new(&self.task.scalars, self.task.bounds_to_hold());
        let Self { keys, random_value, .. } = *self;
        let (exp_avg, exp_avg_sq) = ((m, m_scales), (v, v_scales));
        isa.run(StepBlocks { value, grad, exp_avg, exp_avg_sq, scalars, keys, random_value });
        true
    }
}

fn is_aligned<T>(operand: &Operand) -> bool {
    operand.ptr.addr().is_multiple_of(align_of::<T>())
}

/// The elements `span` of a task whose value and gradient are `V`s, and whose moments are `M`s.
struct Loop<'a, V, M, const RANDOM_VALUE: bool, const RANDOM_MOMENTS: bool> {
    task: &'a AdamTask,
    span: &'a Range<usize>,
    keys: Keys,
    of: std::marker::PhantomData<(V, M)>,
}

impl<V: Element, M: Element, const RANDOM_VALUE: bool, const RANDOM_MOMENTS: bool>
    Loop<'_, V, M, RANDOM_VALUE, RANDOM_MOMENTS>
{
    /// # Safety
    /// As [`run_span`]; the dtypes are those of the types.
    unsafe fn run(&self, isa: Isa) -> bool {
        let AdamTask { value, grad, exp_avg, exp_avg_sq, .. } = self.task;
        let aligned = is_aligned::<V>(value)
            && is_aligned::<V>(grad)
            && is_aligned::<M>(exp_avg)
            && is_aligned::<M>(exp_avg_sq);
        if !aligned {
            return false;
        }
        // SAFETY: the caller's contract: dense, aligned elements of this type, ours to read and write.
        let value = unsafe { slice::<V>(value, self.span) };
        // SAFETY: as above.
        let exp_avg = unsafe { slice::<M>(exp_avg, self.span) };
        // SAFETY: as above.
        let exp_avg_sq = unsafe { slice::<M>(exp_avg_sq, self.span) };
        // SAFETY: readable, and not written meanwhile: its memory is not the value's.
        let grad = unsafe { read_slice::<V>(grad, self.span) };
        let scalars = Scalars::<f32>::new(&self.task.scalars, self.task.bounds_to_hold());
        isa.run(Fused::<V, M, RANDOM_VALUE, RANDOM_MOMENTS> {
            value,
            grad,
            exp_avg,
            exp_avg_sq,
            scalars,
            keys: self.keys,
        });
        true
    }
}

/// # Safety
/// Dense, aligned `T`s from the operand's address on, no one else's while the slice lives.
unsafe fn slice<'a, T>(operand: &Operand, span: &Range<usize>) -> &'a mut [T] {
    let first = operand.ptr.cast::<T>().wrapping_add(span.start);
    // SAFETY: the caller's contract.
    unsafe { std::slice::from_raw_parts_mut(first, span.len()) }
}

/// # Safety
/// Dense, aligned `T`s from the operand's address on, which nobody writes while the slice lives.
unsafe fn read_slice<'a, T>(operand: &Operand, span: &Range<usize>) -> &'a [T] {
    let first = operand.ptr.cast_const().cast::<T>().wrapping_add(span.start);
    // SAFETY: the caller's contract.
    unsafe { std::slice::from_raw_parts(first, span.len()) }
}

struct Fused<'a, V, M, const RANDOM_VALUE: bool, const RANDOM_MOMENTS: bool> {
    value: &'a mut [V],
    grad: &'a [V],
    exp_avg: &'a mut [M],
    exp_avg_sq: &'a mut [M],
    scalars: Scalars<f32>,
    keys: Keys,
}

impl<V: Element, M: Element, const RANDOM_VALUE: bool, const RANDOM_MOMENTS: bool> Kernel
    for Fused<'_, V, M, RANDOM_VALUE, RANDOM_MOMENTS>
{
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { value, grad, exp_avg, exp_avg_sq, scalars, keys } = self;
        if scalars.has_l2_decay() {
            step::<V, M, RANDOM_VALUE, RANDOM_MOMENTS, true>(
                value, grad, exp_avg, exp_avg_sq, scalars, keys,
            );
        } else {
            step::<V, M, RANDOM_VALUE, RANDOM_MOMENTS, false>(
                value, grad, exp_avg, exp_avg_sq, scalars, keys,
            );
        }
    }
}

#[inline(always)]
fn step<
    V: Element,
    M: Element,
    const RANDOM_VALUE: bool,
    const RANDOM_MOMENTS: bool,
    const L2: bool,
>(
    value: &mut [V],
    grad: &[V],
    exp_avg: &mut [M],
    exp_avg_sq: &mut [M],
    scalars: Scalars<f32>,
    keys: Keys,
) {
    let all = value.iter_mut().zip(grad).zip(exp_avg).zip(exp_avg_sq).enumerate();
    for (i, (((value, grad), exp_avg), exp_avg_sq)) in all {
        let p = f32::decode(*value);
        let (m, v) = scalars.moments::<L2>(
            p,
            f32::decode(*grad),
            f32::decode(*exp_avg),
            f32::decode(*exp_avg_sq),
        );
        let p = scalars.value(p, m, v);
        let index = keys.first.wrapping_add(i as u32);
        if RANDOM_MOMENTS {
            let random = word(keys.moments, index);
            *exp_avg = m.encode_at_random(random >> 16);
            *exp_avg_sq = v.encode_at_random(random & 0xffff);
        } else {
            *exp_avg = m.encode();
            *exp_avg_sq = v.encode();
        }
        *value = if RANDOM_VALUE {
            p.encode_at_random(word(keys.value, index) & 0xffff)
        } else {
            p.encode()
        };
    }
}
