//! The memory behind a value or a moment: owned by the store, or lent by another framework.

use std::alloc::{Layout as Allocation, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

use crate::{DType, Element, Operand, ViewLayout};

/// Cache lines and the widest vectors are this long.
const ALIGNMENT: usize = 64;

/// A dense, zeroed, 64-byte aligned array. The zeros come from the operating system, so that pages
/// never written cost nothing.
///
/// ```
/// use paramstate::{DType, OwnedBuffer};
///
/// let buffer = OwnedBuffer::zeroed(DType::F32, 3);
/// assert_eq!(buffer.as_slice::<f32>(), Some(&[0.0; 3][..]));
/// assert_eq!(buffer.as_slice::<f64>(), None);
/// ```
#[derive(Debug)]
pub struct OwnedBuffer {
    ptr: NonNull<u8>,
    dtype: DType,
    len: usize,
}

// SAFETY: the buffer owns its memory, whose elements are plain numbers.
unsafe impl Send for OwnedBuffer {}
// SAFETY: through a shared reference the memory is only read.
unsafe impl Sync for OwnedBuffer {}

impl OwnedBuffer {
    /// `len` zeros.
    ///
    /// # Panics
    /// If the size in bytes is more than an address can say. Running out of memory aborts, as for a `Vec`.
    #[must_use]
    pub fn zeroed(dtype: DType, len: usize) -> Self {
        let allocation = Self::allocation(dtype, len);
        if allocation.size() == 0 {
            // Aligned and never read: there are no elements.
            let ptr = NonNull::without_provenance(allocation.align().try_into().expect("not 0"));
            return Self { ptr, dtype, len };
        }
        // SAFETY: the size is not zero.
        let ptr = unsafe { alloc_zeroed(allocation) };
        let ptr = NonNull::new(ptr).unwrap_or_else(|| handle_alloc_error(allocation));
        Self { ptr, dtype, len }
    }

    /// A copy of `values`.
    #[must_use]
    pub fn copy_of<T: Element>(values: &[T]) -> Self {
        let mut buffer = Self::zeroed(T::DTYPE, values.len());
        buffer.as_mut_slice().expect("made with this dtype").copy_from_slice(values);
        buffer
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.len * self.dtype.size_of()
    }

    /// The elements, if they are `T`s.
    #[must_use]
    pub fn as_slice<T: Element>(&self) -> Option<&[T]> {
        // SAFETY: `len` elements of this dtype were allocated and zeroed, aligned to 64 bytes.
        (T::DTYPE == self.dtype)
            .then(|| unsafe { std::slice::from_raw_parts(self.ptr.as_ptr().cast(), self.len) })
    }

    /// The elements, if they are `T`s.
    #[must_use]
    pub fn as_mut_slice<T: Element>(&mut self) -> Option<&mut [T]> {
        // SAFETY: as in `as_slice`; the buffer is borrowed mutably for as long as the slice lives.
        (T::DTYPE == self.dtype)
            .then(|| unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr().cast(), self.len) })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: so many bytes were allocated and zeroed, and the elements are plain numbers.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.size_bytes()) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; any bytes are numbers, and the buffer is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.size_bytes()) }
    }

    /// The raw memory, valid for as long as the buffer lives.
    #[must_use]
    pub fn operand(&self) -> Operand {
        Operand { ptr: self.ptr.as_ptr(), dtype: self.dtype }
    }

    fn allocation(dtype: DType, len: usize) -> Allocation {
        len.checked_mul(dtype.size_of())
            .and_then(|size| Allocation::from_size_align(size, ALIGNMENT).ok())
            .expect("a buffer's size in bytes fits an address")
    }
}

impl Drop for OwnedBuffer {
    fn drop(&mut self) {
        let allocation = Self::allocation(self.dtype, self.len);
        if allocation.size() != 0 {
            // SAFETY: `zeroed` allocated this memory with the same size and alignment.
            unsafe { dealloc(self.ptr.as_ptr(), allocation) };
        }
    }
}

/// Memory that another framework owns. Its address is asked for at each use and never remembered,
/// because the owner may move it.
///
/// # Safety
/// What `describe` returns is valid for reads and writes of all its elements, by this crate alone,
/// until the store that asked has finished the call in which it asked.
pub unsafe trait Lender: Send + Sync {
    /// Where the memory is now; `None` once the owner has let go of it.
    fn describe(&self) -> Option<Lent>;
    /// Bytes, for the account of memory; 0 once the owner has let go.
    fn size_bytes(&self) -> usize;
}

/// What a [`Lender`] lends. A `Flat` layout means row-major: anything else is described by strides.
#[derive(Clone, Debug)]
pub struct Lent {
    /// The memory.
    pub operand: Operand,
    /// Its layout.
    pub layout: ViewLayout,
}

/// The memory behind a value or a moment.
pub enum Buffer {
    /// The store's own; dense and row-major.
    Owned(OwnedBuffer),
    /// Another framework's.
    Borrowed(Box<dyn Lender>),
}

impl Buffer {
    /// Where the memory is now, and its layout; `None` once a lender has let go of it.
    #[must_use]
    pub fn describe(&self) -> Option<Lent> {
        match self {
            Self::Owned(buffer) => Some(Lent {
                operand: buffer.operand(),
                layout: ViewLayout::Flat { len: buffer.len() },
            }),
            Self::Borrowed(lender) => lender.describe(),
        }
    }

    /// Bytes.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        match self {
            Self::Owned(buffer) => buffer.size_bytes(),
            Self::Borrowed(lender) => lender.size_bytes(),
        }
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Owned(buffer) => buffer.fmt(f),
            Self::Borrowed(lender) => f.debug_tuple("Borrowed").field(&lender.describe()).finish(),
        }
    }
}
