//! Work that threads of a pool help with, and that waits for none that comes too late.
//!
//! A thread that was woken may not run for milliseconds: other libraries let their threads spin where there are no more
//! cores than threads. Whoever asked for help has done all of the work by then, and goes on; the gate is closed, and who
//! comes late finds that out before it touches anything.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use rayon::ThreadPool;

/// Calls `work` here, and in up to `helpers` threads of the pool by way of `enter`. Returns once all calls that have
/// begun are finished; from then on none begins. A panic of any of them is passed on.
pub(crate) fn help<W: Fn() + Sync>(
    pool: &ThreadPool,
    helpers: usize,
    work: W,
    enter: impl Fn(&dyn Fn()) + Clone + Send + 'static,
) {
    let gate = Arc::new(Gate::default());
    let shared: &(dyn Fn() + Sync) = &work;
    // SAFETY: only the lifetime changes. It is called between `enter` and `leave` of the gate alone, and `closing`
    // does not let this function end, by a panic neither, before all that entered have left and none can enter.
    let shared: &'static (dyn Fn() + Sync) = unsafe { std::mem::transmute(shared) };
    let closing = Closing(&gate);
    for _ in 0..helpers {
        let (gate, enter) = (Arc::clone(&gate), enter.clone());
        pool.spawn(move || {
            if gate.enter() {
                let done = catch_unwind(AssertUnwindSafe(|| enter(&|| shared())));
                gate.leave(done.err());
            }
        });
    }
    work();
    drop(closing);
    if let Some(panic) = gate.state().panic.take() {
        resume_unwind(panic);
    }
}

#[derive(Default)]
struct Gate {
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Default)]
struct State {
    is_closed: bool,
    inside: usize,
    panic: Option<Box<dyn Any + Send>>,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is still open; who entered has to leave.
    fn enter(&self) -> bool {
        let mut state = self.state();
        state.inside += usize::from(!state.is_closed);
        !state.is_closed
    }

    fn leave(&self, panic: Option<Box<dyn Any + Send>>) {
        let mut state = self.state();
        state.inside -= 1;
        state.panic = state.panic.take().or(panic);
        self.left.notify_one();
    }
}

/// Closes the gate when it goes out of scope, and waits for those inside.
struct Closing<'a>(&'a Gate);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.is_closed = true;
        while state.inside > 0 {
            state = self.0.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    use rayon::ThreadPoolBuilder;

    use super::*;

    fn pool(threads: usize) -> ThreadPool {
        ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    #[test]
    fn who_comes_late_is_not_waited_for_and_does_nothing() {
        let pool = pool(1);
        let (free, blocked) = channel::<()>();
        pool.spawn(move || blocked.recv().unwrap()); // the only thread of the pool
        let calls = AtomicUsize::new(0);
        let count = || {
            calls.fetch_add(1, Ordering::Relaxed);
        };
        help(&pool, 1, count, |work| work());
        free.send(()).unwrap();
        pool.install(|| ()); // all that was asked before has had its turn
        assert_eq!(calls.into_inner(), 1);
    }

    #[test]
    fn who_has_begun_is_waited_for() {
        let pool = pool(3);
        for _ in 0..200 {
            let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let work = || {
                begun.fetch_add(1, Ordering::Relaxed);
                std::thread::yield_now();
                ended.fetch_add(1, Ordering::Relaxed);
            };
            help(&pool, 3, work, |work| work());
            assert_eq!(begun.load(Ordering::Relaxed), ended.load(Ordering::Relaxed));
        }
    }

    #[test]
    fn a_panic_is_passed_on_from_here_and_from_there() {
        let pool = pool(2);
        let here = std::thread::current().id();
        for panics_here in [true, false] {
            let (met, meet) = channel::<()>();
            let (met, meet) = (Mutex::new(met), Mutex::new(meet));
            let work = || {
                if (std::thread::current().id() == here) == panics_here {
                    let _ = met.lock().unwrap().send(());
                    panic!("on purpose");
                }
                let _ = meet.lock().unwrap().recv();
            };
            let result = catch_unwind(AssertUnwindSafe(|| help(&pool, 1, work, |work| work())));
            assert!(result.is_err());
        }
    }
}
