//! Elementwise bounds, applied inside the update or by a pass of their own.

use crate::element::Compute;
use crate::{Error, Result};

/// A lower and an upper bound for every element; none by default.
///
/// A NaN lies outside no bound and stays what it is, as in torch. A bound is rounded to the
/// value's dtype, to the nearest, as `torch.clamp_` does.
///
/// ```
/// use paramstate::Bounds;
///
/// let unit = Bounds::new(Some(0.0), Some(1.0))?;
/// assert_eq!((unit.min, unit.max), (Some(0.0), Some(1.0)));
/// assert!(Bounds::new(Some(1.0), Some(0.0)).is_err());
/// # Ok::<(), paramstate::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Bounds {
    /// No element is less.
    pub min: Option<f64>,
    /// No element is greater.
    pub max: Option<f64>,
}

impl Bounds {
    /// Bounds that some number satisfies.
    ///
    /// # Errors
    /// [`Error::InvalidBounds`] for a NaN, and where `min` is greater than `max`.
    pub fn new(min: Option<f64>, max: Option<f64>) -> Result<Self> {
        let (low, high) = (min.unwrap_or(f64::NEG_INFINITY), max.unwrap_or(f64::INFINITY));
        if low <= high {
            Ok(Self { min, max })
        } else {
            Err(Error::InvalidBounds { min: low, max: high })
        }
    }

    /// Whether there is nothing to hold.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Infinite where there is no bound: the comparison then never holds, and costs nothing beside
    /// the memory that the loop waits for.
    pub(crate) fn narrow<C: Compute>(self) -> Interval<C> {
        Interval {
            min: C::narrow(self.min.unwrap_or(f64::NEG_INFINITY)),
            max: C::narrow(self.max.unwrap_or(f64::INFINITY)),
        }
    }
}

/// [`Bounds`] in the compute type.
#[derive(Clone, Copy)]
pub(crate) struct Interval<C> {
    pub min: C,
    pub max: C,
}

impl<C: Compute> Interval<C> {
    /// Both comparisons are false for a NaN.
    #[inline(always)]
    pub(crate) fn clamp(self, x: C) -> C {
        let x = if x < self.min { self.min } else { x };
        if x > self.max { self.max } else { x }
    }
}
