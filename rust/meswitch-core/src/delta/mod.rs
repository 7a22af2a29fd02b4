//! Delta directories: `meswitch.json` (the manifest), `delta.safetensors` (the tensors), and the fine-tune's own small
//! files. The format is described in docs/format.md.

#[cfg(feature = "compress")]
mod assemble;
#[cfg(feature = "compress")]
mod header;
#[cfg(feature = "compress")]
mod journal;
mod manifest;
mod matrix;
mod reader;
#[cfg(feature = "compress")]
mod rewrite;
mod site;
mod tensor;
mod verify;
#[cfg(feature = "compress")]
mod writer;

#[cfg(feature = "compress")]
pub use assemble::{Assembly, Progress};
#[cfg(feature = "compress")]
pub(crate) use header::estimated_bytes;
pub use manifest::{BaseEntry, FileEntry, MANIFEST, Manifest, TENSORS, VERSION};
pub use reader::Delta;
#[cfg(feature = "compress")]
pub use rewrite::rewrite;
pub use site::{PartEntry, SiteEntry, SiteKind, SparseCounts, TermsEntry};
#[cfg(feature = "compress")]
pub(crate) use tensor::Role;
pub use tensor::TensorSpec;
#[cfg(feature = "compress")]
pub(crate) use writer::{Writer, check_copied_files, check_site_name};

/// Bytes of a checksum: a BLAKE3 hash cut to 128 bits.
const CHECKSUM_BYTES: usize = 16;

/// Every tensor starts at a multiple of this in the file: a cache line.
pub(crate) const ALIGNMENT: usize = 64;

/// The prefix of the names of padding tensors.
const PADDING: &str = "_pad.";

/// The checksum of some bytes, in hexadecimal. Uses rayon's pool for more than a megabyte (feature `rayon`).
#[must_use]
pub fn checksum(bytes: &[u8]) -> String {
    let mut hasher = blake3::Hasher::new();
    #[cfg(feature = "rayon")]
    if bytes.len() > 1 << 20 {
        hasher.update_rayon(bytes);
        return hex(&hasher.finalize().as_bytes()[..CHECKSUM_BYTES]);
    }
    hasher.update(bytes);
    hex(&hasher.finalize().as_bytes()[..CHECKSUM_BYTES])
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
