//! The slow twin: one element after another, written without the crate's kernels.

#![allow(dead_code, reason = "each test file uses its part")]

use std::num::NonZeroUsize;

use paramstate::{
    Adam, Bounds, DType, Decay, Direction, Execution, Isa, Operand, OwnedBuffer, bf16, f16,
};
use proptest::prelude::*;

pub const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::Bf16, DType::F16];

/// What one element has: its value, gradient and moments, each exactly as a `f64`.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    pub value: f64,
    pub grad: f64,
    pub exp_avg: f64,
    pub exp_avg_sq: f64,
    pub max_exp_avg_sq: Option<f64>,
}

macro_rules! step_in {
    ($name:ident, $float:ident) => {
        fn $name(point: Point, adam: &Adam, step: f64, coefficient: f64, bounds: Bounds) -> Point {
            let narrow = |x: f64| x as $float;
            let sign = if adam.direction == Direction::Maximize { -1.0 } else { 1.0 };
            let correction1 = 1.0 - adam.beta1.powf(step);
            let correction2 = (1.0 - adam.beta2.powf(step)).sqrt();
            let p = narrow(point.value);
            let mut g = narrow(point.grad) * narrow(sign * coefficient);
            if adam.decay == Decay::L2 && adam.weight_decay != 0.0 {
                g = narrow(adam.weight_decay).mul_add(p, g);
            }
            let m = narrow(point.exp_avg);
            let m = (g - m).mul_add(narrow(1.0 - adam.beta1), m);
            let v = narrow(adam.beta2) * narrow(point.exp_avg_sq);
            let v = (narrow(1.0 - adam.beta2) * g).mul_add(g, v);
            let max = point.max_exp_avg_sq.map(|old| {
                let old = narrow(old);
                if old.is_nan() || v.is_nan() { $float::NAN } else { old.max(v) }
            });
            let mut kept = p;
            if adam.decay == Decay::Decoupled {
                kept = p * narrow(1.0 - adam.lr * adam.weight_decay);
            }
            let denominator = max.unwrap_or(v).sqrt() + narrow(adam.eps * correction2);
            let change = narrow(-(adam.lr / correction1) * correction2);
            let mut p = change.mul_add(m / denominator, kept);
            if let Some(min) = bounds.min
                && p < narrow(min)
            {
                p = narrow(min);
            }
            if let Some(max) = bounds.max
                && p > narrow(max)
            {
                p = narrow(max);
            }
            Point {
                value: p.into(),
                grad: point.grad,
                exp_avg: m.into(),
                exp_avg_sq: v.into(),
                max_exp_avg_sq: max.map(Into::into),
            }
        }
    };
}

step_in!(step_in_f32, f32);
step_in!(step_in_f64, f64);

/// One step of one element, in `f64` if `double`. Results are not yet rounded to a storage dtype.
pub fn step(
    point: Point,
    adam: &Adam,
    step: f64,
    coefficient: f64,
    bounds: Bounds,
    double: bool,
) -> Point {
    if double {
        step_in_f64(point, adam, step, coefficient, bounds)
    } else {
        step_in_f32(point, adam, step, coefficient, bounds)
    }
}

/// `x` as a tensor of this dtype stores it.
pub fn stored(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F64 => x,
        DType::F32 => (x as f32).into(),
        DType::Bf16 => bf16::from_f32(x as f32).to_f64(),
        DType::F16 => f16::from_f32(x as f32).to_f64(),
        DType::E4M3 | DType::E5M3 | DType::E8M0 => panic!("a number has no code without a scale"),
    }
}

pub fn get(buffer: &OwnedBuffer, index: usize) -> f64 {
    match buffer.dtype() {
        DType::F64 => buffer.as_slice::<f64>().unwrap()[index],
        DType::F32 => buffer.as_slice::<f32>().unwrap()[index].into(),
        DType::Bf16 => buffer.as_slice::<bf16>().unwrap()[index].to_f64(),
        DType::F16 => buffer.as_slice::<f16>().unwrap()[index].to_f64(),
        DType::E4M3 | DType::E5M3 | DType::E8M0 => bytes(buffer)[index].into(), // the code itself
    }
}

pub fn set(buffer: &mut OwnedBuffer, index: usize, x: f64) {
    match buffer.dtype() {
        DType::F64 => buffer.as_mut_slice::<f64>().unwrap()[index] = x,
        DType::F32 => buffer.as_mut_slice::<f32>().unwrap()[index] = x as f32,
        DType::Bf16 => buffer.as_mut_slice::<bf16>().unwrap()[index] = bf16::from_f32(x as f32),
        DType::F16 => buffer.as_mut_slice::<f16>().unwrap()[index] = f16::from_f32(x as f32),
        DType::E4M3 | DType::E5M3 | DType::E8M0 => bytes_mut(buffer)[index] = x as u8,
    }
}

pub fn copy(buffer: &OwnedBuffer) -> OwnedBuffer {
    match buffer.dtype() {
        DType::F64 => OwnedBuffer::copy_of(buffer.as_slice::<f64>().unwrap()),
        DType::F32 => OwnedBuffer::copy_of(buffer.as_slice::<f32>().unwrap()),
        DType::Bf16 => OwnedBuffer::copy_of(buffer.as_slice::<bf16>().unwrap()),
        DType::F16 => OwnedBuffer::copy_of(buffer.as_slice::<f16>().unwrap()),
        DType::E4M3 | DType::E5M3 | DType::E8M0 => {
            let mut copy = OwnedBuffer::zeroed(buffer.dtype(), buffer.len());
            bytes_mut(&mut copy).copy_from_slice(bytes(buffer));
            copy
        }
    }
}

fn bytes(buffer: &OwnedBuffer) -> &[u8] {
    // SAFETY: an owned buffer has so many initialised bytes, and lives as long as the slice.
    unsafe { std::slice::from_raw_parts(buffer.operand().ptr, buffer.size_bytes()) }
}

fn bytes_mut(buffer: &mut OwnedBuffer) -> &mut [u8] {
    // SAFETY: as in `bytes`; any bytes are numbers, and the buffer is borrowed mutably.
    unsafe { std::slice::from_raw_parts_mut(buffer.operand().ptr, buffer.size_bytes()) }
}

/// Equal bits, but that every NaN equals every other.
#[track_caller]
pub fn assert_same(left: &OwnedBuffer, right: &OwnedBuffer, what: &str) {
    assert_eq!((left.dtype(), left.len()), (right.dtype(), right.len()), "{what}");
    if bytes(left) == bytes(right) {
        return;
    }
    for i in 0..left.len() {
        let (a, b) = (get(left, i), get(right, i));
        let same = a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
        assert!(same, "{what} of {} [{i}]: {a:e} is not {b:e}", left.dtype());
    }
}

/// The element `offset` places after the first.
pub fn operand_at(buffer: &OwnedBuffer, offset: usize) -> Operand {
    let operand = buffer.operand();
    Operand { ptr: operand.ptr.wrapping_add(offset * buffer.dtype().size_of()), ..operand }
}

/// The offsets of all elements in logical order, by counting the index up.
pub fn offsets(shape: &[usize], strides: &[isize]) -> Vec<isize> {
    let mut all = vec![0];
    for (&size, &stride) in shape.iter().zip(strides) {
        all = all
            .iter()
            .flat_map(|&offset| (0..size as isize).map(move |i| offset + i * stride))
            .collect();
    }
    all
}

/// Numbers of all sizes and both signs, one in sixteen a hard case; the same for the same seed.
pub fn numbers(seed: u64, len: usize) -> impl Iterator<Item = f64> {
    const HARD: [f64; 12] = [
        0.0,
        -0.0,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
        1e-40,
        -1e-44,
        65_504.0,
        65_520.0,
        6e-8,
        3.389e38,
        1e-20,
    ];
    let mut state = seed | 1;
    (0..len).map(move |_| {
        // xorshift64*, Vigna 2016 (arXiv:1402.6246)
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let bits = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
        let uniform = (bits >> 11) as f64 / (1u64 << 53) as f64 - 0.5;
        match bits % 16 {
            0 => HARD[(bits >> 4) as usize % HARD.len()],
            1 => uniform * 1e-6,
            _ => uniform,
        }
    })
}

pub fn filled(dtype: DType, numbers: impl ExactSizeIterator<Item = f64>) -> OwnedBuffer {
    let mut buffer = OwnedBuffer::zeroed(dtype, numbers.len());
    numbers.enumerate().for_each(|(i, x)| set(&mut buffer, i, x));
    buffer
}

pub fn any_dtype() -> impl Strategy<Value = DType> {
    prop::sample::select(DTYPES.to_vec())
}

pub fn any_bounds() -> impl Strategy<Value = Bounds> {
    let bound = || prop::option::of(-0.5..0.5f64);
    (bound(), bound()).prop_map(|(a, b)| match (a, b) {
        (Some(a), Some(b)) => Bounds::new(Some(a.min(b)), Some(a.max(b))).unwrap(),
        (min, max) => Bounds::new(min, max).unwrap(),
    })
}

pub fn any_adam() -> impl Strategy<Value = Adam> {
    use paramstate::SecondMoment::{Maximum, Running};
    (
        prop::sample::select(vec![0.0, 1e-3, 0.1]),
        prop::sample::select(vec![0.0, 0.5, 0.9]),
        prop::sample::select(vec![0.0, 0.9, 0.999]),
        prop::sample::select(vec![0.0, 1e-8, 1e-3]),
        prop::sample::select(vec![0.0, 0.01, 0.3]),
        prop::sample::select(vec![Decay::L2, Decay::Decoupled]),
        prop::sample::select(vec![Direction::Minimize, Direction::Maximize]),
        prop::sample::select(vec![Running, Maximum]),
    )
        .prop_map(|(lr, beta1, beta2, eps, weight_decay, decay, direction, second_moment)| {
            Adam { lr, beta1, beta2, eps, weight_decay, decay, direction, second_moment }
        })
}

/// Every instruction set that this machine has, each with a few numbers of threads.
pub fn executions() -> impl Iterator<Item = Execution> {
    Isa::available().into_iter().flat_map(|isa| {
        [1, 2, 7].map(|threads| Execution { threads: NonZeroUsize::new(threads).unwrap(), isa })
    })
}

/// The orders of three dimensions.
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

/// Strides of some order of the dimensions, with gaps: transposed, sliced, or dense.
pub fn any_strides(shape: [usize; 3]) -> impl Strategy<Value = Vec<isize>> {
    (prop::sample::select(ORDERS.to_vec()), prop::array::uniform3(0usize..3)).prop_map(
        move |(order, gaps)| {
            let mut strides = vec![0; 3];
            let mut stride = 1;
            for dimension in order {
                stride += gaps[dimension] as isize;
                strides[dimension] = stride;
                stride *= shape[dimension].max(1) as isize;
            }
            strides
        },
    )
}

/// Either of `any_strides`, or with some of them 0, as after `expand`.
pub fn any_grad_strides(shape: [usize; 3]) -> impl Strategy<Value = Vec<isize>> {
    (any_strides(shape), prop::array::uniform3(prop::bool::weighted(0.3))).prop_map(
        |(strides, zero)| {
            strides.into_iter().zip(zero).map(|(s, zero)| if zero { 0 } else { s }).collect()
        },
    )
}
