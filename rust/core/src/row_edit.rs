//! Rows taken, added, ordered anew and reset: the value, all state shaped like it, the bounds of its
//! elements, and what its rows have of their own change together, for several parameters or for none.

use std::collections::HashSet;

use crate::along::{Along, number};
use crate::row_change::RowMove;
use crate::row_traits::RowTraits;
use crate::values::{VALUE, extent};
use crate::{
    Buffer, DType, Element, Entry, Error, OwnedBuffer, ParamId, Reach, Result, RowChange, Store,
    overlaps_itself,
};

/// Elements of any type, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Values<'a> {
    dtype: DType,
    bytes: &'a [u8],
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

/// All that one parameter will have; nothing of it is in place yet.
struct Prepared {
    id: ParamId,
    shape: Option<Vec<usize>>,
    buffers: Vec<(String, Buffer)>,
    limits: [Option<OwnedBuffer>; 2],
    step: u64,
    rows: Option<RowTraits>,
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
            if prepared.buffers.iter().any(|(key, _)| key == VALUE) {
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

impl Entry {
    /// Checks everything, and makes what will take the place of what is there.
    fn prepare(&self, value: NewValue<'_>, dim: usize, change: RowChange<'_>) -> Result<Prepared> {
        let shape = self.value_shape()?;
        self.check_dim(dim, &shape)?;
        self.check_declared(&shape)?;
        let along = Along::new(&shape, dim);
        let moved = self.row_move(change, along.rows)?;
        let mut new_shape = shape.clone();
        new_shape[dim] = moved.values.len();
        let mut buffers = self.moved_state(&along, &moved)?;
        let value = self.moved_value(value, &along, &moved, &new_shape)?;
        let (step, rows) = self.moved_traits(dim, (&shape, &new_shape), &moved)?;
        let limits = self.moved_limits(&along, &moved)?;
        let is_owned = match &value {
            Some(Buffer::Borrowed(_)) => false,
            Some(Buffer::Owned(_)) => true,
            None => self.shape.is_some(),
        };
        buffers.extend(value.map(|value| (VALUE.to_owned(), value)));
        let shape = is_owned.then_some(new_shape);
        Ok(Prepared { id: self.id(), shape, buffers, limits, step, rows })
    }

    fn moved_value(
        &self,
        value: NewValue<'_>,
        along: &Along,
        moved: &RowMove,
        shape: &[usize],
    ) -> Result<Option<Buffer>> {
        let not_owned = || Error::NotOwned { parameter: self.label(), key: VALUE.to_owned() };
        if let NewValue::Replaced(buffer) = value {
            self.check_replacement(&buffer, shape)?;
            return Ok(Some(buffer));
        }
        if moved.keeps_values() {
            return Ok(None);
        }
        let Some(Buffer::Owned(held)) = self.buffer(VALUE) else { return Err(not_owned()) };
        let new = match value {
            NewValue::Rows(rows) => {
                self.check_new_rows(held.dtype(), rows, along.elements(moved.new_values()))?;
                rows.bytes.to_vec()
            }
            NewValue::Filled(x) => number(held.dtype(), x),
            NewValue::Follows => Vec::new(),
            NewValue::Stays | NewValue::Replaced(_) => return Err(not_owned()),
        };
        let mut buffer = along.gathered(held, &moved.values);
        along.fill(&mut buffer, &moved.values, &new);
        Ok(Some(Buffer::Owned(buffer)))
    }

    fn check_new_rows(&self, expected: DType, rows: Values<'_>, count: usize) -> Result<()> {
        let (parameter, got) = (|| self.label(), rows.bytes.len() / rows.dtype.size_of());
        if rows.dtype != expected {
            let (key, expected, got) = (VALUE.to_owned(), rows.dtype, expected);
            return Err(Error::DTypeMismatch { parameter: parameter(), key, expected, got });
        }
        if got != count {
            return Err(Error::RowValues { parameter: parameter(), expected: count, got });
        }
        Ok(())
    }

    fn check_replacement(&self, buffer: &Buffer, shape: &[usize]) -> Result<()> {
        let (parameter, key) = (|| self.label(), || VALUE.to_owned());
        let Some(lent) = buffer.describe() else {
            return Err(Error::LenderGone { parameter: parameter(), key: key() });
        };
        if overlaps_itself(&extent(&lent)) {
            return Err(Error::Expanded { parameter: parameter(), key: key() });
        }
        let got = lent.layout.shape();
        let fits = match got {
            Some(got) => got == shape,
            None => lent.layout.len() == shape.iter().product(),
        };
        if fits {
            return Ok(());
        }
        let got = got.map_or_else(|| vec![lent.layout.len()], <[usize]>::to_vec);
        let expected = shape.to_vec();
        Err(Error::ShapeMismatch { parameter: parameter(), key: key(), expected, got })
    }

    fn moved_state(&self, along: &Along, moved: &RowMove) -> Result<Vec<(String, Buffer)>> {
        let len = along.elements(along.rows);
        let mut changed = Vec::new();
        if moved.keeps_state() {
            return Ok(changed);
        }
        for key in self.keys().filter(|key| *key != VALUE) {
            match self.buffer(key) {
                Some(Buffer::Owned(buffer)) if buffer.len() == len => {
                    let buffer = along.gathered(buffer, &moved.state);
                    changed.push((key.to_owned(), Buffer::Owned(buffer)));
                }
                Some(Buffer::Borrowed(lender))
                    if lender.describe().is_none_or(|lent| lent.layout.len() == len) =>
                {
                    return Err(Error::NotOwned { parameter: self.label(), key: key.to_owned() });
                }
                _ => {}
            }
        }
        Ok(changed)
    }

    /// The parameter's step, and what differs between the rows that there are to be.
    fn moved_traits(
        &self,
        dim: usize,
        (shape, new_shape): (&[usize], &[usize]),
        moved: &RowMove,
    ) -> Result<(u64, Option<RowTraits>)> {
        // Without a step, all rows are as new.
        let any_new = self.step > 0 && moved.state.contains(&None);
        match &self.rows {
            None if !any_new => return Ok((self.step, None)),
            Some(rows) if !any_new && rows.dim != dim => {
                return Ok((self.step, Some(rows.within(new_shape))));
            }
            _ => {}
        }
        let (held, new) = (self.traits_along(dim, shape)?, self.step as i64);
        let offset = |from: &Option<usize>| from.map_or(new, |row| held.offsets[row]);
        let frozen = |from: &Option<usize>| from.is_some_and(|row| held.frozen[row]);
        let offsets = moved.state.iter().map(offset).collect();
        let frozen = moved.values.iter().map(frozen).collect();
        Ok(RowTraits::new(dim, new_shape, offsets, frozen).settled(self.step))
    }

    fn moved_limits(&self, along: &Along, moved: &RowMove) -> Result<[Option<OwnedBuffer>; 2]> {
        if self.limits.iter().all(Option::is_none) {
            return Ok([None, None]);
        }
        let Some(sources) = moved.bounds() else {
            return Err(Error::BoundsOfNewRows { parameter: self.label() });
        };
        let gathered = |limit: &Option<OwnedBuffer>| {
            limit.as_ref().map(|limit| along.gathered(limit, &sources))
        };
        Ok(self.limits.each_ref().map(gathered))
    }

    fn take_over(&mut self, prepared: Prepared) {
        for (key, buffer) in prepared.buffers {
            self.set_buffer(&key, buffer);
        }
        self.limits = prepared.limits;
        self.shape = prepared.shape;
        self.step = prepared.step;
        self.rows = prepared.rows;
    }
}
