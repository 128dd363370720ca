//! The update in one loop where it needs no scratch: dense, aligned tensors whose dtypes go together often. What comes
//! from memory is converted, stepped, rounded and stored element by element; the bits are those of the general way.

use std::ops::Range;

use half::{bf16, f16};

use crate::blockwise::{BLOCK_LEN, StepBlocks};
use crate::element::Compute;
use crate::isa::{Isa, Kernel};
use crate::kahan::StepCompensated;
use crate::pairs::Pairs;
use crate::random::{Use, word};
use crate::slices::{Slices, is_aligned, slice};
use crate::update::Scalars;
use crate::{AdamTask, DType, Element, Layout, Operand, Rounding, Scales, ViewLayout};

/// Takes the elements `span` of a task, if its tensors are of a kind that has a loop here.
///
/// # Safety
/// As [`adam_step`](crate::adam_step), for these elements of the task.
#[inline]
pub(crate) unsafe fn run_span(task: &AdamTask, span: &Range<usize>, isa: Isa) -> bool {
    if task.value.dtype == DType::F32 && task.precision.is_none() {
        return false; // in place, or of rare kinds
    }
    let Some(Asked { value, random_moments, scales, keys }) = Asked::of(task, span) else {
        return false;
    };
    use AskedValue::{Compensated, Nearest, Random};
    use DType::{Bf16, F16, F32};
    let dtypes =
        [task.value, task.grad, task.exp_avg, task.exp_avg_sq].map(|operand| operand.dtype);
    let work = Work { task, span, keys, isa };
    if let Some(scales) = scales {
        let is_random = matches!(value, Random);
        return match (&dtypes[..2], value) {
            (_, Compensated(_)) => false,
            // SAFETY: the caller's contract, and the dtypes were compared.
            ([F32, F32], _) => unsafe { work.run_blocks::<f32>(scales, is_random) },
            // SAFETY: as above.
            ([Bf16, Bf16], _) => unsafe { work.run_blocks::<bf16>(scales, is_random) },
            _ => false,
        };
    }
    match (dtypes, value, random_moments) {
        // SAFETY: the caller's contract, and the dtypes were compared.
        ([Bf16, Bf16, Bf16, Bf16], Nearest, false) => unsafe { work.run_pairs::<false>() },
        // SAFETY: as above.
        ([Bf16, Bf16, Bf16, Bf16], Random, true) => unsafe { work.run_pairs::<true>() },
        ([Bf16, Bf16, Bf16, Bf16], Compensated(left_over), false) => {
            // SAFETY: as above.
            unsafe { work.run_compensated::<bf16, bf16>(left_over) }
        }
        // SAFETY: as above.
        ([Bf16, Bf16, F32, F32], Nearest, _) => unsafe { work.run::<bf16, f32, false, false>() },
        // SAFETY: as above.
        ([Bf16, Bf16, F32, F32], Random, _) => unsafe { work.run::<bf16, f32, true, false>() },
        ([Bf16, Bf16, F32, F32], Compensated(left_over), _) => {
            // SAFETY: as above.
            unsafe { work.run_compensated::<bf16, f32>(left_over) }
        }
        // SAFETY: as above.
        ([F16, F16, F16, F16], Nearest, false) => unsafe { work.run::<f16, f16, false, false>() },
        // SAFETY: as above.
        ([F16, F16, F32, F32], Nearest, _) => unsafe { work.run::<f16, f32, false, false>() },
        // SAFETY: as above.
        ([F32, F32, Bf16, Bf16], _, true) => unsafe { work.run::<f32, bf16, false, true>() },
        _ => false,
    }
}

/// How the loop is to store the value.
#[derive(Clone, Copy)]
enum AskedValue {
    Nearest,
    Random,
    /// What is left over has the value's dtype, and is as dense.
    Compensated(Operand),
}

/// What is asked of the loop.
struct Asked {
    value: AskedValue,
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
        let (nearest, keys) = (AskedValue::Nearest, Keys::default());
        let Some(precision) = &task.precision else {
            return Some(Self { value: nearest, random_moments: false, scales: None, keys });
        };
        let value = match &precision.value {
            Rounding::Nearest => nearest,
            Rounding::Stochastic => AskedValue::Random,
            Rounding::Kahan(_) if task.value.dtype.size_of() > 2 => nearest,
            Rounding::Kahan(left_over) => {
                let is_as_dense = matches!(left_over.layout, ViewLayout::Flat { .. });
                let is_alike = left_over.operand.dtype == task.value.dtype;
                (is_as_dense && is_alike).then_some(AskedValue::Compensated(left_over.operand))?
            }
        };
        let (first, value_key) = precision.stream.dense(Use::Value, span)?;
        let (_, moments) = precision.stream.dense(Use::Moments, span)?;
        let keys = Keys { value: value_key, moments, first };
        let random_moments = precision.random_moments;
        Some(Self { value, random_moments, scales: precision.scales, keys })
    }
}

/// The elements `span` of a task.
///
/// Each method runs one loop over them, or returns false where an operand does not lie as its type has to. They ask for
/// what [`run_span`] does, and for operands of the dtypes that their types say.
struct Work<'a> {
    task: &'a AdamTask,
    span: &'a Range<usize>,
    keys: Keys,
    isa: Isa,
}

impl Work<'_> {
    fn scalars(&self) -> Scalars<f32> {
        Scalars::new(&self.task.scalars, self.task.bounds_to_hold())
    }

    /// # Safety
    /// See [`Work`].
    unsafe fn run<V: Element, M: Element, const RANDOM_VALUE: bool, const RANDOM_MOMENTS: bool>(
        &self,
    ) -> bool {
        // SAFETY: the caller's contract.
        let Some(slices) = (unsafe { Slices::<V, M>::of(self.task, self.span) }) else {
            return false;
        };
        let (scalars, keys) = (self.scalars(), self.keys);
        self.isa.run(Fused::<_, _, RANDOM_VALUE, RANDOM_MOMENTS> { slices, scalars, keys });
        true
    }

    /// All bfloat16: what lies in whole words by pairs, and the rest.
    ///
    /// # Safety
    /// See [`Work`].
    unsafe fn run_pairs<const RANDOM: bool>(&self) -> bool {
        let Range { start, end } = *self.span;
        let mut rest = start..end;
        if start.is_multiple_of(2) {
            let words = start / 2..end / 2;
            // SAFETY: the caller's contract: two dense elements in each word.
            if let Some(slices) = unsafe { Slices::of(self.task, &words) } {
                let (scalars, keys) = (self.scalars(), self.keys);
                self.isa.run(Pairs::<RANDOM> { slices, scalars, keys });
                rest.start = 2 * words.end;
            }
        }
        let first = self.keys.first.wrapping_add((rest.start - start) as u32);
        let work = Work { span: &rest, keys: Keys { first, ..self.keys }, ..*self };
        // SAFETY: the caller's contract.
        unsafe { work.run::<bf16, bf16, RANDOM, RANDOM>() }
    }

    /// With what the value's rounding leaves over.
    ///
    /// # Safety
    /// See [`Work`]; `left_over` is as the value is.
    unsafe fn run_compensated<V: Element, M: Element>(&self, left_over: Operand) -> bool {
        // SAFETY: the caller's contract.
        let slices = unsafe { Slices::<V, M>::of(self.task, self.span) };
        let Some(slices) = slices.filter(|_| is_aligned::<V>(&left_over)) else { return false };
        // SAFETY: the caller's contract: dense, aligned elements of this type, ours to read and write.
        let left_over = unsafe { slice::<V>(&left_over, self.span) };
        let scalars = self.scalars();
        self.isa.run(StepCompensated { slices, left_over, scalars });
        true
    }

    /// With moments that are 8-bit floats.
    ///
    /// # Safety
    /// See [`Work`]; of the scales there is one for each block.
    unsafe fn run_blocks<V: Element>(&self, scales: Scales, random_value: bool) -> bool {
        // SAFETY: the caller's contract: a byte for each element of a moment.
        let Some(slices) = (unsafe { Slices::<V, u8>::of(self.task, self.span) }) else {
            return false;
        };
        let blocks = self.span.start / BLOCK_LEN..self.span.end.div_ceil(BLOCK_LEN);
        // SAFETY: the caller's contract: a byte for each block, ours to read and write.
        let m_scales = unsafe { slice::<u8>(&scales.exp_avg, &blocks) };
        // SAFETY: as above.
        let v_scales = unsafe { slice::<u8>(&scales.exp_avg_sq, &blocks) };
        let Slices { value, grad, exp_avg, exp_avg_sq } = slices;
        let (exp_avg, exp_avg_sq) = ((exp_avg, m_scales), (exp_avg_sq, v_scales));
        let (scalars, keys) = (self.scalars(), self.keys);
        let step = StepBlocks { value, grad, exp_avg, exp_avg_sq, scalars, keys, random_value };
        self.isa.run(step);
        true
    }
}

struct Fused<'a, V, M, const RANDOM_VALUE: bool, const RANDOM_MOMENTS: bool> {
    slices: Slices<'a, V, M>,
    scalars: Scalars<f32>,
    keys: Keys,
}

impl<V: Element, M: Element, const RANDOM_VALUE: bool, const RANDOM_MOMENTS: bool> Kernel
    for Fused<'_, V, M, RANDOM_VALUE, RANDOM_MOMENTS>
{
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { slices, scalars, keys } = self;
        if scalars.has_l2_decay() {
            steps::<V, M, RANDOM_VALUE, RANDOM_MOMENTS, true>(slices, scalars, keys);
        } else {
            steps::<V, M, RANDOM_VALUE, RANDOM_MOMENTS, false>(slices, scalars, keys);
        }
    }
}

#[inline(always)]
fn steps<
    V: Element,
    M: Element,
    const RANDOM_VALUE: bool,
    const RANDOM_MOMENTS: bool,
    const L2: bool,
>(
    slices: Slices<'_, V, M>,
    scalars: Scalars<f32>,
    mut keys: Keys,
) {
    let (strides, rest) = slices.strides();
    for Slices { value, grad, exp_avg, exp_avg_sq } in strides {
        let len = value.len();
        step::<V, M, RANDOM_VALUE, RANDOM_MOMENTS, L2>(
            value, grad, exp_avg, exp_avg_sq, scalars, keys,
        );
        keys.first = keys.first.wrapping_add(len as u32);
    }
    let Slices { value, grad, exp_avg, exp_avg_sq } = rest;
    step::<V, M, RANDOM_VALUE, RANDOM_MOMENTS, L2>(value, grad, exp_avg, exp_avg_sq, scalars, keys);
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
