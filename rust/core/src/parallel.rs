//! Work cut at fixed borders, handed out to a pool of threads.
//!
//! The borders depend on the work alone, never on the number of threads, so results do not either.

use std::cell::Cell;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::Isa;
use crate::float_mode::FloatMode;
use crate::helpers_gate::help;

/// Elements of one tensor that are one unit of work: a few hundred kilobytes, large beside the cost
/// of handing it out and small beside a model.
pub(crate) const CHUNK: usize = 1 << 16;

/// Small tensors are gathered until they weigh this much.
const BATCH: usize = 1 << 14;

/// What a tensor costs beyond its elements, in elements.
const OVERHEAD: usize = 256;

/// Less than this many elements in all are done before a worker would have woken up.
const WORTH_WAKING: usize = 1 << 15;

/// How to run: the number of threads, the caller included, and the instruction set.
///
/// ```
/// use std::num::NonZeroUsize;
///
/// let execution = paramstate::Execution::new(NonZeroUsize::MIN);
/// assert_eq!(execution.isa, paramstate::Isa::detect());
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Execution {
    /// Threads, the caller among them. Results do not depend on it.
    pub threads: NonZeroUsize,
    /// The instruction set. Results do not depend on it.
    pub isa: Isa,
}

impl Execution {
    /// So many threads, and the best instruction set of this CPU.
    #[must_use]
    pub fn new(threads: NonZeroUsize) -> Self {
        Self { threads, isa: Isa::detect() }
    }
}

/// A list of tensors cut into units of work: a chunk of a large one, or several small ones whole.
pub(crate) struct Plan {
    stretches: Vec<Stretch>,
    units: usize,
    elements: usize,
}

/// Either one tensor of any number of units, or several tensors that are one unit together.
struct Stretch {
    first_unit: usize,
    tensors: Range<usize>,
}

thread_local! {
    /// The memory of the latest plan's list. An allocation on every step would have the allocator
    /// sort what a backward pass has freed, at the cost of the step of many small tensors.
    static STRETCHES: Cell<Vec<Stretch>> = const { Cell::new(Vec::new()) };
}

impl Drop for Plan {
    fn drop(&mut self) {
        STRETCHES.set(std::mem::take(&mut self.stretches));
    }
}

impl Plan {
    pub(crate) fn new(lens: impl Iterator<Item = usize>) -> Self {
        let mut stretches = STRETCHES.take();
        stretches.clear();
        let mut plan = Self { stretches, units: 0, elements: 0 };
        let mut weight = BATCH; // nothing joins a stretch that does not exist yet
        for (tensor, len) in lens.enumerate() {
            plan.elements += len;
            if weight + len + OVERHEAD <= BATCH {
                weight += len + OVERHEAD;
                let last = plan.stretches.last_mut().expect("a light one was pushed before");
                last.tensors.end = tensor + 1;
            } else {
                plan.stretches
                    .push(Stretch { first_unit: plan.units, tensors: tensor..tensor + 1 });
                plan.units += len.div_ceil(CHUNK).max(1);
                weight = len.saturating_add(OVERHEAD).min(BATCH);
            }
        }
        plan
    }

    pub(crate) fn units(&self) -> usize {
        self.units
    }

    /// The tensors of a unit, each with the part of it that belongs to the unit.
    pub(crate) fn parts(
        &self,
        unit: usize,
        len_of: impl Fn(usize) -> usize,
    ) -> impl Iterator<Item = (usize, Range<usize>)> {
        let after = self.stretches.partition_point(|stretch| stretch.first_unit <= unit);
        let stretch = &self.stretches[after - 1];
        let start = (unit - stretch.first_unit) * CHUNK;
        stretch.tensors.clone().map(move |tensor| {
            let len = len_of(tensor);
            (tensor, start..len.min(start + CHUNK))
        })
    }

    /// Calls `work` once for every unit, on as many threads as are asked for and worth it. Each
    /// thread makes scratch for itself, once.
    pub(crate) fn run<S>(
        &self,
        threads: NonZeroUsize,
        scratch: impl Fn() -> S + Sync,
        work: impl Fn(&mut S, usize) + Sync,
    ) {
        let next = AtomicUsize::new(0);
        let drain = || {
            let mut scratch = scratch();
            loop {
                let unit = next.fetch_add(1, Ordering::Relaxed);
                if unit >= self.units {
                    break;
                }
                work(&mut scratch, unit);
            }
        };
        let helpers = threads.get().min(self.units).saturating_sub(1);
        if self.elements < WORTH_WAKING || helpers == 0 {
            return drain();
        }
        let Some(pool) = pool(helpers) else { return drain() };
        let mode = FloatMode::current();
        help(&pool, helpers, drain, move |work| {
            let _own = mode.enter();
            work();
        });
    }
}

/// The pool of one process. A child made by `fork` has its parent's memory but none of its threads.
struct Shared {
    process: u32,
    pool: Mutex<Option<Arc<ThreadPool>>>,
}

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(std::ptr::null_mut());

/// At least `workers` threads beside the caller, or `None` where the system refuses them: the
/// caller then does the work alone.
fn pool(workers: usize) -> Option<Arc<ThreadPool>> {
    // A panic while the lock is held leaves either the old pool or none, and both are right.
    let mut slot = shared().pool.lock().unwrap_or_else(PoisonError::into_inner);
    if slot.as_ref().is_none_or(|pool| pool.current_num_threads() < workers) {
        let named = |index| format!("paramstate-{index}");
        *slot = ThreadPoolBuilder::new()
            .num_threads(workers)
            .thread_name(named)
            .build()
            .ok()
            .map(Arc::new);
    }
    slot.clone()
}

/// This process's own. What a parent left behind is never touched nor freed: its lock may have been
/// held at the fork, and its threads do not exist here.
fn shared() -> &'static Shared {
    let process = std::process::id();
    let found = SHARED.load(Ordering::Acquire);
    // SAFETY: null, or a leaked box.
    if let Some(shared) = unsafe { found.as_ref() }
        && shared.process == process
    {
        return shared;
    }
    let fresh = Box::into_raw(Box::new(Shared { process, pool: Mutex::new(None) }));
    match SHARED.compare_exchange(found, fresh, Ordering::AcqRel, Ordering::Acquire) {
        // SAFETY: leaked just now.
        Ok(_) => unsafe { &*fresh },
        Err(won) => {
            // SAFETY: no one else has seen it.
            drop(unsafe { Box::from_raw(fresh) });
            // SAFETY: another thread of this process leaked it just now.
            unsafe { &*won }
        }
    }
}
