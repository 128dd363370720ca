//! The floating-point mode of a thread: rounding, and whether denormals are flushed to zero.
//!
//! The mode is per thread (`torch.set_flush_denormal` sets it for its caller alone), so a worker
//! takes over the caller's for each piece of work: otherwise results would depend on which thread
//! an element falls to.

#[cfg(target_arch = "x86_64")]
type Register = u32;
#[cfg(target_arch = "aarch64")]
type Register = u64;
/// No mode is known here: worker threads run in their own.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
type Register = ();

/// The control register of one thread, as it was read.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct FloatMode(Register);

impl FloatMode {
    pub(crate) fn current() -> Self {
        Self(read())
    }

    /// Sets this mode, until what is returned goes out of scope.
    pub(crate) fn enter(self) -> Restore {
        let before = Self::current();
        write(self.0);
        Restore(before)
    }
}

/// Puts a thread's own mode back, after a panic too.
pub(crate) struct Restore(FloatMode);

impl Drop for Restore {
    fn drop(&mut self) {
        write(self.0.0);
    }
}

#[cfg(target_arch = "x86_64")]
fn read() -> Register {
    let mut mxcsr = 0;
    // SAFETY: STMXCSR writes the four bytes of `mxcsr`, and every x86-64 CPU has it.
    unsafe {
        std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut mxcsr, options(nostack, preserves_flags));
    }
    mxcsr
}

#[cfg(target_arch = "x86_64")]
fn write(mxcsr: Register) {
    // SAFETY: LDMXCSR reads four bytes; their value came from `read`, so no reserved bit is set.
    // The mode changes only the results of run-time arithmetic, which is the purpose.
    unsafe {
        std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const mxcsr, options(nostack));
    }
}

#[cfg(target_arch = "aarch64")]
fn read() -> Register {
    let fpcr;
    // SAFETY: reading FPCR has no effect, and every AArch64 CPU has it.
    unsafe {
        std::arch::asm!("mrs {}, fpcr", out(reg) fpcr, options(nomem, nostack, preserves_flags));
    }
    fpcr
}

#[cfg(target_arch = "aarch64")]
fn write(fpcr: Register) {
    // SAFETY: the value came from `read`, so no reserved bit is set. The mode changes only the
    // results of run-time arithmetic, which is the purpose.
    unsafe {
        std::arch::asm!("msr fpcr, {}", in(reg) fpcr, options(nostack, preserves_flags));
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn read() -> Register {}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn write((): Register) {}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_its_own_mode_back_after_a_panic_too() {
        const ROUND_UP: u32 = 0x4000;
        let own = FloatMode::current();
        let caught = std::panic::catch_unwind(|| {
            let _own = FloatMode(own.0 | ROUND_UP).enter();
            panic!("{:#x}", FloatMode::current().0 & ROUND_UP);
        });
        assert_eq!(caught.unwrap_err().downcast_ref::<String>().unwrap(), "0x4000");
        assert!(FloatMode::current() == own);
    }
}
