//! One kernel over a fixed amount of work on one thread, for a tool that counts instructions.
//!
//! `instructions` lists the kernels, each with the elements that one run works on; `instructions
//! NAME` runs one twice: once so that what is made only once has been made, then inside
//! [`counted`], the function whose instructions are to be counted. `make instructions` does so.

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::Arc;

use paramstate::{
    Adam, AdamTask, BLOCK_LEN, Bounds, Cohorts, DType, Decay, Execution, Isa, Layout, NormLimit,
    Operand, Order, OwnedBuffer, ParamId, Particulars, Precision, Projection, Rounding, RowSteps,
    Scales, SecondMoment, Stream, StridedLayout, View, ViewLayout, adam_step, bf16, clamp, f16,
    project, scale, sum_of_squares,
};

/// Two chunks of work: what is done once per chunk is counted too.
const LEN: usize = 1 << 17;

/// Of the kernels that walk rows.
const INNER: usize = 64;
const ROWS: usize = LEN / INNER;

/// Names that `make instructions` records; a new kernel is a new line.
const KERNELS: &[(&str, fn())] = &[
    ("adam fp32", || one(Work::default())),
    ("adam fp32, L2 decay", || one(Work { decay: Decay::L2, ..Work::default() })),
    ("adam fp32, AMSGrad", || one(Work { second: SecondMoment::Maximum, ..Work::default() })),
    ("adam fp32, bounds", || one(Work { bounds: narrow_bounds(), ..Work::default() })),
    ("adam fp32, strided", || one(Work { transposed: true, ..Work::default() })),
    ("adam fp32, bounds of each element", || one(Work { each: true, ..Work::default() })),
    ("adam fp32, rows of two ages", || one(Work { ages: Some(|row| row % 2), ..Work::default() })),
    ("adam fp32, rows of 100 ages", || {
        one(Work { ages: Some(|row| row % 100), ..Work::default() })
    }),
    ("adam fp32, short rows of two ages", || {
        one(Work { ages: Some(|row| row % 2), inner: 4, ..Work::default() });
    }),
    ("adam fp32, short rows of 100 ages", || {
        one(Work { ages: Some(|row| row % 100), inner: 4, ..Work::default() });
    }),
    ("adam bf16", || one(Work::all(DType::Bf16))),
    ("adam f16", || one(Work::all(DType::F16))),
    ("adam f64", || one(Work::all(DType::F64))),
    ("adam bf16, stochastic", || {
        one(Work { rounding: Some(Rounding::Stochastic), ..Work::all(DType::Bf16) });
    }),
    ("adam bf16, Kahan", || one(Work { compensated: true, ..Work::all(DType::Bf16) })),
    ("adam bf16, fp32 moments", || {
        one(Work { moments: DType::F32, ..Work::all(DType::Bf16) });
    }),
    ("adam fp32, bf16 moments, random", || {
        let rounding = Some(Rounding::Nearest);
        one(Work { moments: DType::Bf16, rounding, ..Work::default() });
    }),
    ("adam fp32, 8-bit moments", || {
        let rounding = Some(Rounding::Nearest);
        one(Work { moments: DType::E4M3, rounding, ..Work::default() });
    }),
    ("adam fp32, 8-bit moments, AMSGrad", || {
        let (rounding, second) = (Some(Rounding::Nearest), SecondMoment::Maximum);
        one(Work { moments: DType::E4M3, rounding, second, ..Work::default() });
    }),
    ("adam fp32, bf16 moments", || one(Work { moments: DType::Bf16, ..Work::default() })),
    ("adam fp32, 2048 tensors of 64", || {
        run(&vec![Work { len: INNER, ..Work::default() }; ROWS]);
    }),
    ("norm fp32", || over_view(DType::F32, sum)),
    ("norm bf16", || over_view(DType::Bf16, sum)),
    ("scale fp32", || {
        // SAFETY: one buffer of `LEN` elements, which nobody else has.
        over_view(DType::F32, |view| unsafe { scale(&[view], 0.999, &execution()) });
    }),
    ("clamp fp32", || {
        // SAFETY: as above.
        over_view(DType::F32, |view| unsafe { clamp(&[(view, narrow_bounds())], &execution()) });
    }),
    ("norms of rows held, fp32", hold_norms),
];

/// What a tool counts: everything inside.
#[inline(never)]
fn counted(mut work: impl FnMut()) {
    black_box(&mut work)();
}

fn twice(mut work: impl FnMut()) {
    work();
    counted(work);
}

/// Valgrind has no AVX-512, and counts of two instruction sets cannot be compared.
fn execution() -> Execution {
    let avx2 = Isa::available().into_iter().find(|isa| isa.name() == "avx2+fma");
    Execution { threads: NonZeroUsize::MIN, isa: avx2.unwrap_or_else(Isa::portable) }
}

/// Some of the values lie outside.
fn narrow_bounds() -> Bounds {
    Bounds::new(Some(-0.25), Some(0.25)).expect("in order")
}

/// Small numbers of both signs, never zeros.
fn filled(dtype: DType, len: usize) -> OwnedBuffer {
    let number = |i: usize| ((i * 7919) % 1013) as f32 * 1e-3 - 0.5;
    let numbers = (0..len).map(number);
    match dtype {
        DType::F64 => OwnedBuffer::copy_of(&numbers.map(f64::from).collect::<Vec<_>>()),
        DType::F32 => OwnedBuffer::copy_of(&numbers.collect::<Vec<_>>()),
        DType::Bf16 => OwnedBuffer::copy_of(&numbers.map(bf16::from_f32).collect::<Vec<_>>()),
        DType::F16 => OwnedBuffer::copy_of(&numbers.map(f16::from_f32).collect::<Vec<_>>()),
        DType::E4M3 | DType::E5M3 | DType::E8M0 => OwnedBuffer::zeroed(dtype, len), // the first step fills it
    }
}

/// A step over one parameter, as most are: AdamW in fp32, dense, without bounds.
#[derive(Clone)]
struct Work {
    len: usize,
    values: DType,
    moments: DType,
    decay: Decay,
    second: SecondMoment,
    bounds: Bounds,
    transposed: bool,
    each: bool,
    ages: Option<fn(usize) -> usize>,
    /// Elements of a row.
    inner: usize,
    /// Of the value; moments are rounded at random then.
    rounding: Option<Rounding>,
    /// Whether what the value's rounding leaves over is kept.
    compensated: bool,
}

impl Default for Work {
    fn default() -> Self {
        Self {
            len: LEN,
            values: DType::F32,
            moments: DType::F32,
            decay: Decay::Decoupled,
            second: SecondMoment::Running,
            bounds: Bounds::default(),
            transposed: false,
            each: false,
            ages: None,
            inner: INNER,
            rounding: None,
            compensated: false,
        }
    }
}

impl Work {
    fn all(dtype: DType) -> Self {
        Self { values: dtype, moments: dtype, ..Self::default() }
    }

    fn adam(&self) -> Adam {
        Adam {
            weight_decay: 1e-2,
            decay: self.decay,
            second_moment: self.second,
            ..Adam::default()
        }
    }

    /// Value, gradient, moments, the bounds below and above, what is left over, and the scales of the moments.
    fn buffers(&self) -> [OwnedBuffer; 11] {
        let value = filled(self.values, self.len);
        let second = if self.moments == DType::E4M3 { DType::E5M3 } else { self.moments };
        let moments = [self.moments, second, second].map(|dtype| filled(dtype, self.len));
        let [exp_avg, mut exp_avg_sq, max_exp_avg_sq] = moments;
        if let Some(squares) = exp_avg_sq.as_mut_slice::<f32>() {
            squares.iter_mut().for_each(|x| *x *= *x);
        } else {
            exp_avg_sq = OwnedBuffer::zeroed(second, self.len);
        }
        let limits = [-0.25f32, 0.25].map(|limit| OwnedBuffer::copy_of(&vec![limit; self.len]));
        let [min, max] = limits;
        let [a, b, c] =
            [(); 3].map(|()| OwnedBuffer::zeroed(DType::E8M0, self.len.div_ceil(BLOCK_LEN)));
        let grad = filled(self.values, self.len);
        let left_over = OwnedBuffer::zeroed(self.values, self.len);
        [value, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, min, max, left_over, a, b, c]
    }

    /// The gradient's dimensions lie the other way round in memory than all others'.
    fn layout(&self) -> Layout {
        if !self.transposed {
            return Layout::Flat { len: self.len };
        }
        let (rows, columns) = (ROWS as isize, INNER as isize);
        let [value, exp_avg, exp_avg_sq, max_exp_avg_sq] = [(); 4].map(|()| vec![columns, 1]);
        let grad = vec![1, rows];
        let shape = vec![ROWS, INNER];
        let strided = StridedLayout { shape, value, grad, exp_avg, exp_avg_sq, max_exp_avg_sq };
        Layout::Strided(Box::new(strided))
    }

    fn particulars(&self, min: Operand, max: Operand) -> Option<Box<Particulars>> {
        if !self.each && self.ages.is_none() {
            return None;
        }
        let view = |operand| View { operand, layout: ViewLayout::Flat { len: self.len } };
        let rows = self.ages.map(|age| {
            let rows = 0..self.len / self.inner;
            let offsets: Vec<i64> = rows.map(|row| age(row) as i64).collect();
            RowSteps::new(
                self.inner,
                Arc::new(Cohorts::new(&offsets, |_| false)),
                &self.adam(),
                200.0,
            )
        });
        Some(Box::new(Particulars {
            rows,
            min: self.each.then(|| view(min)),
            max: self.each.then(|| view(max)),
            ..Particulars::default()
        }))
    }

    fn precision(&self, left_over: Operand, scales: [Operand; 3]) -> Option<Box<Precision>> {
        let id = ParamId::new(1).expect("positive");
        let [exp_avg, exp_avg_sq, max_exp_avg_sq] = scales;
        let max_exp_avg_sq = Some(max_exp_avg_sq);
        let layout = ViewLayout::Flat { len: self.len };
        let kahan = Rounding::Kahan(View { operand: left_over, layout: layout.clone() });
        let value = if self.compensated { Some(kahan) } else { self.rounding.clone() };
        Some(Box::new(Precision {
            value: value?,
            random_moments: self.moments.size_of() == 2 && !self.compensated,
            stream: Stream::new(0, id, 0, layout),
            scales: self.moments.is_blockwise().then_some(Scales {
                exp_avg,
                exp_avg_sq,
                max_exp_avg_sq,
            }),
        }))
    }

    fn task(&self, buffers: &[OwnedBuffer; 11]) -> AdamTask {
        let [value, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, min, max, left_over, scales @ ..] =
            buffers.each_ref().map(OwnedBuffer::operand);
        AdamTask {
            value,
            grad,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq: (self.second == SecondMoment::Maximum).then_some(max_exp_avg_sq),
            layout: self.layout(),
            scalars: self.adam().scalars(200.0, 0.5),
            bounds: self.bounds,
            particulars: self.particulars(min, max),
            precision: self.precision(left_over, scales),
        }
    }
}

fn one(work: Work) {
    run(&[work]);
}

fn run(all: &[Work]) {
    let buffers: Vec<_> = all.iter().map(Work::buffers).collect();
    let tasks: Vec<_> = all.iter().zip(&buffers).map(|(work, own)| work.task(own)).collect();
    // SAFETY: disjoint buffers, each as long as its layout, alive until the end; one thread.
    twice(|| unsafe { adam_step(black_box(&tasks), Order::Parallel, &execution()) });
}

fn over_view(dtype: DType, work: impl Fn(View)) {
    let buffer = filled(dtype, LEN);
    let layout = ViewLayout::Flat { len: LEN };
    twice(|| work(View { operand: buffer.operand(), layout: layout.clone() }));
}

fn sum(view: View) {
    // SAFETY: one buffer of `LEN` elements, which nobody writes.
    black_box(unsafe { sum_of_squares(&[view], &execution()) });
}

fn hold_norms() {
    let buffer = filled(DType::F32, LEN);
    let projection = Projection {
        operand: buffer.operand(),
        shape: vec![ROWS, INNER],
        strides: vec![INNER as isize, 1],
        over: vec![false, true],
        limit: NormLimit::Exactly(1.0),
        rows: None,
    };
    // SAFETY: one buffer of `ROWS` rows of `INNER` elements, which nobody else has.
    twice(|| unsafe { project(&[&projection], &execution()) });
}

fn main() -> ExitCode {
    let Some(wanted) = std::env::args().nth(1) else {
        println!("{LEN} elements on {}", execution().isa.name());
        KERNELS.iter().for_each(|(name, _)| println!("{name}"));
        return ExitCode::SUCCESS;
    };
    let Some((_, kernel)) = KERNELS.iter().find(|(name, _)| *name == wanted) else {
        eprintln!("no such kernel: {wanted}");
        return ExitCode::FAILURE;
    };
    kernel();
    ExitCode::SUCCESS
}
