//! Delta directories: `meswitch.json` (the manifest), `delta.safetensors` (the tensors), and the fine-tune's own small
//! files. The format is described in docs/format.md.

#[cfg(feature = "compress")]
mod assemble;
mod checksum;
#[cfg(feature = "compress")]
mod estimate;
mod header;
#[cfg(feature = "compress")]
mod journal;
pub(crate) mod load;
mod manifest;
mod matrix;
mod reader;
#[cfg(feature = "compress")]
mod rewrite;
mod site;
mod tensor;
mod tensors;
mod verify;
#[cfg(feature = "compress")]
mod writer;

#[cfg(feature = "compress")]
pub use assemble::{Assembly, Progress};
#[cfg(feature = "compress")]
pub(crate) use checksum::hex;
pub use checksum::{Checksum, checksum};
#[cfg(feature = "compress")]
pub(crate) use estimate::estimated_bytes;
pub use manifest::{BaseEntry, FileEntry, Kind, MANIFEST, Manifest, TENSORS, VERSION};
pub use reader::Delta;
#[cfg(feature = "compress")]
pub use rewrite::{rewrite, rewrite_at, upgrade};
pub use site::{Owner, PartEntry, SiteEntry, SiteKind, SparseCounts, TermsEntry};
#[cfg(feature = "compress")]
pub(crate) use tensor::Role;
pub use tensor::TensorSpec;
pub use tensors::Tensors;
#[cfg(feature = "compress")]
pub(crate) use writer::{Writer, check_copied_files, check_site_name};

/// Every tensor starts at a multiple of this in the file: a cache line.
pub(crate) const ALIGNMENT: usize = 64;

/// The prefix of the names of padding tensors.
const PADDING: &str = "_pad.";
