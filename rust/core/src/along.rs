//! One buffer along the dimension of its rows.

use crate::{DType, Element, OwnedBuffer, bf16, f16};

/// How a value, or what is shaped like it, lies along the dimension of its rows.
pub(crate) struct Along {
    outer: usize,
    pub rows: usize,
    inner: usize,
}

impl Along {
    pub(crate) fn new(shape: &[usize], dim: usize) -> Self {
        let product = |sizes: &[usize]| sizes.iter().product();
        Self { outer: product(&shape[..dim]), rows: shape[dim], inner: product(&shape[dim + 1..]) }
    }

    /// Elements of so many rows.
    pub(crate) fn elements(&self, rows: usize) -> usize {
        self.outer * rows * self.inner
    }

    /// The rows `from`, in this order; zeros for `None`.
    pub(crate) fn gathered(&self, buffer: &OwnedBuffer, from: &[Option<usize>]) -> OwnedBuffer {
        let dtype = buffer.dtype();
        let (row, bytes) = (self.inner * dtype.size_of(), buffer.bytes());
        let mut new = OwnedBuffer::zeroed(dtype, self.elements(from.len()));
        if row == 0 {
            return new;
        }
        let places = (0..self.outer).flat_map(|outer| from.iter().map(move |from| (outer, from)));
        for (target, (outer, from)) in new.bytes_mut().chunks_exact_mut(row).zip(places) {
            if let Some(from) = from {
                let start = (outer * self.rows + from) * row;
                target.copy_from_slice(&bytes[start..start + row]);
            }
        }
        new
    }

    /// Writes the rows that come from none: `new` has as many of them, row-major, or one element
    /// that all of theirs are to be.
    pub(crate) fn fill(&self, buffer: &mut OwnedBuffer, from: &[Option<usize>], new: &[u8]) {
        let row = self.inner * buffer.dtype().size_of();
        if row == 0 || new.is_empty() {
            return;
        }
        let places = (0..self.outer).flat_map(|_| from.iter());
        let targets = buffer.bytes_mut().chunks_exact_mut(row).zip(places);
        let targets = targets.filter(|(_, from)| from.is_none()).map(|(target, _)| target);
        let sources = new.chunks(row).cycle();
        for (target, source) in targets.zip(sources) {
            for part in target.chunks_mut(source.len()) {
                part.copy_from_slice(source);
            }
        }
    }
}

/// The bytes of a number in this dtype.
pub(crate) fn number(dtype: DType, x: f64) -> Vec<u8> {
    fn bytes<T: Element>(x: f64) -> Vec<u8> {
        OwnedBuffer::copy_of(&[T::from_f64(x)]).bytes().to_vec()
    }
    match dtype {
        DType::F64 => bytes::<f64>(x),
        DType::F32 => bytes::<f32>(x),
        DType::Bf16 => bytes::<bf16>(x),
        DType::F16 => bytes::<f16>(x),
        // Codes, which mean no number without a scale: no value is kept in them.
        DType::E4M3 | DType::E5M3 | DType::E8M0 => Vec::new(),
    }
}
