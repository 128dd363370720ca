//! The keeper of identity and state: every buffer under the ID of its parameter.

use std::collections::HashMap;

use crate::{Bounds, Buffer, Entry, Error, ParamId, Result};

/// Parameters by ID, each with its names and the buffers of its value and state.
///
/// An ID never changes. A name leads to one ID; a tied parameter has several names, the first of
/// which is its main one.
///
/// ```
/// use paramstate::Store;
///
/// let mut store = Store::new();
/// let id = store.register(Some("embed.weight"), None)?;
/// store.alias(id, "head.weight")?; // tied
/// store.rename("embed.weight", "tokens.weight")?;
/// assert_eq!(store.id("head.weight"), Some(id));
/// assert_eq!(store.names(id)?, ["tokens.weight", "head.weight"]);
/// # Ok::<(), paramstate::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct Store {
    /// In the order of registration.
    pub(crate) entries: Vec<Entry>,
    positions: HashMap<ParamId, usize>,
    by_name: HashMap<String, ParamId>,
}

impl Store {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A new parameter, without buffers. Without an `id`, one is derived from the name, with a
    /// counter that grows until the ID is free; a nameless parameter gets a random one.
    ///
    /// # Errors
    /// [`Error::NameTaken`], [`Error::IdTaken`].
    pub fn register(&mut self, name: Option<&str>, id: Option<ParamId>) -> Result<ParamId> {
        if let Some(name) = name {
            self.check_name_is_free(name)?;
        }
        let id = match id {
            Some(id) => self.check_id_is_free(id)?,
            None => self.free_id(name),
        };
        self.positions.insert(id, self.entries.len());
        self.entries.push(Entry::new(id, name));
        if let Some(name) = name {
            self.by_name.insert(name.to_owned(), id);
        }
        Ok(id)
    }

    /// Forgets a parameter and hands back what was kept for it. Its names and its ID become free.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn remove(&mut self, id: ParamId) -> Result<Entry> {
        let position = self.positions.remove(&id).ok_or(Error::UnknownId { id })?;
        for later in self.positions.values_mut().filter(|later| **later > position) {
            *later -= 1;
        }
        let entry = self.entries.remove(position);
        for name in &entry.names {
            self.by_name.remove(name);
        }
        Ok(entry)
    }

    /// The parameter that has this name, be it the main one or an alias.
    #[must_use]
    pub fn id(&self, name: &str) -> Option<ParamId> {
        self.by_name.get(name).copied()
    }

    /// The main name first, then aliases; empty for a nameless parameter.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn names(&self, id: ParamId) -> Result<&[String]> {
        Ok(&self.entry(id)?.names)
    }

    /// One more name for a parameter; the main one if it had none.
    ///
    /// # Errors
    /// [`Error::UnknownId`], [`Error::NameTaken`].
    pub fn alias(&mut self, id: ParamId, name: &str) -> Result<()> {
        self.entry(id)?;
        self.check_name_is_free(name)?;
        self.entry_mut(id)?.names.push(name.to_owned());
        self.by_name.insert(name.to_owned(), id);
        Ok(())
    }

    /// Another name in the place of `old`. The ID stays what it is.
    ///
    /// # Errors
    /// [`Error::UnknownName`], [`Error::NameTaken`].
    pub fn rename(&mut self, old: &str, new: &str) -> Result<()> {
        let id = self.id(old).ok_or_else(|| Error::UnknownName { name: old.to_owned() })?;
        if old == new {
            return Ok(());
        }
        self.check_name_is_free(new)?;
        for name in self.entry_mut(id)?.names.iter_mut().filter(|name| *name == old) {
            *name = new.to_owned();
        }
        self.by_name.remove(old);
        self.by_name.insert(new.to_owned(), id);
        Ok(())
    }

    /// Takes one name away, be it the main one (the next takes its place) or an alias. The ID stays.
    ///
    /// # Errors
    /// [`Error::UnknownName`].
    ///
    /// ```
    /// let mut store = paramstate::Store::new();
    /// let id = store.register(Some("head.weight"), None)?;
    /// store.alias(id, "embed.weight")?;
    /// store.unalias("head.weight")?;
    /// assert_eq!(store.names(id)?, ["embed.weight"]);
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn unalias(&mut self, name: &str) -> Result<()> {
        let id = self.id(name).ok_or_else(|| Error::UnknownName { name: name.to_owned() })?;
        self.entry_mut(id)?.names.retain(|held| held != name);
        self.by_name.remove(name);
        Ok(())
    }

    /// Whether there is a parameter with this ID.
    #[must_use]
    pub fn contains(&self, id: ParamId) -> bool {
        self.positions.contains_key(&id)
    }

    /// All IDs, in the order of registration.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = ParamId> {
        self.entries.iter().map(Entry::id)
    }

    /// How many parameters there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What is kept for a parameter.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn entry(&self, id: ParamId) -> Result<&Entry> {
        self.position(id).map(|position| &self.entries[position])
    }

    /// The buffer called `key`; `None` also where the ID is unknown.
    #[must_use]
    pub fn buffer(&self, id: ParamId, key: &str) -> Option<&Buffer> {
        self.entry(id).ok()?.buffer(key)
    }

    /// Keeps a buffer under `key`, and returns the one that it takes the place of. Shapes are
    /// compared when they are used, by `step`.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn set_buffer(&mut self, id: ParamId, key: &str, buffer: Buffer) -> Result<Option<Buffer>> {
        let entry = self.entry_mut(id)?;
        if key == crate::values::VALUE {
            entry.shape = None; // that of the value which goes
        }
        Ok(entry.set_buffer(key, buffer))
    }

    /// Gives up a buffer; `None` if there was none.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn take_buffer(&mut self, id: ParamId, key: &str) -> Result<Option<Buffer>> {
        Ok(self.entry_mut(id)?.take_buffer(key))
    }

    /// The keys of a parameter's buffers.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn keys(&self, id: ParamId) -> Result<impl Iterator<Item = &str>> {
        Ok(self.entry(id)?.keys())
    }

    /// The bounds that every step keeps.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn bounds(&self, id: ParamId) -> Result<Bounds> {
        Ok(self.entry(id)?.bounds)
    }

    /// Declares bounds that every later step keeps, at no extra pass over memory. They take the place
    /// of a norm. The value as it is now is left alone: [`Store::hold`] moves it.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn set_bounds(&mut self, id: ParamId, bounds: Bounds) -> Result<()> {
        let entry = self.entry_mut(id)?;
        entry.bounds = bounds;
        if !bounds.is_none() {
            entry.norm = None;
        }
        Ok(())
    }

    /// Bytes of all buffers, owned and lent.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.entries.iter().map(Entry::memory_bytes).sum()
    }

    /// Bytes of one parameter's buffers.
    ///
    /// # Errors
    /// [`Error::UnknownId`].
    pub fn memory_bytes_of(&self, id: ParamId) -> Result<usize> {
        Ok(self.entry(id)?.memory_bytes())
    }

    pub(crate) fn position(&self, id: ParamId) -> Result<usize> {
        self.positions.get(&id).copied().ok_or(Error::UnknownId { id })
    }

    pub(crate) fn entry_mut(&mut self, id: ParamId) -> Result<&mut Entry> {
        self.position(id).map(|position| &mut self.entries[position])
    }

    fn check_name_is_free(&self, name: &str) -> Result<()> {
        match self.id(name) {
            Some(id) => {
                Err(Error::NameTaken { name: name.to_owned(), owner: self.entry(id)?.label() })
            }
            None => Ok(()),
        }
    }

    fn check_id_is_free(&self, id: ParamId) -> Result<ParamId> {
        match self.entry(id) {
            Ok(entry) => Err(Error::IdTaken { owner: entry.label() }),
            Err(_) => Ok(id),
        }
    }

    fn free_id(&self, name: Option<&str>) -> ParamId {
        let mut counter = 0;
        loop {
            let id = name.map_or_else(ParamId::random, |name| ParamId::derive(name, counter));
            if !self.contains(id) {
                return id;
            }
            counter += 1;
        }
    }
}
