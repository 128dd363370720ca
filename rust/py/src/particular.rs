//! From what was declared for a parameter to what its task has beyond the ordinary: every tensor read and checked.

use std::sync::Arc;

use paramstate::{
    Adam, Cohorts, Layout, Operand, Particulars, Projection, RowSteps, View, ViewLayout, WhenBound,
};
use pyo3::intern;
use pyo3::prelude::*;

use crate::declared::{Declared, Norm};
use crate::geometry::{Density, bounding_range};
use crate::problem::Problem;
use crate::sorted_rows::{Sorted, Source};
use crate::tensor::{Element, Reading, Torch};

/// Rows that grow no older: their offsets are counted up when the parameter's step is.
pub struct Aging {
    offsets: *mut i64,
    rows: usize,
    frozen: Option<*const u8>,
    named: Option<*const u8>,
}

// SAFETY: addresses; who follows them sees to it that nobody else writes there.
unsafe impl Send for Aging {}
// SAFETY: as above.
unsafe impl Sync for Aging {}

impl Aging {
    /// Counts up the offsets of all rows that are skipped.
    ///
    /// # Safety
    ///
    /// The tensors that were read are alive, and no other thread uses them.
    pub unsafe fn age(&self) {
        for row in 0..self.rows {
            // SAFETY: the caller's contract, and there are so many rows.
            if unsafe { self.skips(row) } {
                // SAFETY: as above.
                let offset = unsafe { self.offsets.add(row) };
                // SAFETY: as above.
                let next = unsafe { offset.read_unaligned() } + 1;
                // SAFETY: as above.
                unsafe { offset.write_unaligned(next) };
            }
        }
    }

    /// # Safety
    ///
    /// As for `age`; `row` is one of the rows.
    #[inline(always)]
    unsafe fn skips(&self, row: usize) -> bool {
        let at = |mask: *const u8| {
            // SAFETY: the caller's contract: a mask has a byte for each row.
            let at = unsafe { mask.add(row) };
            // SAFETY: as above.
            unsafe { at.read() != 0 }
        };
        self.frozen.is_some_and(at) || self.named.is_some_and(|named| !at(named))
    }
}

/// Memory that a step reads, and that it must not write: where it begins and ends, and under which key it came.
pub type Borrowing = (usize, usize, &'static str);

/// The rows' tensors once they were read.
struct RowTensors {
    dim: usize,
    cohorts: Arc<Cohorts>,
    /// Where any row is skipped.
    aging: Option<Aging>,
}

/// What a parameter has beyond the ordinary.
pub struct Particular {
    pub particulars: Box<Particulars>,
    pub aging: Option<Aging>,
    pub borrowings: Vec<Borrowing>,
}

type Found<T> = Result<T, Box<Problem>>;

/// Reads what was declared for one parameter.
pub struct Look<'a, 'py> {
    pub py: Python<'py>,
    pub torch: &'a Torch,
    pub value: &'a Reading<'a>,
    /// That of the task.
    pub layout: &'a Layout,
    pub adam: &'a Adam,
    /// The parameter's steps before this one.
    pub step: f64,
    pub versions: Versions,
    pub borrowings: Vec<Borrowing>,
}

/// The versions of offsets and frozen rows; `None` where a tensor keeps none. Asking may run Python code.
pub type Versions = [Option<u64>; 2];

pub fn versions(py: Python<'_>, declared: &Declared) -> Versions {
    [&declared.offsets, &declared.frozen_rows].map(|tensor| {
        let Some(tensor) = tensor else { return Some(0) };
        let version = tensor.bind(py).getattr(intern!(py, "_version"));
        version.and_then(|version| version.extract()).ok()
    })
}

impl Look<'_, '_> {
    /// # Safety
    ///
    /// No Python code has run since the value was read.
    pub unsafe fn particular(mut self, declared: &mut Declared) -> Found<Particular> {
        // SAFETY: the caller's contract.
        let rows = unsafe { self.rows(declared) }?;
        // SAFETY: the caller's contract.
        let min = unsafe { self.bound("min", &declared.min) }?;
        // SAFETY: the caller's contract.
        let max = unsafe { self.bound("max", &declared.max) }?;
        let projection = match &declared.norm {
            Some(norm) => Some(self.projection(norm, rows.as_ref())?),
            None => None,
        };
        let row_steps = |rows: &RowTensors| {
            let cohorts = Arc::clone(&rows.cohorts);
            RowSteps::new(self.inner(rows.dim), cohorts, self.adam, self.step + 1.0)
        };
        let zero = declared.zero_at_bound;
        let particulars = Particulars {
            rows: rows.as_ref().map(row_steps),
            min,
            max,
            when_bound: if zero { WhenBound::ZeroMoment } else { WhenBound::KeepMoment },
            at_bound: declared.count_at_bound.then(Arc::default),
            projection,
        };
        let aging = rows.and_then(|rows| rows.aging);
        Ok(Particular { particulars: Box::new(particulars), aging, borrowings: self.borrowings })
    }

    /// # Safety
    ///
    /// As for `particular`.
    unsafe fn rows(&mut self, declared: &mut Declared) -> Found<Option<RowTensors>> {
        let Some(offsets) = &declared.offsets else {
            let masks = [("frozen_rows", &declared.frozen_rows), ("rows", &declared.named)];
            return match masks.into_iter().find(|(_, mask)| mask.is_some()) {
                Some((key, _)) => Err(Problem::boxed("rows_undeclared", key, &[], &[])),
                None => Ok(None),
            };
        };
        let dim = self.dim("offsets", declared.dim)?;
        // SAFETY: the caller's contract.
        let offsets = unsafe { self.of_rows("offsets", offsets, Element::Int64, dim) }?;
        let mut mask = |key, tensor: &Option<Py<PyAny>>| match tensor {
            // SAFETY: the caller's contract.
            Some(mask) => unsafe { self.of_rows(key, mask, Element::Bool, dim) }.map(Some),
            None => Ok(None),
        };
        let frozen = mask("frozen_rows", &declared.frozen_rows)?;
        let named = mask("rows", &declared.named)?;
        let aging = Aging {
            offsets: offsets.cast(),
            rows: self.value.geometry.shape[dim] as usize,
            frozen: frozen.map(|mask| mask.cast_const()),
            named: named.map(|mask| mask.cast_const()),
        };
        // SAFETY: the tensors were just read.
        let (cohorts, greatest) = unsafe { self.sorted(&aging, &mut declared.sorted) };
        if greatest as f64 > self.step {
            let (step, greatest) = ([self.step as i64], [greatest]);
            return Err(Problem::boxed("rows_ahead", "offsets", &step, &greatest));
        }
        let aging = (frozen.is_some() || named.is_some()).then_some(aging);
        Ok(Some(RowTensors { dim, cohorts, aging }))
    }

    /// The rows in cohorts, and the greatest offset of those that are not skipped. Offsets that this step is to change
    /// are sorted again for the next.
    ///
    /// # Safety
    ///
    /// As for `Aging::age`.
    unsafe fn sorted(&self, rows: &Aging, latest: &mut Option<Sorted>) -> (Arc<Cohorts>, i64) {
        let [offsets, frozen] = self.versions;
        let source = |address: usize, version: u64| Source { address, rows: rows.rows, version };
        let source = offsets.zip(frozen).filter(|_| rows.named.is_none()).map(|(first, second)| {
            let frozen = rows.frozen.map_or(0, |mask| mask.addr());
            [source(rows.offsets.addr(), first), source(frozen, second)]
        });
        if let Some(latest) = &*latest
            && Some(latest.source) == source
        {
            return (Arc::clone(&latest.cohorts), latest.greatest);
        }
        let read = |row| {
            // SAFETY: the caller's contract; there are so many rows.
            let offset = unsafe { rows.offsets.add(row) };
            // SAFETY: as above.
            unsafe { offset.read_unaligned() }
        };
        let offsets: Vec<i64> = (0..rows.rows).map(read).collect();
        // SAFETY: the caller's contract.
        let skipped = |row: usize| unsafe { rows.skips(row) };
        let cohorts = Arc::new(Cohorts::new(&offsets, skipped));
        let greatest = cohorts.offsets().iter().copied().max().unwrap_or(i64::MIN);
        *latest = source.map(|source| Sorted { source, cohorts: Arc::clone(&cohorts), greatest });
        (cohorts, greatest)
    }

    /// The memory of a tensor with one element for each row.
    ///
    /// # Safety
    ///
    /// As for `particular`.
    unsafe fn of_rows(
        &mut self,
        key: &'static str,
        tensor: &Py<PyAny>,
        element: Element,
        dim: usize,
    ) -> Found<*mut u8> {
        // SAFETY: the caller's contract.
        let reading = unsafe { self.torch.read(tensor.bind_borrowed(self.py)) };
        let reading = reading
            .filter(|reading| reading.element == element && reading.density == Density::Contiguous)
            .ok_or_else(|| Problem::boxed("rows_dtype", key, &[], &[]))?;
        let rows = self.value.geometry.shape[dim];
        if reading.geometry.shape != [rows] {
            return Err(Problem::boxed("rows_length", key, &[rows], reading.geometry.shape));
        }
        self.borrow(key, &reading);
        Ok(reading.ptr)
    }

    fn borrow(&mut self, key: &'static str, reading: &Reading<'_>) {
        let extent = reading.geometry.extent(reading.ptr.addr(), reading.itemsize());
        let (start, end) = bounding_range(&extent);
        self.borrowings.push((start, end, key));
    }

    /// One side's bounds, walked along with the task.
    ///
    /// # Safety
    ///
    /// As for `particular`.
    unsafe fn bound(
        &mut self,
        key: &'static str,
        tensor: &Option<Py<PyAny>>,
    ) -> Found<Option<View>> {
        let Some(tensor) = tensor else { return Ok(None) };
        // SAFETY: the caller's contract.
        let reading = unsafe { self.torch.read(tensor.bind_borrowed(self.py)) };
        let (reading, operand): (Reading<'_>, Operand) = reading
            .and_then(|reading| Some((reading, reading.operand()?)))
            .ok_or_else(|| Problem::boxed("bound_dtype", key, &[], &[]))?;
        let (shape, bound) = (self.value.geometry.shape, &reading.geometry);
        let strides = broadcast(shape, bound.shape, bound.strides)
            .ok_or_else(|| Problem::boxed("bound_shape", key, shape, bound.shape))?;
        let layout = ViewLayout::along(
            self.order().into_iter().map(|dim| (shape[dim] as usize, strides[dim])),
        );
        self.borrow(key, &reading);
        Ok(Some(View { operand, layout }))
    }

    /// The dimensions in the order in which the task is walked.
    fn order(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.value.geometry.shape.len()).collect();
        if self.is_permuted() {
            order.sort_by_key(|&dim| std::cmp::Reverse(self.value.geometry.strides[dim]));
        }
        order
    }

    /// Whether the task is walked in the order of memory, which is not that of the dimensions.
    fn is_permuted(&self) -> bool {
        matches!(self.layout, Layout::Flat { .. }) && self.value.density == Density::Permuted
    }

    /// Elements of one row that are neighbours in the walk.
    fn inner(&self, dim: usize) -> usize {
        let shape = self.value.geometry.shape;
        let after = self.order().into_iter().skip_while(|&place| place != dim).skip(1);
        after.map(|dim| shape[dim] as usize).product()
    }

    fn dim(&self, key: &'static str, dim: isize) -> Found<usize> {
        let shape = self.value.geometry.shape;
        let place = if dim < 0 { dim + shape.len() as isize } else { dim };
        usize::try_from(place)
            .ok()
            .filter(|&place| place < shape.len())
            .ok_or_else(|| Problem::boxed("dim", key, shape, &[dim as i64]))
    }

    fn projection(&self, norm: &Norm, rows: Option<&RowTensors>) -> Found<Projection> {
        let geometry = &self.value.geometry;
        let mut over = vec![norm.dims.is_none(); geometry.shape.len()];
        for &dim in norm.dims.iter().flatten() {
            over[self.dim("norm", dim)?] = true;
        }
        // Its dtype is one with a kernel, or there would be no task.
        let operand = self.value.operand().expect("the value of a task");
        Ok(Projection {
            operand,
            shape: geometry.shape_vec(),
            strides: geometry.strides_vec(),
            over,
            limit: norm.limit,
            rows: rows
                .filter(|rows| rows.aging.is_some())
                .map(|rows| (rows.dim, Arc::clone(&rows.cohorts))),
        })
    }
}

/// The strides of a tensor that is broadcast to a shape, by torch's rules.
fn broadcast(shape: &[i64], from: &[i64], strides: &[i64]) -> Option<Vec<isize>> {
    let missing = shape.len().checked_sub(from.len())?;
    let along = |dim: usize| match dim.checked_sub(missing) {
        None => Some(0),
        Some(place) if from[place] == shape[dim] => Some(strides[place] as isize),
        Some(place) => (from[place] == 1).then_some(0),
    };
    (0..shape.len()).map(along).collect()
}
