//! What worker threads take over from the thread that calls, and from the process that forked.

mod reference;

use std::num::NonZeroUsize;

use paramstate::{
    Adam, AdamTask, Bounds, DType, Execution, Layout, Order, OwnedBuffer, View, ViewLayout,
    adam_step, sum_of_squares,
};

/// Many chunks, so that workers get their share.
const LEN: usize = 1 << 21;

fn steps(threads: usize, tiny: f32) -> Vec<u32> {
    let buffers: [OwnedBuffer; 4] = std::array::from_fn(|side| {
        let x = if side == 1 { tiny } else { 0.0 };
        let mut buffer = OwnedBuffer::zeroed(DType::F32, LEN);
        buffer.as_mut_slice::<f32>().unwrap().fill(x);
        buffer
    });
    let [value, grad, exp_avg, exp_avg_sq] = buffers.each_ref().map(OwnedBuffer::operand);
    let task = AdamTask {
        value,
        grad,
        exp_avg,
        exp_avg_sq,
        max_exp_avg_sq: None,
        layout: Layout::Flat { len: LEN },
        scalars: Adam::default().scalars(1.0, 1.0),
        bounds: Bounds::default(),
        particulars: None,
        precision: None,
    };
    let execution = Execution::new(NonZeroUsize::new(threads).unwrap());
    // SAFETY: four buffers of their own, alive until the end.
    unsafe { adam_step(&[task], Order::Parallel, &execution) };
    buffers[2].as_slice::<f32>().unwrap().iter().map(|x| x.to_bits()).collect()
}

/// Flushes denormals to zero, as `torch.set_flush_denormal` does, on this thread alone.
#[cfg(target_arch = "x86_64")]
fn set_flush(on: bool) {
    let mut mode = 0u32;
    // SAFETY: STMXCSR writes four bytes.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut mode) };
    let mode = if on { mode | 0x8040 } else { mode & !0x8040 };
    // SAFETY: LDMXCSR reads four bytes; FTZ and DAZ are no reserved bits.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const mode) };
}

#[cfg(target_arch = "x86_64")]
#[test]
fn workers_flush_denormals_exactly_where_their_caller_does() {
    // A denormal product of normal numbers: the first moment.
    let tiny = 5.0 * f32::MIN_POSITIVE;
    let kept = steps(1, tiny);
    assert!(kept.iter().all(|bits| *bits != 0));
    assert_eq!(steps(7, tiny), kept);
    set_flush(true);
    let (alone, together) = (steps(1, tiny), steps(7, tiny));
    // Zero, but where the mode is not there to be had (Valgrind does not model it).
    let own = std::hint::black_box(tiny) * std::hint::black_box(0.1);
    let own = std::hint::black_box(own).to_bits();
    set_flush(false);
    assert!(alone.iter().all(|bits| *bits == own));
    assert_eq!(together, alone);
    assert_eq!(steps(7, tiny), kept, "the workers have their own mode back");
}

#[cfg(unix)]
#[test]
fn a_child_made_by_fork_after_a_parallel_step_has_workers_of_its_own() {
    let norm = || {
        let mut buffer = OwnedBuffer::zeroed(DType::F32, LEN);
        buffer.as_mut_slice::<f32>().unwrap().fill(0.5);
        let layout = ViewLayout::Strided { shape: vec![LEN], strides: vec![1] };
        let view = View { operand: buffer.operand(), layout };
        let execution = Execution::new(NonZeroUsize::new(4).unwrap());
        // SAFETY: one buffer, alive until the end of the call.
        unsafe { sum_of_squares(&[view], &execution) }
    };
    assert_eq!(norm(), LEN as f64 / 4.0);
    // SAFETY: the child calls nothing but the code under test, and leaves without cleaning up.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        let right = norm() == LEN as f64 / 4.0;
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(i32::from(!right)) };
    }
    let mut status = 0;
    for _ in 0..1_000 {
        // SAFETY: `child` is ours, and `status` is a place for its status.
        if unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == child {
            assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "{status:#x}");
            assert_eq!(norm(), LEN as f64 / 4.0, "the parent's workers are still there");
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(30));
    }
    // SAFETY: `child` is ours and still runs.
    unsafe { libc::kill(child, libc::SIGKILL) };
    panic!("the child hangs");
}
