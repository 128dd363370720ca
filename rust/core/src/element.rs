//! The element types of values, gradients and moments, and the two types that arithmetic runs in.

use std::fmt;
use std::ops::{Add, Div, Mul, Sub};

use half::{bf16, f16};

/// The element type of one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 64-bit float.
    F64,
    /// 32-bit float.
    F32,
    /// 16-bit float with eight bits of exponent.
    Bf16,
    /// 16-bit float with five bits of exponent.
    F16,
    /// 8-bit float with a sign and four bits of exponent: a first moment in blocks with a scale.
    E4M3,
    /// 8-bit float with five bits of exponent and no sign: a second moment in blocks with a scale.
    E5M3,
    /// A power of two, the scale of such a block.
    E8M0,
}

impl DType {
    /// Bytes per element.
    #[must_use]
    pub const fn size_of(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
            Self::E4M3 | Self::E5M3 | Self::E8M0 => 1,
        }
    }

    /// Whether it means a number only together with a block's scale: no [`Element`].
    #[must_use]
    pub const fn is_blockwise(self) -> bool {
        matches!(self, Self::E4M3 | Self::E5M3 | Self::E8M0)
    }

    /// The name that torch and NumPy use, where they have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "float64",
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
            Self::E4M3 => "8-bit float (E4M3)",
            Self::E5M3 => "8-bit float (E5M3)",
            Self::E8M0 => "scale (E8M0)",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type that a buffer can hold: `f64`, `f32`, [`bf16`] and [`f16`](struct@f16). Sealed.
pub trait Element: Convert + fmt::Debug + PartialEq + Send + Sync + 'static {
    /// The type's tag.
    const DTYPE: DType;
}

/// Conversion from and to the compute types, rounding to the nearest, ties to even. As in torch, a
/// `f64` reaches a 16-bit type through `f32`.
pub trait Convert: Copy {
    /// Exact but for `f64`.
    fn to_f32(self) -> f32;
    /// Exact.
    fn to_f64(self) -> f64;
    /// Rounded where needed; a NaN stays one.
    fn from_f32(x: f32) -> Self;
    /// Rounded where needed; a NaN stays one.
    fn from_f64(x: f64) -> Self;
    /// Where the number lies between two of this type, the upper one (by magnitude) if `random`, of
    /// 16 bits, says so: with the probability that makes it right on average. Types of more than 16
    /// bits round to the nearest.
    fn from_f32_at_random(x: f32, random: u32) -> Self;
}

macro_rules! elements {
    ($($type:ty => $dtype:expr),* $(,)?) => {
        $(impl Element for $type {
            const DTYPE: DType = $dtype;
        })*
    };
}

elements!(f64 => DType::F64, f32 => DType::F32, bf16 => DType::Bf16, f16 => DType::F16);

impl Convert for f64 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self as f32
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x.into()
    }
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn from_f32_at_random(x: f32, _: u32) -> Self {
        x.into()
    }
}

impl Convert for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self.into()
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn from_f32_at_random(x: f32, _: u32) -> Self {
        x
    }
}

/// By integer arithmetic without a branch, so that a loop over it becomes vector code.
impl Convert for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        Convert::to_f32(self).into()
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        Self::from_bits((nearest_bf16(x) >> 16) as u16)
    }
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        Convert::from_f32(x as f32)
    }
    #[inline(always)]
    fn from_f32_at_random(x: f32, random: u32) -> Self {
        Self::from_bits((random_bf16(x, random) >> 16) as u16)
    }
}

/// The nearest `bf16` in the upper half of a word; the lower half is anything.
#[inline(always)]
pub(crate) fn nearest_bf16(x: f32) -> u32 {
    let bits = x.to_bits();
    // Half of the last place kept, less one where that place is even: ties go to even.
    quieted(x, bits.wrapping_add(0x7fff + (bits >> 16 & 1)))
}

/// One of the two neighbours of `x` in `bf16`, as 16 random bits say, in the upper half of a word.
#[inline(always)]
pub(crate) fn random_bf16(x: f32, random: u32) -> u32 {
    quieted(x, x.to_bits().wrapping_add(random))
}

/// The addition can make anything of a NaN: these bits make it a quiet one.
#[inline(always)]
fn quieted(x: f32, sum: u32) -> u32 {
    sum | if x.is_nan() { 0x7fc0_0000 } else { 0 }
}

/// Like `bf16`, all cases computed and one chosen. No result depends on whether the thread flushes
/// denormal `f32` to zero: none is made here, and one that comes is less than half of what `f16` has.
impl Convert for f16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        let sign = u32::from(self.to_bits() & 0x8000) << 16;
        let magnitude = u32::from(self.to_bits() & 0x7fff) << 13;
        // The exponent's bias grows from 15 to 127. Infinity and NaN have the largest one there is.
        let normal = magnitude + (112 << 23);
        let not_finite = magnitude + (224 << 23);
        // Below the least exponent there is no leading one: it is put there, and subtracted.
        let least = 113 << 23;
        let denormal = (f32::from_bits(magnitude | least) - f32::from_bits(least)).to_bits();
        let finite = if magnitude < 1 << 23 { denormal } else { normal };
        f32::from_bits(sign | if magnitude < 31 << 23 { finite } else { not_finite })
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        Convert::to_f32(self).into()
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        let bits = x.to_bits() & 0x7fff_ffff;
        let sign = x.to_bits() >> 16 & 0x8000;
        // As for bf16: half of the last place kept, less one where that place is even.
        let normal = bits.wrapping_add(0xfff + (bits >> 13 & 1)).wrapping_sub(112 << 23) >> 13;
        // The last place of 0.5 is that of the denormals: the addition rounds to it.
        let denormal = (f32::from_bits(bits) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
        let finite = if bits < 113 << 23 { denormal } else { normal };
        let finite = finite.min(0x7c00); // what is too large becomes infinity
        let nan = 0x7e00 | (bits >> 13 & 0x3ff);
        Self::from_bits((sign | if bits > 0x7f80_0000 { nan } else { finite }) as u16)
    }
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        Convert::from_f32(x as f32)
    }
    #[inline(always)]
    fn from_f32_at_random(x: f32, random: u32) -> Self {
        let bits = x.to_bits() & 0x7fff_ffff;
        let sign = x.to_bits() >> 16 & 0x8000;
        // Below the least exponent there is no leading one: with that exponent added there is, and
        // the last place is the same. Of the random bits so many are used as are dropped.
        let least: u32 = 113 << 23;
        let is_small = bits < least;
        let led = if is_small {
            f32::from_bits(bits) + f32::from_bits(least)
        } else {
            f32::from_bits(bits)
        };
        let kept = led.to_bits().wrapping_add(random >> 3) >> 13;
        let finite = kept.wrapping_sub(if is_small { 113 << 10 } else { 112 << 10 }).min(0x7c00);
        let nan = 0x7e00 | (bits >> 13 & 0x3ff);
        Self::from_bits((sign | if bits > 0x7f80_0000 { nan } else { finite }) as u16)
    }
}

/// The type that arithmetic runs in: `f64` where an operand is `f64`, else `f32`.
pub(crate) trait Compute:
    Element
    + PartialOrd
    + Default
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
{
    fn narrow(x: f64) -> Self;
    /// `self * a + b`, rounded once.
    fn mul_add(self, a: Self, b: Self) -> Self;
    fn sqrt(self) -> Self;
    fn abs(self) -> Self;
    fn is_nan(self) -> bool;
    fn decode<T: Element>(x: T) -> Self;
    fn encode<T: Element>(self) -> T;
    fn encode_at_random<T: Element>(self, random: u32) -> T;
    /// That of the two which is in this type.
    fn either<'a>(single: &'a [f32], double: &'a [f64]) -> &'a [Self];
    /// The numbers, if they are of 32 bits.
    #[cfg(target_arch = "x86_64")]
    fn singles(numbers: &[Self]) -> Option<&[f32]>;
    /// The numbers, if they are of 32 bits.
    #[cfg(target_arch = "x86_64")]
    fn singles_mut(numbers: &mut [Self]) -> Option<&mut [f32]>;
}

impl Compute for f32 {
    #[inline(always)]
    fn narrow(x: f64) -> Self {
        x as Self
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f32::mul_add(self, a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn abs(self) -> Self {
        f32::abs(self)
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        f32::is_nan(self)
    }
    #[inline(always)]
    fn decode<T: Element>(x: T) -> Self {
        x.to_f32()
    }
    #[inline(always)]
    fn encode<T: Element>(self) -> T {
        T::from_f32(self)
    }
    #[inline(always)]
    fn encode_at_random<T: Element>(self, random: u32) -> T {
        T::from_f32_at_random(self, random)
    }
    #[inline(always)]
    fn either<'a>(single: &'a [f32], _: &'a [f64]) -> &'a [Self] {
        single
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn singles(numbers: &[Self]) -> Option<&[f32]> {
        Some(numbers)
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn singles_mut(numbers: &mut [Self]) -> Option<&mut [f32]> {
        Some(numbers)
    }
}

impl Compute for f64 {
    #[inline(always)]
    fn narrow(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f64::mul_add(self, a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn abs(self) -> Self {
        f64::abs(self)
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        f64::is_nan(self)
    }
    #[inline(always)]
    fn decode<T: Element>(x: T) -> Self {
        x.to_f64()
    }
    #[inline(always)]
    fn encode<T: Element>(self) -> T {
        T::from_f64(self)
    }
    #[inline(always)]
    fn encode_at_random<T: Element>(self, random: u32) -> T {
        if T::DTYPE.size_of() > 2 {
            T::from_f64(self)
        } else {
            T::from_f32_at_random(self as f32, random)
        }
    }
    #[inline(always)]
    fn either<'a>(_: &'a [f32], double: &'a [f64]) -> &'a [Self] {
        double
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn singles(_: &[Self]) -> Option<&[f32]> {
        None
    }
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn singles_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    }

    #[test]
    fn every_16_bit_number_is_decoded_as_half_does() {
        for bits in 0..=u16::MAX {
            let (x, y) = (f16::from_bits(bits), bf16::from_bits(bits));
            assert!(same(Convert::to_f32(x), f16::to_f32(x)), "{bits:#x}");
            assert!(same(Convert::to_f32(y), bf16::to_f32(y)), "{bits:#x}");
        }
    }

    /// What lies between two numbers becomes the upper one for just so many of the random words as
    /// its distance from the lower says; what is a number stays one for all.
    #[test]
    fn rounding_at_random_is_right_on_average() {
        fn check<T: Element>(x: f32, lower: T, upper: T, up: u32, resolution: u32) {
            for sign in [1.0f32, -1.0] {
                let chosen = |random| Convert::to_f32(T::from_f32_at_random(sign * x, random));
                let ups =
                    (0..1 << 16).filter(|&random| chosen(random) == sign * upper.to_f32()).count();
                let downs =
                    (0..1 << 16).filter(|&random| chosen(random) == sign * lower.to_f32()).count();
                assert_eq!(ups + downs, if up == 0 { 1 << 16 } else { ups + downs }, "{x:e}");
                assert!(
                    (ups as i64 - i64::from(up)).abs() <= i64::from(resolution),
                    "{x:e}: {ups} for {up}"
                );
            }
        }
        let bf = |bits| bf16::from_bits(bits);
        let between = |bits: u16, part: u32| f32::from_bits((u32::from(bits) << 16) + part);
        for bits in [0x3f80, 0x0001, 0x0080, 0x7f00, 0x4049] {
            for part in [1, 100, 0x8000, 0xffff] {
                check(between(bits, part), bf(bits), bf(bits + 1), part, 0);
            }
        }
        let half = |bits| f16::from_bits(bits);
        for bits in [0x0001u16, 0x0002, 0x03ff, 0x0400, 0x3c00, 0x7000] {
            let (low, high) = (Convert::to_f32(half(bits)), Convert::to_f32(half(bits + 1)));
            for part in [0.125, 0.5, 0.75] {
                let up = (part * 65536.0) as u32;
                check(low + (high - low) * part, half(bits), half(bits + 1), up, 8);
            }
        }
        for bits in 0..=u16::MAX {
            for random in [0, 1, 0xffff] {
                let (x, y) = (half(bits), bf(bits));
                let stays = |a: f32, b: f32| assert!(same(a, b), "{a} {b}");
                stays(
                    Convert::to_f32(f16::from_f32_at_random(Convert::to_f32(x), random)),
                    Convert::to_f32(x),
                );
                stays(
                    Convert::to_f32(bf16::from_f32_at_random(Convert::to_f32(y), random)),
                    Convert::to_f32(y),
                );
            }
        }
    }

    /// Every exponent, every pattern at the place where rounding is decided, a few in between.
    #[test]
    fn numbers_are_rounded_to_16_bits_as_half_does() {
        let mantissas = (0..1 << 11).map(|low| low << 12);
        let mantissas = mantissas.flat_map(|high| [0, 1, 0xfff].map(|low| high | low));
        for mantissa in mantissas {
            for high in 0..1 << 9 {
                let x = f32::from_bits(high << 23 | mantissa);
                let (a, b) = (<f16 as Convert>::from_f32(x), f16::from_f32(x));
                assert!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "{x:e}");
                let (a, b) = (<bf16 as Convert>::from_f32(x), bf16::from_f32(x));
                assert!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "{x:e}");
            }
        }
    }
}
