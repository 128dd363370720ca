//! What the store keeps for one parameter.

use crate::norms::HeldNorm;
use crate::row_traits::RowTraits;
use crate::{Bounds, Buffer, Label, OwnedBuffer, ParamId};

/// One parameter: its ID, its names, its bounds, and the buffers of its value and state.
///
/// ```
/// use paramstate::Store;
///
/// let mut store = Store::new();
/// let id = store.register_values(Some("weight"), None, &[2], &[1.0f32, 2.0])?;
/// let entry = store.remove(id)?;
/// assert_eq!((entry.id(), entry.names()), (id, &["weight".to_string()][..]));
/// assert_eq!(entry.keys().collect::<Vec<_>>(), ["value"]);
/// # Ok::<(), paramstate::Error>(())
/// ```
#[derive(Debug)]
pub struct Entry {
    id: ParamId,
    pub(crate) names: Vec<String>,
    pub(crate) bounds: Bounds,
    /// Of a value that the store owns; a lender describes its own.
    pub(crate) shape: Option<Vec<usize>>,
    /// Steps taken with the state held here.
    pub(crate) step: u64,
    /// Where rows differ in steps, or some are frozen.
    pub(crate) rows: Option<RowTraits>,
    /// Lower and upper bounds of each element, row-major.
    pub(crate) limits: [Option<OwnedBuffer>; 2],
    pub(crate) norm: Option<HeldNorm>,
    pub(crate) frozen: bool,
    buffers: Vec<(String, Buffer)>,
}

impl Entry {
    pub(crate) fn new(id: ParamId, name: Option<&str>) -> Self {
        Self {
            id,
            names: name.map(str::to_owned).into_iter().collect(),
            bounds: Bounds::default(),
            shape: None,
            step: 0,
            rows: None,
            limits: [None, None],
            norm: None,
            frozen: false,
            buffers: Vec::new(),
        }
    }

    /// The ID.
    #[must_use]
    pub fn id(&self) -> ParamId {
        self.id
    }

    /// The main name first, then aliases; empty for a nameless parameter.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// What holds for the value after every step.
    #[must_use]
    pub fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// The buffer called `key`: `"value"`, `"exp_avg"`, `"exp_avg_sq"`, `"max_exp_avg_sq"`, or
    /// whatever else was set.
    #[must_use]
    pub fn buffer(&self, key: &str) -> Option<&Buffer> {
        self.buffers.iter().find(|(held, _)| held == key).map(|(_, buffer)| buffer)
    }

    /// The keys of all buffers, in the order in which they were first set.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.buffers.iter().map(|(key, _)| key.as_str())
    }

    /// Bytes of all buffers.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.buffers.iter().map(|(_, buffer)| buffer.size_bytes()).sum()
    }

    pub(crate) fn buffer_mut(&mut self, key: &str) -> Option<&mut Buffer> {
        self.buffers.iter_mut().find(|(held, _)| held == key).map(|(_, buffer)| buffer)
    }

    pub(crate) fn set_buffer(&mut self, key: &str, buffer: Buffer) -> Option<Buffer> {
        match self.buffer_mut(key) {
            Some(held) => Some(std::mem::replace(held, buffer)),
            None => {
                self.buffers.push((key.to_owned(), buffer));
                None
            }
        }
    }

    pub(crate) fn take_buffer(&mut self, key: &str) -> Option<Buffer> {
        let index = self.buffers.iter().position(|(held, _)| held == key)?;
        Some(self.buffers.remove(index).1)
    }

    /// Leaves the value, and state as if never stepped. Rows stay frozen, unless they are no longer
    /// the value's.
    pub(crate) fn reset(&mut self) {
        self.buffers.retain(|(key, _)| key == crate::values::VALUE);
        self.step = 0;
        let shape = self.value_shape().ok();
        let rows = self.rows.take().filter(|rows| shape.as_ref() == Some(&rows.shape));
        self.rows = rows.and_then(RowTraits::begun_anew);
    }

    pub(crate) fn label(&self) -> Label {
        Label { id: self.id, name: self.names.first().cloned() }
    }
}
