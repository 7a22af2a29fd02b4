//! The codec: a matrix of differences to codes, scales and salient channels.

mod columns;
mod compensate;
pub mod fit;
mod low_rank;
pub mod pair;
mod probe;
mod quantize;
mod salient;
mod sparse;
mod sweep;

pub use compensate::Factor;
pub use pair::Pair;
pub use probe::{energies, probe};
pub use quantize::{Class, Part, Quantized, Settings, Zero, quantize};
pub use sparse::Sparse;
