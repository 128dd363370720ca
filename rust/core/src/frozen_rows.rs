//! Rows that rest: no update, no decay, no momentum, and they grow no older.

use crate::row_traits::RowTraits;
use crate::{ParamId, Result, Store};

impl Store {
    /// Freezes rows of several parameters, or of none: until [`Store::unfreeze_rows`] a step leaves
    /// their values and state as they are, they grow no older, and their gradients are not in the
    /// global norm. No constraint moves them, either: a norm over frozen and free rows scales the
    /// free ones only, and may stay off its limit.
    ///
    /// # Errors
    /// Nothing is frozen after any of: [`Error::UnknownId`](crate::Error::UnknownId),
    /// [`Error::MissingBuffer`](crate::Error::MissingBuffer),
    /// [`Error::LenderGone`](crate::Error::LenderGone),
    /// [`Error::ShapeMismatch`](crate::Error::ShapeMismatch),
    /// [`Error::NoSuchDimension`](crate::Error::NoSuchDimension),
    /// [`Error::NoSuchRow`](crate::Error::NoSuchRow), and
    /// [`Error::RowDimension`](crate::Error::RowDimension) where rows along another dimension differ.
    ///
    /// ```
    /// use paramstate::{Adam, Store, StepOptions};
    ///
    /// let mut store = Store::new();
    /// let id = store.register_values(None, None, &[3], &[1.0f32, 1.0, 1.0])?;
    /// store.freeze_rows(&[id], 0, &[1])?;
    /// store.step(&[(id, (&[2.0f32; 3]).into())], &Adam::default(), &StepOptions::default())?;
    /// assert!(store.values::<f32>(id)?[0] < 1.0);
    /// assert_eq!(store.values::<f32>(id)?[1], 1.0);
    /// assert_eq!(store.row_steps(id)?, Some((0, vec![1, 0, 1])));
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn freeze_rows(&mut self, ids: &[ParamId], dim: usize, rows: &[usize]) -> Result<()> {
        let mut changed = Vec::with_capacity(ids.len());
        for &id in ids {
            let entry = self.entry(id)?;
            let shape = entry.value_shape()?;
            entry.check_declared(&shape)?;
            let traits = entry.traits_along(dim, &shape)?;
            entry.check_rows(rows, shape[dim])?;
            let mut frozen = traits.frozen.clone();
            rows.iter().for_each(|&row| frozen[row] = true);
            changed.push((id, traits.frozen_as(frozen)));
        }
        self.take_traits(changed)
    }

    /// Ends what [`Store::freeze_rows`] began, for these rows or for all: they go on from the state
    /// that they had.
    ///
    /// # Errors
    /// Nothing has changed after [`Error::UnknownId`](crate::Error::UnknownId) or
    /// [`Error::NoSuchRow`](crate::Error::NoSuchRow).
    ///
    /// ```
    /// let mut store = paramstate::Store::new();
    /// let id = store.register_values(None, None, &[3], &[1.0f32, 1.0, 1.0])?;
    /// store.freeze_rows(&[id], 0, &[0, 2])?;
    /// store.unfreeze_rows(&[id], Some(&[2]))?;
    /// assert_eq!(store.frozen_rows(id)?, Some((0, &[true, false, false][..])));
    /// store.unfreeze_rows(&[id], None)?;
    /// assert_eq!(store.frozen_rows(id)?, None);
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn unfreeze_rows(&mut self, ids: &[ParamId], rows: Option<&[usize]>) -> Result<()> {
        let mut changed = Vec::with_capacity(ids.len());
        for &id in ids {
            let entry = self.entry(id)?;
            let Some(traits) = entry.rows.as_ref().filter(|traits| traits.any_frozen()) else {
                continue;
            };
            let mut frozen = traits.frozen.clone();
            match rows {
                Some(rows) => {
                    entry.check_rows(rows, frozen.len())?;
                    rows.iter().for_each(|&row| frozen[row] = false);
                }
                None => frozen.fill(false),
            }
            changed.push((id, traits.frozen_as(frozen)));
        }
        self.take_traits(changed)
    }

    /// The dimension of a parameter's rows, and for each whether it is frozen; `None` where none is.
    ///
    /// # Errors
    /// [`Error::UnknownId`](crate::Error::UnknownId).
    pub fn frozen_rows(&self, id: ParamId) -> Result<Option<(usize, &[bool])>> {
        let traits = self.entry(id)?.rows.as_ref();
        let traits = traits.filter(|traits| traits.any_frozen());
        Ok(traits.map(|traits| (traits.dim, &traits.frozen[..])))
    }

    fn take_traits(&mut self, all: Vec<(ParamId, RowTraits)>) -> Result<()> {
        for (id, traits) in all {
            let entry = self.entry_mut(id)?;
            (entry.step, entry.rows) = traits.settled(entry.step);
        }
        Ok(())
    }
}
