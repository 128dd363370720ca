//! Asking for cold memory a little before it is read.
//!
//! After a backward pass nothing of an optimizer's tensors is in the caches, and reading one parameter waits for memory
//! a dozen times. Most of what it waits for lay in the same place at the last step: the Python objects, and torch's
//! descriptions of the tensors (their shapes are a part of them). A remembered address is only ever a hint: if it is
//! stale, a line is loaded for nothing.

use paramstate::prefetch;

use crate::roster::Row;

/// Rows ahead: far enough for a load from memory, near enough to stay in the first-level cache.
const AHEAD: usize = 4;

/// A description begins about one line before the shape in it, and ends about one line after.
const LINE: usize = 64;

/// Where torch described the tensors of each row at the last step.
#[derive(Default)]
pub struct Foresight {
    descriptions: Vec<Descriptions>,
}

/// The addresses of the shapes of value, step and both moments.
pub type Descriptions = [usize; 4];

impl Foresight {
    /// Makes room for so many rows.
    pub fn resize(&mut self, rows: usize) {
        self.descriptions.resize(rows, Descriptions::default());
    }

    /// Remembers where a row was described.
    #[inline]
    pub fn remember(&mut self, row: usize, descriptions: Descriptions) {
        if let Some(former) = self.descriptions.get_mut(row) {
            *former = descriptions;
        }
    }

    /// Asks for what the row after the next few will read.
    #[inline]
    pub fn look_ahead(&self, rows: &[Row], row: usize) {
        let next = row + AHEAD;
        let (Some(row), Some(descriptions)) = (rows.get(next), self.descriptions.get(next)) else {
            return;
        };
        row.lent.iter().for_each(|&object| prefetch(object));
        for shape in descriptions {
            prefetch(shape.wrapping_sub(LINE));
            prefetch(*shape);
            prefetch(shape.wrapping_add(LINE));
        }
    }
}
