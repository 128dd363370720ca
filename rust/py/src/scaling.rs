//! Scaling in place: each element once, however many tensors use it.
//!
//! One gradient may serve several parameters (a parameter that is listed twice, a gradient that a client assigned twice),
//! and an expanded one has several indices for one element: multiplied once for each use, it would be scaled too often.

use std::collections::{HashMap, HashSet};

use paramstate::{Extent, View, ViewLayout, overlapping, overlaps_itself};

use crate::findings::Findings;
use crate::running::gradient_view;

/// The gradients of all tasks, no memory twice. Those that share a part of their memory alone are left to torch.
pub fn of_gradients(findings: &mut Findings<'_>) -> Vec<View> {
    let (views, left) = each_once(findings.tasks.iter().map(gradient_view));
    findings.leave_to_torch(&left);
    views
}

/// The views without those that repeat another's memory, and the indices of those that share a part of it.
pub fn each_once(views: impl Iterator<Item = View>) -> (Vec<View>, HashSet<usize>) {
    let mut users: HashMap<_, Vec<usize>> = HashMap::new();
    let mut distinct = Vec::new();
    for (index, view) in views.enumerate() {
        let view = without_repeats(view);
        let Extent { start, itemsize, shape, strides } = extent(&view);
        let same = users.entry((start, itemsize, shape, strides)).or_default();
        if same.is_empty() {
            distinct.push((index, view));
        }
        same.push(index);
    }
    let extents: Vec<Extent> = distinct.iter().map(|(_, view)| extent(view)).collect();
    let itself = (0..extents.len()).filter(|&index| overlaps_itself(&extents[index]));
    let pairs = overlapping(&extents).into_iter().flat_map(|(a, b)| [a, b]);
    let shared: HashSet<usize> = itself.chain(pairs).map(|index| distinct[index].0).collect();
    let left = users.into_values().filter(|users| shared.contains(&users[0])).flatten().collect();
    distinct.retain(|(index, _)| !shared.contains(index));
    (distinct.into_iter().map(|(_, view)| view).collect(), left)
}

/// A dimension along which nothing moves has one element in memory.
fn without_repeats(mut view: View) -> View {
    if let ViewLayout::Strided { shape, strides } = &mut view.layout {
        for (size, _) in
            shape.iter_mut().zip(strides).filter(|(size, stride)| **size > 1 && **stride == 0)
        {
            *size = 1;
        }
    }
    view
}

fn extent(view: &View) -> Extent {
    let (start, itemsize) = (view.operand.ptr.addr(), view.operand.dtype.size_of());
    let (shape, strides) = match &view.layout {
        ViewLayout::Flat { len } => (vec![*len], vec![1]),
        ViewLayout::Strided { shape, strides } => (shape.clone(), strides.clone()),
    };
    Extent { start, itemsize, shape, strides }
}
