//! Low-bit deltas of fine-tuned language models.
//!
//! A *delta* is what a fine-tune changes of its base. A *delta directory* stores it in a few bits per weight. This
//! crate opens and verifies delta directories, multiplies activations with their matrices on the CPU, and compresses
//! fine-tunes into them. It does not run models: the base's weights, and everything else of a model, are the caller's.
//!
//! # Reading
//!
//! [`Delta::open`] checks a directory's structure and reads no tensor; [`Delta::verify`] reads every byte and compares it
//! with its checksum. [`Delta::tensors`] reads all tensors into memory that nobody else can change, and
//! [`delta::Tensors::matrix`] gives one site as a [`kernels::Matrix`], whatever the version of the format.
//!
//! ```
//! use meswitch_core::{Delta, kernels};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # if cfg!(miri) { return Ok(()) }
//! # let folder = tempfile::tempdir()?;
//! # let path = doctest::write_delta(folder.path())?;
//! let delta = Delta::open(&path)?;
//! delta.verify()?;
//!
//! // The delta of one weight, [output channels, input channels].
//! let tensors = delta.tensors()?;
//! let matrix = tensors.matrix("layer.weight")?;
//! assert_eq!((matrix.rows(), matrix.columns()), (2, 3));
//!
//! // y = Δ̂ · x for one token. Results come in runs of rows, from several threads.
//! let y = std::sync::Mutex::new(vec![0f32; matrix.rows()]);
//! kernels::delta_linear(&matrix, &[1.0, 10.0, 100.0], true, &|_token, first, values| {
//!     y.lock().unwrap()[first..first + values.len()].copy_from_slice(values);
//! });
//! assert_eq!(y.into_inner()?, [205.0, -0.5]);
//!
//! // The same delta as floats.
//! let mut dense = [0f32; 6];
//! kernels::dense_rows(&matrix, 0, &mut dense);
//! assert_eq!(dense, [0.0, 0.5, 2.0, -0.5, 0.0, 0.0]);
//! # Ok(())
//! # }
//! # // A directory as docs/format.md describes it: one sparse site with three entries.
//! # mod doctest {
//! #     use std::{fs, io, path::{Path, PathBuf}};
//! #     use meswitch_core::delta::checksum;
//! #     pub fn write_delta(folder: &Path) -> io::Result<PathBuf> {
//! #         let starts: Vec<u8> = [0u32, 2, 3].iter().flat_map(|start| start.to_le_bytes()).collect();
//! #         let (gaps, values) = ([1u8, 1, 0], [0x38u8, 0x40, 0xb8]);
//! #         let header = r#"{"layer.weight/sparse_starts":{"dtype":"I32","shape":[3],"data_offsets":[0,12]},
//! #             "_pad.0":{"dtype":"U8","shape":[52],"data_offsets":[12,64]},
//! #             "layer.weight/sparse_gaps":{"dtype":"U8","shape":[3],"data_offsets":[64,67]},
//! #             "_pad.1":{"dtype":"U8","shape":[61],"data_offsets":[67,128]},
//! #             "layer.weight/sparse_values":{"dtype":"F8_E5M2","shape":[3],"data_offsets":[128,131]}}"#;
//! #         let length = (header.len() + 8).next_multiple_of(64) - 8;
//! #         let head = [&(length as u64).to_le_bytes()[..], format!("{header:length$}").as_bytes()].concat();
//! #         let data = [&starts[..], &[0; 52], &gaps, &[0; 61], &values].concat();
//! #         let file = [&head[..], &data].concat();
//! #         let hash = "0".repeat(64);
//! #         let body = format!(
//! #             r#""format_version": 3, "writer": "doctest", "base": {{"fingerprint": "{hash}", "sample": "{hash}", "name": ""}},
//! #             "settings": null, "files": {{"delta.safetensors": {{"bytes": {}, "checksum": "{}"}}}},
//! #             "sites": [{{"name": "layer.weight", "kind": "quantized", "shape": [2, 3], "dtype": "BF16", "bytes": 18,
//! #             "bpw": 24.0, "relative_error": 0.0, "sparse": {{"entries": 3, "changed": 3}}, "tensors":
//! #             {{"sparse_starts": "{}", "sparse_gaps": "{}", "sparse_values": "{}"}}}}]}}"#,
//! #             file.len(), checksum(&head), checksum(&starts), checksum(&gaps), checksum(&values));
//! #         let manifest = format!("{{\"checksum\": \"{}\",\n{body}", checksum(body.as_bytes()));
//! #         let path = folder.join("delta");
//! #         fs::create_dir(&path)?;
//! #         fs::write(path.join("meswitch.json"), manifest)?;
//! #         fs::write(path.join("delta.safetensors"), file)?;
//! #         Ok(path)
//! #     }
//! # }
//! ```
//!
//! # Writing
//!
//! With the feature `compress`, `compress::Job` turns two Hugging Face checkpoints, a base and a fine-tune, into a
//! delta directory. `delta::Assembly` writes sites that are given, and `delta::rewrite` replaces tensors of a
//! directory. All of them write under a temporary name and rename at the end.
//!
//! # Features
//!
//! * `compress` (default): the codec, reading of checkpoints, and writing of delta directories. Implies `rayon`.
//! * `rayon`: hashing and kernels on rayon's pool. Without it they run on the calling thread, except that kernels always
//!   use torch's own OpenMP threads where the process has loaded torch, or libgomp's where it has loaded that.
//!
//! # Platforms
//!
//! Little-endian Unix only. Kernels have code for AVX-512, AVX2 and NEON, and portable code for the
//! rest.

#![warn(unreachable_pub)]

#[cfg(target_endian = "big")]
compile_error!("meswitch-core reads little-endian tensors as they are: big-endian targets are not supported");

#[cfg(feature = "compress")]
pub mod checkpoint;
#[cfg(feature = "compress")]
pub mod codec;
#[cfg(feature = "compress")]
pub mod compress;
#[cfg(feature = "compress")]
mod crash;
pub mod delta;
mod directory;
mod error;
#[cfg(feature = "compress")]
mod fingerprint;
#[cfg(feature = "compress")]
#[doc(hidden)]
pub mod folder;
pub mod kernels;
pub mod layout;
mod memory;
#[cfg(not(shuttle))] // which has no part in it
pub mod moe;
pub mod residency;

pub use delta::Delta;
pub use error::{Error, Result};
pub use memory::{KeepAlive, Region};
