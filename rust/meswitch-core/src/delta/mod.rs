//! A delta directory: `meswitch.json` (the manifest) and `delta.safetensors` (the tensors), laid out in docs/format.md.

mod assemble;
mod journal;
mod manifest;
mod reader;
mod writer;

pub use assemble::{Assembly, Progress};
pub use manifest::{
    BaseEntry, FileEntry, Kind, MANIFEST, Manifest, PartEntry, SiteEntry, SparseEntry, TENSORS, TensorSpec, VERSION,
};
pub use reader::Delta;
pub use writer::{Folder, Writer, rewrite, weigh};

/// Bytes of a checksum: a BLAKE3 hash cut to 128 bits.
const CHECKSUM_BYTES: usize = 16;

/// Every tensor starts at a multiple of this in the file: a cache line.
pub const ALIGNMENT: usize = 64;

/// The checksum of some bytes, in hexadecimal.
#[must_use]
pub fn checksum(bytes: &[u8]) -> String {
    let mut hasher = blake3::Hasher::new();
    if bytes.len() > 1 << 20 {
        hasher.update_rayon(bytes);
    } else {
        hasher.update(bytes);
    }
    hex(&hasher.finalize().as_bytes()[..CHECKSUM_BYTES])
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
