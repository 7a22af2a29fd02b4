//! Which instruction set runs, chosen once.

use std::fmt;
use std::sync::OnceLock;

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backend {
    /// The portable truth; on ARM the compiler makes NEON of it, which every 64-bit ARM has.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        })
    }
}

/// The instruction set in use: the best that the processor has, or a lesser one named by `MESWITCH_BACKEND`.
pub fn backend() -> Backend {
    static CHOSEN: OnceLock<Backend> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let best = detect();
        match std::env::var("MESWITCH_BACKEND").as_deref() {
            Ok("scalar") => Backend::Scalar,
            Ok("avx2") => best.min(Backend::Avx2),
            _ => best,
        }
    })
}

/// Whether byte products with 32-bit sums (AVX-512 VNNI) may be used.
#[cfg(target_arch = "x86_64")]
pub(super) fn has_vnni() -> bool {
    is_x86_feature_detected!("avx512vnni")
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Backend {
    let has =
        |wanted: &[&str]| features().iter().filter(|(name, on)| *on && wanted.contains(name)).count() == wanted.len();
    if has(&["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c", "bmi2"]) {
        Backend::Avx512
    } else if has(&["avx2", "fma", "f16c", "bmi2"]) {
        Backend::Avx2
    } else {
        Backend::Scalar
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Backend {
    Backend::Scalar
}

/// The processor features that kernels ask about, and whether each is there.
#[cfg(target_arch = "x86_64")]
#[must_use]
pub fn features() -> Vec<(&'static str, bool)> {
    macro_rules! ask {
        ($($name:tt),*) => { vec![$(($name, is_x86_feature_detected!($name))),*] };
    }
    ask!("avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")
}

/// The processor features that kernels ask about, and whether each is there.
#[cfg(not(target_arch = "x86_64"))]
#[must_use]
pub fn features() -> Vec<(&'static str, bool)> {
    Vec::new()
}
