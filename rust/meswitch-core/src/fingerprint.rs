//! Which base a delta belongs to.

use std::collections::BTreeMap;

use crate::checkpoint::{Checkpoint, View};
use crate::delta::hex;
use crate::error::Result;

/// Bytes of a tensor's head, middle and tail that a sample reads.
const SAMPLE: usize = 1024;

/// The hash of one tensor: dtype, shape and content.
pub type Digest = [u8; 32];

/// The hash of a base: names, dtypes, shapes and content, gathered a tensor at a time in any order.
#[derive(Default)]
pub struct Fingerprint(BTreeMap<String, Digest>);

impl Fingerprint {
    /// Reads a whole checkpoint.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn of(base: &Checkpoint) -> Result<Self> {
        let mut fingerprint = Self::default();
        for name in base.names() {
            fingerprint.add(name, &base.view(name)?);
        }
        Ok(fingerprint)
    }

    /// Takes in one tensor, whose hash it returns.
    pub fn add(&mut self, name: &str, view: &View<'_>) -> Digest {
        let mut hasher = head(view);
        hasher.update_rayon(view.data);
        let digest = *hasher.finalize().as_bytes();
        self.put(name, digest);
        digest
    }

    /// Takes in one tensor that was hashed before.
    pub fn put(&mut self, name: &str, digest: Digest) {
        self.0.insert(name.to_owned(), digest);
    }

    /// Whether that tensor was taken in.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The fingerprint, in hexadecimal.
    #[must_use]
    pub fn finish(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for (name, hash) in &self.0 {
            hasher.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes()).update(hash);
        }
        hex(hasher.finalize().as_bytes())
    }
}

/// The quick hash: as the fingerprint, of three kilobytes a tensor.
///
/// # Errors
/// Where the checkpoint cannot be read.
pub fn sample(base: &Checkpoint) -> Result<String> {
    let mut whole = Fingerprint::default();
    for name in base.names() {
        let view = base.view(name)?;
        let mut hasher = head(&view);
        let length = view.data.len();
        for start in [0, length.saturating_sub(SAMPLE) / 2, length.saturating_sub(SAMPLE)] {
            hasher.update(&view.data[start..(start + SAMPLE).min(length)]);
        }
        whole.0.insert(name.clone(), *hasher.finalize().as_bytes());
    }
    Ok(whole.finish())
}

fn head(view: &View<'_>) -> blake3::Hasher {
    let mut hasher = blake3::Hasher::new();
    hasher.update(view.dtype.to_string().as_bytes()).update(&[0]);
    for size in &view.shape {
        hasher.update(&(*size as u64).to_le_bytes());
    }
    hasher
}
