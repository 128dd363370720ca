//! Bounds of each element of an owned parameter, and which parameters are frozen.

use std::num::NonZeroUsize;

use crate::elementwise;
use crate::values::VALUE;
use crate::{
    Bounds, Element, Entry, Error, Execution, OwnedBuffer, ParamId, Result, Store, View, ViewLayout,
};

impl Store {
    /// Declares bounds of each element, row-major and as many as the value has, that every later
    /// step keeps in the place of the same for all ([`Store::set_bounds`]) on that side; an infinite
    /// one bounds nothing. `None` takes them away. The value as it is now is left alone:
    /// [`Store::hold_bounds`] moves it.
    ///
    /// # Errors
    /// [`Error::UnknownId`], [`Error::MissingBuffer`], [`Error::LenderGone`],
    /// [`Error::ShapeMismatch`], and [`Error::InvalidBounds`] for a NaN and where a lower bound is
    /// above the upper.
    ///
    /// ```
    /// let mut store = paramstate::Store::new();
    /// let id = store.register_values(None, None, &[3], &[-2.0f32, 0.0, 2.0])?;
    /// store.set_element_bounds(id, Some(&[-1.0f32, 1.0, f32::NEG_INFINITY]), None)?;
    /// store.hold_bounds(id)?;
    /// assert_eq!(store.values::<f32>(id)?, [-1.0, 1.0, 2.0]);
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn set_element_bounds<T: Element>(
        &mut self,
        id: ParamId,
        min: Option<&[T]>,
        max: Option<&[T]>,
    ) -> Result<()> {
        let entry = self.entry_mut(id)?;
        let expected = entry.lent(VALUE)?.layout.len();
        for (key, bound) in [("min", min), ("max", max)] {
            if let Some(bound) = bound.filter(|bound| bound.len() != expected) {
                let (parameter, key) = (entry.label(), key.to_owned());
                let (expected, got) = (vec![expected], vec![bound.len()]);
                return Err(Error::ShapeMismatch { parameter, key, expected, got });
            }
        }
        let bound = |bounds: Option<&[T]>, i: usize| bounds.map(|bounds| bounds[i].to_f64());
        let sides = min.is_some() || max.is_some();
        for i in 0..if sides { expected } else { 0 } {
            Bounds::new(bound(min, i), bound(max, i))?;
        }
        entry.limits = [min, max].map(|bound| bound.map(OwnedBuffer::copy_of));
        Ok(())
    }

    /// Moves each element of the value into the bounds that are declared for it, once. ID, moments
    /// and steps stay.
    ///
    /// # Errors
    /// [`Error::UnknownId`], [`Error::MissingBuffer`], [`Error::LenderGone`], [`Error::Expanded`],
    /// and [`Error::ShapeMismatch`] where the value has changed its length since.
    pub fn hold_bounds(&mut self, id: ParamId) -> Result<()> {
        let bounds = self.bounds(id)?;
        let entry = self.entry_mut(id)?;
        let value = entry.lent_for_writing(VALUE)?;
        entry.check_limits(value.layout.len())?;
        let [min, max] = entry.limit_views();
        let view = View { operand: value.operand, layout: value.layout };
        let execution = Execution::new(NonZeroUsize::MIN);
        // SAFETY: the value is the entry's own, or lent for the length of this call; no element
        // occurs twice in it, the bounds are as many, and the store is borrowed mutably.
        unsafe { elementwise::clamp_each(&view, bounds, [min, max], &execution) };
        Ok(())
    }

    /// The bounds of each element on one side, `0` for the lower: `None` where there are none, or
    /// of another element type.
    #[must_use]
    pub fn element_bounds<T: Element>(&self, id: ParamId) -> [Option<&[T]>; 2] {
        let limits = self.entry(id).map(|entry| entry.limits.each_ref());
        limits.map_or([None, None], |limits| {
            limits.map(|limit| limit.as_ref().and_then(OwnedBuffer::as_slice))
        })
    }

    /// Whether any element has a bound of its own.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn has_element_bounds(&self, id: ParamId) -> Result<bool> {
        Ok(self.entry(id)?.limits.iter().any(Option::is_some))
    }

    /// Freezes a parameter: as long as it is, a step treats it as if it had no gradient. Nothing of
    /// it changes, it grows no older, and its gradient is not in the global norm.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    ///
    /// ```
    /// use paramstate::{Adam, Store, StepOptions};
    ///
    /// let mut store = Store::new();
    /// let id = store.register_values(None, None, &[1], &[1.0f32])?;
    /// store.freeze(id)?;
    /// let report =
    ///     store.step(&[(id, (&[2.0f32]).into())], &Adam::default(), &StepOptions::default())?;
    /// assert_eq!((report.updated, store.values::<f32>(id)?), (0, &[1.0][..]));
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn freeze(&mut self, id: ParamId) -> Result<()> {
        self.entry_mut(id)?.frozen = true;
        Ok(())
    }

    /// Ends what [`Store::freeze`] began: the moments go on where they were.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn unfreeze(&mut self, id: ParamId) -> Result<()> {
        self.entry_mut(id)?.frozen = false;
        Ok(())
    }

    /// Whether a parameter is frozen.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn is_frozen(&self, id: ParamId) -> Result<bool> {
        Ok(self.entry(id)?.frozen)
    }
}

impl Entry {
    /// The bounds of each element, row-major.
    pub(crate) fn limit_views(&self) -> [Option<View>; 2] {
        self.limits.each_ref().map(|limit| {
            let limit = limit.as_ref()?;
            let layout = ViewLayout::Flat { len: limit.len() };
            Some(View { operand: limit.operand(), layout })
        })
    }

    /// That bounds and rows, if there are any, are those of a value of so many elements.
    pub(crate) fn check_limits(&self, len: usize) -> Result<()> {
        for (key, limit) in ["min", "max"].into_iter().zip(&self.limits) {
            if let Some(limit) = limit.as_ref().filter(|limit| limit.len() != len) {
                let (parameter, key) = (self.label(), key.to_owned());
                let (expected, got) = (vec![len], vec![limit.len()]);
                return Err(Error::ShapeMismatch { parameter, key, expected, got });
            }
        }
        match &self.ages {
            Some(ages) if ages.len != len => {
                let (parameter, key) = (self.label(), "rows".to_owned());
                let (expected, got) = (vec![len], vec![ages.len]);
                Err(Error::ShapeMismatch { parameter, key, expected, got })
            }
            _ => Ok(()),
        }
    }
}
