//! Random bits that depend on nothing but a key and an element's place: no thread, no order of work
//! and no cut of the tensor has a part in them.

use std::ops::Range;

use crate::isa::{Isa, Kernel};
use crate::layout::Steps;
use crate::{ParamId, ViewLayout};

/// The random bits of one parameter in one step: for each element a word that is keyed by the seed,
/// the parameter's ID, the step, and the element's index in the logical tensor.
///
/// The words are a counter-based hash: two rounds of the 32-bit mixer `lowbias32` (C. Wellons,
/// "Prospecting for hash functions", 2018), with half of a 64-bit key put in before each.
///
/// ```
/// use paramstate::{ParamId, Stream, ViewLayout};
///
/// // Of a tensor of four rows of three, the rows from the second on.
/// let shard = Stream::new(7, ParamId::new(1)?, 3, ViewLayout::Flat { len: 9 });
/// # let _ = shard;
/// # Ok::<(), paramstate::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Stream {
    base: u64,
    step: u64,
    first: u64,
    indices: ViewLayout,
}

/// What the words of one step are used for: each use has words of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    Value = 1,
    Moments = 2,
}

impl Stream {
    /// The logical index of the first element that is walked is `first`; `indices` are those of the
    /// others, relative to it, in the order of the task's walk: `Flat` where one follows the other.
    #[must_use]
    pub fn new(seed: u64, id: ParamId, first: u64, indices: ViewLayout) -> Self {
        Self { base: mixed(mixed(seed).wrapping_add(id.get())), step: 0, first, indices }
    }

    /// The words from now on are those of this step.
    pub fn at_step(&mut self, step: u64) {
        self.step = step;
    }

    fn key(&self, purpose: Use) -> u64 {
        mixed(mixed(self.base.wrapping_add(self.step)).wrapping_add(purpose as u64))
    }

    /// The first index of `span` and the key, for `word`, where one index follows the other and all
    /// have the same upper half.
    pub(crate) fn dense(&self, purpose: Use, span: &Range<usize>) -> Option<(u32, [u32; 2])> {
        let first = self.first.wrapping_add(span.start as u64);
        let last = first.wrapping_add(span.len() as u64);
        if !matches!(self.indices, ViewLayout::Flat { .. }) || first >> 32 != last >> 32 {
            return None;
        }
        let key = mixed(self.key(purpose) ^ (first >> 32));
        Some((first as u32, [key as u32, (key >> 32) as u32]))
    }

    /// The words of the elements `span`, in the order of the walk.
    pub(crate) fn fill(&self, purpose: Use, span: Range<usize>, words: &mut [u32], isa: Isa) {
        let key = self.key(purpose);
        let steps: Steps<'_> = self.indices.steps();
        for run in steps.runs(span) {
            let stride = run.stride as u64;
            let mut first = self.first.wrapping_add_signed(run.offset as i64);
            let mut rest = &mut words[run.target];
            while !rest.is_empty() {
                // As far as the upper half of the index stays the same.
                let left = (1 << 32) - (first & 0xffff_ffff);
                let same = if stride == 0 { u64::MAX } else { left.div_ceil(stride) };
                let (now, later) = rest.split_at_mut(rest.len().min(same as usize));
                let key = mixed(key ^ (first >> 32));
                isa.run(Fill { key, first: first as u32, stride: stride as u32, words: now });
                first = first.wrapping_add(stride.wrapping_mul(now.len() as u64));
                rest = later;
            }
        }
    }
}

/// The finaliser of `SplitMix64` (Steele, Lea & Flood 2014).
fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// The word of one index.
#[inline(always)]
pub(crate) fn word([early, late]: [u32; 2], index: u32) -> u32 {
    let x = index.wrapping_add(early);
    let x = (x ^ x >> 16).wrapping_mul(0x7feb_352d).wrapping_add(late);
    let x = (x ^ x >> 15).wrapping_mul(0x846c_a68b);
    x ^ x >> 16
}

struct Fill<'a> {
    key: u64,
    first: u32,
    stride: u32,
    words: &'a mut [u32],
}

impl Kernel for Fill<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let key = [self.key as u32, (self.key >> 32) as u32];
        for (i, target) in self.words.iter_mut().enumerate() {
            *target = word(key, self.first.wrapping_add((i as u32).wrapping_mul(self.stride)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(stream: &Stream, purpose: Use, span: Range<usize>) -> Vec<u32> {
        let mut words = vec![0; span.len()];
        stream.fill(purpose, span, &mut words, Isa::detect());
        words
    }

    fn stream(seed: u64, first: u64, indices: ViewLayout) -> Stream {
        Stream::new(seed, ParamId::new(5).unwrap(), first, indices)
    }

    const FLAT: ViewLayout = ViewLayout::Flat { len: usize::MAX };

    #[test]
    fn a_word_depends_on_the_index_alone_whatever_the_walk() {
        let whole = words(&stream(1, 0, FLAT), Use::Value, 0..60);
        assert_eq!(words(&stream(1, 0, FLAT), Use::Value, 17..40), whole[17..40]);
        assert_eq!(words(&stream(1, 20, FLAT), Use::Value, 0..40), whole[20..]);
        let transposed = ViewLayout::Strided { shape: vec![6, 10], strides: vec![1, 6] };
        let walked = words(&stream(1, 0, transposed), Use::Value, 0..60);
        for (i, word) in walked.iter().enumerate() {
            assert_eq!(*word, whole[i / 10 + 6 * (i % 10)]);
        }
    }

    #[test]
    fn indices_beyond_32_bits_have_words_of_their_own() {
        let border = (1u64 << 32) - 5;
        let across = words(&stream(1, border, FLAT), Use::Value, 0..10);
        assert_eq!(words(&stream(1, border + 5, FLAT), Use::Value, 0..5), across[5..]);
        assert_ne!(words(&stream(1, 0, FLAT), Use::Value, 0..5), across[5..]);
        let strided = ViewLayout::Strided { shape: vec![4], strides: vec![3] };
        let every_third = words(&stream(1, border, strided), Use::Value, 0..4);
        assert_eq!(every_third, [across[0], across[3], across[6], across[9]]);
    }

    #[test]
    fn seeds_ids_steps_and_uses_have_words_of_their_own() {
        let of = |seed, id, step, purpose| {
            let mut stream = Stream::new(seed, ParamId::new(id).unwrap(), 0, FLAT);
            stream.at_step(step);
            words(&stream, purpose, 0..64)
        };
        let all = [
            of(1, 1, 1, Use::Value),
            of(2, 1, 1, Use::Value),
            of(1, 2, 1, Use::Value),
            of(1, 1, 2, Use::Value),
            of(1, 1, 1, Use::Moments),
        ];
        for (i, one) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|other| other.iter().zip(one).all(|(a, b)| a != b)));
        }
    }

    /// Every bit, its neighbour in place, and the same place a step later: independent to within
    /// five standard deviations of as many coins.
    #[test]
    fn bits_are_fair_and_independent() {
        const COUNT: usize = 1 << 16;
        let mut one = stream(3, 0, FLAT);
        one.at_step(10);
        let now = words(&one, Use::Moments, 0..COUNT);
        one.at_step(11);
        let later = words(&one, Use::Moments, 0..COUNT);
        let is_fair = |bits: &dyn Fn(usize) -> u32| {
            for bit in 0..32 {
                let ones: u32 = (0..COUNT - 1).map(|i| bits(i) >> bit & 1).sum();
                let off = f64::from(ones) - (COUNT - 1) as f64 / 2.0;
                assert!(off.abs() < 5.0 * (COUNT as f64 / 4.0).sqrt(), "bit {bit}: {off}");
            }
        };
        is_fair(&|i| now[i]);
        is_fair(&|i| now[i] ^ now[i + 1]);
        is_fair(&|i| now[i] ^ later[i]);
        is_fair(&|i| now[i] ^ now[i].rotate_left(16)); // the halves serve two moments
        let mut cells = [0u32; 256];
        now.iter().for_each(|word| cells[(word >> 24) as usize] += 1);
        let expected = COUNT as f64 / 256.0;
        let chi2: f64 = cells.iter().map(|&n| (f64::from(n) - expected).powi(2) / expected).sum();
        assert!((chi2 - 255.0).abs() < 5.0 * (2.0f64 * 255.0).sqrt(), "{chi2}");
    }
}
