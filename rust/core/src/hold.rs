//! What is declared for a value, held at once and not only after a step.

use std::num::NonZeroUsize;
use std::ops::Range;

use crate::row_traits::RowTraits;
use crate::values::VALUE;
use crate::{
    Bounds, Element, Execution, Lent, Operand, OwnedBuffer, ParamId, Result, Store, View,
    ViewLayout, elementwise, project, row_major,
};

/// Whether what is frozen is held to what is declared for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// All of the value is.
    All,
    /// A frozen parameter is not, and frozen rows are not, as in a step.
    Unfrozen,
}

impl Store {
    /// Holds the value to what is declared for it, once: moves each element into its bounds, scales
    /// what has another norm. ID, moments and steps stay.
    ///
    /// # Errors
    /// [`Error::UnknownId`](crate::Error::UnknownId),
    /// [`Error::MissingBuffer`](crate::Error::MissingBuffer),
    /// [`Error::LenderGone`](crate::Error::LenderGone), [`Error::Expanded`](crate::Error::Expanded), and
    /// [`Error::ShapeMismatch`](crate::Error::ShapeMismatch) where the value has changed its shape since.
    ///
    /// ```
    /// use paramstate::{Bounds, Reach, Store};
    ///
    /// let mut store = Store::new();
    /// let id = store.register_values(None, None, &[2], &[5.0f32, 5.0])?;
    /// store.set_bounds(id, Bounds::new(None, Some(1.0))?)?;
    /// store.freeze_rows(&[id], 0, &[1])?;
    /// store.hold(id, Reach::Unfrozen)?;
    /// assert_eq!(store.values::<f32>(id)?, [1.0, 5.0]);
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn hold(&mut self, id: ParamId, reach: Reach) -> Result<()> {
        let entry = self.entry_mut(id)?;
        let value = entry.lent_for_writing(VALUE)?;
        let shape = entry.shape_of(&value.layout);
        entry.check_declared(&shape)?;
        if reach == Reach::Unfrozen && entry.frozen {
            return Ok(());
        }
        let rows = entry.rows.as_ref();
        let resting = rows.filter(|rows| reach == Reach::Unfrozen && rows.any_frozen());
        let limits = entry.limit_views();
        if !entry.bounds.is_none() || limits.iter().any(Option::is_some) {
            let part = |range: Option<Range<usize>>| {
                let of = |view: View| part_of(view, &shape, resting.zip(range.clone()));
                let Lent { operand, layout } = value.clone();
                (of(View { operand, layout }), limits.clone().map(|limit| limit.map(of)))
            };
            let parts: Vec<_> = match resting {
                Some(rows) => free_runs(&rows.frozen).map(Some).map(part).collect(),
                None => vec![part(None)],
            };
            for (view, limits) in parts {
                // SAFETY: the value is the entry's own, or lent for the length of this call; no
                // element occurs twice in it, the bounds are as many, and the store is borrowed mutably.
                unsafe { elementwise::clamp_each(&view, entry.bounds, limits, &alone()) };
            }
        }
        let skipped = resting.map(|rows| (rows.dim, rows.cohorts(None)));
        if let Some(projection) = entry.projection(&value, skipped) {
            // SAFETY: as above; shape and strides are the value's, `check_declared` found the norm's
            // dimensions among them and as many rows as cohorts.
            unsafe { project(&[&projection], &alone()) };
        }
        Ok(())
    }

    /// Moves each element into bounds of its own, row-major and as many as the value has, once;
    /// nothing is declared. ID, moments and steps stay.
    ///
    /// # Errors
    /// Those of [`Store::set_element_bounds`], and [`Error::Expanded`](crate::Error::Expanded).
    ///
    /// ```
    /// let mut store = paramstate::Store::new();
    /// let id = store.register_values(None, None, &[2], &[5.0f32, 5.0])?;
    /// store.clip_each(id, None, Some(&[1.0f32, 2.0]))?;
    /// assert_eq!(store.values::<f32>(id)?, [1.0, 2.0]);
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn clip_each<T: Element>(
        &mut self,
        id: ParamId,
        min: Option<&[T]>,
        max: Option<&[T]>,
    ) -> Result<()> {
        let entry = self.entry_mut(id)?;
        let Lent { operand, layout } = entry.lent_for_writing(VALUE)?;
        entry.check_element_bounds(&entry.shape_of(&layout), [min, max])?;
        let copies = [min, max].map(|bound| bound.map(OwnedBuffer::copy_of));
        let limits = copies.each_ref().map(|bound| bound.as_ref().map(whole));
        let view = View { operand, layout };
        // SAFETY: as in `hold`.
        unsafe { elementwise::clamp_each(&view, Bounds::default(), limits, &alone()) };
        Ok(())
    }
}

/// On the calling thread: what is done once is not worth waking others.
fn alone() -> Execution {
    Execution::new(NonZeroUsize::MIN)
}

/// All of a buffer.
pub(crate) fn whole(buffer: &OwnedBuffer) -> View {
    View { operand: buffer.operand(), layout: ViewLayout::Flat { len: buffer.len() } }
}

/// Neighbouring rows that are not frozen.
fn free_runs(frozen: &[bool]) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        start += frozen[start..].iter().position(|frozen| !frozen)?;
        let rest = &frozen[start..];
        let end = start + rest.iter().position(|frozen| *frozen).unwrap_or(rest.len());
        Some(std::mem::replace(&mut start, end)..end)
    })
}

/// Some rows of a tensor of this shape, or all of it.
fn part_of(view: View, shape: &[usize], rows: Option<(&RowTraits, Range<usize>)>) -> View {
    let Some((traits, range)) = rows else { return view };
    let strides = match view.layout {
        ViewLayout::Strided { strides, .. } => strides,
        ViewLayout::Flat { .. } => row_major(shape),
    };
    let (dim, dtype) = (traits.dim, view.operand.dtype);
    let bytes = range.start as isize * strides[dim] * dtype.size_of() as isize;
    let operand = Operand { ptr: view.operand.ptr.wrapping_offset(bytes), dtype };
    let size = |place: usize| if place == dim { range.len() } else { shape[place] };
    let sizes = (0..shape.len()).map(|place| (size(place), strides[place]));
    View { operand, layout: ViewLayout::along(sizes) }
}
