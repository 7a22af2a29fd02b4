//! The codec: turns the difference of two weights into codes, scales, salient channels and a low-rank part, or into
//! sparse entries.
//!
//! Work is divided over rayon's pool, always in the same bands of rows, so results do not depend on the number of
//! threads.

mod columns;
mod compensate;
#[doc(hidden)]
pub mod fit;
mod fitter;
mod low_rank;
mod pair;
mod probe;
mod quantize;
mod salient;
mod settings;
mod sparse;
mod statistics;
mod sweep;

#[doc(hidden)]
pub use pair::Pair;
#[doc(hidden)]
pub use probe::{probe, row_energies};
#[doc(hidden)]
pub use quantize::{Quantized, QuantizedPart, quantize};
pub use settings::{Class, Settings, Zero};
#[doc(hidden)]
pub use sparse::SparseDelta;
