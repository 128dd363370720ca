//! Bounds of NumPy arrays, declared or held once: numbers, or arrays with a bound of each element.

use numpy::{Element as NumpyElement, PyArray1, PyArrayMethods, PyUntypedArray};
use paramstate::{Bounds, DType, Element, Error, ParamId, Reach, f16};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::array::{self, Access};
use crate::arrays::{clip_with, label, value};
use crate::error::to_python;
use crate::store::Store;

/// Lower and upper bounds as they were given.
pub type Sides<'py> = [Option<Bound<'py, PyAny>>; 2];

/// What becomes of bounds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// They hold from now on.
    Declare,
    /// The value is moved into them, once.
    Clip,
}

/// Declares bounds, and moves a registered array into them.
pub fn set(py: Python<'_>, store: &Store, id: ParamId, sides: Sides<'_>) -> PyResult<()> {
    bound(py, store, id, sides, Purpose::Declare)
}

/// Moves an array into bounds; or, given neither, holds it to what is declared; or lets a function change it.
pub fn clip(py: Python<'_>, store: &Store, id: ParamId, sides: Sides<'_>) -> PyResult<()> {
    value(py, store, id)?;
    match &sides {
        [None, None] => hold(py, store, id),
        [Some(function), max] if function.is_callable() => match max {
            Some(_) => Err(PyTypeError::new_err("clip takes bounds or a function, not both")),
            None => clip_with(py, store, id, function),
        },
        _ => bound(py, store, id, sides, Purpose::Clip),
    }
}

/// Holds an array to what is declared for it, what is frozen too.
fn hold(py: Python<'_>, store: &Store, id: ParamId) -> PyResult<()> {
    let declared = {
        let core = &store.lock(py).core;
        let bounds = core.bounds(id).map(|bounds| !bounds.is_none());
        let limits = core.has_element_bounds(id);
        let norm = core.norm(id).map(|norm| norm.is_some());
        [bounds, limits, norm]
    };
    for declared in declared {
        if declared.map_err(to_python)? {
            let hold = || store.lock_detached().core.hold(id, Reach::All);
            return py.detach(hold).map_err(to_python);
        }
    }
    Err(PyValueError::new_err(format!(
        "{} has no declared bounds and no declared norm; pass min, max or a function, or call set_bounds first",
        label(py, store, id)
    )))
}

fn bound(
    py: Python<'_>,
    store: &Store,
    id: ParamId,
    sides: Sides<'_>,
    purpose: Purpose,
) -> PyResult<()> {
    let is_array = |side: &Bound<'_, PyAny>| side.cast::<PyUntypedArray>().is_ok();
    if !sides.iter().flatten().any(is_array) {
        let [min, max] = sides.map(|side| side.map(|number| number.extract()).transpose());
        let bounds = Bounds::new(min?, max?);
        let bounds = bounds.map_err(|error| named(py, store, id, &error))?;
        return match purpose {
            Purpose::Declare => declare::<f64>(py, store, id, bounds, [None, None]),
            Purpose::Clip => {
                py.detach(|| store.lock_detached().core.clip(id, bounds)).map_err(to_python)
            }
        };
    }
    let target = value(py, store, id)?;
    match array::describe(target.as_any(), "the value", Access::Read)?.operand.dtype {
        DType::F64 => of_each::<f64>(py, store, id, sides, &target, purpose),
        DType::F16 => of_each::<f16>(py, store, id, sides, &target, purpose),
        // No array is of the others.
        _ => of_each::<f32>(py, store, id, sides, &target, purpose),
    }
}

/// An error of the core that does not say which parameter it is about.
fn named(py: Python<'_>, store: &Store, id: ParamId, error: &Error) -> PyErr {
    PyValueError::new_err(format!("{}: {error}", label(py, store, id)))
}

/// Bounds of each element, in the value's shape and dtype.
fn of_each<T: Element + NumpyElement>(
    py: Python<'_>,
    store: &Store,
    id: ParamId,
    sides: Sides<'_>,
    target: &Bound<'_, PyUntypedArray>,
    purpose: Purpose,
) -> PyResult<()> {
    let numpy = py.import(intern!(py, "numpy"))?;
    let elements = |side: Bound<'_, PyAny>| -> PyResult<Vec<T>> {
        let shape = target.getattr(intern!(py, "shape"))?;
        let got = array::shape(&side);
        let all = numpy.call_method1(intern!(py, "broadcast_to"), (side, &shape));
        let all = all.map_err(|_| {
            PyValueError::new_err(format!(
                "{}: a bound of shape {got:?} does not broadcast to the value's shape {shape}",
                label(py, store, id)
            ))
        })?;
        let dtype = PyDict::new(py);
        dtype.set_item(intern!(py, "dtype"), target.getattr(intern!(py, "dtype"))?)?;
        let flat = all.call_method0(intern!(py, "ravel"))?;
        let flat = numpy.call_method(intern!(py, "array"), (flat,), Some(&dtype))?;
        Ok(flat.cast_into::<PyArray1<T>>()?.to_vec()?)
    };
    let [min, max] = sides;
    let limits = [min.map(elements).transpose()?, max.map(elements).transpose()?];
    match purpose {
        Purpose::Declare => declare(py, store, id, Bounds::default(), limits),
        Purpose::Clip => {
            let [min, max] = &limits;
            let clip = || store.lock_detached().core.clip_each(id, min.as_deref(), max.as_deref());
            py.detach(clip).map_err(to_python)
        }
    }
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
        if is_array { loans.core.hold(id, Reach::Unfrozen) } else { Ok(()) }
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
