//! Bounds of each element of an owned parameter, and which parameters are frozen.

use crate::hold::whole;
use crate::{Bounds, Element, Entry, Error, OwnedBuffer, ParamId, Result, Store, View};

impl Store {
    /// Declares bounds of each element, row-major and as many as the value has, that every later
    /// step keeps in the place of the same for all ([`Store::set_bounds`]) on that side; an infinite
    /// one bounds nothing. They take the place of a norm, and `None` takes them away. The value as it
    /// is now is left alone: [`Store::hold`] moves it.
    ///
    /// # Errors
    /// [`Error::UnknownId`], [`Error::MissingBuffer`], [`Error::LenderGone`],
    /// [`Error::ShapeMismatch`], and [`Error::InvalidElementBounds`] for a NaN and where a lower bound
    /// is above the upper.
    ///
    /// ```
    /// let mut store = paramstate::Store::new();
    /// let id = store.register_values(None, None, &[3], &[-2.0f32, 0.0, 2.0])?;
    /// store.set_element_bounds(id, Some(&[-1.0f32, 1.0, f32::NEG_INFINITY]), None)?;
    /// store.hold(id, paramstate::Reach::All)?;
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
        entry.check_element_bounds(&entry.value_shape()?, [min, max])?;
        if min.is_some() || max.is_some() {
            entry.norm = None;
        }
        entry.limits = [min, max].map(|bound| bound.map(OwnedBuffer::copy_of));
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
        self.limits.each_ref().map(|limit| limit.as_ref().map(whole))
    }

    /// That there is a number between the bounds of each element of a value of this shape.
    pub(crate) fn check_element_bounds<T: Element>(
        &self,
        shape: &[usize],
        [min, max]: [Option<&[T]>; 2],
    ) -> Result<()> {
        let expected = shape.iter().product();
        for (key, bound) in [("min", min), ("max", max)] {
            if let Some(bound) = bound.filter(|bound| bound.len() != expected) {
                return Err(self.misshapen(key, &[expected], &[bound.len()]));
            }
        }
        if min.is_none() && max.is_none() {
            return Ok(());
        }
        let bound = |bounds: Option<&[T]>, i: usize| bounds.map(|bounds| bounds[i].to_f64());
        for i in 0..expected {
            if let Err(Error::InvalidBounds { min, max }) =
                Bounds::new(bound(min, i), bound(max, i))
            {
                let (parameter, index) = (self.label(), place(shape, i));
                return Err(Error::InvalidElementBounds { parameter, index, min, max });
            }
        }
        Ok(())
    }

    /// That what was declared for each element, for rows or along dimensions is for a value of this shape.
    pub(crate) fn check_declared(&self, shape: &[usize]) -> Result<()> {
        let len = shape.iter().product();
        for (key, limit) in ["min", "max"].into_iter().zip(&self.limits) {
            if let Some(limit) = limit.as_ref().filter(|limit| limit.len() != len) {
                return Err(self.misshapen(key, &[len], &[limit.len()]));
            }
        }
        if let Some(rows) = self.rows.as_ref().filter(|rows| rows.shape != shape) {
            return Err(self.misshapen("rows", shape, &rows.shape));
        }
        let mut dims = self.norm.iter().flat_map(|norm| norm.over.iter());
        dims.try_for_each(|&dim| self.check_dim(dim, shape))
    }

    fn misshapen(&self, key: &str, expected: &[usize], got: &[usize]) -> Error {
        let (parameter, key) = (self.label(), key.to_owned());
        Error::ShapeMismatch { parameter, key, expected: expected.to_vec(), got: got.to_vec() }
    }
}

/// The index of an element in each dimension.
fn place(shape: &[usize], element: usize) -> Vec<usize> {
    let mut rest = element;
    let mut index: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&size| {
            let along = rest % size;
            rest /= size;
            along
        })
        .collect();
    index.reverse();
    index
}
