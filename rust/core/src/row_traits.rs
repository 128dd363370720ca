//! What differs between the rows of one parameter: how many steps each has taken, and whether it is
//! frozen.
//!
//! With the parameter's step `t`, row `r` has taken `t - offsets[r]` steps: a step of all rows leaves
//! the offsets as they are, and a row that sits one out gets one more.

use std::sync::{Arc, OnceLock};

use crate::{Cohorts, Entry, Error, Result};

/// The rows along one dimension, some of which lack steps or are frozen. Where none does and none
/// is, a parameter has no traits, and pays nothing.
#[derive(Clone, Debug)]
pub(crate) struct RowTraits {
    pub dim: usize,
    /// The value's.
    pub shape: Vec<usize>,
    /// What each row lacks of the parameter's steps.
    pub offsets: Vec<i64>,
    pub frozen: Vec<bool>,
    /// Those that are not frozen, by their offsets.
    cohorts: OnceLock<Arc<Cohorts>>,
}

impl RowTraits {
    pub(crate) fn new(dim: usize, shape: &[usize], offsets: Vec<i64>, frozen: Vec<bool>) -> Self {
        Self { dim, shape: shape.to_vec(), offsets, frozen, cohorts: OnceLock::new() }
    }

    /// Rows that have taken every step, none of them frozen.
    pub(crate) fn alike(dim: usize, shape: &[usize]) -> Self {
        Self::new(dim, shape, vec![0; shape[dim]], vec![false; shape[dim]])
    }

    /// The same rows of a value that has changed along another dimension.
    pub(crate) fn within(&self, shape: &[usize]) -> Self {
        Self { shape: shape.to_vec(), ..self.clone() }
    }

    /// The same rows, of which these are frozen.
    pub(crate) fn frozen_as(&self, frozen: Vec<bool>) -> Self {
        Self::new(self.dim, &self.shape, self.offsets.clone(), frozen)
    }

    /// As of a parameter that was never stepped: frozen rows stay so.
    pub(crate) fn begun_anew(self) -> Option<Self> {
        let offsets = vec![0; self.offsets.len()];
        let any = self.any_frozen();
        any.then(|| Self::new(self.dim, &self.shape, offsets, self.frozen))
    }

    pub(crate) fn any_frozen(&self) -> bool {
        self.frozen.contains(&true)
    }

    /// Where rows do not differ they have no traits, and the parameter's step is theirs.
    pub(crate) fn settled(self, step: u64) -> (u64, Option<Self>) {
        let first = self.offsets.first().copied().unwrap_or(0);
        if self.any_frozen() || self.offsets.iter().any(|offset| *offset != first) {
            return (step, Some(self));
        }
        (step.saturating_add_signed(-first), None)
    }

    /// Rows by their offsets; those that are frozen are skipped, and where some are named, all others.
    pub(crate) fn cohorts(&self, named: Option<&[bool]>) -> Arc<Cohorts> {
        let sorted = || Arc::new(Cohorts::new(&self.offsets, |row| self.skips(row, named)));
        match named {
            Some(_) => sorted(),
            None => Arc::clone(self.cohorts.get_or_init(sorted)),
        }
    }

    /// Counts a step that was taken by all rows but those that it skipped.
    pub(crate) fn age(&mut self, named: Option<&[bool]>) {
        for row in 0..self.offsets.len() {
            if self.skips(row, named) {
                self.offsets[row] += 1;
            }
        }
        if named.is_some() {
            // Frozen rows are in no cohort: their offsets alone do not change it.
            self.cohorts = OnceLock::new();
        }
    }

    fn skips(&self, row: usize, named: Option<&[bool]>) -> bool {
        self.frozen[row] || named.is_some_and(|named| !named[row])
    }
}

impl Entry {
    /// The traits of rows along `dim` of a value of this shape, made where there are none.
    ///
    /// # Errors
    /// [`Error::NoSuchDimension`], and [`Error::RowDimension`] where rows differ along another.
    pub(crate) fn traits_along(&self, dim: usize, shape: &[usize]) -> Result<RowTraits> {
        self.check_dim(dim, shape)?;
        self.check_row_dim(dim)?;
        Ok(self.rows.clone().unwrap_or_else(|| RowTraits::alike(dim, shape)))
    }

    /// That no rows along another dimension differ.
    pub(crate) fn check_row_dim(&self, dim: usize) -> Result<()> {
        match &self.rows {
            Some(rows) if rows.dim != dim => {
                Err(Error::RowDimension { parameter: self.label(), held: rows.dim, dim })
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn check_dim(&self, dim: usize, shape: &[usize]) -> Result<()> {
        if dim < shape.len() {
            return Ok(());
        }
        Err(Error::NoSuchDimension { parameter: self.label(), dim, shape: shape.to_vec() })
    }

    /// That there are so many rows.
    pub(crate) fn check_row_count(&self, dim: usize, shape: &[usize], got: usize) -> Result<()> {
        self.check_dim(dim, shape)?;
        if shape[dim] == got {
            return Ok(());
        }
        Err(Error::RowValues { parameter: self.label(), expected: shape[dim], got })
    }

    /// That all of these are among so many rows.
    pub(crate) fn check_rows(&self, index: &[usize], rows: usize) -> Result<()> {
        match index.iter().find(|&&row| row >= rows) {
            Some(&row) => Err(Error::NoSuchRow { parameter: self.label(), row, rows }),
            None => Ok(()),
        }
    }
}
