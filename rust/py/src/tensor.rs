//! One torch tensor, read without owning it.
//!
//! # What is read, and what is left to torch
//!
//! Only objects whose type is exactly `Tensor` or `Parameter` are read: a subclass may mean anything by its memory.
//! Left to torch, that is answered with `None`: other devices, dtypes without a kernel (complex, quantised, float8),
//! tensors without memory of their own (sparse, meta, functorch's wrappers, functional tensors, zero tensors, a freed
//! storage), and tensors whose negation is still pending.
//!
//! # The pending negation
//!
//! DLPack describes the memory, and a tensor with torch's negative bit means the negated memory. Asking `is_neg()` costs
//! as much as everything else that is read of a tensor, so it is asked only where it can be true: such a tensor is the
//! imaginary part of a conjugated complex tensor, whose elements are two apart; so a tensor of more than one element
//! whose memory is dense has no pending negation. (torch's private `_neg_view()` of a dense tensor is the exception.)

use std::ffi::c_void;
use std::slice;

use paramstate::{DType, Operand};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use pyo3::{Borrowed, ffi, intern};

use crate::dlpack::{self, Describe, DlDataType, DlTensor};
use crate::geometry::{Density, Geometry};

/// What `connect` was given, for the life of the process.
static TORCH: PyOnceLock<Torch> = PyOnceLock::new();

/// What `connect_blockwise` was given.
static BLOCKWISE: PyOnceLock<Py<PyType>> = PyOnceLock::new();

/// torch, as far as it is needed: two types and a C function.
pub struct Torch {
    tensor: Py<PyType>,
    parameter: Py<PyType>,
    describe: Describe,
}

/// An element of a tensor, as DLPack names it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Element {
    Float(DType),
    Int64,
    Int32,
    Bool,
    Byte,
}

/// What a tensor is made of; valid as long as no Python code runs.
#[derive(Clone, Copy)]
pub struct Reading<'a> {
    pub ptr: *mut u8,
    pub element: Element,
    pub geometry: Geometry<'a>,
    pub density: Density,
    pub len: usize,
    /// The address of the shape, wherever torch keeps it: a hint for `foresight`.
    pub described_at: usize,
}

impl Reading<'_> {
    /// The tensor as a kernel takes it, if there is a kernel for its dtype.
    pub fn operand(&self) -> Option<Operand> {
        match self.element {
            Element::Float(dtype) => Some(Operand { ptr: self.ptr, dtype }),
            Element::Int64 | Element::Int32 | Element::Bool | Element::Byte => None,
        }
    }

    pub fn itemsize(&self) -> usize {
        self.element.size()
    }

    /// Whether the layout leaves it open that the memory means its negation.
    pub fn may_be_negated(&self) -> bool {
        self.len == 1 || self.density == Density::Sparse
    }
}

impl Element {
    fn of(dtype: DlDataType) -> Option<Self> {
        const INT: u8 = 0;
        const UINT: u8 = 1;
        const FLOAT: u8 = 2;
        const BFLOAT: u8 = 4;
        const BOOL: u8 = 6;
        Some(match (dtype.code, dtype.bits, dtype.lanes) {
            (FLOAT, 32, 1) => Self::Float(DType::F32),
            (BFLOAT, 16, 1) => Self::Float(DType::Bf16),
            (FLOAT, 64, 1) => Self::Float(DType::F64),
            (FLOAT, 16, 1) => Self::Float(DType::F16),
            (INT, 64, 1) => Self::Int64,
            (INT, 32, 1) => Self::Int32,
            (BOOL, 8, 1) => Self::Bool,
            (UINT, 8, 1) => Self::Byte,
            _ => return None,
        })
    }

    /// Bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::Float(DType::F64) | Self::Int64 => 8,
            Self::Float(DType::F32) | Self::Int32 => 4,
            Self::Float(DType::Bf16 | DType::F16) => 2,
            Self::Float(DType::E4M3 | DType::E5M3 | DType::E8M0) | Self::Bool | Self::Byte => 1,
        }
    }
}

/// Tells this module what torch is. The package calls it once, when torch is imported.
///
/// Raises RuntimeError where the exchange table is of a version that is not known here.
#[pyfunction]
pub fn connect(
    tensor_type: &Bound<'_, PyType>,
    parameter_type: &Bound<'_, PyType>,
    exchange_api: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let torch = Torch {
        tensor: tensor_type.clone().unbind(),
        parameter: parameter_type.clone().unbind(),
        describe: dlpack::describe_function(exchange_api)?,
    };
    // A second call changes nothing: there is one torch in a process.
    let _ = TORCH.set(exchange_api.py(), torch);
    Ok(())
}

/// Tells this module which class holds moments in 8 bits: `codes` and `scales` are its attributes, uint8 tensors.
#[pyfunction]
pub fn connect_blockwise(blockwise_type: &Bound<'_, PyType>) {
    // A second call changes nothing: there is one such class in a process.
    let _ = BLOCKWISE.set(blockwise_type.py(), blockwise_type.clone().unbind());
}

/// The codes and the scales of a tensor of that class.
pub type Blockwise<'py> = [Bound<'py, PyAny>; 2];

/// What a tensor of that class holds; `None` for any other object. May run Python code.
#[inline]
pub fn blockwise<'py>(object: &Bound<'py, PyAny>) -> PyResult<Option<Blockwise<'py>>> {
    let py = object.py();
    match BLOCKWISE.get(py) {
        Some(kind) if object.get_type_ptr() == kind.as_ptr().cast() => {
            let part = |name| object.getattr(name);
            Ok(Some([part(intern!(py, "codes"))?, part(intern!(py, "scales"))?]))
        }
        _ => Ok(None),
    }
}

impl Torch {
    pub fn get(py: Python<'_>) -> PyResult<&Self> {
        TORCH.get(py).ok_or_else(|| {
            PyRuntimeError::new_err("connect(tensor_type, parameter_type, exchange_api) first")
        })
    }

    /// How many bytes the elements of a tensor take, on whatever device; 0 where DLPack cannot tell.
    pub fn size_bytes(&self, object: Borrowed<'_, '_, PyAny>) -> usize {
        let Some(out) = self.ask(object) else { return 0 };
        if out.ndim == 0 {
            return out.dtype.size();
        }
        // SAFETY: DLPack: `shape` points to `ndim` sizes when `ndim` is not 0, and nothing has run since it was filled in.
        let shape = unsafe { slice::from_raw_parts(out.shape, out.ndim as usize) };
        out.dtype.size() * shape.iter().map(|&size| size as usize).product::<usize>()
    }

    /// Whether `object` is a tensor of any class.
    pub fn is_tensor(&self, object: &Bound<'_, PyAny>) -> PyResult<bool> {
        object.is_instance(self.tensor.bind(object.py()).as_any())
    }

    /// Whether `object` is exactly a `Tensor` or a `Parameter`.
    pub fn is_plain(&self, object: Borrowed<'_, '_, PyAny>) -> bool {
        let kind = object.get_type_ptr();
        kind == self.parameter.as_ptr().cast() || kind == self.tensor.as_ptr().cast()
    }

    /// Reads a tensor in the host's memory; `None` for any other object. Clears the Python error, if any.
    ///
    /// # Safety
    ///
    /// The reading must not be used after Python code has run, which may resize the tensor. Where the answer is `Some`,
    /// the call itself has run none.
    pub unsafe fn read<'a>(&self, object: Borrowed<'a, '_, PyAny>) -> Option<Reading<'a>> {
        let out = self.ask(object)?;
        // SAFETY: `out` was just filled in for `object`, which lives for `'a` and is not resized before Python code runs.
        unsafe { reading(&out) }
    }

    /// What DLPack says of a tensor; `None` for objects of other types and where it refuses.
    #[inline]
    fn ask(&self, object: Borrowed<'_, '_, PyAny>) -> Option<DlTensor> {
        if !self.is_plain(object) {
            return None;
        }
        let mut out = DlTensor::empty();
        let pointer = object.as_ptr().cast::<c_void>();
        // SAFETY: `object` is of a type that the table was published on, and the interpreter is attached.
        let status = unsafe { (self.describe)(pointer, &mut out) };
        if status != 0 {
            drop(PyErr::take(object.py()));
            return None;
        }
        Some(out)
    }
}

/// # Safety
///
/// `out` was filled in by the exchange table, and its arrays stay as they are for `'a`.
unsafe fn reading<'a>(out: &DlTensor) -> Option<Reading<'a>> {
    if out.device.kind != dlpack::CPU {
        return None;
    }
    let element = Element::of(out.dtype)?;
    let rank = out.ndim as usize;
    let (shape, strides): (&[i64], &[i64]) = if rank == 0 {
        (&[], &[])
    } else {
        // SAFETY: DLPack: `shape` points to `ndim` sizes when `ndim` is not 0.
        let shape = unsafe { slice::from_raw_parts(out.shape, rank) };
        // SAFETY: DLPack 1.2 and later, and torch always: `strides` points to `ndim` strides when `ndim` is not 0.
        let strides = unsafe { slice::from_raw_parts(out.strides, rank) };
        (shape, strides)
    };
    let geometry = Geometry { shape, strides };
    let len = geometry.len();
    if out.data.is_null() && len != 0 {
        return None;
    }
    let ptr = out.data.cast::<u8>().wrapping_add(out.byte_offset as usize);
    Some(Reading {
        ptr,
        element,
        geometry,
        density: geometry.density(),
        len,
        described_at: out.shape.addr(),
    })
}

/// Whether the tensor's negation is still pending; a tensor that cannot answer is treated as if it were.
#[cold]
pub fn is_negated(tensor: Borrowed<'_, '_, PyAny>) -> bool {
    let py = tensor.py();
    let answer = tensor.call_method0(intern!(py, "is_neg")).and_then(|answer| answer.is_truthy());
    answer.unwrap_or(true)
}

/// The tensor's gradient, or `None`.
#[inline]
pub fn gradient<'py>(parameter: Borrowed<'_, 'py, PyAny>) -> PyResult<Option<Bound<'py, PyAny>>> {
    let grad = parameter.getattr(intern!(parameter.py(), "grad"))?;
    // SAFETY: reads the address of a static object.
    let none = unsafe { ffi::Py_None() };
    Ok((grad.as_ptr() != none).then_some(grad))
}
