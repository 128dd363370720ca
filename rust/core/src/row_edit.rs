//! Rows taken, added, ordered anew and reset: the value, all state shaped like it, the bounds of its
//! elements, and what its rows have of their own change together, for several parameters or for none.

use std::collections::HashSet;

use crate::{Buffer, DType, Element, Error, ParamId, Reach, Result, RowChange, Store};

/// Elements of any type, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Values<'a> {
    pub(crate) dtype: DType,
    pub(crate) bytes: &'a [u8],
}

impl<'a, T: Element> From<&'a [T]> for Values<'a> {
    fn from(values: &'a [T]) -> Self {
        // SAFETY: the elements are plain numbers, every byte of which is initialised.
        let bytes = unsafe {
            std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values))
        };
        Self { dtype: T::DTYPE, bytes }
    }
}

impl<'a, T: Element, const N: usize> From<&'a [T; N]> for Values<'a> {
    fn from(values: &'a [T; N]) -> Self {
        values.as_slice().into()
    }
}

/// What the value of one parameter becomes when its rows change.
#[derive(Debug)]
pub enum NewValue<'a> {
    /// An owned value follows the change; new rows are zeros.
    Follows,
    /// An owned value follows, and these are its new rows, in their order.
    Rows(Values<'a>),
    /// An owned value follows; new rows are of this number.
    Filled(f64),
    /// The value stays where it is: the change leaves values alone.
    Stays,
    /// This takes the value's place, changed already.
    Replaced(Buffer),
}

impl Store {
    /// Changes rows along one dimension of several parameters, all of them or none.
    ///
    /// Every owned state buffer as long as the value follows it, and so do bounds of each element,
    /// the steps of rows, and whether they are frozen; buffers of other lengths stay. What is
    /// declared for a value holds for the changed one at once, but in frozen rows.
    ///
    /// # Errors
    /// Nothing has changed after any of: [`Error::UnknownId`], [`Error::DuplicateParameter`],
    /// [`Error::MissingBuffer`], [`Error::LenderGone`], [`Error::NotOwned`], [`Error::Expanded`],
    /// [`Error::ShapeMismatch`], [`Error::NoSuchDimension`], [`Error::NoSuchRow`],
    /// [`Error::RowValues`], [`Error::DTypeMismatch`], [`Error::RowDimension`],
    /// [`Error::BoundsOfNewRows`].
    ///
    /// ```
    /// use paramstate::{Adam, NewValue, RowChange, StepOptions, Store};
    ///
    /// let mut store = Store::new();
    /// let id = store.register_values(None, None, &[2], &[1.0f32, 2.0])?;
    /// store.step(&[(id, (&[1.0f32; 2]).into())], &Adam { lr: 0.0, ..Adam::default() }, &StepOptions::default())?;
    /// // A copy of row 0 with its state, and a new row that holds 9.
    /// let values = [Some(0), Some(1), Some(0), None];
    /// let change = RowChange::From { values: &values, state: &values };
    /// store.edit_rows(vec![(id, NewValue::Filled(9.0))], 0, change)?;
    /// assert_eq!(store.values::<f32>(id)?, [1.0, 2.0, 1.0, 9.0]);
    /// assert_eq!(store.row_steps(id)?, Some((0, vec![1, 1, 1, 0])));
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn edit_rows(
        &mut self,
        edits: Vec<(ParamId, NewValue<'_>)>,
        dim: usize,
        change: RowChange<'_>,
    ) -> Result<()> {
        let mut seen = HashSet::with_capacity(edits.len());
        let mut all = Vec::with_capacity(edits.len());
        for (id, value) in edits {
            let entry = self.entry(id)?;
            if !seen.insert(id) {
                return Err(Error::DuplicateParameter { parameter: entry.label() });
            }
            all.push(entry.prepare(value, dim, change)?);
        }
        let mut moved = Vec::with_capacity(all.len());
        for prepared in all {
            let id = prepared.id;
            if prepared.has_new_value() {
                moved.push(id);
            }
            self.entry_mut(id)?.take_over(prepared);
        }
        moved.into_iter().try_for_each(|id| self.hold(id, Reach::Unfrozen))
    }

    /// Keeps the rows whose flag is set, and drops the others.
    ///
    /// # Errors
    /// Those of [`Store::edit_rows`].
    ///
    /// ```
    /// let mut store = paramstate::Store::new();
    /// let id = store.register_values(None, None, &[3, 2], &[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0])?;
    /// store.keep_rows(&[id], 0, &[true, false, true])?;
    /// assert_eq!(store.values::<f32>(id)?, [1.0, 2.0, 5.0, 6.0]);
    /// assert_eq!(store.shape(id)?, Some(&[2, 2][..]));
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn keep_rows(&mut self, ids: &[ParamId], dim: usize, keep: &[bool]) -> Result<()> {
        for id in ids {
            let entry = self.entry(*id)?;
            entry.check_row_count(dim, &entry.value_shape()?, keep.len())?;
        }
        let index: Vec<usize> = (0..keep.len()).filter(|&row| keep[row]).collect();
        self.gather_rows(ids, dim, &index)
    }

    /// Puts these rows in the place of all, in this order; a row may be there more than once.
    ///
    /// # Errors
    /// Those of [`Store::edit_rows`].
    ///
    /// ```
    /// let mut store = paramstate::Store::new();
    /// let id = store.register_values(None, None, &[3], &[1.0f32, 2.0, 3.0])?;
    /// store.gather_rows(&[id], 0, &[2, 0, 0, 1])?;
    /// assert_eq!(store.values::<f32>(id)?, [3.0, 1.0, 1.0, 2.0]);
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn gather_rows(&mut self, ids: &[ParamId], dim: usize, index: &[usize]) -> Result<()> {
        self.follow(ids, dim, RowChange::Gather(index))
    }

    /// As [`Store::gather_rows`], where every row has to be there once.
    ///
    /// # Errors
    /// [`Error::NoPermutation`], and those of [`Store::edit_rows`].
    pub fn permute_rows(&mut self, ids: &[ParamId], dim: usize, order: &[usize]) -> Result<()> {
        for id in ids {
            let entry = self.entry(*id)?;
            entry.check_row_count(dim, &entry.value_shape()?, order.len())?;
            let mut sorted = order.to_vec();
            sorted.sort_unstable();
            if !sorted.iter().copied().eq(0..order.len()) {
                return Err(Error::NoPermutation { parameter: entry.label() });
            }
        }
        self.gather_rows(ids, dim, order)
    }

    /// Resets the state of some rows: their next step is a first step.
    ///
    /// # Errors
    /// Those of [`Store::edit_rows`].
    pub fn reset_rows(&mut self, ids: &[ParamId], dim: usize, rows: &[usize]) -> Result<()> {
        self.follow(ids, dim, RowChange::Reset(rows))
    }

    /// Adds rows at the end. Their state is as new, also in that their first step is bias-corrected
    /// as a first step. All parameters get the same number of rows.
    ///
    /// # Errors
    /// Those of [`Store::edit_rows`].
    ///
    /// ```
    /// use paramstate::{Adam, Store, StepOptions};
    ///
    /// let mut store = Store::new();
    /// let id = store.register_values(None, None, &[1, 2], &[1.0f32, 1.0])?;
    /// let adam = Adam { lr: 0.5, eps: 0.0, ..Adam::default() };
    /// for _ in 0..3 {
    ///     store.step(&[(id, (&[1.0f32, 1.0]).into())], &adam, &StepOptions::default())?;
    /// }
    /// store.append_rows(0, 1, &[(id, (&[8.0f32, 8.0]).into())])?;
    /// assert_eq!(store.row_steps(id)?, Some((0, vec![3, 0])));
    /// store.step(&[(id, (&[1.0f32; 4]).into())], &adam, &StepOptions::default())?;
    /// assert_eq!(store.values::<f32>(id)?[2..], [7.5, 7.5]); // one learning rate, as any first step
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn append_rows(
        &mut self,
        dim: usize,
        count: usize,
        rows: &[(ParamId, Values<'_>)],
    ) -> Result<()> {
        let edits = rows.iter().map(|&(id, values)| (id, NewValue::Rows(values))).collect();
        self.edit_rows(edits, dim, RowChange::Append(count))
    }

    /// Adds rows of one number in front of the others and behind them, with state as new.
    ///
    /// # Errors
    /// Those of [`Store::edit_rows`].
    ///
    /// ```
    /// let mut store = paramstate::Store::new();
    /// let id = store.register_values(None, None, &[2], &[1.0f32, 2.0])?;
    /// store.pad_rows(&[id], 0, (1, 2), 7.0)?;
    /// assert_eq!(store.values::<f32>(id)?, [7.0, 1.0, 2.0, 7.0, 7.0]);
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn pad_rows(
        &mut self,
        ids: &[ParamId],
        dim: usize,
        (before, after): (usize, usize),
        value: f64,
    ) -> Result<()> {
        let edits = ids.iter().map(|&id| (id, NewValue::Filled(value))).collect();
        self.edit_rows(edits, dim, RowChange::Pad { before, after })
    }

    /// Lets there be so many rows: the last ones go, or rows of one number come behind the others,
    /// with state as new.
    ///
    /// # Errors
    /// Those of [`Store::edit_rows`].
    ///
    /// ```
    /// let mut store = paramstate::Store::new();
    /// let id = store.register_values(None, None, &[3], &[1.0f32, 2.0, 3.0])?;
    /// store.resize_rows(&[id], 0, 2, 0.0)?;
    /// store.resize_rows(&[id], 0, 3, 7.0)?;
    /// assert_eq!(store.values::<f32>(id)?, [1.0, 2.0, 7.0]);
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn resize_rows(
        &mut self,
        ids: &[ParamId],
        dim: usize,
        size: usize,
        value: f64,
    ) -> Result<()> {
        let edits = ids.iter().map(|&id| (id, NewValue::Filled(value))).collect();
        self.edit_rows(edits, dim, RowChange::Resize(size))
    }

    /// The dimension of a parameter's rows and the steps that each has taken; `None` where all rows
    /// have taken as many as the parameter.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn row_steps(&self, id: ParamId) -> Result<Option<(usize, Vec<u64>)>> {
        let entry = self.entry(id)?;
        let taken = |offset: &i64| entry.step.saturating_add_signed(-offset);
        let rows = entry.rows.as_ref();
        let rows = rows.filter(|rows| rows.offsets.iter().any(|offset| *offset != 0));
        Ok(rows.map(|rows| (rows.dim, rows.offsets.iter().map(taken).collect())))
    }

    fn follow(&mut self, ids: &[ParamId], dim: usize, change: RowChange<'_>) -> Result<()> {
        let edits = ids.iter().map(|&id| (id, NewValue::Follows)).collect();
        self.edit_rows(edits, dim, change)
    }
}
