//! What a step writes, and the verdict on it.

use paramstate::{AdamTask, Operand, Order, Precision, Rounding};

/// For memory of which nothing is shared that must not be.
pub struct Verdict {
    pub order: Order,
    /// Start and end of what the tasks write: sorted, and no two of them touch.
    pub written: Vec<(usize, usize)>,
    /// Start, end and task of the gradients of the step at hand; kept for its memory.
    pub gradients: Vec<((usize, usize), usize)>,
}

/// The tensors of a task that are written, with their index in `KEYS`.
pub fn written(task: &AdamTask) -> impl Iterator<Item = (usize, Operand)> {
    [(0, task.value), (2, task.exp_avg), (3, task.exp_avg_sq)]
        .into_iter()
        .chain(task.max_exp_avg_sq.map(|operand| (4, operand)))
        .chain(task.precision.iter().flat_map(|precision| of_precision(precision)))
}

/// What is written besides value and moments: the moments' scales, and what rounding left over.
pub fn of_precision(precision: &Precision) -> impl Iterator<Item = (usize, Operand)> {
    let left_over = match &precision.value {
        Rounding::Kahan(view) => Some((5, view.operand)),
        Rounding::Nearest | Rounding::Stochastic => None,
    };
    let scales = precision.scales.iter().flat_map(|scales| {
        let max = scales.max_exp_avg_sq.map(|operand| (4, operand));
        [(2, scales.exp_avg), (3, scales.exp_avg_sq)].into_iter().chain(max)
    });
    left_over.into_iter().chain(scales)
}
