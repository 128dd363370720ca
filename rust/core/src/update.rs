//! Adam and AdamW, once, for every dtype and instruction set.
//!
//! Adam is Kingma & Ba 2015 (arXiv:1412.6980), Algorithm 1; AdamW is Loshchilov & Hutter 2019
//! (arXiv:1711.05101), Algorithm 2; AMSGrad is Reddi et al. 2018. With torch's names, at step `t`:
//!
//! ```text
//! grad       = grad + weight_decay * value                                       (L2 alone)
//! exp_avg    = beta1 * exp_avg + (1 - beta1) * grad
//! exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad²
//! s          = exp_avg_sq, or its maximum over all steps (AMSGrad)
//! value      = value * (1 - lr * weight_decay)                                    (AdamW alone)
//!              - lr * (exp_avg / (1 - beta1^t)) / (sqrt(s / (1 - beta2^t)) + eps)
//! ```
//!
//! Where the code departs from that, it is equal in exact arithmetic:
//!
//! 1. The gradient is multiplied by a coefficient as it is loaded: the sign (maximize), a clip by
//!    the global norm and the inverse of a loss scale cost no pass of their own.
//! 2. `exp_avg + (1 - beta1) * (grad - exp_avg)`: one rounding less, as torch's `lerp`.
//! 3. Numerator and denominator of the last line are multiplied by `sqrt(1 - beta2^t)`, so that
//!    both bias corrections are scalars of the step and none is left in the loop.
//! 4. `a * b + c` is one fused operation, rounded once, on every instruction set.
//! 5. Bounds are applied to the new value before it is stored.

use crate::bounds::Interval;
use crate::element::Compute;
use crate::isa::Kernel;
use crate::{Bounds, Error, Result};

/// How weight decay acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Decay {
    /// Added to the gradient: Adam.
    #[default]
    L2,
    /// Taken from the value: AdamW.
    Decoupled,
}

/// Which way to go along the gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Direction {
    /// Against it.
    #[default]
    Minimize,
    /// With it.
    Maximize,
}

/// What the step is divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SecondMoment {
    /// The running average of the squared gradient.
    #[default]
    Running,
    /// Its maximum over all steps: AMSGrad.
    Maximum,
}

/// The settings of Adam and AdamW; torch's defaults for Adam.
///
/// ```
/// use paramstate::{Adam, Decay};
///
/// let adamw = Adam { lr: 3e-4, weight_decay: 1e-2, decay: Decay::Decoupled, ..Adam::default() };
/// adamw.validate()?;
/// # Ok::<(), paramstate::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    /// The learning rate, at least 0.
    pub lr: f64,
    /// The first moment's rate of decay, in [0, 1).
    pub beta1: f64,
    /// The second moment's rate of decay, in [0, 1).
    pub beta2: f64,
    /// Added to the denominator, at least 0.
    pub eps: f64,
    /// At least 0.
    pub weight_decay: f64,
    /// How `weight_decay` acts.
    pub decay: Decay,
    /// Which way to go.
    pub direction: Direction,
    /// AMSGrad or not.
    pub second_moment: SecondMoment,
}

impl Default for Adam {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            decay: Decay::L2,
            direction: Direction::Minimize,
            second_moment: SecondMoment::Running,
        }
    }
}

impl Adam {
    /// Checks every setting, with torch's ranges.
    ///
    /// # Errors
    /// [`Error::InvalidSetting`] for the first that lies outside its range.
    pub fn validate(&self) -> Result<()> {
        let at_least_0 = "at least 0";
        let fraction = "at least 0 and less than 1";
        let settings = [
            ("lr", self.lr, self.lr >= 0.0, at_least_0),
            ("beta1", self.beta1, (0.0..1.0).contains(&self.beta1), fraction),
            ("beta2", self.beta2, (0.0..1.0).contains(&self.beta2), fraction),
            ("eps", self.eps, self.eps >= 0.0, at_least_0),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0.0, at_least_0),
        ];
        match settings.into_iter().find(|(_, _, valid, _)| !valid) {
            Some((name, got, _, expected)) => Err(Error::InvalidSetting { name, got, expected }),
            None => Ok(()),
        }
    }

    /// What one step needs, computed once in `f64`. `step` counts this step too: it is 1 on the
    /// first. `grad_coefficient` multiplies the gradient. Any number is accepted: what makes no
    /// sense (a step of 0) gives values that make none, as in torch.
    ///
    /// ```
    /// let scalars = paramstate::Adam::default().scalars(1.0, 1.0);
    /// # let _ = scalars;
    /// ```
    #[must_use]
    pub fn scalars(&self, step: f64, grad_coefficient: f64) -> AdamScalars {
        let bias_correction1 = 1.0 - self.beta1.powf(step);
        let bias_correction2_sqrt = (1.0 - self.beta2.powf(step)).sqrt();
        let (l2_decay, kept) = match self.decay {
            Decay::L2 => (self.weight_decay, 1.0),
            Decay::Decoupled => (0.0, 1.0 - self.lr * self.weight_decay),
        };
        AdamScalars {
            grad_coefficient: match self.direction {
                Direction::Minimize => grad_coefficient,
                Direction::Maximize => -grad_coefficient,
            },
            l2_decay,
            one_minus_beta1: 1.0 - self.beta1,
            beta2: self.beta2,
            one_minus_beta2: 1.0 - self.beta2,
            change: -(self.lr / bias_correction1) * bias_correction2_sqrt,
            eps: self.eps * bias_correction2_sqrt,
            kept,
        }
    }
}

/// One step's scalars, from [`Adam::scalars`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamScalars {
    /// Multiplies the gradient; negative to maximize.
    pub grad_coefficient: f64,
    /// The part of the value that is added to the gradient; 0 unless decay is L2.
    pub l2_decay: f64,
    /// `1 - beta1`.
    pub one_minus_beta1: f64,
    /// `beta2`.
    pub beta2: f64,
    /// `1 - beta2`.
    pub one_minus_beta2: f64,
    /// `-(lr / bias_correction1) * sqrt(bias_correction2)`.
    pub change: f64,
    /// `eps * sqrt(bias_correction2)`.
    pub eps: f64,
    /// The part of the value that decoupled decay leaves; 1 without it.
    pub kept: f64,
}

/// [`AdamScalars`] and bounds in the compute type.
#[derive(Clone, Copy)]
pub(crate) struct Scalars<C> {
    grad_coefficient: C,
    l2_decay: C,
    one_minus_beta1: C,
    beta2: C,
    one_minus_beta2: C,
    change: C,
    eps: C,
    kept: C,
    bounds: Interval<C>,
}

impl<C: Compute> Scalars<C> {
    pub(crate) fn new(scalars: &AdamScalars, bounds: Bounds) -> Self {
        Self {
            grad_coefficient: C::narrow(scalars.grad_coefficient),
            l2_decay: C::narrow(scalars.l2_decay),
            one_minus_beta1: C::narrow(scalars.one_minus_beta1),
            beta2: C::narrow(scalars.beta2),
            one_minus_beta2: C::narrow(scalars.one_minus_beta2),
            change: C::narrow(scalars.change),
            eps: C::narrow(scalars.eps),
            kept: C::narrow(scalars.kept),
            bounds: bounds.narrow(),
        }
    }

    /// The same but for the bias corrections, which are those of another age.
    pub(crate) fn corrected(self, [change, eps]: [C; 2]) -> Self {
        Self { change, eps, ..self }
    }

    pub(crate) fn bounds(&self) -> Interval<C> {
        self.bounds
    }

    pub(crate) fn has_l2_decay(&self) -> bool {
        self.l2_decay != C::default()
    }

    pub(crate) fn correction(&self) -> [C; 2] {
        [self.change, self.eps]
    }

    /// The moments of one element: the old ones and its gradient give the new.
    ///
    /// L2 decay is left out rather than multiplied by 0: that would make NaN of an infinite value.
    #[inline(always)]
    pub(crate) fn moments<const L2: bool>(
        &self,
        value: C,
        grad: C,
        exp_avg: C,
        exp_avg_sq: C,
    ) -> (C, C) {
        let grad = grad * self.grad_coefficient;
        let grad = if L2 { self.l2_decay.mul_add(value, grad) } else { grad };
        let exp_avg = (grad - exp_avg).mul_add(self.one_minus_beta1, exp_avg);
        let exp_avg_sq = (self.one_minus_beta2 * grad).mul_add(grad, self.beta2 * exp_avg_sq);
        (exp_avg, exp_avg_sq)
    }

    /// The new value of one element.
    #[inline(always)]
    pub(crate) fn value(&self, value: C, exp_avg: C, second_moment: C) -> C {
        self.bounds.clamp(self.moved(value, exp_avg, second_moment, self.correction()))
    }

    /// The new value of one element, before any bounds and for these bias corrections.
    #[inline(always)]
    pub(crate) fn moved(&self, value: C, exp_avg: C, second_moment: C, [change, eps]: [C; 2]) -> C {
        let direction = exp_avg / (second_moment.sqrt() + eps);
        change.mul_add(direction, value * self.kept)
    }
}

/// The greater of two; NaN if either is, as `torch.maximum`.
#[inline(always)]
pub(crate) fn maximum<C: Compute>(a: C, b: C) -> C {
    let a_stays = (a >= b) | a.is_nan();
    if a_stays { a } else { b }
}

/// One block of elements in the compute type; all slices are of one length.
pub(crate) struct Block<'a, C> {
    pub value: &'a mut [C],
    pub grad: &'a [C],
    pub exp_avg: &'a mut [C],
    pub exp_avg_sq: &'a mut [C],
    /// With AMSGrad.
    pub max_exp_avg_sq: Option<&'a mut [C]>,
}

impl<'a, C: Compute> Block<'a, C> {
    /// The same, if it is in fp32.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(crate) fn singles(self) -> Option<Block<'a, f32>> {
        Some(Block {
            value: C::singles_mut(self.value)?,
            grad: C::singles(self.grad)?,
            exp_avg: C::singles_mut(self.exp_avg)?,
            exp_avg_sq: C::singles_mut(self.exp_avg_sq)?,
            max_exp_avg_sq: self.max_exp_avg_sq.and_then(C::singles_mut),
        })
    }

    /// The first `len` elements, and the others.
    #[inline(always)]
    pub(crate) fn split_at(self, len: usize) -> (Self, Self) {
        let (value, values) = self.value.split_at_mut(len);
        let (grad, grads) = self.grad.split_at(len);
        let (exp_avg, exp_avgs) = self.exp_avg.split_at_mut(len);
        let (exp_avg_sq, exp_avg_sqs) = self.exp_avg_sq.split_at_mut(len);
        let (max, maxima) = self.max_exp_avg_sq.map(|max| max.split_at_mut(len)).unzip();
        let first = Self { value, grad, exp_avg, exp_avg_sq, max_exp_avg_sq: max };
        let (value, grad, exp_avg, exp_avg_sq) = (values, grads, exp_avgs, exp_avg_sqs);
        (first, Self { value, grad, exp_avg, exp_avg_sq, max_exp_avg_sq: maxima })
    }
}

/// The update of one block.
pub(crate) struct Update<'a, C> {
    pub block: Block<'a, C>,
    pub scalars: &'a Scalars<C>,
}

impl<C: Compute> Kernel for Update<'_, C> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Block { value, grad, exp_avg, exp_avg_sq, max_exp_avg_sq } = self.block;
        let scalars = *self.scalars;
        let l2 = scalars.has_l2_decay();
        match (l2, max_exp_avg_sq) {
            (false, None) => running::<C, false>(value, grad, exp_avg, exp_avg_sq, scalars),
            (true, None) => running::<C, true>(value, grad, exp_avg, exp_avg_sq, scalars),
            (false, Some(max)) => {
                maximal::<C, false>(value, grad, exp_avg, exp_avg_sq, max, scalars)
            }
            (true, Some(max)) => maximal::<C, true>(value, grad, exp_avg, exp_avg_sq, max, scalars),
        }
    }
}

// The slices are arguments of their own, since the compiler takes only arguments to be free of aliases.

#[inline(always)]
fn running<C: Compute, const L2: bool>(
    value: &mut [C],
    grad: &[C],
    exp_avg: &mut [C],
    exp_avg_sq: &mut [C],
    scalars: Scalars<C>,
) {
    for (((p, &g), m), v) in value.iter_mut().zip(grad).zip(exp_avg).zip(exp_avg_sq) {
        (*m, *v) = scalars.moments::<L2>(*p, g, *m, *v);
        *p = scalars.value(*p, *m, *v);
    }
}

#[inline(always)]
fn maximal<C: Compute, const L2: bool>(
    value: &mut [C],
    grad: &[C],
    exp_avg: &mut [C],
    exp_avg_sq: &mut [C],
    max_exp_avg_sq: &mut [C],
    scalars: Scalars<C>,
) {
    let moments = exp_avg.iter_mut().zip(exp_avg_sq).zip(max_exp_avg_sq);
    for ((p, &g), ((m, v), max)) in value.iter_mut().zip(grad).zip(moments) {
        (*m, *v) = scalars.moments::<L2>(*p, g, *m, *v);
        *max = maximum(*max, *v);
        *p = scalars.value(*p, *m, *max);
    }
}
