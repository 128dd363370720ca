//! What a Python object lends the store: the object is kept, its address is asked for anew at each use.

use std::sync::Arc;

use paramstate::{Lender, Lent};
use pyo3::prelude::*;

use crate::array;
use crate::tensor::Torch;

/// A tensor or an array whose memory the store may use. Clones are one and the same loan.
#[derive(Clone)]
pub struct Loan(Arc<Lending>);

struct Lending {
    object: Py<PyAny>,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Tensor,
    Array,
}

impl Loan {
    pub fn tensor(object: Py<PyAny>) -> Self {
        Self(Arc::new(Lending { object, kind: Kind::Tensor }))
    }

    pub fn array(object: Py<PyAny>) -> Self {
        Self(Arc::new(Lending { object, kind: Kind::Array }))
    }

    /// The object that lends.
    pub fn object(&self) -> &Py<PyAny> {
        &self.0.object
    }

    pub fn is_array(&self) -> bool {
        matches!(self.0.kind, Kind::Array)
    }
}

// SAFETY: `describe` answers with what NumPy or torch says of the memory at this moment, and the object that owns it is
// kept by this loan.
unsafe impl Lender for Loan {
    fn describe(&self) -> Option<Lent> {
        Python::attach(|py| {
            let object = self.0.object.bind_borrowed(py);
            match self.0.kind {
                Kind::Array => array::lent(object),
                Kind::Tensor => {
                    // SAFETY: the reading is converted before any Python code runs.
                    let reading = unsafe { Torch::get(py).ok()?.read(object) }?;
                    let operand = reading.operand()?;
                    Some(Lent { operand, layout: reading.geometry.view_layout() })
                }
            }
        })
    }

    fn size_bytes(&self) -> usize {
        Python::attach(|py| {
            let object = self.0.object.bind_borrowed(py);
            match self.0.kind {
                Kind::Array => array::size_bytes(object),
                Kind::Tensor => Torch::get(py).map_or(0, |torch| torch.size_bytes(object)),
            }
        })
    }
}
