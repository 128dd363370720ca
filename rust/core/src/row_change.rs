//! What can happen to the rows along one dimension, and where each row that there is to be comes from.

use std::collections::HashSet;

use crate::{Entry, Error, Result};

/// What happens to the rows along one dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowChange<'a> {
    /// These rows in this order take the place of all: some are left out, moved, or there twice.
    Gather(&'a [usize]),
    /// So many rows are added at the end. They are as new: state of zeros, and no steps taken.
    Append(usize),
    /// So many new rows are added in front of the others and behind them.
    Pad {
        /// In front.
        before: usize,
        /// Behind.
        after: usize,
    },
    /// There are to be so many: the last ones go, or new ones come behind.
    Resize(usize),
    /// The state of these rows becomes that of new ones; their values stay.
    Reset(&'a [usize]),
    /// Each row that there is to be takes the value of one row and the state of one, not always the
    /// same. `None` is a new one: its value is what the caller gives, its state is as new.
    From {
        /// Whose value.
        values: &'a [Option<usize>],
        /// Whose state; as many.
        state: &'a [Option<usize>],
    },
}

/// For each row that there is to be, where its value and its state come from.
pub(crate) struct RowMove {
    pub values: Vec<Option<usize>>,
    pub state: Vec<Option<usize>>,
    /// How many rows there were.
    rows: usize,
}

impl RowMove {
    fn new(change: RowChange<'_>, rows: usize) -> Self {
        let all = || (0..rows).map(Some);
        let new = |count| std::iter::repeat_n(None, count);
        let both = match change {
            RowChange::Gather(index) => index.iter().map(|&row| Some(row)).collect(),
            RowChange::Append(count) => all().chain(new(count)).collect(),
            RowChange::Pad { before, after } => {
                new(before).chain(all()).chain(new(after)).collect()
            }
            RowChange::Resize(size) => {
                all().take(size).chain(new(size.saturating_sub(rows))).collect()
            }
            RowChange::Reset(reset) => {
                let reset: HashSet<usize> = reset.iter().copied().collect();
                let kept = |row| (!reset.contains(&row)).then_some(row);
                return Self {
                    values: all().collect(),
                    state: (0..rows).map(kept).collect(),
                    rows,
                };
            }
            RowChange::From { values, state } => {
                return Self { values: values.to_vec(), state: state.to_vec(), rows };
            }
        };
        let both: Vec<Option<usize>> = both;
        Self { values: both.clone(), state: both, rows }
    }

    /// Whether all values stay what and where they are.
    pub(crate) fn keeps_values(&self) -> bool {
        self.keeps(&self.values)
    }

    /// Whether all state stays what and where it is.
    pub(crate) fn keeps_state(&self) -> bool {
        self.keeps(&self.state)
    }

    /// How many rows have a value that comes from none.
    pub(crate) fn new_values(&self) -> usize {
        self.values.iter().filter(|from| from.is_none()).count()
    }

    /// The rows whose bounds each takes: those of its value, else those of its state.
    pub(crate) fn bounds(&self) -> Option<Vec<Option<usize>>> {
        let known = self.values.iter().zip(&self.state).map(|(value, state)| value.or(*state));
        known.map(|from| from.map(Some)).collect()
    }

    fn keeps(&self, sources: &[Option<usize>]) -> bool {
        sources.iter().copied().eq((0..self.rows).map(Some))
    }
}

impl Entry {
    /// What a change means for so many rows, once it was checked.
    pub(crate) fn row_move(&self, change: RowChange<'_>, rows: usize) -> Result<RowMove> {
        match change {
            RowChange::Gather(index) | RowChange::Reset(index) => self.check_rows(index, rows)?,
            RowChange::From { values, state } => {
                let known = values.iter().chain(state).copied().flatten();
                self.check_rows(&known.collect::<Vec<_>>(), rows)?;
                if state.len() != values.len() {
                    let (expected, got) = (values.len(), state.len());
                    return Err(Error::RowValues { parameter: self.label(), expected, got });
                }
            }
            RowChange::Append(_) | RowChange::Pad { .. } | RowChange::Resize(_) => {}
        }
        Ok(RowMove::new(change, rows))
    }
}
