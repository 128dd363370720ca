//! How the results of an update are stored, where that is not each dtype's nearest number: rounding
//! at random, what rounding left over, and moments in blocks that share a scale.

use std::ops::Range;

use crate::codec::{self, BLOCK, Random, Written};
use crate::element::Compute;
use crate::isa::Isa;
use crate::kahan;
use crate::random::Use;
use crate::side::{Blocks, Side};
use crate::{Bounds, DType, Operand, Stream, View};

/// How the results of one update are stored. A task without any of it stores the nearest number of
/// each operand's dtype, as torch does, and pays nothing.
///
/// Types of more than 16 bits are rounded to the nearest whatever is said here.
#[derive(Clone, Debug)]
pub struct Precision {
    /// The value's.
    pub value: Rounding,
    /// Whether 16-bit moments are rounded at random; those of 8 bits always are.
    pub random_moments: bool,
    /// What is random comes from here.
    pub stream: Stream,
    /// Of moments that are 8-bit floats, E4M3 the first, E5M3 the others; these lie one after
    /// another in the order of the walk, whatever the layout says, 128 under each scale.
    pub scales: Option<Scales>,
}

/// How a value is rounded to a type of 16 bits.
#[derive(Clone, Debug, Default)]
pub enum Rounding {
    /// To the nearest.
    #[default]
    Nearest,
    /// To one of the two neighbours, so that it is right on average; a value that lies on one stays.
    /// Updates of less than half the distance of two numbers are not lost (Gupta et al. 2015,
    /// arXiv:1502.02551).
    Stochastic,
    /// To the nearest, and what that leaves over is kept here, in the value's dtype, for the next
    /// update (Kahan 1965; Zamirai et al. 2020, arXiv:2010.06192, Algorithm 2). Walked along with the
    /// task's own layout.
    Kahan(View),
}

/// The scales of the blocks of three moments, each a byte (E8M0).
#[derive(Clone, Copy, Debug)]
pub struct Scales {
    /// Of the first moment.
    pub exp_avg: Operand,
    /// Of the second moment.
    pub exp_avg_sq: Operand,
    /// Of its maximum; with AMSGrad.
    pub max_exp_avg_sq: Option<Operand>,
}

impl Precision {
    /// Bounds that the value's dtype has, so that no rounding leads over them.
    pub(crate) fn bounds(&self, bounds: Bounds, dtype: DType) -> Bounds {
        let stored = |bound: Option<f64>| {
            let mut number = [bound?];
            codec::round_to(dtype, &mut number, Isa::portable());
            Some(number[0])
        };
        match self.value {
            Rounding::Nearest => bounds,
            Rounding::Stochastic | Rounding::Kahan(_) => {
                Bounds { min: stored(bounds.min), max: stored(bounds.max) }
            }
        }
    }

    /// The dtype to which the bounds of single elements are rounded first, as in `bounds`.
    pub(crate) fn dtype_of_bounds(&self, dtype: DType) -> Option<DType> {
        (!matches!(self.value, Rounding::Nearest)).then_some(dtype)
    }

    /// What rounding left over, for a type of 16 bits.
    fn compensation(&self) -> Option<&View> {
        match &self.value {
            Rounding::Kahan(view) if view.operand.dtype.size_of() <= 2 => Some(view),
            _ => None,
        }
    }

    /// Adds to a block of values what their rounding left over.
    ///
    /// # Safety
    /// The compensation is readable at each index of `part`, and nothing writes it meanwhile.
    pub(crate) unsafe fn complete<C: Compute>(
        &self,
        part: &Range<usize>,
        (value, dtype): (&mut [C], DType),
        scratch: &mut [C; BLOCK],
        isa: Isa,
    ) {
        if let Some(view) = self.compensation() {
            let side = Side::new::<C>(view.operand, view.layout.steps());
            // SAFETY: the caller's contract.
            let left_over = unsafe { side.read(part.clone(), scratch, isa) };
            kahan::complete(dtype, value, left_over, isa);
        }
    }

    /// Stores a block.
    ///
    /// # Safety
    /// As for `Operands::close`; the compensation is ours alone to read and write.
    pub(crate) unsafe fn store<C: Compute>(
        &self,
        (value, moments): (&Side<'_>, [Option<&Side<'_>>; 3]),
        part: &Range<usize>,
        blocks: &mut Blocks<C>,
        active: Option<&[bool]>,
        isa: Isa,
    ) {
        let len = part.len();
        let Blocks { value: a, grad: spare, exp_avg: b, exp_avg_sq: c, max_exp_avg_sq: d, words } =
            blocks;
        words.resize(BLOCK, 0);
        let words = &mut words[..len];
        let is_random = self.random_moments || self.scales.is_some();
        if is_random {
            self.stream.fill(Use::Moments, part.clone(), words, isa);
        }
        // The maximum takes the bits of what it is the maximum of: where they are equal they stay so.
        for ((side, source), shift) in moments.into_iter().zip([b, c, d]).zip([16, 0, 0]) {
            let Some(side) = side else { continue };
            let random = is_random.then_some(Random { words, shift });
            // SAFETY: the caller's contract.
            unsafe {
                side.close(part.clone(), Written { source: &source[..len], active, random }, isa)
            };
        }
        let source = &mut a[..len];
        let mut random = None;
        if matches!(self.value, Rounding::Stochastic) {
            self.stream.fill(Use::Value, part.clone(), words, isa);
            random = Some(Random { words, shift: 0 });
        }
        if let Some(view) = self.compensation() {
            // SAFETY: the caller's contract: the memory still holds the former value.
            unsafe { value.copy(part.clone(), spare, isa) };
            let left_over = &mut spare[..len];
            kahan::split(value.dtype(), source, left_over, isa);
            let side = Side::new::<C>(view.operand, view.layout.steps());
            let written = Written { source: left_over, active, random: None };
            // SAFETY: the caller's contract.
            unsafe { side.close(part.clone(), written, isa) };
        }
        // SAFETY: the caller's contract.
        unsafe { value.close(part.clone(), Written { source, active, random }, isa) };
    }
}
