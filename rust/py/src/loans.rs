//! The core's store together with the Python objects that lend it memory.

use std::collections::HashMap;

use paramstate::{Buffer, Error, ParamId, Store};

use crate::lender::Loan;

/// What a `Store` keeps behind its lock. Python code is never run while the lock is held, so nothing in here creates or
/// drops a Python object: what is given up is handed to the caller.
#[derive(Default)]
pub struct Loans {
    pub core: Store,
    /// The loans that `core` holds, again: from here the objects can be found and shown to the garbage collector.
    of: HashMap<ParamId, Vec<(String, Loan)>>,
    revision: u64,
}

impl Loans {
    /// Changes whenever anything may have changed that a `Walk` remembers: loans, bounds, parameters.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Says that something has changed, and returns the new revision.
    pub fn revise(&mut self) -> u64 {
        self.revision += 1;
        self.revision
    }

    /// Puts a loan, or nothing, under a key; returns the loan that was there.
    pub fn exchange(
        &mut self,
        id: ParamId,
        key: &str,
        loan: Option<Loan>,
    ) -> Result<Option<Loan>, Error> {
        match &loan {
            Some(loan) => {
                drop(self.core.set_buffer(id, key, Buffer::Borrowed(Box::new(loan.clone())))?);
            }
            None => drop(self.core.take_buffer(id, key)?),
        }
        let held = self.of.entry(id).or_default();
        let former =
            held.iter().position(|(name, _)| name == key).map(|index| held.swap_remove(index).1);
        held.extend(loan.map(|loan| (key.to_owned(), loan)));
        Ok(former)
    }

    /// The loan under a key.
    pub fn loan(&self, id: ParamId, key: &str) -> Option<&Loan> {
        self.of.get(&id)?.iter().find(|(name, _)| name == key).map(|(_, loan)| loan)
    }

    /// The keys under which something is lent.
    pub fn lent_keys(&self, id: ParamId) -> Vec<String> {
        self.of.get(&id).into_iter().flatten().map(|(name, _)| name.clone()).collect()
    }

    /// Takes back every loan of a parameter that is about to go.
    pub fn take_all(&mut self, id: ParamId) -> Vec<(String, Loan)> {
        self.of.remove(&id).unwrap_or_default()
    }

    /// Forgets the state of a parameter; returns what was lent for it.
    pub fn reset(&mut self, id: ParamId) -> Result<Vec<(String, Loan)>, Error> {
        self.core.reset(id)?;
        let held = self.of.entry(id).or_default();
        let (value, state) =
            std::mem::take(held).into_iter().partition(|(name, _)| name == "value");
        *held = value;
        Ok(state)
    }

    /// Every loan.
    pub fn all(&self) -> impl Iterator<Item = &Loan> {
        self.of.values().flatten().map(|(_, loan)| loan)
    }
}
