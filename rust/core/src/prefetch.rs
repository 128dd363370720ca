//! Hints to the processor that memory will be used soon.
//!
//! A step over many small tensors waits for memory at each of them: their lines are cold, and no
//! hardware foresees which tensor is next. We know, so we ask for the lines a little earlier.

/// Bytes of a cache line, or a divisor of it.
const LINE: usize = 64;

/// Lines of each operand that are asked for ahead: beyond, the hardware follows by itself.
pub(crate) const LINES: usize = 8;

/// Asks for the line at an address. Any address will do: a hint never fails and changes nothing
/// but time. Where the compiler offers no such instruction, nothing happens.
///
/// ```
/// let value = [0.0f32; 16];
/// paramstate::prefetch(value.as_ptr().addr());
/// paramstate::prefetch(0);
/// ```
#[inline(always)]
pub fn prefetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: the instruction is part of every x86-64 and accesses nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::without_provenance(address)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Asks for the first lines of some memory, at most `lines` of them.
#[inline(always)]
pub(crate) fn prefetch_start(ptr: *const u8, bytes: usize, lines: usize) {
    for line in 0..bytes.div_ceil(LINE).min(lines) {
        prefetch(ptr.addr() + line * LINE);
    }
}

/// How many elements ahead a loop that does much to each asks for memory. The hardware foresees a stream within a page;
/// such a loop crosses several pages at once, and waits at each border without this.
const AHEAD: usize = 512;

/// Asks for as much memory as a part of a tensor takes, so far beyond it that it is there when its turn comes.
#[inline(always)]
pub(crate) fn prefetch_ahead<T, const LEN: usize>(part: &[T; LEN]) {
    let ahead = part.as_ptr().wrapping_add(AHEAD);
    prefetch_start(ahead.cast(), size_of_val(part), usize::MAX);
}
