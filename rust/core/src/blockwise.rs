//! Moments in one byte for an element and one for a block of 128: the format, written and read.
//!
//! The scheme is that of the OCP Microscaling Formats (MX) v1.0, with blocks of [`BLOCK_LEN`]
//! elements: each is an 8-bit float, and their block shares a power of two, its scale (E8M0).
//!
//! * `exp_avg` is E4M3 (a sign, four bits of exponent, three of mantissa): `m = f * 2^s` with
//!   `|f| <= 448`. From the block's greatest element down to 2^-13 of it the relative spacing is at
//!   most 1/8; below, the spacing is at most 2^-16 of it.
//! * `exp_avg_sq` is E5M3 (no sign, five bits of exponent, three of mantissa): the same spacing down
//!   to 2^-29 of the block's greatest element, below at most 2^-32. It never falls to zero where it is
//!   positive: what is less than the least number is that, so that a small first moment is never
//!   divided by nothing.
//!
//! A result lies between two numbers of the format and becomes either with the probability that
//! makes it right on average; it is off by less than their distance. What is not finite reads as NaN.
//! The scale is that of the block's greatest finite element, or that of 2^-109 and 2^-93 if all are
//! less. Being a power of two it changes no mantissa: what was read is written again as it was, also
//! among other neighbours, unless these are more than 2^13 (2^29) times greater.

use crate::codec::Random;
use crate::element::Compute;
use crate::fused::Keys;
use crate::isa::Kernel;
use crate::prefetch::prefetch_ahead;
use crate::random::word;
use crate::update::Scalars;
use crate::{DType, Element};

/// Elements that share a scale.
pub const BLOCK_LEN: usize = 128;

/// One of the two 8-bit floats.
#[derive(Clone, Copy)]
struct Format {
    /// What is added to the exponent.
    bias: u32,
    /// The code that means NaN, and the greatest magnitude there is.
    nan: u32,
    signed: bool,
    /// The least scale with which every number of the format is a normal `f32`.
    least_scale: u32,
}

const MANTISSA: u32 = 3;
/// Bits of the mantissa of `f32` that the format does not have.
const DROPPED: u32 = 23 - MANTISSA;
const F32_BIAS: u32 = 127;
const F32_INFINITE: u32 = 255 << 23;
/// All bits of a `f32` but the sign.
const MAGNITUDE: u32 = 0x7fff_ffff;

impl Format {
    const fn of(dtype: DType) -> Self {
        match dtype {
            DType::E4M3 => Self { bias: 7, nan: 0x7f, signed: true, least_scale: 10 },
            DType::E5M3 => Self { bias: 15, nan: 0xff, signed: false, least_scale: 18 },
            _ => panic!("not an 8-bit float"),
        }
    }

    /// The exponent of the greatest binade.
    const fn top(self) -> u32 {
        (self.nan >> MANTISSA) - self.bias
    }

    /// The scale (E8M0) that brings a block's greatest magnitude into the greatest binade. Rounding
    /// up does not lead out of it: above 1.75, the next code would be the NaN's.
    #[inline(always)]
    fn scale_of(self, greatest: u32) -> u8 {
        let exponent = (greatest + (1 << (DROPPED + 1)) - 1) >> 23;
        exponent.saturating_sub(self.top()).max(self.least_scale) as u8
    }

    /// The least number with a leading one. Those below are as far apart as those in the binade above it: twice as far
    /// as if the exponent went one lower and they had leading ones, too. Let `l` be the number that a code would stand
    /// for then, and `x` what it stands for: `x = 2 l - least` below, `x = l` from there on, so `x` is the lesser of
    /// the two, and `l` the greater of `x` and `(x + least) / 2`. No case has to be told from the other.
    const fn least(self) -> f32 {
        power_of_two(F32_BIAS + 1 - self.bias)
    }

    /// The bits of a magnitude's code where `f32` has its own.
    const fn magnitude(self) -> u32 {
        if self.signed { 0x7f << DROPPED } else { 0xff << DROPPED }
    }

    /// The bit of the sign, where there is one.
    const fn sign(self) -> u32 {
        if self.signed { 1 << 31 } else { 0 }
    }

    /// The exponent of the least code, biased as that of `f32`, if it had a leading one.
    const fn first(self) -> u32 {
        F32_BIAS - self.bias
    }

    /// A magnitude's code, for a number that was divided by its scale.
    #[inline(always)]
    fn encode(self, magnitude: f32, random: u32) -> u32 {
        let led = greater(magnitude, magnitude.mul_add(0.5, self.least() / 2.0));
        // 16 random bits at the upper end of what is dropped.
        let kept = led.to_bits().wrapping_add(random << (DROPPED - 16)) >> DROPPED;
        kept.wrapping_sub(self.first() << MANTISSA)
    }

    /// The number that a magnitude's code stands for, with its scale.
    #[inline(always)]
    fn decode(self, code: u8, scale: f32) -> f32 {
        // Of a signed code the sign is copied upwards, over all that a magnitude does not have.
        let wide = if self.signed { i32::from(code as i8) as u32 } else { code.into() };
        let (magnitude, sign) = (wide << DROPPED & self.magnitude(), wide & self.sign());
        let led = f32::from_bits(magnitude + (self.first() << 23)) * scale;
        let number = lesser(led, led.mul_add(2.0, -self.least() * scale));
        f32::from_bits(number.to_bits() | sign)
    }
}

/// Of two numbers neither of which is NaN.
#[inline(always)]
fn greater(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// As [`greater`].
#[inline(always)]
fn lesser(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

/// Two to the power of `exponent - 127`.
#[inline(always)]
const fn power_of_two(exponent: u32) -> f32 {
    f32::from_bits(exponent << 23)
}

/// One block's update: its moments in codes, its values and gradients of one type.
pub(crate) struct StepBlocks<'a, V> {
    pub value: &'a mut [V],
    pub grad: &'a [V],
    pub exp_avg: (&'a mut [u8], &'a mut [u8]),
    pub exp_avg_sq: (&'a mut [u8], &'a mut [u8]),
    pub scalars: Scalars<f32>,
    pub keys: Keys,
    pub random_value: bool,
}

impl<V: Element> Kernel for StepBlocks<'_, V> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        match (self.scalars.has_l2_decay(), self.random_value) {
            // A wider value than of 16 bits is rounded to the nearest either way.
            (false, true) if size_of::<V>() == 2 => self.step::<false, true>(),
            (true, true) if size_of::<V>() == 2 => self.step::<true, true>(),
            (false, _) => self.step::<false, false>(),
            (true, _) => self.step::<true, false>(),
        }
    }
}

const FIRST: Format = Format::of(DType::E4M3);
const SECOND: Format = Format::of(DType::E5M3);

impl<V: Element> StepBlocks<'_, V> {
    /// Whole blocks, and what is left of one: of the former the compiler knows the length.
    #[inline(always)]
    fn step<const L2: bool, const RANDOM_VALUE: bool>(self) {
        let Self { scalars, mut keys, .. } = self;
        let mut room =
            Room { first: [0.0; BLOCK_LEN], second: [0.0; BLOCK_LEN], words: [0; BLOCK_LEN] };
        let (values, last_value) = self.value.as_chunks_mut::<BLOCK_LEN>();
        let (grads, last_grad) = self.grad.as_chunks::<BLOCK_LEN>();
        let (m_codes, last_m) = self.exp_avg.0.as_chunks_mut::<BLOCK_LEN>();
        let (v_codes, last_v) = self.exp_avg_sq.0.as_chunks_mut::<BLOCK_LEN>();
        let (m_scales, v_scales) = (self.exp_avg.1, self.exp_avg_sq.1);
        let scales = m_scales.iter_mut().zip(v_scales.iter_mut());
        let blocks = values.iter_mut().zip(grads).zip(m_codes).zip(v_codes).zip(scales);
        for ((((value, grad), m_codes), v_codes), (m_scale, v_scale)) in blocks {
            // A block is too much work for the processor to look beyond it by itself.
            prefetch_ahead(value);
            prefetch_ahead(grad);
            prefetch_ahead(m_codes);
            prefetch_ahead(v_codes);
            room.step::<V, L2, RANDOM_VALUE>(
                value,
                grad,
                (m_codes, m_scale),
                (v_codes, v_scale),
                scalars,
                keys,
            );
            keys.first = keys.first.wrapping_add(BLOCK_LEN as u32);
        }
        if let (false, Some(m_scale), Some(v_scale)) =
            (last_value.is_empty(), m_scales.last_mut(), v_scales.last_mut())
        {
            let (m, v) = ((last_m, m_scale), (last_v, v_scale));
            room.step::<V, L2, RANDOM_VALUE>(last_value, last_grad, m, v, scalars, keys);
        }
    }
}

/// The moments of one block, and its random words.
struct Room {
    first: [f32; BLOCK_LEN],
    second: [f32; BLOCK_LEN],
    words: [u32; BLOCK_LEN],
}

impl Room {
    #[inline(always)]
    fn step<V: Element, const L2: bool, const RANDOM_VALUE: bool>(
        &mut self,
        value: &mut [V],
        grad: &[V],
        (m_codes, m_scale): (&mut [u8], &mut u8),
        (v_codes, v_scale): (&mut [u8], &mut u8),
        scalars: Scalars<f32>,
        keys: Keys,
    ) {
        let len = value.len();
        let (grad, m, v) = (&grad[..len], &mut self.first[..len], &mut self.second[..len]);
        FIRST.decode_block(m_codes, *m_scale, m);
        SECOND.decode_block(v_codes, *v_scale, v);
        let (mut m_bits, mut v_bits) = (0, 0);
        for i in 0..len {
            let p = f32::decode(value[i]);
            let (new_m, new_v) = scalars.moments::<L2>(p, f32::decode(grad[i]), m[i], v[i]);
            (m[i], v[i]) = (new_m, new_v);
            m_bits = m_bits.max(new_m.to_bits() & MAGNITUDE);
            v_bits = v_bits.max(new_v.to_bits());
            let p = scalars.value(p, new_m, new_v);
            value[i] = if RANDOM_VALUE {
                p.encode_at_random(word(keys.value, keys.first.wrapping_add(i as u32)) & 0xffff)
            } else {
                p.encode()
            };
        }
        let words = &mut self.words[..len];
        for (i, target) in words.iter_mut().enumerate() {
            *target = word(keys.moments, keys.first.wrapping_add(i as u32));
        }
        *m_scale = FIRST.encode_block(m, m_bits, |i| words[i] >> 16, m_codes);
        *v_scale = SECOND.encode_block(v, v_bits, |i| words[i] & 0xffff, v_codes);
    }
}

impl Format {
    #[inline(always)]
    fn decode_block(self, codes: &[u8], scale: u8, target: &mut [f32]) {
        let codes = &codes[..target.len()];
        let scale = power_of_two(scale.into());
        // In bytes, of which a vector holds four times as many.
        let (bits, nan) = (if self.signed { 0x7f } else { 0xff }, self.nan as u8);
        let nans = codes.iter().fold(0, |nans, &code| nans | u8::from(code & bits == nan));
        for (&code, x) in codes.iter().zip(target.iter_mut()) {
            *x = self.decode(code, scale);
        }
        if nans != 0 {
            for (&code, x) in codes.iter().zip(target) {
                *x = if code & bits == nan { f32::NAN } else { *x };
            }
        }
    }

    /// Returns the scale. `greatest` is that of the magnitudes, as bits; without a sign in the format that of all bits.
    #[inline(always)]
    fn encode_block(
        self,
        source: &[f32],
        greatest: u32,
        random: impl Fn(usize) -> u32,
        codes: &mut [u8],
    ) -> u8 {
        let codes = &mut codes[..source.len()];
        let all_finite = greatest < F32_INFINITE;
        let finite = |bits: u32| if bits < F32_INFINITE { bits } else { 0 };
        let greatest = if all_finite {
            greatest
        } else {
            source.iter().fold(0, |greatest, x| greatest.max(finite(x.to_bits() & MAGNITUDE)))
        };
        let scale = self.scale_of(greatest);
        let inverse = power_of_two(2 * F32_BIAS - u32::from(scale));
        let coded = |i: usize, x: f32, magnitude: u32| {
            let magnitude = f32::from_bits(magnitude);
            let code = self.encode(magnitude * inverse, random(i));
            let code = if self.signed {
                code | (x.to_bits() >> 24 & 0x80)
            } else {
                code.max(u32::from(magnitude > 0.0))
            };
            code as u8
        };
        let all = source.iter().zip(codes).enumerate();
        if all_finite {
            for (i, (&x, code)) in all {
                let bits = x.to_bits();
                // Without a sign in the format there is none in the numbers: it would make them too great.
                *code = coded(i, x, if self.signed { bits & MAGNITUDE } else { bits });
            }
        } else {
            for (i, (&x, code)) in all {
                let bits = x.to_bits() & MAGNITUDE;
                *code = if bits < F32_INFINITE { coded(i, x, bits) } else { self.nan as u8 };
            }
        }
        scale
    }
}

/// Blocks of codes into numbers.
pub(crate) struct Decode<'a, C> {
    pub dtype: DType,
    pub codes: &'a [u8],
    pub scales: &'a [u8],
    pub target: &'a mut [C],
}

impl<C: Compute> Kernel for Decode<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        match self.dtype {
            DType::E4M3 => self.run_in(const { Format::of(DType::E4M3) }),
            _ => self.run_in(const { Format::of(DType::E5M3) }),
        }
    }
}

impl<C: Compute> Decode<'_, C> {
    #[inline(always)]
    fn run_in(self, format: Format) {
        let blocks = self.codes.chunks(BLOCK_LEN).zip(self.target.chunks_mut(BLOCK_LEN));
        let mut numbers = [0.0; BLOCK_LEN];
        for ((codes, target), &scale) in blocks.zip(self.scales) {
            format.decode_block(codes, scale, &mut numbers[..codes.len()]);
            target.iter_mut().zip(&numbers).for_each(|(x, number)| *x = C::decode(*number));
        }
    }
}

/// Numbers into blocks of codes, with a word of random bits for each.
pub(crate) struct Encode<'a, C> {
    pub dtype: DType,
    pub source: &'a [C],
    pub random: Random<'a>,
    pub codes: &'a mut [u8],
    pub scales: &'a mut [u8],
}

impl<C: Compute> Kernel for Encode<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        match self.dtype {
            DType::E4M3 => self.run_in(const { Format::of(DType::E4M3) }),
            _ => self.run_in(const { Format::of(DType::E5M3) }),
        }
    }
}

impl<C: Compute> Encode<'_, C> {
    #[inline(always)]
    fn run_in(self, format: Format) {
        let Random { words, shift } = self.random;
        let blocks = self.source.chunks(BLOCK_LEN).zip(words.chunks(BLOCK_LEN));
        let targets = self.codes.chunks_mut(BLOCK_LEN).zip(self.scales);
        let mut numbers = [0.0f32; BLOCK_LEN];
        for ((source, words), (codes, scale)) in blocks.zip(targets) {
            let numbers = &mut numbers[..source.len()];
            let mut greatest = 0;
            for (x, number) in source.iter().zip(&mut *numbers) {
                *number = x.encode();
                // What is positive stays so, also where only a `f64` is so small.
                let vanished = (*x > C::default()) & (*number == 0.0) & !format.signed;
                *number = if vanished { f32::from_bits(1) } else { *number };
                let bits = number.to_bits();
                greatest = greatest.max(if format.signed { bits & MAGNITUDE } else { bits });
            }
            let words = &words[..source.len()];
            *scale = format.encode_block(numbers, greatest, |i| words[i] >> shift & 0xffff, codes);
        }
    }
}

#[cfg(test)]
mod tests;
