//! How results are stored, by a slow twin: one number at a time, its neighbours looked up in tables
//! of all the numbers that there are.

#![allow(dead_code, reason = "each test file uses its part")]

pub mod case;

use std::sync::LazyLock;

use paramstate::{BLOCK_LEN, DType, bf16, f16};

use crate::reference::stored;

/// What the words of one parameter in one step depend on.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    pub seed: u64,
    pub id: u64,
    pub step: u64,
}

pub const VALUE: u64 = 1;
pub const MOMENTS: u64 = 2;

/// SplitMix64 with its constant added first.
pub fn split_mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The random bits of one element: for one use (`VALUE`, `MOMENTS`), by its logical index.
pub fn word(key: Key, purpose: u64, index: u64) -> u32 {
    let sum = |a: u64, b: u64| split_mix(a.wrapping_add(b));
    let key = sum(sum(sum(split_mix(key.seed), key.id), key.step), purpose);
    let key = split_mix(key ^ (index >> 32));
    let (early, late) = (key & 0xffff_ffff, key >> 32);
    let low = |x: u64| x & 0xffff_ffff;
    let mut x = low(index + early);
    x ^= x >> 16;
    x = low(low(x * 0x7feb_352d) + late);
    x ^= x >> 15;
    x = low(x * 0x846c_a68b);
    (x ^ x >> 16) as u32
}

/// All magnitudes, the least first. The last of a type of 16 bits stands for infinity.
static BF16: LazyLock<Vec<f64>> = LazyLock::new(|| {
    (0..0x7f80).map(|bits| bf16::from_bits(bits).to_f64()).chain([2f64.powi(128)]).collect()
});
static F16: LazyLock<Vec<f64>> = LazyLock::new(|| {
    (0..0x7c00).map(|bits| f16::from_bits(bits).to_f64()).chain([65_536.0]).collect()
});
static E4M3: LazyLock<Vec<f64>> = LazyLock::new(|| (0..0x7f).map(|code| small(code, 7)).collect());
static E5M3: LazyLock<Vec<f64>> = LazyLock::new(|| (0..0xff).map(|code| small(code, 15)).collect());

/// A float of three bits of mantissa.
fn small(code: u32, bias: i32) -> f64 {
    let (exponent, mantissa) = ((code >> 3) as i32, f64::from(code & 7) / 8.0);
    match exponent {
        0 => mantissa * 2f64.powi(1 - bias),
        _ => (1.0 + mantissa) * 2f64.powi(exponent - bias),
    }
}

/// The place of one of the two neighbours of `x` in the table: the upper one where the part of
/// their distance that `x` lies above the lower one, of which `bits` are kept, and the random part,
/// of as many bits and at most 16, come to a whole.
fn choose(table: &[f64], x: f64, bits: i32, random: u32) -> usize {
    let upper = table.partition_point(|y| *y <= x);
    let lower = upper - 1;
    if upper == table.len() {
        return lower;
    }
    let whole = 2f64.powi(bits);
    let part = (x - table[lower]) / (table[upper] - table[lower]);
    let random = f64::from(random) / 65_536.0;
    let sum = (part * whole).round_ties_even() + (random * whole).floor();
    if sum >= whole { upper } else { lower }
}

/// A number as it is stored with 16 random bits; types of more than 16 bits use none.
pub fn stored_at_random(dtype: DType, x: f64, random: u32) -> f64 {
    let (table, bits) = match dtype {
        DType::Bf16 => (&*BF16, 16),
        DType::F16 => (&*F16, 13),
        _ => return stored(dtype, x),
    };
    let single = f64::from(x as f32);
    if single.is_nan() || single.is_infinite() {
        return single;
    }
    let place = choose(table, single.abs(), bits, random);
    let magnitude = if place + 1 == table.len() { f64::INFINITY } else { table[place] };
    magnitude.copysign(single)
}

fn codes_of(dtype: DType) -> &'static [f64] {
    if dtype == DType::E4M3 { &E4M3 } else { &E5M3 }
}

/// What a code and its block's scale stand for.
pub fn decoded(dtype: DType, code: u8, scale: u8) -> f64 {
    let is_signed = dtype == DType::E4M3;
    let place = usize::from(if is_signed { code & 0x7f } else { code });
    let Some(magnitude) = codes_of(dtype).get(place) else { return f64::NAN };
    let sign = if is_signed && code >= 0x80 { -1.0 } else { 1.0 };
    sign * magnitude * 2f64.powi(i32::from(scale) - 127)
}

/// The codes of one block and its scale: the least with which its greatest number has a code, and
/// every number of the format is a normal `f32`.
pub fn encoded(dtype: DType, source: &[f64], random: &[u32]) -> (Vec<u8>, u8) {
    assert!(source.len() <= BLOCK_LEN);
    let codes = codes_of(dtype);
    let (least, greatest_code) =
        (if dtype == DType::E4M3 { 10 } else { 18 }, codes[codes.len() - 1]);
    let singles = source.iter().map(|x| f64::from(*x as f32));
    let greatest = singles.filter(|x| x.is_finite()).fold(0.0, |a: f64, x| a.max(x.abs()));
    let size = |scale: u8| 2f64.powi(i32::from(scale) - 127);
    let scale = (least..255).find(|scale| greatest / size(*scale) <= greatest_code).unwrap();
    let code = |(&x, &random): (&f64, &u32)| {
        let single = f64::from(x as f32);
        if !single.is_finite() {
            return codes.len() as u8;
        }
        let place = choose(codes, single.abs() / size(scale), 20, random) as u8;
        match dtype {
            DType::E4M3 => place | if single.is_sign_negative() { 0x80 } else { 0 },
            _ if x > 0.0 => place.max(1),
            _ => place,
        }
    };
    (source.iter().zip(random).map(code).collect(), scale)
}

/// A number of the type that arithmetic runs in.
pub fn narrow(double: bool, x: f64) -> f64 {
    if double { x } else { (x as f32).into() }
}

/// A stored value and what was left over of it; the value alone where that cannot be.
pub fn completed(dtype: DType, double: bool, value: f64, left_over: f64) -> f64 {
    let sum = narrow(double, value + left_over);
    let off = |x: f64| narrow(double, (sum - x).abs());
    if off(value) <= off(stored(dtype, sum)) { sum } else { value }
}

/// The value that is stored, which is the former one if no other is nearer, and what is left over.
pub fn split(dtype: DType, double: bool, sum: f64, former: f64) -> (f64, f64) {
    let off = |x: f64| narrow(double, (sum - x).abs());
    let nearest = stored(dtype, sum);
    let stays = nearest.is_finite() && off(former) <= off(nearest);
    let value = if stays { former } else { nearest };
    let left_over = narrow(double, sum - value);
    (value, stored(dtype, if left_over.is_finite() { left_over } else { 0.0 }))
}
