//! A gradient that lies in memory which the step writes.
//!
//! Gradients are other tensors on each step, so they are looked up among the written ranges every time: both lists are
//! sorted, one pass over them finds the gradients that need a closer look, and nearly always there are none.

use std::collections::HashSet;

use paramstate::{AdamTask, Extent, Layout, Order, overlapping};

use crate::findings::Findings;
use crate::geometry::bounding_range;
use crate::sharing::{Member, STEP, VALUE, Written};
use crate::written_memory::Verdict;

impl Verdict {
    /// The order that the tasks may run in, given their gradients. Gradients that cannot be used where they lie are
    /// taken out and left to torch.
    pub fn with_gradients(&mut self, findings: &mut Findings<'_>) -> Order {
        let suspects = self.suspects(&findings.tasks);
        if suspects.is_empty() { self.order } else { settle(suspects, findings, self.order) }
    }

    fn suspects(&mut self, tasks: &[AdamTask]) -> Vec<usize> {
        let ranged = |(index, task): (usize, &AdamTask)| (range(task), index);
        let gradients = &mut self.gradients;
        gradients.clear();
        gradients.extend(tasks.iter().enumerate().map(ranged));
        gradients.sort_unstable();
        let mut written = self.written.iter().peekable();
        let mut suspects = Vec::new();
        for &((start, end), index) in gradients.iter() {
            while written.next_if(|range| range.1 <= start).is_some() {}
            if start < end && written.peek().is_some_and(|range| range.0 < end) {
                suspects.push(index);
            }
        }
        suspects
    }
}

/// Looks exactly. What another task writes forces an order; what the task itself writes is refused here, but for a
/// gradient that is the very value.
#[cold]
fn settle(suspects: Vec<usize>, findings: &mut Findings<'_>, mut order: Order) -> Order {
    let Written { members, mut extents, .. } = Written::of(findings);
    let written = extents.len();
    extents.extend(suspects.iter().map(|&index| extent(&findings.tasks[index])));
    let mut elsewhere = HashSet::new();
    for (a, b) in overlapping(&extents) {
        if a >= written || b < written {
            continue;
        }
        let (task, Member { task: writer, key }) = (suspects[b - written], members[a]);
        let is_own_value = key == VALUE && is_very_value(&findings.tasks[task]);
        if key == STEP || task == writer && !is_own_value {
            elsewhere.insert(task);
        } else if task != writer {
            order = Order::InSequence;
        }
    }
    findings.leave_to_torch(&elsewhere);
    order
}

fn is_very_value(task: &AdamTask) -> bool {
    let same_strides = match &task.layout {
        Layout::Flat { .. } => true,
        Layout::Strided(layout) => layout.value == layout.grad,
    };
    let (value, grad) = (&task.value, &task.grad);
    same_strides && (value.ptr, value.dtype) == (grad.ptr, grad.dtype)
}

#[inline]
fn range(task: &AdamTask) -> (usize, usize) {
    match &task.layout {
        Layout::Flat { len } => {
            let start = task.grad.ptr.addr();
            (start, start + len * task.grad.dtype.size_of())
        }
        Layout::Strided(_) => bounding_range(&extent(task)),
    }
}

fn extent(task: &AdamTask) -> Extent {
    let (start, itemsize) = (task.grad.ptr.addr(), task.grad.dtype.size_of());
    match &task.layout {
        Layout::Flat { len } => Extent { start, itemsize, shape: vec![*len], strides: vec![1] },
        Layout::Strided(layout) => {
            let (shape, strides) = (layout.shape.clone(), layout.grad.clone());
            Extent { start, itemsize, shape, strides }
        }
    }
}
