//! Why nothing was written. All of it is data; the Python layer words the errors.

use pyo3::prelude::*;

/// A parameter's place: the group, and the index in that group.
pub type Place = (usize, usize);

/// Why nothing was written, for one parameter.
#[pyclass(frozen, get_all, module = "paramstate._core")]
pub struct Problem {
    /// "state_shape", "grad_shape", "expanded", "overlap" or "state_overlap"; of what was declared: "rows_length",
    /// "rows_dtype", "rows_undeclared", "rows_ahead", "dim", "bound_shape", "bound_dtype" or "bound_overlap".
    pub kind: &'static str,
    /// The parameter's group.
    pub group: usize,
    /// The parameter's index in its group.
    pub index: usize,
    /// The tensor that it is about: "value", "grad", a name of a state tensor, or what was declared: "offsets",
    /// "frozen_rows", "rows", "min", "max" or "norm".
    pub key: &'static str,
    /// The parameter's shape; "rows_length": the number of rows; "rows_ahead": the steps taken.
    pub expected: Vec<i64>,
    /// The shape of the tensor named by `key`; "rows_ahead": the greatest offset; "dim": the dimension.
    pub got: Vec<i64>,
    /// The parameter whose memory is shared, for the kinds that end in "overlap".
    pub other: Option<Place>,
}

impl Problem {
    /// Of a parameter whose place is not known yet.
    #[cold]
    pub fn boxed(
        kind: &'static str,
        key: &'static str,
        expected: &[i64],
        got: &[i64],
    ) -> Box<Self> {
        let (expected, got) = (expected.to_vec(), got.to_vec());
        Box::new(Self { kind, group: 0, index: 0, key, expected, got, other: None })
    }
}

#[pymethods]
impl Problem {
    fn __repr__(&self) -> String {
        let Self { kind, group, index, key, expected, got, other } = self;
        format!(
            "Problem(kind='{kind}', group={group}, index={index}, key='{key}', expected={expected:?}, got={got:?}, other={other:?})"
        )
    }
}
