//! What sixteen elements take from their rows, by the instructions of one processor or another.
//!
//! The codes of sixteen elements are a shuffle of sixteen codes of rows. Short tables are picked
//! from in registers (AVX-512 picks sixteen out of 32 numbers at once, AVX2 eight out of 8), longer
//! ones gathered. Of long rows sixteen elements belong to two at most.

#![expect(
    clippy::multiple_unsafe_ops_per_block,
    reason = "one fact allows all instructions of a block: that the processor has them"
)]

use std::arch::x86_64::*;
use std::mem::transmute;

use crate::cohorts::SKIPPED;
use crate::prefetch::prefetch;
use crate::row_chunks::{LongWalk, ShortWalk};
use crate::row_walk::{CHUNK, RowWalk};

type Numbers = [f32; CHUNK];

/// How many codes ahead they are asked for: they are read too slowly for the hardware to foresee.
const CODES_AHEAD: usize = 256;

/// What sixteen elements take from their rows.
pub(crate) struct Taken {
    pub change: Numbers,
    pub eps: Numbers,
    /// All bits for those that are left as they are, none for the others.
    pub keeps: [u32; CHUNK],
}

/// Reads what elements take, sixteen after sixteen.
pub(crate) trait Source {
    fn next(&mut self) -> Taken;
}

/// Instructions that sources are made of. Holding a value is the proof that the processor has them.
///
/// # Safety
/// A value exists only where the processor has SSSE3, too.
pub(crate) unsafe trait Lanes: Copy {
    /// Sixteen codes of 32 bits.
    type Codes: Copy;

    /// A table of more parts of sixteen numbers is better gathered.
    const MOST_PARTS: usize;

    fn widen(self, codes: __m128i) -> Self::Codes;

    /// Of sixteen codes those at the places.
    fn shuffle(self, codes: &[u32; CHUNK], places: &[u8; CHUNK]) -> Self::Codes;

    /// The numbers of the codes.
    fn pick<const PARTS: usize>(self, table: &[Numbers; PARTS], codes: Self::Codes) -> Numbers;

    /// The same, one load each. The table's length is a power of two, from 1 to 2^31.
    ///
    /// # Safety
    /// It is that long.
    unsafe fn gather(self, table: &[f32], codes: Self::Codes) -> Numbers;

    /// `now` for the first `left` of sixteen, then `then`.
    fn split(self, now: f32, then: f32, left: usize) -> Numbers;

    /// All bits where the code is 0, by arithmetic: of a comparison the compiler would make loads
    /// that depend on it, which come late.
    fn zeros(self, codes: Self::Codes) -> [u32; CHUNK];
}

/// A row's code as it is stored.
pub(crate) trait RowCode: Copy + Into<u32> {
    /// The codes of elements: those at the places of sixteen codes of rows.
    fn shuffle<L: Lanes>(codes: &[Self; CHUNK], places: &[u8; CHUNK], lanes: L) -> L::Codes;
}

impl RowCode for u8 {
    #[inline(always)]
    fn shuffle<L: Lanes>(codes: &[u8; CHUNK], places: &[u8; CHUNK], lanes: L) -> L::Codes {
        // SAFETY: sixteen bytes are readable; they need not be aligned.
        let codes = unsafe { _mm_loadu_si128(codes.as_ptr().cast()) };
        // SAFETY: as above.
        let places = unsafe { _mm_loadu_si128(places.as_ptr().cast()) };
        // SAFETY: the lanes include SSSE3.
        lanes.widen(unsafe { _mm_shuffle_epi8(codes, places) })
    }
}

impl RowCode for u32 {
    #[inline(always)]
    fn shuffle<L: Lanes>(codes: &[u32; CHUNK], places: &[u8; CHUNK], lanes: L) -> L::Codes {
        lanes.shuffle(codes, places)
    }
}

/// Rows of fewer than sixteen elements; their tables are picked from in `PARTS` of sixteen numbers,
/// or with 0 of them gathered.
pub(crate) struct ShortRows<'a, T, L, const PARTS: usize> {
    walk: ShortWalk,
    codes: &'a [T],
    tables: [&'a [f32]; 2],
    lanes: L,
}

impl<'a, T, L, const PARTS: usize> ShortRows<'a, T, L, PARTS> {
    /// # Panics
    /// If rows are longer, a table is shorter than its parts, or its length no power of two up to 2^31.
    #[inline(always)]
    pub(crate) fn new(walk: RowWalk, codes: &'a [T], tables: [&'a [f32]; 2], lanes: L) -> Self {
        for table in tables {
            assert!(table.len().is_power_of_two() && table.len() <= 1 << 31);
            assert!(table.len() >= 16 * PARTS);
        }
        Self { walk: ShortWalk::new(walk), codes, tables, lanes }
    }
}

impl<T: RowCode, L: Lanes, const PARTS: usize> Source for ShortRows<'_, T, L, PARTS> {
    #[inline(always)]
    fn next(&mut self) -> Taken {
        let lanes = self.lanes;
        let (row, places) = self.walk.next();
        let codes: &[T; CHUNK] =
            self.codes[row..].first_chunk().expect("a chunk of codes follows the last row's");
        prefetch(codes.as_ptr().wrapping_add(CODES_AHEAD).addr());
        let codes = T::shuffle(codes, places, lanes);
        let change = look_up::<L, PARTS>(self.tables[0], codes, lanes);
        let eps = look_up::<L, PARTS>(self.tables[1], codes, lanes);
        Taken { change, eps, keeps: lanes.zeros(codes) }
    }
}

#[inline(always)]
fn look_up<L: Lanes, const PARTS: usize>(table: &[f32], codes: L::Codes, lanes: L) -> Numbers {
    match table.as_chunks().0.first_chunk() {
        Some(parts) if PARTS > 0 => lanes.pick::<PARTS>(parts, codes),
        // SAFETY: `new` has looked at its length.
        _ => unsafe { lanes.gather(table, codes) },
    }
}

/// Rows of sixteen elements and more.
pub(crate) struct LongRows<'a, T, L> {
    pub walk: LongWalk,
    pub codes: &'a [T],
    pub tables: [&'a [f32]; 2],
    pub lanes: L,
}

impl<T: RowCode, L: Lanes> Source for LongRows<'_, T, L> {
    #[inline(always)]
    fn next(&mut self) -> Taken {
        let (row, left) = self.walk.next();
        let (now, then): (u32, u32) = (self.codes[row].into(), self.codes[row + 1].into());
        let ([change, eps], lanes) = (self.tables, self.lanes);
        let change = lanes.split(change[now as usize], change[then as usize], left);
        let eps = lanes.split(eps[now as usize], eps[then as usize], left);
        let keeps = lanes.split(all_bits(now == SKIPPED), all_bits(then == SKIPPED), left);
        // SAFETY: both are sixteen times any 32 bits.
        Taken { change, eps, keeps: unsafe { transmute::<Numbers, [u32; CHUNK]>(keeps) } }
    }
}

#[inline(always)]
fn all_bits(set: bool) -> f32 {
    f32::from_bits(if set { u32::MAX } else { 0 })
}

/// AVX-512 F, VL, BW and DQ.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The processor has them.
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

// No closures below: the compiler would not always make one part of the loop.

// SAFETY: AVX-512 includes SSSE3.
unsafe impl Lanes for Avx512 {
    type Codes = __m512i;
    const MOST_PARTS: usize = 8;

    #[inline(always)]
    fn widen(self, codes: __m128i) -> __m512i {
        // SAFETY: `self` says that the processor has the instruction.
        unsafe { _mm512_cvtepu8_epi32(codes) }
    }

    #[inline(always)]
    fn shuffle(self, codes: &[u32; CHUNK], places: &[u8; CHUNK]) -> __m512i {
        // SAFETY: as above; sixteen of each are readable, aligned or not.
        unsafe {
            let places = _mm512_cvtepu8_epi32(_mm_loadu_si128(places.as_ptr().cast()));
            _mm512_permutexvar_epi32(places, _mm512_loadu_si512(codes.as_ptr().cast()))
        }
    }

    #[inline(always)]
    fn pick<const PARTS: usize>(self, table: &[Numbers; PARTS], codes: __m512i) -> Numbers {
        // SAFETY: as above; a vector is sixteen numbers.
        unsafe {
            let first = _mm512_loadu_ps(table[0].as_ptr());
            if PARTS == 1 {
                return transmute::<__m512, Numbers>(_mm512_permutexvar_ps(codes, first));
            }
            let second = _mm512_loadu_ps(table[1].as_ptr());
            let mut found = _mm512_permutex2var_ps(first, codes, second);
            let mut place = 2;
            while place < PARTS {
                let start = _mm512_set1_epi32(16 * place as i32);
                let is_here = _mm512_cmpge_epi32_mask(codes, start);
                let low = _mm512_loadu_ps(table[place].as_ptr());
                let high = _mm512_loadu_ps(table[place + 1].as_ptr());
                let here = _mm512_permutex2var_ps(low, codes, high);
                found = _mm512_mask_blend_ps(is_here, found, here);
                place += 2;
            }
            transmute::<__m512, Numbers>(found)
        }
    }

    #[inline(always)]
    unsafe fn gather(self, table: &[f32], codes: __m512i) -> Numbers {
        // SAFETY: as above; masked so, a code is at most the length less one, which no `i32` is less
        // than.
        unsafe {
            let codes = _mm512_and_si512(codes, _mm512_set1_epi32((table.len() - 1) as i32));
            transmute::<__m512, Numbers>(_mm512_i32gather_ps::<4>(codes, table.as_ptr()))
        }
    }

    #[inline(always)]
    fn split(self, now: f32, then: f32, left: usize) -> Numbers {
        let is_then = (u64::from(u16::MAX) << left.min(CHUNK)) as u16;
        // SAFETY: as above; a vector is sixteen numbers.
        unsafe {
            let (now, then) = (_mm512_set1_ps(now), _mm512_set1_ps(then));
            transmute::<__m512, Numbers>(_mm512_mask_blend_ps(is_then, now, then))
        }
    }

    #[inline(always)]
    fn zeros(self, codes: __m512i) -> [u32; CHUNK] {
        // SAFETY: as above; a vector is sixteen numbers.
        unsafe {
            let signs = _mm512_sub_epi32(codes, _mm512_set1_epi32(1));
            transmute::<__m512i, [u32; CHUNK]>(_mm512_srai_epi32::<31>(signs))
        }
    }
}

/// AVX2.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// # Safety
    /// The processor has it.
    pub(crate) unsafe fn new() -> Self {
        Self(())
    }
}

// SAFETY: AVX2 includes SSSE3.
unsafe impl Lanes for Avx2 {
    type Codes = [__m256i; 2];
    const MOST_PARTS: usize = 2;

    #[inline(always)]
    fn widen(self, codes: __m128i) -> [__m256i; 2] {
        // SAFETY: `self` says that the processor has the instructions.
        unsafe { [_mm256_cvtepu8_epi32(codes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(codes))] }
    }

    #[inline(always)]
    fn shuffle(self, codes: &[u32; CHUNK], places: &[u8; CHUNK]) -> [__m256i; 2] {
        // The places of eight elements are less than eight away from the first one's.
        let middle = usize::from(places[8]).min(8);
        let second: &[u32; 8] = codes[middle..].first_chunk().expect("eight of sixteen");
        // SAFETY: as above; sixteen of each are readable, and eight of the second, aligned or not.
        unsafe {
            let [low, high] = self.widen(_mm_loadu_si128(places.as_ptr().cast()));
            let high = _mm256_sub_epi32(high, _mm256_set1_epi32(middle as i32));
            let first = _mm256_loadu_si256(codes.as_ptr().cast());
            let second = _mm256_loadu_si256(second.as_ptr().cast());
            [_mm256_permutevar8x32_epi32(first, low), _mm256_permutevar8x32_epi32(second, high)]
        }
    }

    #[inline(always)]
    fn pick<const PARTS: usize>(self, table: &[Numbers; PARTS], codes: [__m256i; 2]) -> Numbers {
        // SAFETY: as above; two vectors are sixteen numbers.
        unsafe {
            let mut found = [_mm256_setzero_ps(); 2];
            for (place, eight) in table.as_flattened().as_chunks::<8>().0.iter().enumerate() {
                let part = _mm256_loadu_ps(eight.as_ptr());
                let before = _mm256_set1_epi32(8 * place as i32 - 1);
                for (found, codes) in found.iter_mut().zip(codes) {
                    let is_here = _mm256_castsi256_ps(_mm256_cmpgt_epi32(codes, before));
                    let here = _mm256_permutevar8x32_ps(part, codes);
                    *found = _mm256_blendv_ps(*found, here, is_here);
                }
            }
            transmute::<[__m256; 2], Numbers>(found)
        }
    }

    #[inline(always)]
    unsafe fn gather(self, table: &[f32], [low, high]: [__m256i; 2]) -> Numbers {
        // SAFETY: as above; masked so, a code is at most the length less one, which no `i32` is less
        // than.
        unsafe {
            let mask = _mm256_set1_epi32((table.len() - 1) as i32);
            let low = _mm256_i32gather_ps::<4>(table.as_ptr(), _mm256_and_si256(low, mask));
            let high = _mm256_i32gather_ps::<4>(table.as_ptr(), _mm256_and_si256(high, mask));
            transmute::<[__m256; 2], Numbers>([low, high])
        }
    }

    #[inline(always)]
    fn split(self, now: f32, then: f32, left: usize) -> Numbers {
        // SAFETY: as above; two vectors are sixteen numbers.
        unsafe {
            let (now, then) = (_mm256_set1_ps(now), _mm256_set1_ps(then));
            let left = _mm256_set1_epi32(left.min(CHUNK) as i32);
            let low = _mm256_cmpgt_epi32(left, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            let high = _mm256_cmpgt_epi32(left, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
            let low = _mm256_blendv_ps(then, now, _mm256_castsi256_ps(low));
            let high = _mm256_blendv_ps(then, now, _mm256_castsi256_ps(high));
            transmute::<[__m256; 2], Numbers>([low, high])
        }
    }

    #[inline(always)]
    fn zeros(self, [low, high]: [__m256i; 2]) -> [u32; CHUNK] {
        // SAFETY: as above; two vectors are sixteen numbers.
        unsafe {
            let one = _mm256_set1_epi32(1);
            let low = _mm256_srai_epi32::<31>(_mm256_sub_epi32(low, one));
            let high = _mm256_srai_epi32::<31>(_mm256_sub_epi32(high, one));
            transmute::<[__m256i; 2], [u32; CHUNK]>([low, high])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row_walk::RowWalk;

    /// Reads rows of all lengths with the codes and tables of so many ages, against what each
    /// element's row says.
    fn check<T, L: Lanes, const PARTS: usize>(len: usize, lanes: L)
    where
        T: RowCode + TryFrom<usize, Error: std::fmt::Debug>,
    {
        let table = |seed: usize| (0..len).map(|code| (code * 2 + seed) as f32).collect::<Vec<_>>();
        let (change, eps) = (table(0), table(1));
        let tables = [&*change, &*eps];
        for (inner, rows) in (1..40).flat_map(|inner| [1, 5, 300].map(|rows| (inner, rows))) {
            let code = |row: usize| row % rows * 37 % len;
            let codes: Vec<T> =
                (0..rows + CHUNK).map(|row| T::try_from(code(row)).unwrap()).collect();
            for start in [0, 1, 7, inner * rows - 1] {
                let walk = RowWalk::new(inner, rows, start);
                let mut source: Box<dyn Source> = if inner < CHUNK {
                    Box::new(ShortRows::<T, L, PARTS>::new(walk, &codes, tables, lanes))
                } else {
                    Box::new(LongRows { walk: LongWalk::new(walk), codes: &codes, tables, lanes })
                };
                for at in (start..start + 6 * CHUNK).step_by(CHUNK) {
                    let codes: [usize; CHUNK] =
                        std::array::from_fn(|lane| code((at + lane) / inner));
                    let Taken { change: found, eps: found_eps, keeps } = source.next();
                    assert_eq!(found, codes.map(|code| change[code]), "{PARTS} {inner} {at}");
                    assert_eq!(found_eps, codes.map(|code| eps[code]), "{PARTS} {inner} {at}");
                    let expected = codes.map(|code| if code == 0 { u32::MAX } else { 0 });
                    assert_eq!(keeps, expected, "{PARTS} {inner} {at}");
                }
            }
        }
    }

    fn check_all<L: Lanes>(lanes: L) {
        check::<u8, L, 1>(16, lanes);
        check::<u8, L, 2>(32, lanes);
        check::<u8, L, 4>(64, lanes);
        check::<u8, L, 8>(128, lanes);
        check::<u8, L, 0>(256, lanes);
        check::<u32, L, 0>(16, lanes);
        check::<u32, L, 0>(512, lanes);
    }

    #[test]
    fn sixteen_elements_take_what_their_rows_say() {
        if is_x86_feature_detected!("avx2") {
            // SAFETY: it was found.
            check_all(unsafe { Avx2::new() });
        }
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
        {
            // SAFETY: as above.
            check_all(unsafe { Avx512::new() });
        }
    }
}
