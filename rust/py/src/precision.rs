//! How the results of one parameter's step are stored: the task's `Precision`, from what was asked and what was read.

use paramstate::{DType, Layout, ParamId, Precision, Rounding, Scales, Stream, View, ViewLayout};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::geometry::{Density, Geometry};
use crate::tensor::Reading;

/// How values are rounded to 16 bits, as a step was asked.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Nearest,
    Stochastic,
    Kahan,
}

/// What a step was asked about rounding.
#[derive(Clone, Copy)]
pub struct Requested {
    pub kind: Kind,
    /// Of what is random.
    pub seed: u64,
}

impl Requested {
    pub fn new(rounding: Option<(String, u64)>) -> PyResult<Self> {
        let Some((kind, seed)) = rounding else { return Ok(Self { kind: Kind::Nearest, seed: 0 }) };
        let kind = match kind.as_str() {
            "nearest" => Kind::Nearest,
            "stochastic" => Kind::Stochastic,
            "kahan" => Kind::Kahan,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "rounding is \"nearest\", \"stochastic\" or \"kahan\", not {kind:?}"
                )));
            }
        };
        Ok(Self { kind, seed })
    }

    /// Whether a value of this dtype keeps what its rounding left over.
    pub fn keeps_what_is_left_over(self, value: DType) -> bool {
        self.kind == Kind::Kahan && value.size_of() == 2
    }
}

/// What is known of one parameter.
pub struct Known<'a> {
    pub requested: Requested,
    pub id: ParamId,
    pub value: &'a Reading<'a>,
    pub value_dtype: DType,
    pub moments: [Option<DType>; 3],
    pub left_over: Option<&'a Reading<'a>>,
    pub scales: Option<Scales>,
    pub layout: &'a Layout,
}

impl Known<'_> {
    /// The task's, if there is anything to say: moments that are narrower than their value are rounded at random, others
    /// as the value is.
    #[inline]
    pub fn precision(&self) -> Option<Box<Precision>> {
        let is_short = self.value_dtype.size_of() == 2;
        let kind = self.requested.kind;
        let moments = self.moments.iter().flatten().map(|dtype| dtype.size_of());
        let short = moments.filter(|&size| size == 2);
        let random_moments = if is_short { kind == Kind::Stochastic } else { short.count() > 0 };
        if (!is_short || kind == Kind::Nearest) && !random_moments && self.scales.is_none() {
            return None;
        }
        Some(Box::new(self.any_precision(random_moments)))
    }

    #[cold]
    fn any_precision(&self, random_moments: bool) -> Precision {
        let Requested { kind, seed } = self.requested;
        let value = match (kind, self.left_over) {
            _ if self.value_dtype.size_of() != 2 => Rounding::Nearest,
            (Kind::Stochastic, _) => Rounding::Stochastic,
            (Kind::Kahan, Some(left_over)) => Rounding::Kahan(self.view(left_over)),
            _ => Rounding::Nearest,
        };
        let stream = Stream::new(seed, self.id, 0, self.indices());
        Precision { value, random_moments, stream, scales: self.scales }
    }

    fn view(&self, reading: &Reading<'_>) -> View {
        let layout = match self.layout {
            Layout::Flat { len } => ViewLayout::Flat { len: *len },
            Layout::Strided(layout) => ViewLayout::Strided {
                shape: layout.shape.clone(),
                strides: reading.geometry.strides_vec(),
            },
        };
        // Its dtype was found to be the value's.
        let operand = reading.operand().expect("a floating tensor");
        View { operand, layout }
    }

    /// The logical index of each element in the order of the walk.
    fn indices(&self) -> ViewLayout {
        let Geometry { shape, strides } = self.value.geometry;
        let in_order = !matches!(self.layout, Layout::Flat { .. })
            || self.value.density == Density::Contiguous;
        if in_order {
            return ViewLayout::Flat { len: self.value.len };
        }
        let sizes: Vec<usize> = shape.iter().map(|&size| size as usize).collect();
        let logical = paramstate::row_major(&sizes);
        let mut order: Vec<usize> = (0..sizes.len()).collect();
        order.sort_by_key(|&dim| std::cmp::Reverse(strides[dim]));
        ViewLayout::along(order.into_iter().map(|dim| (sizes[dim], logical[dim])))
    }
}
