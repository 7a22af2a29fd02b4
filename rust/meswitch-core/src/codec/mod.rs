//! The codec: a matrix of differences to codes, scales and salient channels.

mod columns;
mod compensate;
pub mod fit;
mod low_rank;
pub mod pair;
mod probe;
mod quantize;
mod salient;
mod settings;
mod source;
mod sparse;
mod statistics;
mod sweep;

pub use compensate::Factor;
pub use pair::Pair;
pub use probe::{energies, probe};
pub use quantize::{Part, Quantized, quantize};
pub use settings::{Class, Settings, Zero};
pub use sparse::Sparse;
