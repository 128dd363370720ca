//! What one parameter will have once its rows have changed: checked and made before anything is put
//! in place, so that of several parameters all change or none.

use crate::along::{Along, number};
use crate::row_change::RowMove;
use crate::row_traits::RowTraits;
use crate::values::{VALUE, extent};
use crate::{
    Buffer, DType, Entry, Error, NewValue, OwnedBuffer, ParamId, Result, RowChange, Values,
    overlaps_itself,
};

/// All that one parameter will have; nothing of it is in place yet.
pub(crate) struct Prepared {
    pub id: ParamId,
    shape: Option<Vec<usize>>,
    buffers: Vec<(String, Buffer)>,
    limits: [Option<OwnedBuffer>; 2],
    step: u64,
    rows: Option<RowTraits>,
}

impl Prepared {
    pub(crate) fn has_new_value(&self) -> bool {
        self.buffers.iter().any(|(key, _)| key == VALUE)
    }
}

impl Entry {
    /// Checks everything, and makes what will take the place of what is there.
    pub(crate) fn prepare(
        &self,
        value: NewValue<'_>,
        dim: usize,
        change: RowChange<'_>,
    ) -> Result<Prepared> {
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

    pub(crate) fn take_over(&mut self, prepared: Prepared) {
        for (key, buffer) in prepared.buffers {
            self.set_buffer(&key, buffer);
        }
        self.limits = prepared.limits;
        self.shape = prepared.shape;
        self.step = prepared.step;
        self.rows = prepared.rows;
    }
}
