//! Low-bit deltas of fine-tuned language models: the codec, the delta directory, memory-mapped reading and the CPU
//! kernels. No Python and no CUDA.

pub mod checkpoint;
pub mod codec;
pub mod compress;
pub mod delta;
pub mod error;
pub mod fingerprint;
pub mod kernels;
pub mod layout;

pub use error::{Error, Result};
