//! The fat binaries that the build embedded.

use crate::{Error, Result};

/// One compiled `.cu` file.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// The file's name, without its ending.
    pub name: &'static str,
    /// A whole fat binary, at a multiple of 64 bytes.
    pub bytes: &'static [u8],
}

/// What the build embedded.
#[derive(Clone, Copy, Debug)]
pub struct Built {
    /// The compiler, and the devices whose machine code it made.
    pub compiler: &'static str,
    /// One for each file of kernels.
    pub images: &'static [Image],
}

/// Aligned as the driver likes images.
#[allow(dead_code)] // where nothing was compiled
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

#[allow(unused_macros)] // where nothing was compiled
macro_rules! image {
    ($name:literal, $path:expr) => {{
        static BYTES: &Aligned<[u8]> = &Aligned(*include_bytes!($path));
        Image { name: $name, bytes: &BYTES.0 }
    }};
}

mod embedded {
    #[allow(clippy::wildcard_imports)] // of what the generated file may or may not name
    #[allow(unused_imports)]
    use super::*;
    include!(concat!(env!("OUT_DIR"), "/images.rs"));
}

/// The embedded kernels.
///
/// # Errors
/// [`Error::NoKernels`] where there was nothing to compile them with when this was built.
pub fn embedded() -> Result<Built> {
    embedded::EMBEDDED.map_err(|reason| Error::NoKernels(reason.to_owned()))
}
