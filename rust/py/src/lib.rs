//! `paramstate._core`: reads torch tensors and NumPy arrays, and calls the `paramstate` crate.
//!
//! This crate converts and calls; what is a step, an overlap or an error is decided by the core, and what to do about it by
//! the Python package. It is the only crate that names pyo3.

use pyo3::prelude::*;

mod array;
mod array_bounds;
mod array_norms;
mod array_rows;
mod arrays;
mod declared;
mod dlpack;
mod error;
mod findings;
mod foresight;
mod geometry;
mod gradients;
mod group;
mod lender;
mod lending;
mod loans;
mod lookup;
mod memory;
mod outcome;
mod particular;
mod precision;
mod problem;
mod reading;
mod roster;
mod row_index;
mod running;
mod scaling;
mod sharing;
mod slots;
mod sorted_rows;
mod state;
mod store;
mod store_methods;
mod tensor;
mod tensors;
mod walk;
mod written_memory;

/// The name of the instruction set that the kernels run on here.
#[pyfunction]
fn isa() -> &'static str {
    paramstate::Isa::detect().name()
}

/// The compiled part of paramstate.
#[pymodule]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<store::Store>()?;
    module.add_class::<walk::Walk>()?;
    module.add_class::<outcome::Outcome>()?;
    module.add_class::<problem::Problem>()?;
    module.add_function(wrap_pyfunction!(tensor::connect, module)?)?;
    module.add_function(wrap_pyfunction!(tensor::connect_blockwise, module)?)?;
    module.add_function(wrap_pyfunction!(tensors::sum_of_squares, module)?)?;
    module.add_function(wrap_pyfunction!(tensors::scale_, module)?)?;
    module.add_function(wrap_pyfunction!(tensors::overlapping, module)?)?;
    module.add_function(wrap_pyfunction!(isa, module)?)
}
