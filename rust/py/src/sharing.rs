//! Shared memory among the tensors that a step writes: what is harmless, what forces an order, what is refused.
//!
//! * Values of two parameters: refused. Two updates of one element would undo each other.
//! * One parameter listed twice, moments that two parameters share: legal, one after the other, as torch does it.
//! * One counter for several parameters: legal, and counted once for each.
//! * Anything else that is shared (two moments of one parameter, a moment and a value): refused.

use std::collections::HashMap;

use paramstate::{
    AdamTask, BLOCK_LEN, DType, Extent, Layout, Operand, Order, Rounding, ViewLayout, overlapping,
};

use crate::findings::Findings;
use crate::geometry::bounding_range;
use crate::problem::Problem;
use crate::roster::KEYS;
use crate::written_memory::{Verdict, written};

/// A tensor that is written: its task, and its index in `KEYS`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Member {
    pub task: usize,
    pub key: usize,
}

pub const VALUE: usize = 0;
pub const STEP: usize = 1;
const LEFT_OVER: usize = 5;

/// All that is written. The very same flat memory stands here once however often it is used, or one tensor that all
/// parameters share would make a pair of every two of them.
#[derive(Default)]
pub struct Written {
    pub members: Vec<Member>,
    pub extents: Vec<Extent>,
    /// First and latest user of each flat range.
    users: HashMap<(usize, usize), (Member, Member)>,
    /// Pairs found while collecting.
    same: Vec<(Member, Member)>,
}

impl Written {
    pub fn of(findings: &Findings<'_>) -> Self {
        let mut written_memory = Self::default();
        for (task, (work, counter)) in findings.tasks.iter().zip(&findings.counters).enumerate() {
            for (key, operand) in written(work) {
                written_memory.add(Member { task, key }, extent(work, key, operand));
            }
            written_memory.add(Member { task, key: STEP }, counter.extent());
        }
        written_memory
    }

    fn add(&mut self, member: Member, extent: Extent) {
        let (start, end) = bounding_range(&extent);
        if start == end {
            return;
        }
        if extent.strides == [1] {
            if let Some((first, latest)) = self.users.get_mut(&(start, end)) {
                self.same.push((*first, member));
                if first != latest {
                    self.same.push((*latest, member));
                }
                *latest = member;
                return;
            }
            self.users.insert((start, end), (member, member));
        }
        self.members.push(member);
        self.extents.push(extent);
    }

    fn shared(&self) -> impl Iterator<Item = (Member, Member)> {
        let pairs = overlapping(&self.extents);
        let partly = pairs.into_iter().map(|(a, b)| (self.members[a], self.members[b]));
        self.same.iter().copied().chain(partly)
    }
}

/// Looks at everything that is written; where something is refused, adds it to the problems and gives no verdict.
#[cold]
pub fn examine(findings: &mut Findings<'_>) -> Option<Verdict> {
    let memory = Written::of(findings);
    let mut order = Order::Parallel;
    let mut problems = Vec::new();
    for (a, b) in memory.shared() {
        match relation(findings, a, b) {
            Relation::Harmless => {}
            Relation::Sequence => order = Order::InSequence,
            Relation::Refused(kind) => problems.push(problem(findings, kind, a, b)),
        }
    }
    if problems.is_empty() {
        let written = merged(memory.extents.iter().map(bounding_range).collect());
        return Some(Verdict { order, written, gradients: Vec::new() });
    }
    findings.problems.append(&mut problems);
    None
}

enum Relation {
    Harmless,
    Sequence,
    Refused(&'static str),
}

fn relation(findings: &Findings<'_>, a: Member, b: Member) -> Relation {
    let object = |member: Member| findings.origins[member.task].parameter;
    match (a.key, b.key) {
        (STEP, STEP) => Relation::Harmless,
        (STEP, _) | (_, STEP) => Relation::Refused("state_overlap"),
        _ if a.task == b.task => Relation::Refused("state_overlap"),
        (VALUE, VALUE) if object(a) == object(b) => Relation::Sequence,
        (VALUE, VALUE) => Relation::Refused("overlap"),
        (VALUE, _) | (_, VALUE) => Relation::Refused("state_overlap"),
        _ => Relation::Sequence,
    }
}

/// Told of the later parameter, and of its state rather than its value.
fn problem(findings: &Findings<'_>, kind: &'static str, a: Member, b: Member) -> Problem {
    let (of, with) = if b.key == VALUE && a.key != VALUE { (a, b) } else { (b, a) };
    let (place, other) = (findings.origins[of.task].place, findings.origins[with.task].place);
    Problem {
        kind,
        group: place.0,
        index: place.1,
        key: KEYS[of.key],
        expected: Vec::new(),
        got: Vec::new(),
        other: Some(other),
    }
}

pub fn extent(task: &AdamTask, key: usize, operand: Operand) -> Extent {
    let (start, itemsize) = (operand.ptr.addr(), operand.dtype.size_of());
    let dense = |len| Extent { start, itemsize, shape: vec![len], strides: vec![1] };
    match &task.layout {
        _ if operand.dtype == DType::E8M0 => dense(task.layout.len().div_ceil(BLOCK_LEN)),
        _ if operand.dtype.is_blockwise() => dense(task.layout.len()),
        Layout::Flat { len } => dense(*len),
        Layout::Strided(layout) if key == LEFT_OVER => {
            let strides = match task.precision.as_ref().map(|precision| &precision.value) {
                Some(Rounding::Kahan(view)) => match &view.layout {
                    ViewLayout::Strided { strides, .. } => strides.clone(),
                    ViewLayout::Flat { .. } => paramstate::row_major(&layout.shape),
                },
                _ => unreachable!("nothing else is written under this key"),
            };
            Extent { start, itemsize, shape: layout.shape.clone(), strides }
        }
        Layout::Strided(layout) => {
            let strides = [
                &layout.value,
                &layout.grad,
                &layout.exp_avg,
                &layout.exp_avg_sq,
                &layout.max_exp_avg_sq,
            ][key];
            Extent { start, itemsize, shape: layout.shape.clone(), strides: strides.clone() }
        }
    }
}

fn merged(mut ranges: Vec<(usize, usize)>) -> Vec<(usize, usize)> {
    ranges.sort_unstable();
    ranges.dedup_by(|next, kept| {
        let touches = next.0 <= kept.1;
        if touches {
            kept.1 = kept.1.max(next.1);
        }
        touches
    });
    ranges
}
