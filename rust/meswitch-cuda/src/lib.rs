//! The CUDA kernels of meswitch, and the way to launch them in another's context.
//!
//! The kernels (`cuda/kernels` of the repository) add `Δ̂ · x` to y for the tokens of many experts at once. This crate
//! embeds them as fat binaries, opens the driver when it is first asked for, and puts launches on the caller's stream. It
//! links nothing of CUDA: where there is no driver, or where kernels could not be compiled, that is an [`Error`] with the
//! reason. It allocates no device memory and waits for nothing.
//!
//! * [`driver`]: `libcuda.so.1`, and the few functions of it that are needed
//! * [`image`]: the fat binaries that were embedded, or why there are none
//! * [`arguments`]: what a launch is given
//! * [`kernels`]: the [`Kernels`](kernels::Kernels) on a device, and their launch

pub mod arguments;
pub mod driver;
pub mod image;
pub mod kernels;

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something cannot be done on a GPU here. Messages say what was expected, then what was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No driver, or one that lacks a function.
    #[error("expected the CUDA driver, found none: {0}")]
    NoDriver(String),
    /// No kernels in this build.
    #[error("expected CUDA kernels, found none: {0}")]
    NoKernels(String),
    /// The driver answered a call with an error.
    #[error("expected {call} to succeed, found {name} ({code})")]
    Driver {
        /// The function that was called.
        call: &'static str,
        /// Its answer.
        code: i32,
        /// The driver's name of it.
        name: String,
    },
    /// An argument outside its range.
    #[error("{0}")]
    Argument(String),
}
