//! Declared bounds of NumPy arrays: numbers, or arrays with a bound of each element.

use numpy::{Element as NumpyElement, PyArray1, PyArrayMethods, PyUntypedArray};
use paramstate::{Bounds, DType, Element, ParamId, f16};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::array::{self, Access};
use crate::arrays::value;
use crate::error::to_python;
use crate::store::Store;

type Sides<'py> = [Option<Bound<'py, PyAny>>; 2];

/// Declares bounds, and moves a registered array into them.
pub fn set(py: Python<'_>, store: &Store, id: ParamId, sides: Sides<'_>) -> PyResult<()> {
    let is_array = |side: &Bound<'_, PyAny>| side.cast::<PyUntypedArray>().is_ok();
    if !sides.iter().flatten().any(is_array) {
        let [min, max] = sides.map(|side| side.map(|number| number.extract()).transpose());
        let bounds = Bounds::new(min?, max?).map_err(to_python)?;
        return declare::<f64>(py, store, id, bounds, [None, None]);
    }
    let target = value(py, store, id)?;
    match array::describe(target.as_any(), "the value", Access::Read)?.operand.dtype {
        DType::F64 => of_each::<f64>(py, store, id, sides, &target),
        DType::F16 => of_each::<f16>(py, store, id, sides, &target),
        // No array is of the others.
        _ => of_each::<f32>(py, store, id, sides, &target),
    }
}

/// Bounds of each element, in the value's shape and dtype.
fn of_each<T: Element + NumpyElement>(
    py: Python<'_>,
    store: &Store,
    id: ParamId,
    sides: Sides<'_>,
    target: &Bound<'_, PyUntypedArray>,
) -> PyResult<()> {
    let numpy = py.import(intern!(py, "numpy"))?;
    let elements = |side: Bound<'_, PyAny>| -> PyResult<Vec<T>> {
        let shape = target.getattr(intern!(py, "shape"))?;
        let all = numpy.call_method1(intern!(py, "broadcast_to"), (side, shape))?;
        let dtype = PyDict::new(py);
        dtype.set_item(intern!(py, "dtype"), target.getattr(intern!(py, "dtype"))?)?;
        let flat = all.call_method0(intern!(py, "ravel"))?;
        let flat = numpy.call_method(intern!(py, "array"), (flat,), Some(&dtype))?;
        Ok(flat.cast_into::<PyArray1<T>>()?.to_vec()?)
    };
    let [min, max] = sides;
    let limits = [min.map(elements).transpose()?, max.map(elements).transpose()?];
    declare(py, store, id, Bounds::default(), limits)
}

fn declare<T: Element>(
    py: Python<'_>,
    store: &Store,
    id: ParamId,
    bounds: Bounds,
    limits: [Option<Vec<T>>; 2],
) -> PyResult<()> {
    py.detach(|| {
        let mut loans = store.lock_detached();
        loans.revise();
        let [min, max] = &limits;
        let none = min.is_none() && max.is_none();
        if !none || loans.core.has_element_bounds(id)? {
            loans.core.set_element_bounds(id, min.as_deref(), max.as_deref())?;
        }
        loans.core.set_bounds(id, bounds)?;
        let is_array = loans.loan(id, "value").is_some_and(|loan| loan.is_array());
        if is_array { loans.core.hold_bounds(id) } else { Ok(()) }
    })
    .map_err(to_python)
}

/// Lower and upper bounds.
pub type Arrays = (Option<Py<PyAny>>, Option<Py<PyAny>>);

/// The bounds of each element, in the value's shape.
pub fn get(py: Python<'_>, store: &Store, id: ParamId) -> PyResult<Arrays> {
    let (f64s, f32s, f16s) = {
        let loans = store.lock(py);
        let core = &loans.core;
        (copies::<f64>(core, id), copies::<f32>(core, id), copies::<f16>(core, id))
    };
    let [a, b, c] =
        [arrays(py, store, id, f64s)?, arrays(py, store, id, f32s)?, arrays(py, store, id, f16s)?];
    Ok((a.0.or(b.0).or(c.0), a.1.or(b.1).or(c.1)))
}

fn copies<T: Element>(core: &paramstate::Store, id: ParamId) -> [Option<Vec<T>>; 2] {
    core.element_bounds::<T>(id).map(|bound| bound.map(<[T]>::to_vec))
}

fn arrays<T: NumpyElement>(
    py: Python<'_>,
    store: &Store,
    id: ParamId,
    [min, max]: [Option<Vec<T>>; 2],
) -> PyResult<Arrays> {
    let array = |bound: Vec<T>| -> PyResult<Py<PyAny>> {
        let shape = array::shape(value(py, store, id)?.as_any());
        Ok(PyArray1::from_vec(py, bound).reshape(shape)?.into_any().unbind())
    };
    Ok((min.map(array).transpose()?, max.map(array).transpose()?))
}
