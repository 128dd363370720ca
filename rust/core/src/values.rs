//! Values and moments of a store's parameters, read and changed from Rust.

use std::num::NonZeroUsize;

use crate::layout::Steps;
use crate::{
    Bounds, Buffer, Element, Entry, Error, Execution, Extent, Lent, OwnedBuffer, ParamId, Result,
    Store, View, ViewLayout, elementwise, overlaps_itself, row_major,
};

/// The key of a parameter's value.
pub(crate) const VALUE: &str = "value";
pub(crate) const EXP_AVG: &str = "exp_avg";
pub(crate) const EXP_AVG_SQ: &str = "exp_avg_sq";
pub(crate) const MAX_EXP_AVG_SQ: &str = "max_exp_avg_sq";

/// One parameter's state, row-major and as long as its value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moments<'a, T> {
    /// Steps taken.
    pub step: u64,
    /// The first moment.
    pub exp_avg: &'a [T],
    /// The second moment.
    pub exp_avg_sq: &'a [T],
    /// Its maximum, once a step was taken with AMSGrad.
    pub max_exp_avg_sq: Option<&'a [T]>,
}

impl Store {
    /// A new parameter with a value that the store owns, copied from `values` in row-major order.
    /// Its state is made by its first step.
    ///
    /// # Errors
    /// [`Error::ValueLength`], and those of [`Store::register`].
    ///
    /// ```
    /// let mut store = paramstate::Store::new();
    /// let id = store.register_values(Some("weight"), None, &[2, 2], &[1.0f32, 2.0, 3.0, 4.0])?;
    /// assert_eq!(store.values::<f32>(id)?, [1.0, 2.0, 3.0, 4.0]);
    /// assert_eq!(store.shape(id)?, Some(&[2, 2][..]));
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn register_values<T: Element>(
        &mut self,
        name: Option<&str>,
        id: Option<ParamId>,
        shape: &[usize],
        values: &[T],
    ) -> Result<ParamId> {
        // A product too large for an address is the length of no slice, whatever a later size says:
        // a size of 0 anywhere makes it 0.
        let product = shape.iter().try_fold(1, |product: usize, size| product.checked_mul(*size));
        let expected = if shape.contains(&0) { 0 } else { product.unwrap_or(usize::MAX) };
        if values.len() != expected {
            return Err(Error::ValueLength { shape: shape.to_vec(), expected, got: values.len() });
        }
        let id = self.register(name, id)?;
        let entry = self.entry_mut(id)?;
        entry.set_buffer(VALUE, Buffer::Owned(OwnedBuffer::copy_of(values)));
        entry.shape = Some(shape.to_vec());
        Ok(id)
    }

    /// The shape of a value that the store owns; `None` for one that is lent, or not there.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn shape(&self, id: ParamId) -> Result<Option<&[usize]>> {
        Ok(self.entry(id)?.shape.as_deref())
    }

    /// A value that the store owns, row-major.
    ///
    /// # Errors
    /// [`Error::UnknownId`], [`Error::MissingBuffer`], [`Error::NotOwned`] for a lent value, and
    /// [`Error::DTypeMismatch`] if its elements are no `T`s.
    pub fn values<T: Element>(&self, id: ParamId) -> Result<&[T]> {
        self.entry(id)?.owned(VALUE)
    }

    /// A parameter's state; `None` if it was never stepped, or was reset since.
    ///
    /// # Errors
    /// As for [`Store::values`].
    ///
    /// ```
    /// use paramstate::{Adam, Store, StepOptions};
    ///
    /// let mut store = Store::new();
    /// let id = store.register_values(None, None, &[1], &[1.0f64])?;
    /// assert_eq!(store.state::<f64>(id)?, None);
    /// store.step(&[(id, (&[2.0f64]).into())], &Adam::default(), &StepOptions::default())?;
    /// assert!((store.state::<f64>(id)?.expect("stepped").exp_avg[0] - 0.2).abs() < 1e-15);
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn state<T: Element>(&self, id: ParamId) -> Result<Option<Moments<'_, T>>> {
        let entry = self.entry(id)?;
        if entry.buffer(EXP_AVG).is_none() {
            return Ok(None);
        }
        let max = entry.buffer(MAX_EXP_AVG_SQ).map(|_| entry.owned(MAX_EXP_AVG_SQ));
        Ok(Some(Moments {
            step: entry.step,
            exp_avg: entry.owned(EXP_AVG)?,
            exp_avg_sq: entry.owned(EXP_AVG_SQ)?,
            max_exp_avg_sq: max.transpose()?,
        }))
    }

    /// The steps taken with the state that the store holds; 0 before the first and after a reset.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn steps(&self, id: ParamId) -> Result<u64> {
        Ok(self.entry(id)?.step)
    }

    /// Forgets the state, as if the parameter had never been stepped: every buffer but the value.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn reset(&mut self, id: ParamId) -> Result<()> {
        self.entry_mut(id)?.reset();
        Ok(())
    }

    /// Moves each element of the value into the bounds, once. ID, moments and steps stay.
    ///
    /// # Errors
    /// [`Error::UnknownId`], [`Error::MissingBuffer`], [`Error::LenderGone`], [`Error::Expanded`].
    ///
    /// ```
    /// use paramstate::{Bounds, Store};
    ///
    /// let mut store = Store::new();
    /// let id = store.register_values(None, None, &[3], &[-2.0f32, 0.5, 2.0])?;
    /// store.clip(id, Bounds::new(Some(-1.0), Some(1.0))?)?;
    /// assert_eq!(store.values::<f32>(id)?, [-1.0, 0.5, 1.0]);
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn clip(&mut self, id: ParamId, bounds: Bounds) -> Result<()> {
        let Lent { operand, layout } = self.entry_mut(id)?.lent_for_writing(VALUE)?;
        let view = (View { operand, layout }, bounds);
        let execution = Execution::new(NonZeroUsize::MIN);
        // SAFETY: the memory is the entry's own, or lent for the length of this call; no element
        // occurs twice, and the store is borrowed mutably.
        unsafe { elementwise::clamp(&[view], &execution) };
        Ok(())
    }

    /// Lets a closure change the value, all elements at once in row-major order. ID, moments and
    /// steps stay.
    ///
    /// # Errors
    /// Those of [`Store::clip`], and [`Error::DTypeMismatch`] if the elements are no `T`s.
    ///
    /// ```
    /// let mut store = paramstate::Store::new();
    /// let id = store.register_values(None, None, &[2], &[3.0f32, 4.0])?;
    /// store.clip_with(id, |values: &mut [f32]| {
    ///     let norm = values.iter().map(|x| x * x).sum::<f32>().sqrt();
    ///     values.iter_mut().for_each(|x| *x /= norm);
    /// })?;
    /// assert_eq!(store.values::<f32>(id)?, [0.6, 0.8]);
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn clip_with<T: Element>(
        &mut self,
        id: ParamId,
        change: impl FnOnce(&mut [T]),
    ) -> Result<()> {
        let entry = self.entry_mut(id)?;
        let lent = entry.lent_for_writing(VALUE)?;
        entry.check_dtype::<T>(VALUE, lent.operand.dtype)?;
        if let Some(Buffer::Owned(buffer)) = entry.buffer_mut(VALUE) {
            change(buffer.as_mut_slice().expect("the dtype was checked"));
            return Ok(());
        }
        // SAFETY: lent for the length of this call, and its elements are `T`s.
        let mut values = unsafe { gather::<T>(&lent) };
        change(&mut values);
        // SAFETY: as above.
        unsafe { scatter(&values, &lent) };
        Ok(())
    }
}

impl Entry {
    /// The value's shape: as it was registered, or as its lender describes it. A lent value that is
    /// described without strides has one dimension.
    pub(crate) fn value_shape(&self) -> Result<Vec<usize>> {
        Ok(self.shape_of(&self.lent(VALUE)?.layout))
    }

    /// The shape of a value that lies so.
    pub(crate) fn shape_of(&self, value: &ViewLayout) -> Vec<usize> {
        match (value.shape(), &self.shape) {
            (Some(shape), _) => shape.to_vec(),
            (None, Some(shape)) => shape.clone(),
            (None, None) => vec![value.len()],
        }
    }

    /// Where a buffer's memory is now.
    pub(crate) fn lent(&self, key: &str) -> Result<Lent> {
        let (parameter, key) = (|| self.label(), key);
        self.buffer(key)
            .ok_or_else(|| Error::MissingBuffer { parameter: parameter(), key: key.to_owned() })?
            .describe()
            .ok_or_else(|| Error::LenderGone { parameter: parameter(), key: key.to_owned() })
    }

    /// Where a buffer's memory is now; no element occurs in it twice.
    pub(crate) fn lent_for_writing(&self, key: &str) -> Result<Lent> {
        let lent = self.lent(key)?;
        if overlaps_itself(&extent(&lent)) {
            return Err(Error::Expanded { parameter: self.label(), key: key.to_owned() });
        }
        Ok(lent)
    }

    fn owned<T: Element>(&self, key: &str) -> Result<&[T]> {
        match self.buffer(key) {
            None => Err(Error::MissingBuffer { parameter: self.label(), key: key.to_owned() }),
            Some(Buffer::Borrowed(_)) => {
                Err(Error::NotOwned { parameter: self.label(), key: key.to_owned() })
            }
            Some(Buffer::Owned(buffer)) => {
                self.check_dtype::<T>(key, buffer.dtype())?;
                Ok(buffer.as_slice().expect("the dtype was checked"))
            }
        }
    }

    fn check_dtype<T: Element>(&self, key: &str, got: crate::DType) -> Result<()> {
        if got == T::DTYPE {
            return Ok(());
        }
        let (parameter, key) = (self.label(), key.to_owned());
        Err(Error::DTypeMismatch { parameter, key, expected: T::DTYPE, got })
    }
}

/// The memory that a buffer covers.
pub(crate) fn extent(lent: &Lent) -> Extent {
    let (shape, strides) = match &lent.layout {
        ViewLayout::Flat { len } => (vec![*len], row_major(&[*len])),
        ViewLayout::Strided { shape, strides } => (shape.clone(), strides.clone()),
    };
    let operand = lent.operand;
    Extent { start: operand.ptr.addr(), itemsize: operand.dtype.size_of(), shape, strides }
}

/// # Safety
/// The memory is readable and holds `T`s.
unsafe fn gather<T: Element>(lent: &Lent) -> Vec<T> {
    let steps: Steps<'_> = lent.layout.steps();
    let first: *const T = lent.operand.ptr.cast_const().cast();
    let mut values = Vec::with_capacity(lent.layout.len());
    for run in steps.runs(0..lent.layout.len()) {
        for i in 0..run.target.len() as isize {
            // SAFETY: an element of the layout.
            let element = unsafe { first.offset(run.offset + i * run.stride) };
            // SAFETY: readable; nothing is asked of its alignment.
            values.push(unsafe { element.read_unaligned() });
        }
    }
    values
}

/// # Safety
/// The memory is writable, holds `T`s, and as many as `values`.
unsafe fn scatter<T: Element>(values: &[T], lent: &Lent) {
    let first: *mut T = lent.operand.ptr.cast();
    for run in lent.layout.steps().runs(0..values.len()) {
        for (i, value) in values[run.target].iter().enumerate() {
            // SAFETY: an element of the layout.
            let element = unsafe { first.offset(run.offset + i as isize * run.stride) };
            // SAFETY: writable; nothing is asked of its alignment.
            unsafe { element.write_unaligned(*value) };
        }
    }
}
