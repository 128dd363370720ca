//! Whether tensors share memory, exactly: `w[:, ::2]` and `w[:, 1::2]` do not.
//!
//! Two tensors share a byte where some index of the one and some index of the other lead to the
//! same address. That is one linear equation in bounded whole numbers,
//! `sum(stride[i] * x[i]) = target` with `0 <= x[i] <= last[i]`, solved largest stride first.
//! For tensors as they occur each level leaves one or two numbers to try.

/// The memory of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The address of the first element.
    pub start: usize,
    /// Bytes per element.
    pub itemsize: usize,
    /// The shape.
    pub shape: Vec<usize>,
    /// Elements to the next index, for each dimension; may be negative or 0.
    pub strides: Vec<isize>,
}

/// The pairs, as indices into `extents` with the lower first and in ascending order, that share at
/// least one byte. A tensor without elements shares nothing.
///
/// ```
/// use paramstate::{Extent, overlapping};
///
/// let column = |start| Extent { start, itemsize: 4, shape: vec![3, 2], strides: vec![4, 2] };
/// assert_eq!(overlapping(&[column(0), column(4)]), []);
/// assert_eq!(overlapping(&[column(0), column(8)]), [(0, 1)]);
/// ```
#[must_use]
pub fn overlapping(extents: &[Extent]) -> Vec<(usize, usize)> {
    let mut ranges: Vec<(i128, i128, usize)> = extents
        .iter()
        .enumerate()
        .filter(|(_, extent)| !extent.shape.contains(&0))
        .map(|(i, extent)| {
            let (low, high) = extent.byte_range();
            (low, high, i)
        })
        .collect();
    ranges.sort_unstable();
    let mut pairs = Vec::new();
    for (k, &(_, high, i)) in ranges.iter().enumerate() {
        let near = ranges[k + 1..].iter().take_while(|(low, _, _)| *low < high);
        for &(_, _, j) in near {
            if share_a_byte(&extents[i], &extents[j]) {
                pairs.push((i.min(j), i.max(j)));
            }
        }
    }
    pairs.sort_unstable();
    pairs
}

/// Whether two different indices lead to one element, as after torch's `expand`.
///
/// ```
/// use paramstate::{Extent, overlaps_itself};
///
/// let extent = |strides| Extent { start: 0, itemsize: 4, shape: vec![3, 2], strides };
/// assert!(!overlaps_itself(&extent(vec![2, 1])));
/// assert!(overlaps_itself(&extent(vec![0, 1])));
/// assert!(overlaps_itself(&extent(vec![1, 1])));
/// ```
#[must_use]
pub fn overlaps_itself(extent: &Extent) -> bool {
    if extent.shape.contains(&0) {
        return false;
    }
    let terms = extent.terms(1);
    if terms.iter().any(|term| term.stride == 0) {
        return true;
    }
    if is_nested(&terms) {
        return false;
    }
    // Two indices meet where their differences d solve sum(stride * d) = 0. The first that is not
    // zero may be taken as positive: d = 1 + e; those after it as y - last, with 0 <= y <= 2 * last.
    (0..terms.len()).any(|k| {
        let (first, after) = (terms[k], &terms[k + 1..]);
        let middle: i128 = after.iter().map(|t| t.stride * t.last).sum();
        let mut equation = vec![Term { stride: first.stride, last: first.last - 1 }];
        equation.extend(after.iter().map(|t| Term { stride: t.stride, last: 2 * t.last }));
        has_solution(equation, middle - first.stride)
    })
}

/// `stride * x` with `0 <= x <= last`.
#[derive(Clone, Copy, Debug)]
struct Term {
    stride: i128,
    last: i128,
}

impl Extent {
    /// The dimensions of more than one index, in units of `unit` bytes per element, all strides
    /// made positive (which changes where the walk starts, not where it leads).
    fn terms(&self, unit: usize) -> Vec<Term> {
        self.shape
            .iter()
            .zip(&self.strides)
            .filter(|(size, _)| **size > 1)
            .map(|(&size, &stride)| Term {
                stride: i128::from(stride.unsigned_abs() as u64) * unit as i128,
                last: size as i128 - 1,
            })
            .collect()
    }

    /// The first byte and the one after the last.
    fn byte_range(&self) -> (i128, i128) {
        let (mut low, mut high) = (self.start as i128, self.start as i128 + self.itemsize as i128);
        for (&size, &stride) in self.shape.iter().zip(&self.strides) {
            let reach = (size as i128 - 1) * stride as i128 * self.itemsize as i128;
            if reach < 0 { low += reach } else { high += reach }
        }
        (low, high)
    }
}

/// Whether each dimension steps over all that the finer ones reach: then no two indices meet.
fn is_nested(terms: &[Term]) -> bool {
    let mut terms = terms.to_vec();
    terms.sort_unstable_by_key(|term| term.stride);
    let mut reach = 0;
    terms.iter().all(|term| {
        let steps_over = term.stride > reach;
        reach += term.stride * term.last;
        steps_over
    })
}

/// Neither has a size of 0.
fn share_a_byte(a: &Extent, b: &Extent) -> bool {
    // low_a + sum_a + byte_a = low_b + sum_b + byte_b. What stands on the right is counted from its
    // far end, so that every term is positive on the left.
    let (low_a, _) = a.byte_range();
    let (_, high_b) = b.byte_range();
    let mut terms = a.terms(a.itemsize);
    terms.extend(b.terms(b.itemsize));
    for itemsize in [a.itemsize, b.itemsize] {
        terms.push(Term { stride: 1, last: itemsize as i128 - 1 });
    }
    has_solution(terms, high_b - 1 - low_a)
}

/// Whether the terms can add up to `target`.
fn has_solution(mut terms: Vec<Term>, target: i128) -> bool {
    terms.retain(|term| term.stride > 0 && term.last > 0);
    terms.sort_unstable_by_key(|term| std::cmp::Reverse(term.stride));
    // Two terms of one stride are one term.
    terms.dedup_by(|next, kept| {
        let same = next.stride == kept.stride;
        if same {
            kept.last += next.last;
        }
        same
    });
    search(&terms, target)
}

/// Depth first, largest stride first. Only those numbers are tried that leave a rest which the
/// finer terms can reach, and which their common divisor divides.
fn search(terms: &[Term], target: i128) -> bool {
    let Some((term, finer)) = terms.split_first() else { return target == 0 };
    let reach: i128 = finer.iter().map(|t| t.stride * t.last).sum();
    let least = ((target - reach).max(0) + term.stride - 1) / term.stride;
    let most = term.last.min(target.div_euclid(term.stride));
    if is_gapless(finer) {
        return least <= most;
    }
    let divisor = finer.iter().fold(0, |divisor, t| gcd(t.stride, divisor));
    (least..=most)
        .map(|x| target - x * term.stride)
        .filter(|rest| rest % divisor == 0)
        .any(|rest| search(finer, rest))
}

/// Whether the terms, largest stride first, reach every number from 0 to their sum.
fn is_gapless(terms: &[Term]) -> bool {
    let mut reach = 0;
    terms.iter().rev().all(|term| {
        let touches = term.stride <= reach + 1;
        reach += term.stride * term.last;
        touches
    })
}

fn gcd(a: i128, b: i128) -> i128 {
    if b == 0 { a } else { gcd(b, a % b) }
}
