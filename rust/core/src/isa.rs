//! The choice of instruction set: one loop, compiled once for each.

/// An instruction set that this CPU was found to have. Only detection makes one, so holding it is
/// the proof.
///
/// All give the same bits: the loops use fused multiply-add, exact division and square root, and a
/// fixed order everywhere.
///
/// ```
/// use paramstate::Isa;
///
/// assert!(Isa::available().contains(&Isa::detect()));
/// println!("running on {}", Isa::detect().name());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Isa(Kind);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// A loop to be compiled for an instruction set: `run` and all that it calls is `#[inline(always)]`.
pub(crate) trait Kernel {
    type Output;
    fn run(self) -> Self::Output;

    /// The same with AVX2, for a loop that names its instructions.
    ///
    /// # Safety
    /// The processor has AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn run_avx2(self) -> Self::Output
    where
        Self: Sized,
    {
        self.run()
    }

    /// The same with AVX-512.
    ///
    /// # Safety
    /// The processor has AVX-512 F, VL, BW and DQ.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn run_avx512(self) -> Self::Output
    where
        Self: Sized,
    {
        self.run()
    }
}

impl Isa {
    /// The best that this CPU has.
    #[must_use]
    pub fn detect() -> Self {
        *Self::available().last().expect("portable code runs everywhere")
    }

    /// What the compiler's target has, and no more.
    #[must_use]
    pub fn portable() -> Self {
        Self(Kind::Portable)
    }

    /// All that this CPU has, best last.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut available = vec![Self::portable()];
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                available.push(Self(Kind::Avx2));
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
            {
                available.push(Self(Kind::Avx512));
            }
        }
        available
    }

    /// `"portable"`, `"avx2+fma"` or `"avx512"`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => "avx2+fma",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => "avx512",
        }
    }

    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Kind::Portable => kernel.run(),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` alone makes this value, after it has found AVX2 and FMA.
            Kind::Avx2 => unsafe { run_avx2(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: `available` alone makes this value, after it has found AVX-512 F, VL, BW and DQ.
            Kind::Avx512 => unsafe { run_avx512(kernel) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function's features say so.
    unsafe { kernel.run_avx2() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,fma")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: this function's features say so.
    unsafe { kernel.run_avx512() }
}
