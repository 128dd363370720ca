//! Time per element of the kernels, beside a plain read-modify-write of as many bytes.

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::time::Duration;

use std::sync::Arc;

use criterion::{Criterion, Throughput};
use paramstate::{
    Adam, AdamTask, Bounds, Cohorts, DType, Execution, Isa, Layout, Order, OwnedBuffer,
    Particulars, RowSteps, View, ViewLayout, adam_step, bf16, sum_of_squares,
};

/// Far more than the caches hold.
const LEN: usize = 1 << 24;

fn executions() -> impl Iterator<Item = (String, Execution)> {
    let all = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    Isa::available().into_iter().skip(1).flat_map(move |isa| {
        [NonZeroUsize::MIN, all]
            .map(|threads| (format!("{}/{threads}", isa.name()), Execution { threads, isa }))
    })
}

/// Small numbers of both signs, never zeros.
fn filled(dtype: DType, len: usize) -> OwnedBuffer {
    let mut buffer = OwnedBuffer::zeroed(dtype, len);
    let number = |i: usize| ((i * 7919) % 1013) as f32 * 1e-3 - 0.5;
    if let Some(values) = buffer.as_mut_slice::<f32>() {
        values.iter_mut().enumerate().for_each(|(i, x)| *x = number(i));
    } else if let Some(values) = buffer.as_mut_slice::<bf16>() {
        values.iter_mut().enumerate().for_each(|(i, x)| *x = bf16::from_f32(number(i)));
    }
    buffer
}

/// A step over `count` tensors of `len` elements each.
fn steps(criterion: &mut Criterion, name: &str, dtypes: [DType; 3], count: usize, len: usize) {
    let [value, grad, moments] = dtypes;
    let buffers: Vec<[OwnedBuffer; 4]> = (0..count)
        .map(|_| {
            let exp_avg_sq = OwnedBuffer::zeroed(moments, len);
            [filled(value, len), filled(grad, len), filled(moments, len), exp_avg_sq]
        })
        .collect();
    let tasks: Vec<AdamTask> = buffers
        .iter()
        .map(|[value, grad, exp_avg, exp_avg_sq]| AdamTask {
            value: value.operand(),
            grad: grad.operand(),
            exp_avg: exp_avg.operand(),
            exp_avg_sq: exp_avg_sq.operand(),
            max_exp_avg_sq: None,
            layout: Layout::Flat { len },
            scalars: Adam::default().scalars(10.0, 1.0),
            bounds: Bounds::default(),
            particulars: None,
            precision: None,
        })
        .collect();
    let bytes = 2 * value.size_of() + grad.size_of() + 4 * moments.size_of();
    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Bytes((count * len * bytes) as u64)).sample_size(10);
    for (label, execution) in executions() {
        group.bench_function(label, |bencher| {
            // SAFETY: disjoint buffers of `len` elements each, alive until the end.
            bencher.iter(|| unsafe { adam_step(black_box(&tasks), Order::Parallel, &execution) });
        });
    }
}

fn adam(criterion: &mut Criterion) {
    use DType::{Bf16, F16, F32};
    steps(criterion, "adam fp32", [F32; 3], 1, LEN);
    steps(criterion, "adam bf16", [Bf16; 3], 1, LEN);
    steps(criterion, "adam fp16", [F16; 3], 1, LEN);
    steps(criterion, "adam fp32 bf16 moments", [F32, F32, Bf16], 1, LEN);
    steps(criterion, "adam fp32 in cache", [F32; 3], 1, 1 << 13);
    steps(criterion, "adam bf16 in cache", [Bf16; 3], 1, 1 << 13);
    steps(criterion, "adam 5000 x 64", [F32; 3], 5_000, 64);
    steps(criterion, "adam bf16 5000 x 64", [Bf16; 3], 5_000, 64);
}

/// A kind of rows: the offset of each.
type Pattern = (&'static str, fn(usize, usize) -> i64);

/// None; rows added three times at the end; a tenth of the rows reset at random; each row of any of
/// a hundred ages.
const PATTERNS: [Pattern; 4] = [
    ("uniform", |_, _| -1),
    ("blocks", |row, rows| (row * 10 / rows) as i64 / 3),
    ("scattered", |row, _| i64::from(row.wrapping_mul(0x9e37_79b9) >> 7 & 15 < 2)),
    ("any", |row, _| (row.wrapping_mul(0x9e37_79b9) >> 7) as i64 % 100),
];

/// A step over one tensor of `rows` rows of `inner` elements, whose rows have steps of their own.
fn row_steps(criterion: &mut Criterion, total: usize, inner: usize) {
    let rows = total / inner;
    let len = rows * inner;
    let buffers = [0, 1, 2].map(|_| filled(DType::F32, len));
    let exp_avg_sq = OwnedBuffer::zeroed(DType::F32, len);
    let adam = Adam::default();
    let mut group = criterion.benchmark_group(format!("rows [{rows}, {inner}]"));
    group.throughput(Throughput::Bytes(28 * len as u64)).sample_size(20);
    for (label, execution) in executions() {
        for (pattern, offset) in PATTERNS {
            let offsets: Vec<i64> = (0..rows).map(|row| offset(row, rows)).collect();
            let particulars = (offsets[0] >= 0).then(|| {
                let cohorts = Arc::new(Cohorts::new(&offsets, |_| false));
                let rows = RowSteps::new(inner, cohorts, &adam, 200.0);
                Box::new(Particulars { rows: Some(rows), ..Particulars::default() })
            });
            let task = AdamTask {
                value: buffers[0].operand(),
                grad: buffers[1].operand(),
                exp_avg: buffers[2].operand(),
                exp_avg_sq: exp_avg_sq.operand(),
                max_exp_avg_sq: None,
                layout: Layout::Flat { len },
                scalars: adam.scalars(200.0, 1.0),
                bounds: Bounds::default(),
                particulars,
                precision: None,
            };
            let tasks = [task];
            group.bench_function(format!("{label} {pattern}"), |bencher| {
                // SAFETY: disjoint buffers of `len` elements each, alive until the end.
                bencher
                    .iter(|| unsafe { adam_step(black_box(&tasks), Order::Parallel, &execution) });
            });
        }
    }
}

fn rows(criterion: &mut Criterion) {
    for inner in [1, 3, 48] {
        row_steps(criterion, 1 << 13, inner);
        row_steps(criterion, LEN / 2, inner);
    }
}

fn norm(criterion: &mut Criterion) {
    for dtype in [DType::F32, DType::Bf16] {
        let buffer = filled(dtype, LEN);
        let view = View { operand: buffer.operand(), layout: ViewLayout::Flat { len: LEN } };
        let views = [view];
        let mut group = criterion.benchmark_group(format!("norm {dtype}"));
        group.throughput(Throughput::Bytes(buffer.size_bytes() as u64)).sample_size(10);
        for (label, execution) in executions() {
            group.bench_function(label, |bencher| {
                // SAFETY: one buffer of `LEN` elements, alive until the end.
                bencher.iter(|| unsafe { sum_of_squares(black_box(&views), &execution) });
            });
        }
    }
}

/// What the machine can do: the bound for the rows above.
fn read_modify_write(criterion: &mut Criterion) {
    let mut buffer = filled(DType::F32, LEN);
    let values = buffer.as_mut_slice::<f32>().expect("made as f32");
    let mut group = criterion.benchmark_group("read-modify-write fp32");
    group.throughput(Throughput::Bytes(8 * LEN as u64)).sample_size(10);
    group.bench_function("1 thread", |bencher| {
        bencher.iter(|| black_box(&mut *values).iter_mut().for_each(|x| *x *= 1.000_001));
    });
    group.bench_function("2 threads", |bencher| {
        bencher.iter(|| {
            let (a, b) = black_box(&mut *values).split_at_mut(LEN / 2);
            std::thread::scope(|scope| {
                scope.spawn(|| a.iter_mut().for_each(|x| *x *= 1.000_001));
                b.iter_mut().for_each(|x| *x *= 1.000_001);
            });
        });
    });
}

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    read_modify_write(&mut criterion);
    adam(&mut criterion);
    rows(&mut criterion);
    norm(&mut criterion);
    criterion.final_summary();
}
