//! One parameter with a [`Precision`]: its memory, its task, and what the slow twin makes of it.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use paramstate::{
    Adam, AdamTask, BLOCK_LEN, Bounds, Cohorts, DType, Layout, Operand, OwnedBuffer, ParamId,
    Particulars, Precision, Rounding, RowSteps, Scales, SecondMoment, Stream, StridedLayout, View,
    ViewLayout, WhenBound, row_major,
};

use super::{
    Key, MOMENTS, VALUE, completed, decoded, encoded, split, split_mix, stored_at_random, word,
};
use crate::reference::{self, Point, copy, filled, get, numbers, offsets, operand_at, set, stored};

/// Value, gradient, first and second moment, maximum, compensation.
pub const SIDES: usize = 6;
pub const NAMES: [&str; SIDES] =
    ["value", "grad", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "compensation"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Nearest,
    Stochastic,
    Kahan,
}

/// Bounds of each element, along some dimensions the same for all.
#[derive(Clone, Debug)]
pub struct Limits {
    pub dtype: DType,
    pub low: Option<[bool; 3]>,
    pub high: Option<[bool; 3]>,
    pub zero: bool,
}

#[derive(Clone, Debug)]
pub struct Case {
    /// Of value, gradient and moments; the moments' are not used with `blockwise`.
    pub dtypes: [DType; SIDES - 1],
    pub blockwise: bool,
    pub shape: [usize; 3],
    /// `None`: flat.
    pub strides: Option<[Vec<isize>; SIDES]>,
    /// Elements before the first; what is used then begins off a vector's alignment.
    pub skip: usize,
    pub kind: Kind,
    pub random_moments: bool,
    pub key: Key,
    /// The first logical index, and the strides of the others.
    pub first: u64,
    pub indices: Option<Vec<isize>>,
    pub adam: Adam,
    pub coefficient: f64,
    pub bounds: Bounds,
    /// The dimension of the rows, and of each row its offset and whether it is skipped.
    pub rows: Option<(usize, Vec<(i64, bool)>)>,
    pub limits: Option<Limits>,
    /// Numbers of all kinds, or finite ones alone.
    pub wild: bool,
    pub seed: u64,
}

/// What a case reads and writes.
pub struct Memory {
    pub sides: [OwnedBuffer; SIDES],
    pub scales: [OwnedBuffer; 3],
}

impl Memory {
    pub fn copy(&self) -> Self {
        Self { sides: self.sides.each_ref().map(copy), scales: self.scales.each_ref().map(copy) }
    }
}

type Limit = Option<(OwnedBuffer, Vec<isize>)>;

impl Case {
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn maximal(&self) -> bool {
        self.adam.second_moment == SecondMoment::Maximum
    }

    /// What is left over of a value is kept for types of 16 bits.
    fn compensates(&self) -> bool {
        self.kind == Kind::Kahan && self.dtypes[0].size_of() == 2
    }

    pub fn dtype(&self, side: usize) -> DType {
        match side {
            2 if self.blockwise => DType::E4M3,
            3 | 4 if self.blockwise => DType::E5M3,
            5 => self.dtypes[0],
            _ => self.dtypes[side],
        }
    }

    fn offsets(&self, side: usize) -> Vec<usize> {
        let dense = row_major(&self.shape);
        let strides = self.strides.as_ref().map_or(&dense, |strides| &strides[side]);
        let strides = if self.dtype(side).is_blockwise() { &dense } else { strides };
        offsets(&self.shape, strides).into_iter().map(|x| self.skip + x as usize).collect()
    }

    pub fn memory(&self) -> Memory {
        let mut sides = std::array::from_fn(|side| {
            let len = self.offsets(side).into_iter().max().map_or(0, |last| last + 1) + 3;
            let seed = self.seed ^ (side as u64 + 1) << 32;
            if self.dtype(side).is_blockwise() {
                let codes = (0..len as u64).map(|i| split_mix(seed + i) as u8);
                let codes = codes.map(|code| if self.wild { code } else { code & 0xbf });
                return filled(
                    self.dtype(side),
                    codes.map(f64::from).collect::<Vec<_>>().into_iter(),
                );
            }
            let numbers = self.numbers(seed, len).into_iter();
            let second = side == 3 || side == 4; // no square is negative
            filled(self.dtype(side), numbers.map(|x| if second { x.abs() } else { x }))
        });
        self.leave_over(&mut sides);
        let scales = std::array::from_fn(|i| {
            let count = self.len().div_ceil(BLOCK_LEN) + 1;
            let scale = |block| 90 + split_mix(self.seed ^ (block * 3 + i as u64)) % 30;
            let scales: Vec<f64> = (0..count as u64).map(|block| scale(block) as f64).collect();
            filled(DType::E8M0, scales.into_iter())
        });
        Memory { sides, scales }
    }

    fn numbers(&self, seed: u64, len: usize) -> Vec<f64> {
        if self.wild {
            return numbers(seed, len).collect();
        }
        let number = |i: u64| {
            let bits = split_mix(seed ^ i);
            let uniform = (bits >> 11) as f64 / (1u64 << 53) as f64 - 0.5;
            uniform * 2f64.powi(-((bits % 16) as i32))
        };
        (0..len as u64).map(number).collect()
    }

    /// What rounding left over of the values, or of others that were there before.
    fn leave_over(&self, sides: &mut [OwnedBuffer; SIDES]) {
        let len = sides[5].len();
        let part = match self.dtypes[0] {
            DType::F16 => 2f64.powi(-11),
            DType::Bf16 => 2f64.powi(-8),
            _ => 1.0, // not read
        };
        let parts = self.numbers(self.seed ^ 77, len);
        let (from, to) = (self.offsets(0), self.offsets(5));
        for i in 0..len {
            set(&mut sides[5], i, 0.0);
        }
        for ((from, to), x) in from.into_iter().zip(to).zip(parts) {
            let left_over = get(&sides[0], from) * part * x;
            set(&mut sides[5], to, left_over);
        }
    }

    /// Some of the lower bounds are above 0, so that zeros are at a bound now and then.
    fn limit(&self, side: u64, varies: [bool; 3]) -> (OwnedBuffer, Vec<isize>) {
        let sizes = [0, 1, 2].map(|dim| if varies[dim] { self.shape[dim] } else { 1 });
        let dtype = self.limits.as_ref().expect("asked for").dtype;
        let offset = if side == 0 { -0.3 } else { 0.3 };
        let clean = |x: f64| if x.is_finite() { x.clamp(-1.0, 1.0) } else { 0.0 };
        let bounds = numbers(self.seed ^ side, sizes.iter().product::<usize>());
        let bounds: Vec<f64> = bounds.map(|x| clean(x) * 0.5 + offset).collect();
        let dense = row_major(&sizes);
        let strides = (0..3).map(|dim| if varies[dim] { dense[dim] } else { 0 }).collect();
        (filled(dtype, bounds.into_iter()), strides)
    }

    pub fn limit_views(&self) -> [Limit; 2] {
        let Some(limits) = &self.limits else { return [None, None] };
        [(0, limits.low), (1, limits.high)]
            .map(|(side, varies)| varies.map(|varies| self.limit(side, varies)))
    }

    fn particulars(&self, limits: &[Limit; 2], count: &Arc<AtomicUsize>) -> Particulars {
        let rows = self.rows.as_ref().map(|(dim, rows)| {
            let offsets: Vec<i64> = rows.iter().map(|(offset, _)| *offset).collect();
            let cohorts = Arc::new(Cohorts::new(&offsets, |row| rows[row].1));
            let inner = self.shape[dim + 1..].iter().product();
            RowSteps::new(inner, cohorts, &self.adam, self.key.step as f64)
        });
        let view = |limit: &Limit| {
            let (buffer, strides) = limit.as_ref()?;
            Some(self.view(buffer.operand(), strides))
        };
        let zero = self.limits.as_ref().is_some_and(|limits| limits.zero);
        Particulars {
            rows,
            min: view(&limits[0]),
            max: view(&limits[1]),
            when_bound: if zero { WhenBound::ZeroMoment } else { WhenBound::KeepMoment },
            at_bound: self.limits.is_some().then(|| Arc::clone(count)),
            projection: None,
        }
    }

    fn view(&self, operand: Operand, strides: &[isize]) -> View {
        let is_flat = self.strides.is_none() && *strides == *row_major(&self.shape);
        let layout = if is_flat {
            ViewLayout::Flat { len: self.len() }
        } else {
            ViewLayout::Strided { shape: self.shape.to_vec(), strides: strides.to_vec() }
        };
        View { operand, layout }
    }

    fn precision(&self, memory: &Memory) -> Precision {
        let dense = row_major(&self.shape);
        let strides = self.strides.as_ref().map_or(&dense, |strides| &strides[5]);
        let indices =
            self.indices.clone().map_or(ViewLayout::Flat { len: self.len() }, |strides| {
                ViewLayout::Strided { shape: self.shape.to_vec(), strides }
            });
        let id = ParamId::new(self.key.id).unwrap();
        let mut stream = Stream::new(self.key.seed, id, self.first, indices);
        stream.at_step(self.key.step);
        let [exp_avg, exp_avg_sq, max] = memory.scales.each_ref().map(OwnedBuffer::operand);
        let max_exp_avg_sq = self.maximal().then_some(max);
        Precision {
            value: match self.kind {
                Kind::Nearest => Rounding::Nearest,
                Kind::Stochastic => Rounding::Stochastic,
                Kind::Kahan => {
                    Rounding::Kahan(self.view(operand_at(&memory.sides[5], self.skip), strides))
                }
            },
            random_moments: self.random_moments,
            stream,
            scales: self.blockwise.then_some(Scales { exp_avg, exp_avg_sq, max_exp_avg_sq }),
        }
    }

    pub fn task(&self, memory: &Memory, limits: &[Limit; 2], count: &Arc<AtomicUsize>) -> AdamTask {
        let [value, grad, exp_avg, exp_avg_sq, max, _] =
            memory.sides.each_ref().map(|buffer| operand_at(buffer, self.skip));
        let layout = match self.strides.clone() {
            None => Layout::Flat { len: self.len() },
            Some([value, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, _]) => {
                let shape = self.shape.to_vec();
                Layout::Strided(Box::new(StridedLayout {
                    shape,
                    value,
                    grad,
                    exp_avg,
                    exp_avg_sq,
                    max_exp_avg_sq,
                }))
            }
        };
        let has_particulars = self.rows.is_some() || self.limits.is_some();
        AdamTask {
            value,
            grad,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq: self.maximal().then_some(max),
            layout,
            scalars: self.adam.scalars(self.key.step as f64, self.coefficient),
            bounds: self.bounds,
            particulars: has_particulars.then(|| Box::new(self.particulars(limits, count))),
            precision: Some(Box::new(self.precision(memory))),
        }
    }

    /// The step that element `i` is at, and whether its row is skipped.
    fn age(&self, i: usize) -> (f64, bool) {
        let Some((dim, rows)) = &self.rows else { return (self.key.step as f64, false) };
        let inner: usize = self.shape[dim + 1..].iter().product();
        let (offset, skipped) = rows[i / inner % self.shape[*dim]];
        ((self.key.step as i64 - offset) as f64, skipped)
    }

    /// What becomes of the memory, and how many values are at a bound.
    pub fn expected(&self, before: &Memory) -> (Memory, usize) {
        let used = if self.maximal() { 5 } else { 4 };
        let double = (0..used).any(|side| self.dtype(side) == DType::F64);
        let at: [Vec<usize>; SIDES] = std::array::from_fn(|side| self.offsets(side));
        let dense = row_major(&self.shape);
        let indices = offsets(&self.shape, self.indices.as_ref().unwrap_or(&dense));
        let limits = self.limit_views().map(|limit| {
            let (buffer, strides) = limit?;
            let all = offsets(&self.shape, &strides).into_iter();
            Some(all.map(|offset| get(&buffer, offset as usize)).collect::<Vec<f64>>())
        });
        let narrow = |x: f64| super::narrow(double, x);
        let mut after = before.copy();
        let (mut fresh, mut count) = ([const { Vec::new() }; 3], 0);
        for i in 0..self.len() {
            let read = |side: usize| match self.dtype(side) {
                dtype if dtype.is_blockwise() => {
                    let code = get(&before.sides[side], at[side][i]) as u8;
                    decoded(dtype, code, get(&before.scales[side - 2], i / BLOCK_LEN) as u8)
                }
                _ => get(&before.sides[side], at[side][i]),
            };
            let (age, skipped) = self.age(i);
            let rounded = |x: f64| match self.kind {
                Kind::Nearest => x,
                _ => stored(self.dtypes[0], narrow(x)),
            };
            let bound = |side: usize, scalar: Option<f64>| {
                limits[side].as_ref().map(|limit| limit[i]).or(scalar).map(rounded)
            };
            let bounds = Bounds { min: bound(0, self.bounds.min), max: bound(1, self.bounds.max) };
            let former = read(0);
            let value = match self.compensates() {
                true => completed(self.dtypes[0], double, former, read(5)),
                false => former,
            };
            let point = Point {
                value,
                grad: read(1),
                exp_avg: read(2),
                exp_avg_sq: read(3),
                max_exp_avg_sq: self.maximal().then(|| read(4)),
            };
            let step =
                |bounds| reference::step(point, &self.adam, age, self.coefficient, bounds, double);
            let (mut new, free) = (step(bounds), step(Bounds::default()));
            let held = new.value != free.value && !free.value.is_nan();
            if held && self.limits.as_ref().is_some_and(|limits| limits.zero) {
                new.exp_avg = 0.0;
            }
            let new = if skipped { point } else { new };
            let index = self.first.wrapping_add_signed(indices[i] as i64);
            let words = [VALUE, MOMENTS].map(|purpose| word(self.key, purpose, index));
            let moments = [(2, Some(new.exp_avg), words[1] >> 16)];
            let squares = [(3, Some(new.exp_avg_sq)), (4, new.max_exp_avg_sq)];
            let squares = squares.map(|(side, x)| (side, x, words[1] & 0xffff));
            for (side, x, random) in moments.into_iter().chain(squares) {
                let Some(x) = x else { continue };
                if self.blockwise {
                    fresh[side - 2].push((x, random));
                } else if !skipped {
                    let dtype = self.dtypes[side];
                    let x = match self.random_moments {
                        true => stored_at_random(dtype, x, random),
                        false => stored(dtype, x),
                    };
                    set(&mut after.sides[side], at[side][i], x);
                }
            }
            if !skipped {
                let (value, left_over) = match self.kind {
                    Kind::Stochastic => {
                        (stored_at_random(self.dtypes[0], new.value, words[0] & 0xffff), None)
                    }
                    Kind::Kahan if self.compensates() => {
                        let (value, rest) = split(self.dtypes[0], double, new.value, former);
                        (value, Some(rest))
                    }
                    _ => (stored(self.dtypes[0], new.value), None),
                };
                set(&mut after.sides[0], at[0][i], value);
                left_over.into_iter().for_each(|rest| set(&mut after.sides[5], at[5][i], rest));
            }
            let is_bound = |bound: Option<f64>| bound.map(|x| stored(self.dtypes[0], narrow(x)));
            let value = get(&after.sides[0], at[0][i]);
            count += usize::from([bounds.min, bounds.max].map(is_bound).contains(&Some(value)));
        }
        for (side, numbers) in (2..5).zip(fresh) {
            for (block, numbers) in numbers.chunks(BLOCK_LEN).enumerate() {
                let (source, random): (Vec<f64>, Vec<u32>) = numbers.iter().copied().unzip();
                let (codes, scale) = encoded(self.dtype(side), &source, &random);
                set(&mut after.scales[side - 2], block, scale.into());
                for (i, code) in codes.into_iter().enumerate() {
                    set(&mut after.sides[side], self.skip + block * BLOCK_LEN + i, code.into());
                }
            }
        }
        (after, count)
    }
}
