//! The walk over rows a chunk at a time, for loops that keep all in registers.

use crate::row_walk::{CHUNK, RowWalk};

/// The walk over rows of fewer elements than a chunk has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ShortWalk {
    walk: RowWalk,
    /// Rows to an element, rounded up, in parts of 2^16: exact for the elements of two chunks.
    per_element: u32,
}

impl ShortWalk {
    /// # Panics
    /// If rows are longer.
    pub(crate) fn new(walk: RowWalk) -> Self {
        assert!(walk.inner < CHUNK);
        Self { walk, per_element: (1usize << 16).div_ceil(walk.inner) as u32 }
    }

    /// The row of the next element, and of that and the fifteen after it how many rows further on
    /// each one's lies.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> (usize, &'static [u8; CHUNK]) {
        let walk = &mut self.walk;
        let (row, places) = (walk.row, &PLACES[walk.inner][walk.within]);
        let end = walk.within + CHUNK;
        let rows = ((end as u32 * self.per_element) >> 16) as usize;
        (walk.row, walk.within) = (row + rows, end - rows * walk.inner);
        if walk.row >= walk.rows {
            wrap_around(walk);
        }
        (row, places)
    }
}

/// The walk over rows of as many elements as a chunk has, or more: a chunk belongs to two at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LongWalk(RowWalk);

impl LongWalk {
    /// # Panics
    /// If rows are shorter.
    pub(crate) fn new(walk: RowWalk) -> Self {
        assert!(walk.inner >= CHUNK);
        Self(walk)
    }

    /// The row of the next element, and how many of it are left, that one too; then comes the next
    /// row.
    #[inline(always)]
    pub(crate) fn next(&mut self) -> (usize, usize) {
        let walk = &mut self.0;
        let (row, left) = (walk.row, walk.inner - walk.within);
        if left > CHUNK {
            walk.within += CHUNK;
            return (row, left);
        }
        (walk.row, walk.within) = (row + 1, CHUNK - left);
        if walk.row >= walk.rows {
            wrap_around(walk);
        }
        (row, left)
    }
}

#[cold]
fn wrap_around(walk: &mut RowWalk) {
    walk.row %= walk.rows;
}

/// By the length of the rows, and where in its row the first element of a chunk lies: how many rows
/// after its row those of the chunk's elements lie.
static PLACES: [[[u8; CHUNK]; CHUNK]; CHUNK] = {
    let mut places = [[[0; CHUNK]; CHUNK]; CHUNK];
    let mut at = CHUNK * CHUNK;
    while at < CHUNK * CHUNK * CHUNK {
        let (inner, within, lane) = (at / CHUNK / CHUNK, at / CHUNK % CHUNK, at % CHUNK);
        places[inner][within][lane] = ((within + lane) / inner) as u8;
        at += 1;
    }
    places
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_lie_in_the_rows_that_they_say() {
        for (inner, rows) in (1..70).flat_map(|inner| (1..20).map(move |rows| (inner, rows))) {
            for start in (0..inner * rows + inner).step_by(1 + inner / 9) {
                let walk = RowWalk::new(inner, rows, start);
                let mut chunks: Box<dyn FnMut() -> [usize; CHUNK]> = if inner < CHUNK {
                    let mut walk = ShortWalk::new(walk);
                    Box::new(move || {
                        let (row, places) = walk.next();
                        places.map(|place| (row + usize::from(place)) % rows)
                    })
                } else {
                    let mut walk = LongWalk::new(walk);
                    Box::new(move || {
                        let (row, left) = walk.next();
                        std::array::from_fn(|lane| (row + usize::from(lane >= left)) % rows)
                    })
                };
                for at in (start..start + 80).step_by(CHUNK) {
                    let expected = std::array::from_fn(|lane| (at + lane) / inner % rows);
                    assert_eq!(chunks(), expected, "rows {rows} of {inner}, from {at}");
                }
            }
        }
    }
}
