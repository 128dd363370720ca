//! NumPy arrays as the core sees memory.

use numpy::npyffi::{NPY_ARRAY_WRITEABLE, NPY_TYPES};
use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use paramstate::{DType, Lent, Operand, ViewLayout, row_major};
use pyo3::Borrowed;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// What an array must allow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
}

/// Where an array's elements lie; an error that names it where they cannot be used.
pub fn describe(array: &Bound<'_, PyAny>, label: &str, access: Access) -> PyResult<Lent> {
    let array = array.cast::<PyUntypedArray>().map_err(|_| {
        let class =
            array.get_type().name().map_or_else(|_| "?".to_owned(), |name| name.to_string());
        PyTypeError::new_err(format!("{label} is a {class}; pass a numpy.ndarray"))
    })?;
    let Some(dtype) = dtype(array) else {
        return Err(PyTypeError::new_err(format!(
            "{label} has dtype {}; pass float64, float32 or float16 in the machine's byte order",
            array.dtype()
        )));
    };
    if access == Access::Write && !is_writable(array) {
        return Err(PyValueError::new_err(format!(
            "{label} is read-only, and it would be updated in place; pass a copy"
        )));
    }
    lent_as(array, dtype).ok_or_else(|| {
        PyValueError::new_err(format!(
            "{label} has strides {:?} in bytes, which are not whole elements; pass a copy",
            array.strides()
        ))
    })
}

/// What a lent array is now; `None` where its owner has changed it beyond use.
pub fn lent(array: Borrowed<'_, '_, PyAny>) -> Option<Lent> {
    let array = array.cast::<PyUntypedArray>().ok()?;
    let dtype = dtype(&array)?;
    if is_writable(&array) { lent_as(&array, dtype) } else { None }
}

/// How many bytes its elements take.
pub fn size_bytes(array: Borrowed<'_, '_, PyAny>) -> usize {
    array.cast::<PyUntypedArray>().map_or(0, |array| array.len() * array.dtype().itemsize())
}

/// The shape of an object that is known to be an array.
pub fn shape(array: &Bound<'_, PyAny>) -> Vec<usize> {
    array.cast::<PyUntypedArray>().map_or_else(|_| Vec::new(), |array| array.shape().to_vec())
}

fn dtype(array: &Bound<'_, PyUntypedArray>) -> Option<DType> {
    const DOUBLE: i32 = NPY_TYPES::NPY_DOUBLE as i32;
    const FLOAT: i32 = NPY_TYPES::NPY_FLOAT as i32;
    const HALF: i32 = NPY_TYPES::NPY_HALF as i32;
    let descriptor = array.dtype();
    let is_native = descriptor.is_native_byteorder().unwrap_or(false);
    match descriptor.num() {
        DOUBLE if is_native => Some(DType::F64),
        FLOAT if is_native => Some(DType::F32),
        HALF if is_native => Some(DType::F16),
        _ => None,
    }
}

fn is_writable(array: &Bound<'_, PyUntypedArray>) -> bool {
    // SAFETY: the pointer is that of an array that this reference keeps alive, and the interpreter is attached.
    let flags = unsafe { (*array.as_array_ptr()).fields.flags };
    flags & NPY_ARRAY_WRITEABLE != 0
}

/// `Flat` is of one dimension, without a gap; all else is given by its strides, which tell the shape.
fn lent_as(array: &Bound<'_, PyUntypedArray>, dtype: DType) -> Option<Lent> {
    // SAFETY: the pointer is that of an array that this reference keeps alive, and the interpreter is attached.
    let data = unsafe { (*array.as_array_ptr()).fields.data };
    let operand = Operand { ptr: data.cast(), dtype };
    let shape = array.shape();
    let strides = match (array.is_c_contiguous(), shape) {
        (true, [len]) => return Some(Lent { operand, layout: ViewLayout::Flat { len: *len } }),
        // What NumPy says of a dimension of one element is any number.
        (true, shape) => row_major(shape),
        (false, _) => {
            let itemsize = dtype.size_of() as isize;
            let whole = |&stride: &isize| (stride % itemsize == 0).then_some(stride / itemsize);
            array.strides().iter().map(whole).collect::<Option<_>>()?
        }
    };
    Some(Lent { operand, layout: ViewLayout::Strided { shape: shape.to_vec(), strides } })
}
