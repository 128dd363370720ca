//! Rows taken, added, ordered anew and reset: the value, all state shaped like it, the bounds of its
//! elements and the steps of its rows change together, for several parameters or for none.

use std::collections::HashSet;

use crate::entry::RowAges;
use crate::values::VALUE;
use crate::{Buffer, DType, Element, Entry, Error, OwnedBuffer, ParamId, Result, Store};

/// What happens to the rows along one dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowChange<'a> {
    /// These rows in this order take the place of all: some are left out, moved, or there twice.
    Gather(&'a [usize]),
    /// So many rows are added at the end. They are as new: state of zeros, and no steps taken.
    Append(usize),
    /// The state of these rows becomes that of new ones; their values stay.
    Reset(&'a [usize]),
}

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
    /// An owned value follows the change; rows that are added are zeros.
    Follows,
    /// An owned value gets these rows at its end.
    Rows(Values<'a>),
    /// A lent value of this shape stays where it is: the change leaves values alone.
    Stays(&'a [usize]),
    /// A lent value of this shape goes, and this takes its place, changed already.
    Replaced(&'a [usize], Buffer),
}

/// A value, or a state buffer, of one parameter along the dimension of its rows.
struct Along {
    outer: usize,
    rows: usize,
    inner: usize,
}

impl Along {
    fn new(shape: &[usize], dim: usize) -> Self {
        let product = |sizes: &[usize]| sizes.iter().product();
        Self { outer: product(&shape[..dim]), rows: shape[dim], inner: product(&shape[dim + 1..]) }
    }

    fn changed(&self, buffer: &OwnedBuffer, change: RowChange<'_>) -> OwnedBuffer {
        match change {
            RowChange::Gather(index) => self.gathered(buffer, index.iter().map(|&row| Some(row))),
            RowChange::Append(count) => {
                let new = std::iter::repeat_n(None, count);
                self.gathered(buffer, (0..self.rows).map(Some).chain(new))
            }
            RowChange::Reset(reset) => {
                let reset: HashSet<usize> = reset.iter().copied().collect();
                let kept = (0..self.rows).map(|row| (!reset.contains(&row)).then_some(row));
                self.gathered(buffer, kept)
            }
        }
    }

    /// These rows; zeros for `None`.
    fn gathered(
        &self,
        buffer: &OwnedBuffer,
        rows: impl Iterator<Item = Option<usize>> + Clone,
    ) -> OwnedBuffer {
        let (dtype, count) = (buffer.dtype(), rows.clone().count());
        let (row, bytes) = (self.inner * dtype.size_of(), buffer.bytes());
        let mut new = OwnedBuffer::zeroed(dtype, self.outer * count * self.inner);
        if row == 0 {
            return new;
        }
        let target = new.bytes_mut().chunks_exact_mut(row);
        let places = (0..self.outer).flat_map(|outer| rows.clone().map(move |row| (outer, row)));
        for (target, (outer, from)) in target.zip(places) {
            if let Some(from) = from {
                let start = (outer * self.rows + from) * row;
                target.copy_from_slice(&bytes[start..start + row]);
            }
        }
        new
    }
}

/// All that one parameter will have; nothing of it is in place yet.
struct Prepared {
    position: usize,
    shape: Option<Vec<usize>>,
    buffers: Vec<(String, Buffer)>,
    limits: [Option<OwnedBuffer>; 2],
    step: u64,
    ages: Option<RowAges>,
}

impl Store {
    /// Changes rows along one dimension of several parameters, all of them or none.
    ///
    /// Every owned state buffer as long as the value follows it, and so do bounds of each element
    /// and the steps of rows; buffers of other lengths stay.
    ///
    /// # Errors
    /// Nothing has changed after any of: [`Error::UnknownId`], [`Error::DuplicateParameter`],
    /// [`Error::MissingBuffer`], [`Error::NotOwned`], [`Error::NoSuchDimension`],
    /// [`Error::NoSuchRow`], [`Error::RowValues`], [`Error::DTypeMismatch`],
    /// [`Error::RowDimension`], [`Error::BoundsOfNewRows`].
    pub fn edit_rows(
        &mut self,
        edits: Vec<(ParamId, NewValue<'_>)>,
        dim: usize,
        change: RowChange<'_>,
    ) -> Result<()> {
        let mut seen = HashSet::with_capacity(edits.len());
        let mut all = Vec::with_capacity(edits.len());
        for (id, value) in edits {
            let position = self.position(id)?;
            let entry = &self.entries[position];
            if !seen.insert(id) {
                return Err(Error::DuplicateParameter { parameter: entry.label() });
            }
            all.push(entry.prepare(position, value, dim, change)?);
        }
        for prepared in all {
            self.entries[prepared.position].take_over(prepared);
        }
        Ok(())
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
            self.entry(*id)?.check_row_count(dim, keep.len())?;
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
        let edits = ids.iter().map(|&id| (id, NewValue::Follows)).collect();
        self.edit_rows(edits, dim, RowChange::Gather(index))
    }

    /// As [`Store::gather_rows`], where every row has to be there once.
    ///
    /// # Errors
    /// [`Error::NoPermutation`], and those of [`Store::edit_rows`].
    pub fn permute_rows(&mut self, ids: &[ParamId], dim: usize, order: &[usize]) -> Result<()> {
        for id in ids {
            let entry = self.entry(*id)?;
            entry.check_row_count(dim, order.len())?;
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
        let edits = ids.iter().map(|&id| (id, NewValue::Follows)).collect();
        self.edit_rows(edits, dim, RowChange::Reset(rows))
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

    /// The dimension of a parameter's rows and the steps that each has taken; `None` where all rows
    /// have taken as many as the parameter.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn row_steps(&self, id: ParamId) -> Result<Option<(usize, Vec<u64>)>> {
        let entry = self.entry(id)?;
        let taken = |offset: &i64| entry.step.saturating_add_signed(-offset);
        let ages = entry.ages.as_ref();
        Ok(ages.map(|ages| (ages.dim, ages.offsets.iter().map(taken).collect())))
    }
}

impl Entry {
    fn value_shape(&self) -> Result<&[usize]> {
        match (self.buffer(VALUE), &self.shape) {
            (Some(Buffer::Owned(_)), Some(shape)) => Ok(shape),
            (None, _) => {
                Err(Error::MissingBuffer { parameter: self.label(), key: VALUE.to_owned() })
            }
            _ => Err(Error::NotOwned { parameter: self.label(), key: VALUE.to_owned() }),
        }
    }

    fn check_dim(&self, shape: &[usize], dim: usize) -> Result<()> {
        if dim < shape.len() {
            return Ok(());
        }
        Err(Error::NoSuchDimension { parameter: self.label(), dim, shape: shape.to_vec() })
    }

    fn check_row_count(&self, dim: usize, got: usize) -> Result<()> {
        let shape = self.value_shape()?;
        self.check_dim(shape, dim)?;
        if shape[dim] == got {
            return Ok(());
        }
        Err(Error::RowValues { parameter: self.label(), expected: shape[dim], got })
    }

    /// Checks everything, and makes what will take the place of what is there.
    fn prepare(
        &self,
        position: usize,
        value: NewValue<'_>,
        dim: usize,
        change: RowChange<'_>,
    ) -> Result<Prepared> {
        let shape = match &value {
            NewValue::Follows | NewValue::Rows(_) => self.value_shape()?,
            NewValue::Stays(shape) | NewValue::Replaced(shape, _) => shape,
        };
        self.check_dim(shape, dim)?;
        let along = Along::new(shape, dim);
        self.check_rows(&along, change)?;
        let mut buffers = self.changed_state(&along, change)?;
        let value = match (value, self.buffer(VALUE)) {
            (NewValue::Follows, Some(Buffer::Owned(value))) => match change {
                RowChange::Reset(_) => None,
                _ => Some(Buffer::Owned(along.changed(value, change))),
            },
            (NewValue::Rows(rows), Some(Buffer::Owned(value))) => {
                Some(Buffer::Owned(self.appended(&along, value, rows, change)?))
            }
            (NewValue::Replaced(_, buffer), _) => Some(buffer),
            _ => None,
        };
        buffers.extend(value.map(|value| (VALUE.to_owned(), value)));
        let mut new_shape = shape.to_vec();
        new_shape[dim] = rows_after(&along, change);
        let (step, ages) = self.changed_ages(dim, &along, &new_shape, change)?;
        let limits = self.changed_limits(&along, change)?;
        let shape = self.shape.is_some().then_some(new_shape);
        Ok(Prepared { position, shape, buffers, limits, step, ages })
    }

    fn check_rows(&self, along: &Along, change: RowChange<'_>) -> Result<()> {
        let index = match change {
            RowChange::Gather(index) | RowChange::Reset(index) => index,
            RowChange::Append(_) => return Ok(()),
        };
        match index.iter().find(|&&row| row >= along.rows) {
            Some(&row) => Err(Error::NoSuchRow { parameter: self.label(), row, rows: along.rows }),
            None => Ok(()),
        }
    }

    fn changed_state(&self, along: &Along, change: RowChange<'_>) -> Result<Vec<(String, Buffer)>> {
        let len = along.outer * along.rows * along.inner;
        let mut changed = Vec::new();
        for key in self.keys().filter(|key| *key != VALUE) {
            match self.buffer(key) {
                Some(Buffer::Owned(buffer)) if buffer.len() == len => {
                    changed.push((key.to_owned(), Buffer::Owned(along.changed(buffer, change))));
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

    /// The value with rows at its end.
    fn appended(
        &self,
        along: &Along,
        value: &OwnedBuffer,
        rows: Values<'_>,
        change: RowChange<'_>,
    ) -> Result<OwnedBuffer> {
        let count = rows_after(along, change) - along.rows;
        let (expected, got) =
            (along.outer * count * along.inner, rows.bytes.len() / rows.dtype.size_of());
        let (parameter, key) = (|| self.label(), || VALUE.to_owned());
        if rows.dtype != value.dtype() {
            let (expected, got) = (rows.dtype, value.dtype());
            return Err(Error::DTypeMismatch { parameter: parameter(), key: key(), expected, got });
        }
        if expected != got {
            return Err(Error::RowValues { parameter: parameter(), expected, got });
        }
        let mut new = along.changed(value, change);
        let row = along.inner * value.dtype().size_of();
        let (old, added) = (along.rows * row, count * row);
        if added > 0 {
            let places = new.bytes_mut().chunks_exact_mut(old + added);
            for (place, rows) in places.zip(rows.bytes.chunks_exact(added)) {
                place[old..].copy_from_slice(rows);
            }
        }
        Ok(new)
    }

    /// The parameter's step and what each row lacks of it. Where no row lacks more than another,
    /// rows have no steps of their own.
    fn changed_ages(
        &self,
        dim: usize,
        along: &Along,
        shape: &[usize],
        change: RowChange<'_>,
    ) -> Result<(u64, Option<RowAges>)> {
        if self.step == 0 {
            return Ok((0, None));
        }
        if let Some(ages) = self.ages.as_ref().filter(|ages| ages.dim != dim) {
            return match change {
                RowChange::Gather(_) => {
                    let offsets = ages.offsets.clone();
                    Ok((self.step, Some(RowAges::new(ages.dim, shape, offsets))))
                }
                _ => Err(Error::RowDimension { parameter: self.label(), held: ages.dim, dim }),
            };
        }
        let fresh = self.step as i64;
        let mut offsets =
            self.ages.as_ref().map_or_else(|| vec![0; along.rows], |ages| ages.offsets.clone());
        match change {
            RowChange::Gather(index) => offsets = index.iter().map(|&row| offsets[row]).collect(),
            RowChange::Append(count) => offsets.resize(along.rows + count, fresh),
            RowChange::Reset(rows) => rows.iter().for_each(|&row| offsets[row] = fresh),
        }
        match offsets.first() {
            Some(&first) if offsets.iter().any(|offset| *offset != first) => {
                Ok((self.step, Some(RowAges::new(dim, shape, offsets))))
            }
            first => Ok((self.step.saturating_add_signed(-first.unwrap_or(&0)), None)),
        }
    }

    fn changed_limits(
        &self,
        along: &Along,
        change: RowChange<'_>,
    ) -> Result<[Option<OwnedBuffer>; 2]> {
        let has_limits = self.limits.iter().any(Option::is_some);
        if has_limits && matches!(change, RowChange::Append(1..)) {
            return Err(Error::BoundsOfNewRows { parameter: self.label() });
        }
        Ok(self.limits.each_ref().map(|limit| match (limit, change) {
            (Some(limit), RowChange::Gather(_)) => Some(along.changed(limit, change)),
            _ => None,
        }))
    }

    fn take_over(&mut self, prepared: Prepared) {
        for (key, buffer) in prepared.buffers {
            self.set_buffer(&key, buffer);
        }
        for (held, new) in self.limits.iter_mut().zip(prepared.limits) {
            if new.is_some() {
                *held = new;
            }
        }
        self.shape = prepared.shape;
        self.step = prepared.step;
        self.ages = prepared.ages;
    }
}

fn rows_after(along: &Along, change: RowChange<'_>) -> usize {
    match change {
        RowChange::Gather(index) => index.len(),
        RowChange::Append(count) => along.rows + count,
        RowChange::Reset(_) => along.rows,
    }
}
