//! What the elements of mixed rows take from their rows, a strip at a time: so little that it is
//! prepared while the loop still waits for the memory of the strip before.

use crate::cohorts::{Codes, SKIPPED};
use crate::element::Compute;
use crate::row_walk::{CHUNK, RowWalk};

/// Elements of one strip, at most.
pub(crate) const STRIP: usize = 128;

const ROOM: usize = STRIP + CHUNK;

/// The bias corrections of each element (`change` and `eps`), and whether it takes part; as long as
/// the strip.
#[derive(Clone, Copy, Default)]
pub(crate) struct Corrections<'a, C> {
    pub change: &'a [C],
    pub eps: &'a [C],
    /// 0 for those that do not; empty if all do.
    pub active: &'a [u8],
}

/// Where they are written.
pub(crate) struct Strip<C> {
    change: [C; ROOM],
    eps: [C; ROOM],
    active: [u8; ROOM],
}

impl<C: Compute> Default for Strip<C> {
    #[inline(always)]
    fn default() -> Self {
        let zeros = [C::default(); ROOM];
        Self { change: zeros, eps: zeros, active: [0; ROOM] }
    }
}

/// A walk over mixed rows, with their codes and what these stand for.
#[derive(Clone, Copy)]
pub(crate) struct RowReader<'a, C> {
    pub walk: RowWalk,
    pub codes: &'a Codes,
    /// `change` and `eps` of each code; sixteen numbers or more, and a power of two of them.
    pub tables: [&'a [C]; 2],
    /// Whether some rows take no part.
    pub skips: bool,
}

impl<'a, C: Compute> RowReader<'a, C> {
    /// The same, if it is in fp32.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(crate) fn singles(self) -> Option<RowReader<'a, f32>> {
        let Self { walk, codes, tables: [change, eps], skips } = self;
        let tables = [C::singles(change)?, C::singles(eps)?];
        Some(RowReader { walk, codes, tables, skips })
    }

    /// The next `len` elements, not more than a strip.
    #[inline(always)]
    pub(crate) fn read<'b>(&mut self, len: usize, strip: &'b mut Strip<C>) -> Corrections<'b, C> {
        let first = match self.codes {
            Codes::Few(codes) => self.spread(codes, len, strip),
            Codes::Many(codes) => self.spread(codes, len, strip),
        };
        let all = first..first + len;
        let active = if self.skips { &strip.active[all.clone()] } else { &[] };
        Corrections { change: &strip.change[all.clone()], eps: &strip.eps[all], active }
    }

    /// Returns where the first element's are.
    #[inline(always)]
    fn spread<T: Copy + Into<u32>>(
        &mut self,
        codes: &[T],
        len: usize,
        strip: &mut Strip<C>,
    ) -> usize {
        let Strip { change, eps, active } = strip;
        let [changes, all_eps] = self.tables;
        if self.skips {
            { self.walk }.write(codes, len, active, |code| u8::from(code.into() != SKIPPED));
        }
        { self.walk }.write(codes, len, change, |code| changes[code.into() as usize]);
        self.walk.write(codes, len, eps, |code| all_eps[code.into() as usize])
    }
}
