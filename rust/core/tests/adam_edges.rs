//! The update at its edges: the published equations, aliases, alignment, nothing at all.

mod reference;

use std::num::NonZeroUsize;

use paramstate::{
    Adam, AdamTask, Bounds, DType, Decay, Direction, Execution, Layout, Operand, Order,
    SecondMoment, StridedLayout, adam_step,
};
use proptest::prelude::*;
use reference::{any_adam, numbers};

proptest! {
    /// Equal to the paper's equations in exact arithmetic, so close to them in `f64`.
    #[test]
    fn it_is_adam_as_published(adam in any_adam(), seed in any::<u64>()) {
        let adam = Adam { eps: 1e-8, ..adam };
        // Not so small that the difference from the last moment would lose most of their digits.
        let size = |x: f64| if x.is_finite() { x.abs().clamp(0.1, 9.0) } else { 1.0 };
        let grads: Vec<f64> = numbers(seed, 8).map(|x| size(x).copysign(x)).collect();
        let [mut value, mut grad, mut m, mut v, mut max] = [[0.5f64], [0.0], [0.0], [0.0], [0.0]];
        let (mut p, mut first, mut second, mut greatest) = (0.5f64, 0.0f64, 0.0f64, 0.0f64);
        for (t, g) in (1..).zip(grads) {
            grad[0] = g;
            let operand = |x: &mut [f64; 1]| Operand { ptr: x.as_mut_ptr().cast(), dtype: DType::F64 };
            let maximal = adam.second_moment == SecondMoment::Maximum;
            let task = AdamTask {
                value: operand(&mut value), grad: operand(&mut grad), exp_avg: operand(&mut m), exp_avg_sq: operand(&mut v),
                max_exp_avg_sq: maximal.then(|| operand(&mut max)), layout: Layout::Flat { len: 1 },
                scalars: adam.scalars(f64::from(t), 1.0), bounds: Bounds::default(), particulars: None, precision: None,
            };
            // SAFETY: arrays of one element each, alive until the end.
            unsafe { adam_step(&[task], Order::Parallel, &Execution::new(NonZeroUsize::MIN)) };

            let mut g = if adam.direction == Direction::Maximize { -g } else { g };
            match adam.decay {
                Decay::L2 => g += adam.weight_decay * p,
                Decay::Decoupled => p -= adam.lr * adam.weight_decay * p,
            }
            first = adam.beta1 * first + (1.0 - adam.beta1) * g;
            second = adam.beta2 * second + (1.0 - adam.beta2) * g * g;
            greatest = greatest.max(second);
            let s = if maximal { greatest } else { second };
            let corrected = (first / (1.0 - adam.beta1.powi(t)), s / (1.0 - adam.beta2.powi(t)));
            p -= adam.lr * corrected.0 / (corrected.1.sqrt() + adam.eps);
            prop_assert!((value[0] - p).abs() <= 1e-12 * p.abs().max(1.0), "{} {p}", value[0]);
        }
    }
}

#[test]
fn one_parameter_listed_often_in_sequence_steps_as_often_as_in_calls_of_its_own() {
    const LEN: usize = 40_000;
    const STEPS: u32 = 50;
    let run = |in_one_call: bool| {
        let [mut value, mut grad, mut m, mut v] = [1.0f32, 0.5, 0.0, 0.0].map(|x| vec![x; LEN]);
        let operand = |x: &mut Vec<f32>| Operand { ptr: x.as_mut_ptr().cast(), dtype: DType::F32 };
        let operands = [&mut value, &mut grad, &mut m, &mut v].map(operand);
        let adam = Adam { lr: 0.1, beta1: 0.5, ..Adam::default() };
        let task = |step| AdamTask {
            value: operands[0],
            grad: operands[1],
            exp_avg: operands[2],
            exp_avg_sq: operands[3],
            max_exp_avg_sq: None,
            layout: Layout::Flat { len: LEN },
            scalars: adam.scalars(f64::from(step), 1.0),
            bounds: Bounds::default(),
            particulars: None,
            precision: None,
        };
        let tasks: Vec<AdamTask> = (1..=STEPS).map(task).collect();
        let execution = Execution::new(NonZeroUsize::new(7).unwrap());
        for call in tasks.chunks(if in_one_call { tasks.len() } else { 1 }) {
            // SAFETY: four vectors that live until the end; tasks share them, one after the other.
            unsafe { adam_step(call, Order::InSequence, &execution) };
        }
        [value, m, v]
    };
    assert_eq!(run(true), run(false));
}

#[test]
fn a_gradient_that_is_its_own_value_is_read_before_it_is_written() {
    for len in [5usize, 70_000] {
        let [mut value, mut m, mut v] = [1.0f32, 0.0, 0.0].map(|x| vec![x; len]);
        let operand = |x: &mut [f32]| Operand { ptr: x.as_mut_ptr().cast(), dtype: DType::F32 };
        let operand_of_value = operand(&mut value);
        let task = AdamTask {
            value: operand_of_value,
            grad: operand_of_value,
            exp_avg: operand(&mut m),
            exp_avg_sq: operand(&mut v),
            max_exp_avg_sq: None,
            layout: Layout::Flat { len },
            scalars: Adam { lr: 0.1, ..Adam::default() }.scalars(1.0, 1.0),
            bounds: Bounds::default(),
            particulars: None,
            precision: None,
        };
        // SAFETY: three vectors that live until the end; the gradient is the value.
        unsafe { adam_step(&[task], Order::Parallel, &Execution::new(NonZeroUsize::MIN)) };
        assert!(value.iter().all(|x| (x - 0.9).abs() < 1e-6));
        assert!(m.iter().all(|m| (m - 0.1).abs() < 1e-6));
    }
}

#[test]
fn memory_off_its_alignment_is_updated_all_the_same() {
    let mut bytes = vec![0u8; 4 * 9 * 4 + 1];
    let at = |bytes: &mut [u8], side: usize| Operand {
        ptr: bytes.as_mut_ptr().wrapping_add(1 + side * 36),
        dtype: DType::F32,
    };
    for i in 0..9 {
        bytes[1 + 36 + 4 * i..][..4].copy_from_slice(&1.0f32.to_ne_bytes());
    }
    let [value, grad, exp_avg, exp_avg_sq] = [0, 1, 2, 3].map(|side| at(&mut bytes, side));
    let task = AdamTask {
        value,
        grad,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq: None,
        layout: Layout::Flat { len: 9 },
        scalars: Adam { lr: 0.1, ..Adam::default() }.scalars(1.0, 1.0),
        bounds: Bounds::default(),
        particulars: None,
        precision: None,
    };
    // SAFETY: four disjoint runs of nine elements inside `bytes`.
    unsafe { adam_step(&[task], Order::Parallel, &Execution::new(NonZeroUsize::MIN)) };
    for i in 0..9 {
        let x = f32::from_ne_bytes(bytes[1 + 4 * i..][..4].try_into().unwrap());
        assert!((x + 0.1).abs() < 1e-6);
    }
}

#[test]
fn an_empty_parameter_may_have_a_null_address() {
    let nothing = Operand { ptr: std::ptr::null_mut(), dtype: DType::F32 };
    let empty = |layout| AdamTask {
        value: nothing,
        grad: nothing,
        exp_avg: nothing,
        exp_avg_sq: nothing,
        max_exp_avg_sq: None,
        layout,
        scalars: Adam::default().scalars(1.0, 1.0),
        bounds: Bounds::default(),
        particulars: None,
        precision: None,
    };
    let strides = || vec![0, 1];
    let strided = Layout::Strided(Box::new(StridedLayout {
        shape: vec![3, 0],
        value: strides(),
        grad: strides(),
        exp_avg: strides(),
        exp_avg_sq: strides(),
        max_exp_avg_sq: Vec::new(),
    }));
    let tasks = [empty(Layout::Flat { len: 0 }), empty(strided)];
    // SAFETY: no task has an element.
    unsafe { adam_step(&tasks, Order::Parallel, &Execution::new(NonZeroUsize::MIN)) };
}
