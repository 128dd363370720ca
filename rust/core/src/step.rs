//! One optimizer step over parameters of a store: everything is checked, then everything is written.

use std::collections::HashSet;
use std::marker::PhantomData;
use std::num::NonZeroUsize;

use crate::row_traits::RowTraits;
use crate::values::{EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ, VALUE, extent};
use crate::{
    Adam, AdamTask, Buffer, Element, Entry, Error, Execution, Layout, Lent, Operand, Order,
    OwnedBuffer, ParamId, Particulars, Result, RowSteps, SecondMoment, Store, StridedLayout, View,
    ViewLayout, adam_step, clip_coefficient, gradient_squares, overlapping, row_major,
};

/// The gradient of one parameter, row-major and as long as its value, of any element type.
///
/// ```
/// use paramstate::Gradient;
///
/// let grad = vec![0.1f32, 0.2];
/// let gradient = Gradient::from(&grad[..]);
/// # let _ = gradient;
/// ```
#[derive(Clone, Debug)]
pub struct Gradient<'a> {
    view: View,
    rows: Option<Named<'a>>,
    memory: PhantomData<&'a [u8]>,
}

/// The rows along a dimension that one step is for: a flag for each.
type Named<'a> = (usize, &'a [bool]);

impl Gradient<'_> {
    /// A gradient in any memory and layout; strides may be 0.
    ///
    /// # Safety
    /// For as long as the gradient lives, the view's elements are readable, nobody writes them, and
    /// they are none of the store's.
    #[must_use]
    pub unsafe fn from_view(view: View) -> Self {
        Self { view, rows: None, memory: PhantomData }
    }
}

impl<'a> Gradient<'a> {
    /// The gradient of only those rows whose flag is set: the step leaves the others as they are,
    /// they grow no older, and they are not in the global norm.
    ///
    /// ```
    /// use paramstate::{Adam, Gradient, Store, StepOptions};
    ///
    /// let mut store = Store::new();
    /// let id = store.register_values(None, None, &[2], &[1.0f32, 1.0])?;
    /// let gradient = Gradient::from(&[3.0f32, 9.0]).of_rows(0, &[true, false]);
    /// let options = StepOptions { max_grad_norm: Some(10.0), ..StepOptions::default() };
    /// assert_eq!(store.step(&[(id, gradient)], &Adam::default(), &options)?.grad_norm, Some(3.0));
    /// assert!(store.values::<f32>(id)?[0] < 1.0);
    /// assert_eq!(store.values::<f32>(id)?[1], 1.0);
    /// assert_eq!(store.row_steps(id)?, Some((0, vec![1, 0])));
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    #[must_use]
    pub fn of_rows(self, dim: usize, rows: &'a [bool]) -> Self {
        Self { rows: Some((dim, rows)), ..self }
    }
}

impl<'a, T: Element> From<&'a [T]> for Gradient<'a> {
    fn from(grad: &'a [T]) -> Self {
        let operand = Operand { ptr: grad.as_ptr().cast_mut().cast(), dtype: T::DTYPE };
        let layout = ViewLayout::Flat { len: grad.len() };
        Self { view: View { operand, layout }, rows: None, memory: PhantomData }
    }
}

impl<'a, T: Element, const N: usize> From<&'a [T; N]> for Gradient<'a> {
    fn from(grad: &'a [T; N]) -> Self {
        grad.as_slice().into()
    }
}

impl<'a, T: Element> From<&'a Vec<T>> for Gradient<'a> {
    fn from(grad: &'a Vec<T>) -> Self {
        grad.as_slice().into()
    }
}

/// How a step is taken, beside the optimizer's settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOptions {
    /// Gradients of a greater global norm are scaled down to it, as they are read.
    pub max_grad_norm: Option<f64>,
    /// Threads, the caller among them; by default as many as the machine runs at once. Results do
    /// not depend on it.
    pub threads: NonZeroUsize,
}

impl Default for StepOptions {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        Self { max_grad_norm: None, threads }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// The gradients' global norm before clipping, if `max_grad_norm` was set. As in torch, a norm
    /// that is not finite is no error: it makes NaN of the values.
    pub grad_norm: Option<f64>,
    /// How many parameters were updated.
    pub updated: usize,
}

/// One parameter whose step was checked.
struct Ready<'g> {
    position: usize,
    grad: &'g View,
    named: Option<Named<'g>>,
    value: Lent,
    /// In the order of [`STATE`]; those that exist already.
    state: [Option<Lent>; 3],
}

const STATE: [&str; 3] = [EXP_AVG, EXP_AVG_SQ, MAX_EXP_AVG_SQ];

impl Store {
    /// One step of Adam or AdamW over the parameters that have a gradient. Moments that do not
    /// exist yet are made, zeroed, in the value's dtype. What is declared for a parameter holds
    /// afterwards, rows are bias-corrected by their own steps, and what is frozen is passed over.
    ///
    /// # Errors
    /// Nothing was written after any of: [`Error::InvalidSetting`], [`Error::UnknownId`],
    /// [`Error::DuplicateGradient`], [`Error::MissingBuffer`], [`Error::LenderGone`],
    /// [`Error::Expanded`], [`Error::ShapeMismatch`], [`Error::Overlap`], and of
    /// [`Gradient::of_rows`] [`Error::NoSuchDimension`], [`Error::RowValues`],
    /// [`Error::RowDimension`].
    ///
    /// ```
    /// use paramstate::{Adam, Store, StepOptions};
    ///
    /// let mut store = Store::new();
    /// let weight = store.register_values(Some("weight"), None, &[2], &[1.0f32, -1.0])?;
    /// let bias = store.register_values(Some("bias"), None, &[1], &[0.0f32])?;
    /// let (weight_grad, bias_grad) = (vec![3.0f32, 0.0], vec![4.0f32]);
    ///
    /// let report = store.step(
    ///     &[(weight, (&weight_grad).into()), (bias, (&bias_grad).into())],
    ///     &Adam { lr: 0.1, ..Adam::default() },
    ///     &StepOptions { max_grad_norm: Some(1.0), ..StepOptions::default() },
    /// )?;
    /// assert_eq!((report.grad_norm, report.updated), (Some(5.0), 2));
    /// assert!((store.values::<f32>(bias)?[0] + 0.1).abs() < 1e-6);
    /// # Ok::<(), paramstate::Error>(())
    /// ```
    pub fn step(
        &mut self,
        grads: &[(ParamId, Gradient<'_>)],
        adam: &Adam,
        options: &StepOptions,
    ) -> Result<StepReport> {
        adam.validate()?;
        let ready = self.check(grads)?;
        let execution = Execution::new(options.threads);
        let (steps, mut tasks): (Vec<u64>, Vec<AdamTask>) =
            ready.into_iter().map(|ready| self.entries[ready.position].task(ready, adam)).unzip();
        let mut grad_norm = None;
        if let Some(max_norm) = options.max_grad_norm {
            // SAFETY: a `Gradient` borrows its elements, or its maker promised that they last.
            let norm = unsafe { gradient_squares(&tasks, &execution) }.sqrt();
            let coefficient = clip_coefficient(norm, max_norm);
            for (task, step) in tasks.iter_mut().zip(steps) {
                task.scalars = adam.scalars(step as f64, coefficient);
            }
            grad_norm = Some(norm);
        }
        // SAFETY: every operand is owned by this store, which is borrowed mutably, or lent for the
        // length of this call, or a gradient as above; `check` found all layouts of one shape, no
        // written element twice, and no two parameters that share memory.
        unsafe { adam_step(&tasks, Order::Parallel, &execution) };
        Ok(StepReport { grad_norm, updated: tasks.len() })
    }

    fn check<'g>(&self, grads: &'g [(ParamId, Gradient<'_>)]) -> Result<Vec<Ready<'g>>> {
        let mut seen = HashSet::with_capacity(grads.len());
        let mut all = Vec::with_capacity(grads.len());
        for (id, gradient) in grads {
            let position = self.position(*id)?;
            let entry = &self.entries[position];
            if !seen.insert(*id) {
                return Err(Error::DuplicateGradient { parameter: entry.label() });
            }
            if entry.frozen {
                continue;
            }
            let value = entry.lent_for_writing(VALUE)?;
            entry.check_shape("grad", &value.layout, &gradient.view.layout)?;
            let shape = entry.shape_of(&value.layout);
            entry.check_declared(&shape)?;
            if let Some((dim, rows)) = gradient.rows {
                entry.check_row_count(dim, &shape, rows.len())?;
                entry.check_row_dim(dim)?;
            }
            let mut state = [const { None }; 3];
            for (slot, key) in state.iter_mut().zip(STATE) {
                if entry.buffer(key).is_some() {
                    let lent = entry.lent_for_writing(key)?;
                    entry.check_shape(key, &value.layout, &lent.layout)?;
                    *slot = Some(lent);
                }
            }
            let (grad, named) = (&gradient.view, gradient.rows);
            all.push(Ready { position, grad, named, value, state });
        }
        self.check_apart(&all)?;
        Ok(all)
    }

    /// Memory that is written belongs to one parameter, and there to one buffer.
    fn check_apart(&self, all: &[Ready<'_>]) -> Result<()> {
        let written = all.iter().flat_map(|ready| {
            let lents =
                [Some(&ready.value)].into_iter().chain(ready.state.iter().map(Option::as_ref));
            lents.flatten().map(|lent| (ready.position, extent(lent)))
        });
        let (positions, extents): (Vec<usize>, Vec<_>) = written.unzip();
        match overlapping(&extents).first() {
            Some(&(first, second)) => Err(Error::Overlap {
                first: self.entries[positions[first]].label(),
                second: self.entries[positions[second]].label(),
            }),
            None => Ok(()),
        }
    }
}

impl Entry {
    fn check_shape(&self, key: &str, value: &ViewLayout, other: &ViewLayout) -> Result<()> {
        let value_shape = match value {
            ViewLayout::Strided { shape, .. } => Some(shape),
            ViewLayout::Flat { .. } => self.shape.as_ref(),
        };
        let fits = match (value_shape, other) {
            (Some(expected), ViewLayout::Strided { shape, .. }) => expected == shape,
            _ => value.len() == other.len(),
        };
        if fits {
            return Ok(());
        }
        let got = match other {
            ViewLayout::Strided { shape, .. } => shape.clone(),
            ViewLayout::Flat { len } => vec![*len],
        };
        let expected = value_shape.cloned().unwrap_or_else(|| vec![value.len()]);
        Err(Error::ShapeMismatch { parameter: self.label(), key: key.to_owned(), expected, got })
    }

    /// Makes what state is missing, counts the step, and says what is to be done.
    fn task(&mut self, ready: Ready<'_>, adam: &Adam) -> (u64, AdamTask) {
        let Ready { grad, named, value, state, .. } = ready;
        let [exp_avg, exp_avg_sq, max] = state;
        let exp_avg = exp_avg.unwrap_or_else(|| self.zeros(EXP_AVG, &value));
        let exp_avg_sq = exp_avg_sq.unwrap_or_else(|| self.zeros(EXP_AVG_SQ, &value));
        let max = match adam.second_moment {
            SecondMoment::Running => None,
            SecondMoment::Maximum => {
                Some(max.unwrap_or_else(|| self.zeros(MAX_EXP_AVG_SQ, &value)))
            }
        };
        self.step += 1;
        let step = self.step;
        let layouts = [
            &value.layout,
            &grad.layout,
            &exp_avg.layout,
            &exp_avg_sq.layout,
            max.as_ref().map_or(&value.layout, |max| &max.layout),
        ];
        let task = AdamTask {
            value: value.operand,
            grad: grad.operand,
            exp_avg: exp_avg.operand,
            exp_avg_sq: exp_avg_sq.operand,
            max_exp_avg_sq: max.as_ref().map(|max| max.operand),
            layout: common_layout(layouts),
            scalars: adam.scalars(step as f64, 1.0),
            bounds: self.bounds,
            particulars: self.particulars(&value, named, adam).map(Box::new),
            precision: None,
        };
        (step, task)
    }

    /// What is not the same for all elements. Rows that this step skips are counted as such.
    fn particulars(
        &mut self,
        value: &Lent,
        named: Option<Named<'_>>,
        adam: &Adam,
    ) -> Option<Particulars> {
        let shape = self.shape_of(&value.layout);
        let alike = |(dim, _)| RowTraits::alike(dim, &shape);
        let traits = self.rows.take().or_else(|| named.map(alike));
        let named = named.map(|(_, rows)| rows);
        let sorted = traits.as_ref().map(|traits| (traits.dim, traits.cohorts(named)));
        let projection = self.projection(value, sorted.clone());
        let rows = sorted.map(|(dim, cohorts)| {
            RowSteps::new(shape[dim + 1..].iter().product(), cohorts, adam, self.step as f64)
        });
        if let Some(mut traits) = traits {
            traits.age(named);
            (self.step, self.rows) = traits.settled(self.step);
        }
        let [min, max] = self.limit_views();
        let any = rows.is_some() || min.is_some() || max.is_some() || projection.is_some();
        any.then(|| Particulars { rows, min, max, projection, ..Particulars::default() })
    }

    /// Zeros like the value, kept under `key`.
    fn zeros(&mut self, key: &str, value: &Lent) -> Lent {
        let buffer = OwnedBuffer::zeroed(value.operand.dtype, value.layout.len());
        let lent =
            Lent { operand: buffer.operand(), layout: ViewLayout::Flat { len: buffer.len() } };
        self.set_buffer(key, Buffer::Owned(buffer));
        lent
    }
}

/// Of value, gradient and moments, which have one shape: flat where all of them are (they are
/// row-major then), else strides for each.
fn common_layout(layouts: [&ViewLayout; 5]) -> Layout {
    let shape = layouts.iter().find_map(|layout| match layout {
        ViewLayout::Strided { shape, .. } => Some(shape),
        ViewLayout::Flat { .. } => None,
    });
    let flat = Layout::Flat { len: layouts[0].len() };
    let Some(shape) = shape else { return flat };
    let dense = row_major(shape);
    if layouts.iter().all(|layout| match layout {
        ViewLayout::Strided { strides, .. } => *strides == dense,
        ViewLayout::Flat { .. } => true,
    }) {
        return flat;
    }
    let [value, grad, exp_avg, exp_avg_sq, max_exp_avg_sq] = layouts.map(|layout| match layout {
        ViewLayout::Strided { strides, .. } => strides.clone(),
        ViewLayout::Flat { .. } => dense.clone(),
    });
    let shape = shape.clone();
    Layout::Strided(Box::new(StridedLayout {
        shape,
        value,
        grad,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq,
    }))
}
