//! Fingerprints: which base a delta was made against.

use std::collections::BTreeMap;

use crate::checkpoint::{Checkpoint, View};
use crate::delta::hex;
use crate::error::Result;

/// Bytes that a sample reads at the start, in the middle and at the end of each tensor.
const SAMPLE_BYTES: usize = 1024;

/// The hash of one tensor's dtype, shape and content.
pub(crate) type Digest = [u8; 32];

/// The hash of all tensors' names, dtypes, shapes and content. Tensors may be added in any order.
#[derive(Default)]
pub(crate) struct Fingerprint(BTreeMap<String, Digest>);

impl Fingerprint {
    /// Reads a whole checkpoint.
    ///
    /// # Errors
    /// [`crate::Error::Checkpoint`] where a tensor cannot be read.
    pub(crate) fn of(base: &Checkpoint) -> Result<Self> {
        let mut fingerprint = Self::default();
        for name in base.stored_names() {
            fingerprint.add(name, base)?;
        }
        Ok(fingerprint)
    }

    /// Hashes and adds a tensor; returns its digest.
    ///
    /// # Errors
    /// [`crate::Error::Checkpoint`] where it cannot be read.
    pub(crate) fn add(&mut self, name: &str, base: &Checkpoint) -> Result<Digest> {
        let digest = base.digest(name)?;
        self.insert(name, digest);
        Ok(digest)
    }

    /// Adds a tensor whose digest is known.
    pub(crate) fn insert(&mut self, name: &str, digest: Digest) {
        self.0.insert(name.to_owned(), digest);
    }

    /// Whether a tensor of that name was added.
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The fingerprint, in hexadecimal.
    pub(crate) fn finish(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for (name, hash) in &self.0 {
            hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes()).update(hash);
        }
        hex(hasher.finalize().as_bytes())
    }
}

/// The hash of a tensor.
pub(crate) fn digest(view: &View<'_>) -> Digest {
    let mut hasher = hash_type(view);
    hasher.update_rayon(&view.data);
    *hasher.finalize().as_bytes()
}

/// The fingerprint with each tensor's content replaced by up to three kilobytes of it. Of a quantized model it is the
/// fingerprint itself, which is quick.
///
/// # Errors
/// [`crate::Error::Checkpoint`] where a tensor cannot be read.
pub(crate) fn sample(base: &Checkpoint) -> Result<String> {
    if base.quantized_from().is_some() {
        return Ok(Fingerprint::of(base)?.finish());
    }
    let mut fingerprint = Fingerprint::default();
    for name in base.stored_names() {
        let view = base.stored_view(name)?;
        let mut hasher = hash_type(&view);
        let length = view.data.len();
        for start in [0, length.saturating_sub(SAMPLE_BYTES) / 2, length.saturating_sub(SAMPLE_BYTES)] {
            hasher.update(&view.data[start..(start + SAMPLE_BYTES).min(length)]);
        }
        fingerprint.insert(name, *hasher.finalize().as_bytes());
    }
    Ok(fingerprint.finish())
}

/// A hasher that has read dtype and shape.
fn hash_type(view: &View<'_>) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    hasher.update(view.dtype.to_string().as_bytes()).update(&[0]);
    for size in &view.shape {
        hasher.update(&(*size as u64).to_le_bytes());
    }
    hasher
}
