//! Where the elements of a tensor lie in memory, and the walk over them in logical order.

use std::ops::Range;

use crate::DType;

/// The raw memory of one tensor: the address of its first element, and what an element is.
///
/// ```
/// use paramstate::{DType, Operand};
///
/// let mut values = [1.0f32, 2.0];
/// let operand = Operand { ptr: values.as_mut_ptr().cast(), dtype: DType::F32 };
/// assert_eq!(operand.dtype.size_of(), 4);
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// The first element; may be null where there are no elements.
    pub ptr: *mut u8,
    /// The element type.
    pub dtype: DType,
}

// SAFETY: an `Operand` is an address; only `unsafe` functions read or write what lies there, and
// their contracts say who else may.
unsafe impl Send for Operand {}
// SAFETY: as for `Send`.
unsafe impl Sync for Operand {}

/// The common layout of the operands of one update.
#[derive(Clone, Debug)]
pub enum Layout {
    /// All operands share one dense layout, whatever its order of dimensions: a flat loop is right.
    Flat {
        /// Elements.
        len: usize,
    },
    /// Each operand has strides of its own.
    Strided(Box<StridedLayout>),
}

/// One shape, and strides in elements for each operand. The gradient's may be 0; those of the
/// operands that are written may not lead to one element twice.
#[derive(Clone, Debug, Default)]
pub struct StridedLayout {
    /// The shape of all operands.
    pub shape: Vec<usize>,
    /// Of the value.
    pub value: Vec<isize>,
    /// Of the gradient.
    pub grad: Vec<isize>,
    /// Of the first moment.
    pub exp_avg: Vec<isize>,
    /// Of the second moment.
    pub exp_avg_sq: Vec<isize>,
    /// Of the maximum of the second moment; unused without one.
    pub max_exp_avg_sq: Vec<isize>,
}

impl Layout {
    /// Elements of each operand.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Flat { len } => *len,
            Self::Strided(layout) => layout.shape.iter().product(),
        }
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// One tensor by itself.
#[derive(Clone, Debug)]
pub struct View {
    /// Its memory.
    pub operand: Operand,
    /// Its layout.
    pub layout: ViewLayout,
}

/// The layout of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ViewLayout {
    /// Dense. Where the order of elements matters (a value and its gradient lent to the store): row-major,
    /// and of one dimension; by strides, a dense value has as many as it has.
    Flat {
        /// Elements.
        len: usize,
    },
    /// By strides.
    Strided {
        /// The shape.
        shape: Vec<usize>,
        /// Elements to the next index, for each dimension.
        strides: Vec<isize>,
    },
}

impl ViewLayout {
    /// A walk along these dimensions, each a size and a stride, the last one fastest. Neighbours
    /// that are walked as one dimension become one, so that runs are as long as they can be.
    ///
    /// ```
    /// use paramstate::ViewLayout;
    ///
    /// assert_eq!(ViewLayout::along([(2, 12), (3, 4), (4, 1)]), ViewLayout::Flat { len: 24 });
    /// let (shape, strides) = (vec![3, 4], vec![0, 1]);
    /// assert_eq!(ViewLayout::along([(3, 0), (4, 1)]), ViewLayout::Strided { shape, strides });
    /// ```
    #[must_use]
    pub fn along(dimensions: impl IntoIterator<Item = (usize, isize)>) -> Self {
        let (mut shape, mut strides): (Vec<usize>, Vec<isize>) = (Vec::new(), Vec::new());
        for (size, stride) in dimensions.into_iter().filter(|(size, _)| *size != 1) {
            match (shape.last_mut(), strides.last_mut()) {
                (Some(last), Some(reach)) if *reach == stride * size as isize => {
                    *last *= size;
                    *reach = stride;
                }
                _ => {
                    shape.push(size);
                    strides.push(stride);
                }
            }
        }
        match (shape.as_slice(), strides.as_slice()) {
            ([], _) => Self::Flat { len: 1 },
            ([len], [1]) => Self::Flat { len: *len },
            _ => Self::Strided { shape, strides },
        }
    }

    /// Elements.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::Flat { len } => *len,
            Self::Strided { shape, .. } => shape.iter().product(),
        }
    }

    /// Whether there are no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The shape, where it is by strides.
    pub(crate) fn shape(&self) -> Option<&[usize]> {
        match self {
            Self::Strided { shape, .. } => Some(shape),
            Self::Flat { .. } => None,
        }
    }

    pub(crate) fn steps(&self) -> Steps<'_> {
        match self {
            Self::Flat { .. } => Steps::Dense,
            Self::Strided { shape, strides } => Steps::Strided { shape, strides },
        }
    }
}

/// Strides in elements of a row-major tensor.
///
/// ```
/// assert_eq!(paramstate::row_major(&[2, 3, 4]), [12, 4, 1]);
/// ```
#[must_use]
pub fn row_major(shape: &[usize]) -> Vec<isize> {
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i].max(1) as isize;
    }
    strides
}

/// How one operand's elements follow each other.
#[derive(Clone, Copy)]
pub(crate) enum Steps<'a> {
    Dense,
    Strided { shape: &'a [usize], strides: &'a [isize] },
}

/// Elements at one distance from each other.
pub(crate) struct Run {
    /// Of the first, in elements from the operand's address.
    pub offset: isize,
    pub stride: isize,
    /// Which of the elements asked for these are.
    pub target: Range<usize>,
}

impl<'a> Steps<'a> {
    /// The elements `span` in logical order, as runs along the last dimension.
    pub(crate) fn runs(self, span: Range<usize>) -> Runs<'a> {
        Runs { steps: self, start: span.start, next: span.start, end: span.end }
    }
}

pub(crate) struct Runs<'a> {
    steps: Steps<'a>,
    start: usize,
    next: usize,
    end: usize,
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        if self.next == self.end {
            return None;
        }
        let first = self.next;
        let (offset, stride, len) = match self.steps {
            Steps::Dense => (first as isize, 1, self.end - first),
            Steps::Strided { shape, strides } => {
                let (offset, left_in_row) = locate(shape, strides, first);
                let stride = strides.last().copied().unwrap_or(1);
                (offset, stride, left_in_row.min(self.end - first))
            }
        };
        self.next += len;
        Some(Run { offset, stride, target: first - self.start..self.next - self.start })
    }
}

/// The offset of a logical index, and how many elements of the last dimension are left from it on.
fn locate(shape: &[usize], strides: &[isize], index: usize) -> (isize, usize) {
    let mut rest = index;
    let mut offset = 0;
    for (&size, &stride) in shape.iter().zip(strides).rev() {
        offset += (rest % size) as isize * stride;
        rest /= size;
    }
    let row = shape.last().copied().unwrap_or(1);
    (offset, row - index % row)
}
