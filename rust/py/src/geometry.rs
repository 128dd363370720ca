//! Shapes and strides as they were read: when two layouts agree, and what they are in the core's words.

use paramstate::{Extent, ViewLayout};

/// Shape and strides (in elements) of one tensor, as lent by its owner for as long as no Python code runs.
#[derive(Clone, Copy)]
pub struct Geometry<'a> {
    pub shape: &'a [i64],
    pub strides: &'a [i64],
}

/// What one look at the strides tells.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Density {
    /// Row after row without a gap: the layout follows from the shape.
    Contiguous,
    /// Every byte of one range belongs to exactly one element, in another order of dimensions.
    Permuted,
    /// Gaps, or elements that share memory.
    Sparse,
}

impl Geometry<'_> {
    /// The number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().map(|&size| size as usize).product()
    }

    pub fn density(&self) -> Density {
        let mut expected = 1;
        for (&size, &stride) in self.shape.iter().zip(self.strides).rev() {
            if size != 1 && stride != expected {
                return self.density_in_any_order();
            }
            expected *= size;
        }
        Density::Contiguous
    }

    /// Takes away, one after another, the dimension whose stride continues what is covered so far.
    #[cold]
    fn density_in_any_order(&self) -> Density {
        if self.shape.contains(&0) {
            return Density::Contiguous;
        }
        let mut left: Vec<(i64, i64)> = self.wide().collect();
        left.sort_unstable();
        let mut expected = 1;
        for (stride, size) in left {
            if stride != expected {
                return Density::Sparse;
            }
            expected *= size;
        }
        Density::Permuted
    }

    /// Whether a step along each dimension of size above 1 is equally long in both; their shapes are equal.
    pub fn same_strides(&self, other: &Geometry<'_>) -> bool {
        self.wide().eq(other.wide())
    }

    /// `(stride, size)` of the dimensions that have more than one element.
    fn wide(&self) -> impl Iterator<Item = (i64, i64)> {
        self.shape
            .iter()
            .zip(self.strides)
            .filter(|&(&size, _)| size != 1)
            .map(|(&size, &stride)| (stride, size))
    }

    pub fn shape_vec(&self) -> Vec<usize> {
        self.shape.iter().map(|&size| size as usize).collect()
    }

    pub fn strides_vec(&self) -> Vec<isize> {
        self.strides.iter().map(|&stride| stride as isize).collect()
    }

    pub fn view_layout(&self) -> ViewLayout {
        match self.density() {
            Density::Sparse => {
                ViewLayout::Strided { shape: self.shape_vec(), strides: self.strides_vec() }
            }
            Density::Contiguous | Density::Permuted => ViewLayout::Flat { len: self.len() },
        }
    }

    pub fn extent(&self, start: usize, itemsize: usize) -> Extent {
        Extent { start, itemsize, shape: self.shape_vec(), strides: self.strides_vec() }
    }
}

/// The bytes from the first to the last; empty where there is no element.
pub fn bounding_range(extent: &Extent) -> (usize, usize) {
    if extent.shape.contains(&0) {
        return (extent.start, extent.start);
    }
    let (mut low, mut high) = (0, 0);
    for (&size, &stride) in extent.shape.iter().zip(&extent.strides) {
        let reach = (size as isize - 1) * stride;
        low += reach.min(0);
        high += reach.max(0);
    }
    let itemsize = extent.itemsize as isize;
    let start = extent.start.wrapping_add_signed(low * itemsize);
    (start, extent.start.wrapping_add_signed((high + 1) * itemsize))
}
