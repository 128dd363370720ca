//! The order in which the groups of a held norm are walked.
//!
//! The dimensions are put into an order in which memory is walked well: those that the norm is not
//! over, then those that it is over, each with the widest strides first; but where the closest
//! neighbours in memory belong to different groups, their dimension comes last. Element `d` of
//! group `(o, k)` then stands at `(o * len + d) * width + k`, and a width of 1 means that each group
//! lies in one piece.

use std::ops::Range;
use std::sync::Arc;

use crate::codec::BLOCK;
use crate::element::Compute;
use crate::parallel::CHUNK;
use crate::rows::Rows;
use crate::side::Side;
use crate::{NormLimit, Projection, View, ViewLayout};

/// A projection with its dimensions in order.
pub(crate) struct Ordered {
    pub view: View,
    pub outer: usize,
    pub len: usize,
    width: usize,
    pub limit: NormLimit,
    pub rows: Option<Rows>,
}

/// What one thread does at a time.
pub(crate) enum Item {
    /// Whole groups, each in one piece.
    Groups(Range<usize>),
    /// Neighbouring groups of one outer index.
    Columns(usize, Range<usize>),
}

impl Ordered {
    pub(crate) fn new(projection: &Projection) -> Self {
        let Projection { operand, shape, strides, over, limit, rows } = projection;
        let mut dims: Vec<usize> = (0..shape.len()).filter(|&dim| shape[dim] != 1).collect();
        dims.sort_by_key(|&dim| std::cmp::Reverse(strides[dim].unsigned_abs()));
        let closest = dims.pop_if(|dim| !over[*dim]);
        let (within, between): (Vec<usize>, Vec<usize>) =
            dims.into_iter().partition(|&dim| over[dim]);
        // One group for all, or none over anything: any order will do.
        let (closest, between) = match closest {
            Some(dim) if within.is_empty() => (None, [between, vec![dim]].concat()),
            closest => (closest, between),
        };
        let size = |dims: &[usize]| dims.iter().map(|&dim| shape[dim]).product();
        let (outer, len) = (size(&between), size(&within));
        let width = closest.map_or(1, |dim| shape[dim]);
        let order: Vec<usize> = between.into_iter().chain(within).chain(closest).collect();
        let rows = rows.as_ref().map(|(dim, cohorts)| {
            let after = order.iter().skip_while(|place| *place != dim).skip(1);
            Rows { inner: after.map(|&dim| shape[dim]).product(), cohorts: Arc::clone(cohorts) }
        });
        let sizes = order.iter().map(|&dim| (shape[dim], strides[dim]));
        let view = View { operand: *operand, layout: ViewLayout::along(sizes) };
        Self { view, outer, len, width, limit: *limit, rows }
    }

    pub(crate) fn side<C: Compute>(&self) -> Side<'_> {
        Side::new::<C>(self.view.operand, self.view.layout.steps())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.outer * self.len * self.width == 0
    }

    /// Whether several threads had better share one group.
    pub(crate) fn is_large(&self) -> bool {
        self.width == 1 && self.len > CHUNK
    }

    pub(crate) fn items(&self) -> impl Iterator<Item = Item> {
        let groups = (CHUNK / self.len).max(1);
        let outer = self.outer;
        let whole = (0..if self.width == 1 { outer } else { 0 }).step_by(groups);
        let whole = whole.map(move |start| Item::Groups(start..outer.min(start + groups)));
        let width = self.width;
        let columns = (0..if width == 1 { 0 } else { outer }).flat_map(move |outer| {
            let tiles = (0..width).step_by(BLOCK);
            tiles.map(move |start| Item::Columns(outer, start..width.min(start + BLOCK)))
        });
        whole.chain(columns)
    }

    pub(crate) fn elements(&self, item: &Item) -> usize {
        match item {
            Item::Groups(groups) => groups.len() * self.len,
            Item::Columns(_, columns) => columns.len() * self.len,
        }
    }

    /// The elements of these columns, a block of them at a time: several rows where all columns of
    /// the row are among them.
    pub(crate) fn parts(
        &self,
        outer: usize,
        columns: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + Clone {
        let (len, width) = (self.len, self.width);
        let rows = if columns.len() == width { (BLOCK / width).max(1) } else { 1 };
        (0..len).step_by(rows).map(move |row| {
            let last = len.min(row + rows) - 1;
            let at = |row: usize, column: usize| (outer * len + row) * width + column;
            at(row, columns.start)..at(last, columns.end)
        })
    }
}
