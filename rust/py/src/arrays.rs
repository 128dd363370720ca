//! What `Store` does with NumPy arrays.

use numpy::{Element as NumpyElement, PyArray1, PyArrayMethods, PyUntypedArray};
use paramstate::{
    Adam, Buffer, DType, Element, Error, Gradient, Label, OwnedBuffer, ParamId, StepOptions, View,
    f16,
};
use pyo3::exceptions::{PyKeyError, PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping, PyTuple};

use crate::array::{self, Access};
use crate::error::to_python;
use crate::lender::Loan;
use crate::lookup::Key;
use crate::store::Store;

const MOMENTS: [&str; 3] = ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"];

/// Lends the store an array, after a look at it.
pub fn borrow(value: Bound<'_, PyAny>, name: Option<&str>) -> PyResult<Loan> {
    let label =
        name.map_or_else(|| "the value".to_owned(), |name| format!("the value of '{name}'"));
    array::describe(&value, &label, Access::Write)?;
    Ok(Loan::array(value.unbind()))
}

/// A parameter as an error names it.
pub fn label(py: Python<'_>, store: &Store, id: ParamId) -> Label {
    let loans = store.lock(py);
    let name = loans.core.names(id).ok().and_then(|names| names.first().cloned());
    Label { id, name }
}

/// The array that lends the value.
pub fn value<'py>(
    py: Python<'py>,
    store: &Store,
    id: ParamId,
) -> PyResult<Bound<'py, PyUntypedArray>> {
    let loan = store.lock(py).loan(id, "value").cloned();
    let Some(loan) = loan else {
        let (parameter, key) = (label(py, store, id), "value".to_owned());
        return Err(PyKeyError::new_err(Error::MissingBuffer { parameter, key }.to_string()));
    };
    loan.object().bind(py).clone().cast_into::<PyUntypedArray>().map_err(|_| {
        let label = label(py, store, id);
        PyTypeError::new_err(format!("the value of {label} is lent by a tensor; ask its optimizer"))
    })
}

/// A dimension counted from the front, of an array of this shape.
pub fn axis(
    py: Python<'_>,
    store: &Store,
    id: ParamId,
    shape: &[usize],
    dim: isize,
) -> PyResult<usize> {
    let place = if dim < 0 { dim + shape.len() as isize } else { dim };
    usize::try_from(place).ok().filter(|axis| *axis < shape.len()).ok_or_else(|| {
        let label = label(py, store, id);
        PyValueError::new_err(format!("{label} has shape {shape:?}, which has no dimension {dim}"))
    })
}

/// A state tensor's elements, copied out of the store.
enum Copied {
    F64(Vec<f64>),
    F32(Vec<f32>),
    F16(Vec<f16>),
}

impl Copied {
    fn of(buffer: &OwnedBuffer) -> Option<Self> {
        fn elements<T: Element>(buffer: &OwnedBuffer) -> Option<Vec<T>> {
            buffer.as_slice().map(<[T]>::to_vec)
        }
        match buffer.dtype() {
            DType::F64 => elements(buffer).map(Self::F64),
            DType::F32 => elements(buffer).map(Self::F32),
            DType::F16 => elements(buffer).map(Self::F16),
            DType::Bf16 | DType::E4M3 | DType::E5M3 | DType::E8M0 => None,
        }
    }

    fn into_array<'py>(self, py: Python<'py>, shape: &[usize]) -> PyResult<Bound<'py, PyAny>> {
        fn array<'py, T: NumpyElement>(
            py: Python<'py>,
            elements: Vec<T>,
            shape: &[usize],
        ) -> PyResult<Bound<'py, PyAny>> {
            Ok(PyArray1::from_vec(py, elements).reshape(shape)?.into_any())
        }
        match self {
            Self::F64(elements) => array(py, elements, shape),
            Self::F32(elements) => array(py, elements, shape),
            Self::F16(elements) => array(py, elements, shape),
        }
    }
}

/// Copies of the moments, and the step count.
pub fn state<'py>(py: Python<'py>, store: &Store, id: ParamId) -> PyResult<Bound<'py, PyDict>> {
    let shape = array::shape(value(py, store, id)?.as_any());
    let (step, moments) = {
        let loans = store.lock(py);
        let moments = MOMENTS.map(|key| match loans.core.buffer(id, key) {
            Some(Buffer::Owned(buffer)) => Copied::of(buffer),
            _ => None,
        });
        (loans.core.steps(id).map_err(to_python)?, moments)
    };
    let state = PyDict::new(py);
    for (key, moment) in MOMENTS.iter().zip(moments) {
        if let Some(moment) = moment {
            if state.is_empty() {
                state.set_item("step", step as f64)?;
            }
            state.set_item(key, moment.into_array(py, &shape)?)?;
        }
    }
    Ok(state)
}

/// Rows of one parameter that a step is for: a flag for each along a dimension.
pub struct Chosen {
    pub id: ParamId,
    pub axis: usize,
    pub flags: Vec<bool>,
}

/// Checks every gradient, and lets the core step.
pub fn step(
    py: Python<'_>,
    store: &Store,
    grads: &Bound<'_, PyMapping>,
    chosen: &[Chosen],
    adam: &Adam,
    options: &StepOptions,
) -> PyResult<Option<f64>> {
    // Holds the arrays until the step is done: the mapping is the caller's and may change meanwhile.
    let mut held: Vec<Bound<'_, PyAny>> = Vec::new();
    let mut gradients = Vec::new();
    for item in grads.items()?.iter() {
        let (key, grad): (Key, Bound<'_, PyAny>) = item.cast::<PyTuple>()?.extract()?;
        let id = store.find(py, &key)?;
        let gradient: Gradient<'_> = gradient(py, store, id, &grad)?;
        let gradient = match chosen.iter().find(|chosen| chosen.id == id) {
            Some(Chosen { axis, flags, .. }) => gradient.of_rows(*axis, flags),
            None => gradient,
        };
        gradients.push((id, gradient));
        held.push(grad);
    }
    let report = py.detach(|| store.lock_detached().core.step(&gradients, adam, options));
    Ok(report.map_err(to_python)?.grad_norm)
}

fn gradient(
    py: Python<'_>,
    store: &Store,
    id: ParamId,
    grad: &Bound<'_, PyAny>,
) -> PyResult<Gradient<'static>> {
    let expected = array::shape(value(py, store, id)?.as_any());
    let label = label(py, store, id);
    let lent = array::describe(grad, &format!("the gradient of {label}"), Access::Read)?;
    let got = array::shape(grad);
    if got != expected {
        let key = "grad".to_owned();
        return Err(to_python(Error::ShapeMismatch { parameter: label, key, expected, got }));
    }
    let view = View { operand: lent.operand, layout: lent.layout };
    // SAFETY: the caller holds the array until the step is done.
    Ok(unsafe { Gradient::from_view(view) })
}

/// Clips by a function from a copy of the value to what it becomes.
pub fn clip_with(
    py: Python<'_>,
    store: &Store,
    id: ParamId,
    function: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let value = value(py, store, id)?;
    let copy = value.call_method0(intern!(py, "copy"))?;
    let numpy = py.import(intern!(py, "numpy"))?;
    let result = numpy.call_method1(intern!(py, "asarray"), (function.call1((copy,))?,))?;
    let (expected, got) = (array::shape(value.as_any()), array::shape(&result));
    if expected != got {
        let (parameter, key) = (label(py, store, id), "value".to_owned());
        return Err(to_python(Error::ShapeMismatch { parameter, key, expected, got }));
    }
    let casting = PyDict::new(py);
    casting.set_item(intern!(py, "casting"), intern!(py, "same_kind"))?;
    numpy.call_method(intern!(py, "copyto"), (value, result), Some(&casting))?;
    Ok(())
}
