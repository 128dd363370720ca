//! The name of one logical parameter for its whole life: 63 bits that never change.

use std::fmt;
use std::num::NonZeroU64;

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// Keeps these hashes apart from every other use of SHA-256 over names.
const DOMAIN: &[u8] = b"paramstate parameter id v1\0";

/// An opaque parameter ID, 1 to `i64::MAX`, so that it also fits a signed 64-bit tensor element.
///
/// ```
/// use paramstate::ParamId;
///
/// let id = ParamId::derive("decoder.weight", 0);
/// assert_eq!(id, ParamId::derive("decoder.weight", 0)); // the same in every process
/// assert_ne!(id, ParamId::derive("decoder.weight", 1)); // the next one, should the first be taken
/// assert_eq!(ParamId::new(7)?.get(), 7); // an ID of one's own
/// assert!(ParamId::new(0).is_err());
/// # Ok::<(), paramstate::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ParamId(NonZeroU64);

impl ParamId {
    /// The ID with this number.
    ///
    /// # Errors
    /// [`Error::InvalidId`] for 0 and for anything above `i64::MAX`.
    pub fn new(id: u64) -> Result<Self> {
        match NonZeroU64::new(id) {
            Some(number) if i64::try_from(id).is_ok() => Ok(Self(number)),
            _ => Err(Error::InvalidId { got: id }),
        }
    }

    /// The ID that every process derives from this name. `counter` is 0 at first, and grows for as
    /// long as the derived ID is already taken (its owner was renamed).
    ///
    /// It is the first eight bytes, big-endian and without the sign bit, of the SHA-256 of a domain
    /// tag, the counter (four bytes, big-endian) and the name.
    #[must_use]
    pub fn derive(name: &str, counter: u32) -> Self {
        let digest = Sha256::new()
            .chain_update(DOMAIN)
            .chain_update(counter.to_be_bytes())
            .chain_update(name.as_bytes())
            .finalize();
        Self::from_bytes(digest[..8].try_into().expect("SHA-256 has 32 bytes"))
    }

    /// A random ID, for a parameter without a name.
    ///
    /// # Panics
    /// If the operating system has no random numbers to give.
    #[must_use]
    pub fn random() -> Self {
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
        Self::from_bytes(bytes)
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u64 {
        self.0.get()
    }

    /// 63 of the 64 bits; the one pattern that is no ID becomes the largest.
    fn from_bytes(bytes: [u8; 8]) -> Self {
        const LARGEST: NonZeroU64 = NonZeroU64::new(i64::MAX as u64).expect("not 0");
        Self(NonZeroU64::new(u64::from_be_bytes(bytes) & LARGEST.get()).unwrap_or(LARGEST))
    }
}

impl fmt::Display for ParamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_derived_id_never_changes_between_versions() {
        assert_eq!(ParamId::derive("layers.0.weight", 0).get(), EXPECTED[0]);
        assert_eq!(ParamId::derive("layers.0.weight", 1).get(), EXPECTED[1]);
    }

    /// `int.from_bytes(hashlib.sha256(DOMAIN + counter.to_bytes(4, "big") + name).digest()[:8], "big") & (2**63 - 1)`
    const EXPECTED: [u64; 2] = [4_825_011_487_852_216_103, 7_094_479_773_820_068_167];

    #[test]
    fn the_largest_id_is_the_largest_signed_number() {
        assert!(ParamId::new(i64::MAX as u64).is_ok());
        assert_eq!(
            ParamId::new(i64::MAX as u64 + 1),
            Err(Error::InvalidId { got: i64::MAX as u64 + 1 })
        );
    }

    #[test]
    fn no_bit_pattern_is_zero() {
        assert_eq!(ParamId::from_bytes([0; 8]).get(), i64::MAX as u64);
        assert_eq!(ParamId::from_bytes([0x80, 0, 0, 0, 0, 0, 0, 0]).get(), i64::MAX as u64);
    }
}
