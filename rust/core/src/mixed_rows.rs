//! The update of rows of several ages in one pass, sixteen elements at once.
//!
//! A compiler reads the corrections of mixed rows element by element, and while a loop of its own
//! writes them out, memory waits. Here they never leave the registers.

use crate::cohorts::Codes;
use crate::prefetch::prefetch_ahead;
use crate::row_chunks::LongWalk;
use crate::row_lanes::{Lanes, LongRows, ShortRows, Source, Taken};
use crate::row_strip::RowReader;
use crate::row_walk::CHUNK;
use crate::update::{Block, Scalars};

/// The update of one block whose rows are mixed, without AMSGrad and bounds of each element.
pub(crate) struct MixedRows<'a> {
    pub block: Block<'a, f32>,
    pub scalars: &'a Scalars<f32>,
    pub rows: RowReader<'a, f32>,
}

impl MixedRows<'_> {
    #[inline(always)]
    pub(crate) fn run<L: Lanes>(self, lanes: L) {
        let RowReader { walk, codes, tables, .. } = self.rows;
        let (is_long, parts) = (walk.inner >= CHUNK, tables[0].len() / 16);
        match codes {
            Codes::Few(codes) if is_long => {
                self.run_from(LongRows { walk: LongWalk::new(walk), codes, tables, lanes });
            }
            Codes::Many(codes) if is_long => {
                self.run_from(LongRows { walk: LongWalk::new(walk), codes, tables, lanes });
            }
            Codes::Few(codes) if parts == 1 => {
                self.run_from(ShortRows::<_, L, 1>::new(walk, codes, tables, lanes));
            }
            Codes::Few(codes) if parts == 2 => {
                self.run_from(ShortRows::<_, L, 2>::new(walk, codes, tables, lanes));
            }
            Codes::Few(codes) if parts == 4 && parts <= L::MOST_PARTS => {
                self.run_from(ShortRows::<_, L, 4>::new(walk, codes, tables, lanes));
            }
            Codes::Few(codes) if parts == 8 && parts <= L::MOST_PARTS => {
                self.run_from(ShortRows::<_, L, 8>::new(walk, codes, tables, lanes));
            }
            Codes::Few(codes) => {
                self.run_from(ShortRows::<_, L, 0>::new(walk, codes, tables, lanes));
            }
            Codes::Many(codes) => {
                self.run_from(ShortRows::<_, L, 0>::new(walk, codes, tables, lanes));
            }
        }
    }

    #[inline(always)]
    fn run_from(self, source: impl Source) {
        match (self.scalars.has_l2_decay(), self.rows.skips) {
            (false, false) => self.run_as::<false, false>(source),
            (false, true) => self.run_as::<false, true>(source),
            (true, false) => self.run_as::<true, false>(source),
            (true, true) => self.run_as::<true, true>(source),
        }
    }

    #[inline(always)]
    fn run_as<const L2: bool, const SKIPS: bool>(self, mut source: impl Source) {
        let scalars = *self.scalars;
        let Block { value, grad, exp_avg, exp_avg_sq, .. } = self.block;
        let (values, value) = value.as_chunks_mut();
        let (grads, grad) = grad.as_chunks();
        let (exp_avgs, exp_avg) = exp_avg.as_chunks_mut();
        let (exp_avg_sqs, exp_avg_sq) = exp_avg_sq.as_chunks_mut();
        let moments = exp_avgs.iter_mut().zip(exp_avg_sqs);
        for ((p, g), (m, v)) in values.iter_mut().zip(grads).zip(moments) {
            prefetch_ahead(p);
            prefetch_ahead(g);
            prefetch_ahead(m);
            prefetch_ahead(v);
            [*p, *m, *v] = update::<L2, SKIPS>([p, g, m, v], source.next(), &scalars);
        }
        if value.is_empty() {
            return;
        }
        let [p, g, m, v] = [&*value, grad, exp_avg, exp_avg_sq].map(padded);
        let updated = update::<L2, SKIPS>([&p, &g, &m, &v], source.next(), &scalars);
        for (target, numbers) in [value, exp_avg, exp_avg_sq].into_iter().zip(updated) {
            target.copy_from_slice(&numbers[..target.len()]);
        }
    }
}

#[inline(always)]
fn padded(numbers: &[f32]) -> [f32; CHUNK] {
    let mut padded = [0.0; CHUNK];
    padded[..numbers.len()].copy_from_slice(numbers);
    padded
}

/// New value and moments from value, gradient and moments.
#[inline(always)]
fn update<const L2: bool, const SKIPS: bool>(
    [p, g, m, v]: [&[f32; CHUNK]; 4],
    Taken { change, eps, keeps }: Taken,
    scalars: &Scalars<f32>,
) -> [[f32; CHUNK]; 3] {
    let mut updated = [[0.0; CHUNK]; 3];
    for i in 0..CHUNK {
        let (new_m, new_v) = scalars.moments::<L2>(p[i], g[i], m[i], v[i]);
        let moved = scalars.moved(p[i], new_m, new_v, [change[i], eps[i]]);
        let keeps = if SKIPS { keeps[i] } else { 0 };
        let pairs = [(p[i], scalars.bounds().clamp(moved)), (m[i], new_m), (v[i], new_v)];
        for (place, (old, new)) in pairs.into_iter().enumerate() {
            // Not a condition: the compiler would load the gradient only where it holds, and late.
            let bits = old.to_bits() & keeps | new.to_bits() & !keeps;
            updated[place][i] = f32::from_bits(bits);
        }
    }
    updated
}
