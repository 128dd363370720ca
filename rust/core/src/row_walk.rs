//! A walk over rows, and what they have written out for each of their elements.
//!
//! Rows may be of any length and begin anywhere in a vector. Those of up to four elements are written
//! as so many copies each; longer ones a whole chunk at a time, beyond their end, where the next row
//! then writes over it.

/// Elements that are worked on at once: beyond those that are asked for, there has to be room for so
/// many, and beyond the last row's as many codes.
pub(crate) const CHUNK: usize = 16;

/// Where a walk over rows is, in which each row has `inner` elements next to each other, and the
/// first row follows the last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowWalk {
    pub inner: usize,
    pub rows: usize,
    pub row: usize,
    /// Where in its row the next element lies.
    pub within: usize,
}

impl RowWalk {
    /// From the walk's element number `start` on.
    pub(crate) fn new(inner: usize, rows: usize, start: usize) -> Self {
        Self { inner, rows, row: start / inner % rows, within: start % inner }
    }

    /// Writes what `of` says of each row to its elements among the next `len`, and returns where
    /// the first of them is.
    #[inline(always)]
    pub(crate) fn write<T: Copy, X: Copy>(
        &mut self,
        of_rows: &[T],
        len: usize,
        target: &mut [X],
        of: impl Fn(T) -> X,
    ) -> usize {
        match self.inner {
            1 => self.copies::<_, _, 1>(of_rows, len, target, of),
            2 => self.copies::<_, _, 2>(of_rows, len, target, of),
            3 => self.copies::<_, _, 3>(of_rows, len, target, of),
            4 => self.copies::<_, _, 4>(of_rows, len, target, of),
            _ => {
                for (row, part) in self.parts(len) {
                    write_chunks(target, part, of(of_rows[row]));
                }
                0
            }
        }
    }

    /// The same for rows of `N` elements: whole rows are written.
    #[inline(always)]
    fn copies<T: Copy, X: Copy, const N: usize>(
        &mut self,
        of_rows: &[T],
        len: usize,
        target: &mut [X],
        of: impl Fn(T) -> X,
    ) -> usize {
        let first = self.within;
        let end = first + len;
        let mut at = 0;
        while at < end {
            let rows = (self.rows - self.row).min((end - at).div_ceil(N));
            let (targets, _) = target[at..at + rows * N].as_chunks_mut::<N>();
            let of_rows = &of_rows[self.row..self.row + rows];
            of_rows.iter().zip(targets).for_each(|(x, target)| *target = [of(*x); N]);
            at += rows * N;
            self.row = if self.row + rows == self.rows { 0 } else { self.row + rows };
        }
        self.within = end % N;
        if at > end {
            self.row = if self.row == 0 { self.rows - 1 } else { self.row - 1 };
        }
        first
    }

    /// The rows of the next `len` elements: the number of each, and where among them its own begin
    /// and how many they are.
    #[inline(always)]
    pub(crate) fn parts(&mut self, len: usize) -> RowParts<'_> {
        RowParts { walk: self, at: 0, len }
    }
}

pub(crate) struct RowParts<'a> {
    walk: &'a mut RowWalk,
    at: usize,
    len: usize,
}

impl Iterator for RowParts<'_> {
    type Item = (usize, (usize, usize));

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        let (at, walk) = (self.at, &mut *self.walk);
        if at >= self.len {
            return None;
        }
        let (row, left) = (walk.row, walk.inner - walk.within);
        let len = left.min(self.len - at);
        if len == left {
            walk.within = 0;
            walk.row = if row + 1 == walk.rows { 0 } else { row + 1 };
        } else {
            walk.within += len;
        }
        self.at += len;
        Some((row, (at, len)))
    }
}

/// Writes `x` to `len` elements and to the rest of their last chunk.
#[inline(always)]
pub(crate) fn write_chunks<X: Copy>(target: &mut [X], (at, len): (usize, usize), x: X) {
    let (chunks, _) = target[at..at + len.next_multiple_of(CHUNK)].as_chunks_mut::<CHUNK>();
    chunks.iter_mut().for_each(|chunk| *chunk = [x; CHUNK]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_gets_its_own_rows_number() {
        for (inner, rows) in
            (1..20).flat_map(|inner| [1, 2, 7, 15, 16, 40].map(|rows| (inner, rows)))
        {
            let numbers: Vec<usize> = (0..rows + CHUNK).map(|row| row % rows).collect();
            for start in 0..inner * rows + inner {
                let mut walk = RowWalk::new(inner, rows, start);
                let mut at = start;
                for len in [33, 1, 64] {
                    let mut target = [usize::MAX; 64 + CHUNK];
                    let first = walk.write(&numbers, len, &mut target, |number| number);
                    for i in 0..len {
                        assert_eq!(
                            target[first + i],
                            (at + i) / inner % rows,
                            "{inner} {rows} {at}"
                        );
                    }
                    at += len;
                }
            }
        }
    }
}
