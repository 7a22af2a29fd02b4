//! The instruction set that kernels use, chosen once per process.

use std::fmt;
use std::sync::OnceLock;

use crate::error::{Error, Result};

/// An instruction set that kernels are compiled for. On one architecture, a greater one includes the lesser ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Backend {
    /// Portable code: the reference that the others must equal.
    Scalar,
    /// AArch64 with NEON.
    Neon,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL.
    Avx512,
}

/// The backends of this architecture, least first.
#[cfg(target_arch = "x86_64")]
const BACKENDS: &[Backend] = &[Backend::Scalar, Backend::Avx2, Backend::Avx512];
#[cfg(target_arch = "aarch64")]
const BACKENDS: &[Backend] = &[Backend::Scalar, Backend::Neon];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const BACKENDS: &[Backend] = &[Backend::Scalar];

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scalar => "scalar",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        })
    }
}

/// The instruction set in use: the one that the environment variable `MESWITCH_BACKEND` names, else the best that the
/// processor has. Read once per process.
///
/// # Panics
/// Where `MESWITCH_BACKEND` is set to anything that this processor cannot run; [`check`] says so without a panic.
#[must_use]
pub fn backend() -> Backend {
    static CHOSEN: OnceLock<Backend> = OnceLock::new();
    *CHOSEN.get_or_init(|| requested().unwrap_or_else(|error| panic!("{error}")))
}

/// Checks that `MESWITCH_BACKEND` is unset or names a backend that this processor can run.
///
/// # Errors
/// [`Error::Backend`] with the possible names.
pub fn check() -> Result<()> {
    requested().map(drop)
}

/// The backends that this processor can run, least first.
pub fn available() -> impl Iterator<Item = Backend> {
    BACKENDS.iter().copied().filter(|backend| *backend <= best())
}

fn requested() -> Result<Backend> {
    match std::env::var_os("MESWITCH_BACKEND") {
        None => Ok(best()),
        Some(name) => parse(&name.to_string_lossy()),
    }
}

fn parse(name: &str) -> Result<Backend> {
    available().find(|backend| backend.to_string() == name).ok_or_else(|| {
        let names: Vec<String> = available().map(|backend| backend.to_string()).collect();
        Error::Backend(format!("MESWITCH_BACKEND: expected one of {}, found {name:?}", names.join(", ")))
    })
}

#[cfg(target_arch = "x86_64")]
fn best() -> Backend {
    let has =
        |needed: &[&str]| features().iter().filter(|(name, on)| *on && needed.contains(name)).count() == needed.len();
    if !has(&["avx2", "fma", "f16c", "bmi2"]) {
        Backend::Scalar
    } else if !has(&["avx512f", "avx512bw", "avx512dq", "avx512vl"]) {
        Backend::Avx2
    } else {
        Backend::Avx512
    }
}

#[cfg(target_arch = "aarch64")]
fn best() -> Backend {
    if features().contains(&("neon", true)) { Backend::Neon } else { Backend::Scalar }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn best() -> Backend {
    Backend::Scalar
}

/// The processor features that kernels depend on, and whether this processor has each.
#[cfg(target_arch = "x86_64")]
#[must_use]
pub fn features() -> Vec<(&'static str, bool)> {
    macro_rules! ask {
        ($($name:tt),*) => { vec![$(($name, is_x86_feature_detected!($name))),*] };
    }
    ask!("avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl")
}

/// The processor features that kernels depend on, and whether this processor has each.
#[cfg(target_arch = "aarch64")]
#[must_use]
pub fn features() -> Vec<(&'static str, bool)> {
    use std::arch::is_aarch64_feature_detected as has;
    vec![("neon", has!("neon"))]
}

/// The processor features that kernels depend on, and whether this processor has each.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
#[must_use]
pub fn features() -> Vec<(&'static str, bool)> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_usable_backends_may_be_named() {
        for backend in available() {
            assert_eq!(parse(&backend.to_string()).unwrap(), backend);
        }
        assert_eq!(available().next(), Some(Backend::Scalar));
        let message = parse("avx").unwrap_err().to_string();
        assert!(message.starts_with("MESWITCH_BACKEND: expected one of scalar") && message.ends_with("found \"avx\""));
    }
}
