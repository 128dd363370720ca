//! Which memory a step writes, and whether any of it is shared.
//!
//! An exact answer sorts all tensors, which costs more than the step of a small one; so it is kept together with the list
//! of addresses and layouts that it was found for, and holds while each step brings the very same list. Nothing else of
//! an earlier step is ever used. Gradients are new on each step: see `gradients`.

use paramstate::{AdamTask, Layout, Order};

use crate::findings::Findings;
use crate::problem::Problem;
use crate::running::Counter;
use crate::sharing;
use crate::written_memory::{Verdict, of_precision, written};

/// The latest verdict, with what it was found for.
#[derive(Default)]
pub struct Memory {
    key: Vec<usize>,
    cursor: usize,
    unchanged: bool,
    verdict: Option<Verdict>,
}

impl Memory {
    /// Begins a step.
    pub fn begin(&mut self) {
        self.cursor = 0;
        self.unchanged = self.verdict.is_some();
    }

    /// Notes the memory of one task. `row` tells apart two parameters that have the same addresses.
    #[inline]
    pub fn note(&mut self, row: usize, task: &AdamTask, counter: &Counter) {
        let dtypes = written(task).fold(1, |code, (_, operand)| code << 4 | operand.dtype as usize);
        let (len, strided) = match &task.layout {
            Layout::Flat { len } => (*len, None),
            Layout::Strided(layout) => (usize::MAX, Some(layout)),
        };
        self.compare(&[
            row,
            len,
            dtypes,
            task.value.ptr.addr(),
            task.exp_avg.ptr.addr(),
            task.exp_avg_sq.ptr.addr(),
            task.max_exp_avg_sq.map_or(0, |operand| operand.ptr.addr()),
            counter.ptr.addr(),
        ]);
        if let Some(precision) = &task.precision {
            for (key, operand) in of_precision(precision) {
                self.compare(&[key, operand.ptr.addr()]);
            }
        }
        if let Some(layout) = strided {
            self.compare(&layout.shape);
            for strides in
                [&layout.value, &layout.exp_avg, &layout.exp_avg_sq, &layout.max_exp_avg_sq]
            {
                let words: Vec<usize> = strides.iter().map(|&stride| stride as usize).collect();
                self.compare(&words);
            }
        }
    }

    #[inline]
    fn compare(&mut self, words: &[usize]) {
        let end = self.cursor + words.len();
        if self.unchanged && self.key.get(self.cursor..end) == Some(words) {
            self.cursor = end;
            return;
        }
        self.unchanged = false;
        self.key.truncate(self.cursor);
        self.key.extend_from_slice(words);
        self.cursor = end;
    }

    /// Adds to `findings` what was declared and lies in memory that the step writes.
    pub fn check_borrowings(&self, findings: &mut Findings<'_>) {
        let Some(verdict) = &self.verdict else { return };
        for &(place, (start, end, key)) in &findings.borrowings {
            let next = verdict.written.partition_point(|range| range.1 <= start);
            if start < end && verdict.written.get(next).is_some_and(|range| range.0 < end) {
                let problem = Problem::boxed("bound_overlap", key, &[], &[]);
                let (group, index) = place;
                findings.problems.push(Problem { group, index, ..*problem });
            }
        }
    }

    /// The order in which the tasks may run; adds to `findings` what may not run, or not here.
    pub fn judge(&mut self, findings: &mut Findings<'_>) -> Order {
        if !self.unchanged || self.cursor != self.key.len() {
            self.key.truncate(self.cursor);
            self.verdict = sharing::examine(findings);
        }
        match &mut self.verdict {
            Some(verdict) => verdict.with_gradients(findings),
            None => Order::InSequence,
        }
    }
}
