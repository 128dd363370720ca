//! Norms that are declared for parameters of a store.

use std::sync::Arc;

use crate::{
    Cohorts, Entry, Error, Lent, NormLimit, ParamId, Projection, Result, Store, ViewLayout,
    row_major,
};

/// What the norm is held to, and over which dimensions it is taken: over all, if there are none.
#[derive(Clone, Debug)]
pub(crate) struct HeldNorm {
    pub limit: NormLimit,
    pub over: Vec<usize>,
}

impl Store {
    /// Declares a limit of the 2-norm that every later step keeps, directly after the update: of the
    /// whole value, or, `over` some dimensions, of each group of elements along them. A norm of 0 is
    /// left alone. It takes the place of all bounds, and `None` takes it away. The value as it is
    /// now is left alone: [`Store::hold`] scales it.
    ///
    /// # Errors
    /// [`Error::UnknownId`], [`Error::MissingBuffer`], [`Error::LenderGone`],
    /// [`Error::NoSuchDimension`], [`Error::RepeatedDimension`], and [`Error::InvalidNorm`] for a
    /// limit that is negative or not finite.
    ///
    /// ```
    /// use paramstate::{NormLimit, Reach, Store};
    ///
    /// let mut store = Store::new();
    /// let id = store.register_values(None, None, &[2, 2], &[3.0f32, 4.0, 0.3, 0.4])?;
    /// store.set_norm(id, Some(NormLimit::AtMost(1.0)), &[1])?; // of each row
    /// store.hold(id, Reach::All)?;
    /// assert_eq!(store.values::<f32>(id)?, [0.6, 0.8, 0.3, 0.4]);
    /// assert_eq!(store.norm(id)?, Some((NormLimit::AtMost(1.0), &[1][..])));
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn set_norm(
        &mut self,
        id: ParamId,
        limit: Option<NormLimit>,
        over: &[usize],
    ) -> Result<()> {
        let entry = self.entry_mut(id)?;
        let Some(limit) = limit else {
            entry.norm = None;
            return Ok(());
        };
        let (NormLimit::AtMost(got) | NormLimit::Exactly(got)) = limit;
        if !(got >= 0.0 && got.is_finite()) {
            return Err(Error::InvalidNorm { parameter: entry.label(), got });
        }
        let shape = entry.value_shape()?;
        for (place, &dim) in over.iter().enumerate() {
            entry.check_dim(dim, &shape)?;
            if over[..place].contains(&dim) {
                return Err(Error::RepeatedDimension { parameter: entry.label(), dim });
            }
        }
        entry.bounds = crate::Bounds::default();
        entry.limits = [None, None];
        entry.norm = Some(HeldNorm { limit, over: over.to_vec() });
        Ok(())
    }

    /// What a parameter's norm is held to, and over which dimensions it is taken (over all, if none
    /// is named); `None` where no norm is declared.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn norm(&self, id: ParamId) -> Result<Option<(NormLimit, &[usize])>> {
        let norm = self.entry(id)?.norm.as_ref();
        Ok(norm.map(|norm| (norm.limit, &norm.over[..])))
    }
}

impl Entry {
    /// How the norm is held in a value that lies so; `rows` are a dimension and what of it is skipped.
    pub(crate) fn projection(
        &self,
        value: &Lent,
        rows: Option<(usize, Arc<Cohorts>)>,
    ) -> Option<Projection> {
        let HeldNorm { limit, over } = self.norm.as_ref()?;
        let shape = self.shape_of(&value.layout);
        let strides = match &value.layout {
            ViewLayout::Strided { strides, .. } => strides.clone(),
            ViewLayout::Flat { .. } => row_major(&shape),
        };
        let over = (0..shape.len()).map(|dim| over.is_empty() || over.contains(&dim)).collect();
        let rows = rows.filter(|(_, cohorts)| cohorts.skips_rows());
        Some(Projection { operand: value.operand, shape, strides, over, limit: *limit, rows })
    }
}
