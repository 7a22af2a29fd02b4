//! The header of `delta.safetensors`, and the size of a delta directory that is not written yet.

use serde_json::{Value, json};

use super::manifest::{FileEntry, Manifest, TENSORS, json as text};
use super::site::{SiteEntry, SiteKind, TermsEntry};
use super::tensor::TensorSpec;
use super::{ALIGNMENT, PADDING, checksum};
use crate::error::{Error, Result};

/// The longest header that readers of safetensors take, without the field that says how long it is.
const MAX_HEADER_BYTES: usize = 100_000_000;

/// The header of `delta.safetensors`, built tensor by tensor.
pub(super) struct Header {
    entries: serde_json::Map<String, Value>,
    /// Where the next tensor starts, counted from the end of the header.
    pub(super) position: usize,
    paddings: usize,
    /// The length of the text so far, with a comma too many.
    length: usize,
}

impl Header {
    pub(super) fn new() -> Self {
        let mut entries = serde_json::Map::new();
        entries.insert("__metadata__".into(), json!({"format": "meswitch"}));
        let length = text(&entries).len() + 1;
        Self { entries, position: 0, paddings: 0, length }
    }

    /// Adds a tensor, and before it one that pads to its alignment. Returns the size of the padding.
    ///
    /// # Errors
    /// [`Error::Format`] where the header becomes longer than readers of safetensors take.
    pub(super) fn add(&mut self, name: &str, dtype: &str, shape: &[usize], size: usize) -> Result<usize> {
        let padding = self.position.next_multiple_of(ALIGNMENT) - self.position;
        if padding > 0 {
            self.entry(&format!("{PADDING}{}", self.paddings), "U8", &[padding], padding);
            self.paddings += 1;
        }
        self.entry(name, dtype, shape, size);
        if self.length > MAX_HEADER_BYTES {
            return Err(Error::Format(format!(
                "expected a header of at most {MAX_HEADER_BYTES} bytes in {TENSORS}, found more from {name} on"
            )));
        }
        Ok(padding)
    }

    fn entry(&mut self, name: &str, dtype: &str, shape: &[usize], size: usize) {
        let offsets = [self.position, self.position + size];
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        self.length += text(name).len() + 1 + text(&entry).len() + 1;
        self.entries.insert(name.into(), entry);
        self.position += size;
    }

    pub(super) fn text(self) -> Vec<u8> {
        text(&self.entries).into_bytes()
    }
}

/// An upper bound of the header's size, its length field included, for tensors by full name. No more than what readers
/// take: [`Header::add`] refuses what would not fit there.
pub(super) fn max_header_bytes(specs: &[TensorSpec]) -> usize {
    // The longest entry: braces, keys, two offsets of 13 digits, and a padding tensor beside it. The name and the dtype
    // without their quotes, which are counted there too, but with what JSON escapes in them.
    let length = |name: &str| text(name).len() - 2;
    let room: usize =
        specs.iter().map(|spec| length(&spec.name) + length(&spec.dtype) + 16 * spec.shape.len() + 80 + 110).sum();
    let most = (MAX_HEADER_BYTES + 8) / ALIGNMENT * ALIGNMENT;
    (8 + 64 + room).next_multiple_of(ALIGNMENT).min(most)
}

/// Where the tensors, `size` bytes in all, start in the file: right after the header, or after the room reserved for it
/// if the difference is below 1/256 of their size.
pub(super) fn tensors_start(header: usize, reserved: usize, size: usize) -> usize {
    let start = (header + 8).next_multiple_of(ALIGNMENT);
    if (reserved - start) * 256 > size { start } else { reserved }
}

/// The size of manifest and tensors, from entries without errors and checksums. It is never too small, and too large
/// only by digits of numbers. `possible` are the tensors that [`super::Writer::create`] is given.
///
/// # Errors
/// [`crate::Error::Format`] where a number of an entry is out of range.
pub(crate) fn estimated_bytes(mut manifest: Manifest, possible: &[TensorSpec]) -> Result<u64> {
    let (mut header, mut unused) = (Header::new(), 0);
    for site in &mut manifest.sites {
        site.bytes = 0;
        for spec in site.tensor_specs()? {
            let size = spec.size();
            header.add(&format!("{}/{}", site.name, spec.name), &spec.dtype, &spec.shape, size)?;
            site.checksums.insert(spec.name, checksum(&[]));
            site.bytes += size as u64;
        }
        site.bpw = bpw(site);
        // Numbers with as many digits as any.
        site.relative_error = 1.234_567;
        match &mut site.kind {
            SiteKind::Quantized { terms: TermsEntry { exponent, .. }, .. }
            | SiteKind::LowRank { terms: TermsEntry { exponent, .. } }
            | SiteKind::Sparse { exponent, .. } => *exponent = -100,
            // Counted as if they had an exponent: callers plan sizes with this estimate, so it stays the same.
            SiteKind::Shared | SiteKind::Replaced => unused += r#","exponent":-100"#.len() as u64,
        }
    }
    let position = header.position;
    let start = tensors_start(header.text().len(), max_header_bytes(possible), position);
    let tensors = (start + position) as u64;
    manifest.files.insert(TENSORS.into(), FileEntry { bytes: tensors, checksum: checksum(&[]) });
    Ok(tensors + manifest.to_text().len() as u64 + unused)
}

/// Bits per weight, rounded to four decimals.
pub(super) fn bpw(site: &SiteEntry) -> f64 {
    let bpw = 8.0 * site.bytes as f64 / site.parameters().unwrap_or(1).max(1) as f64;
    (bpw * 1e4).round() / 1e4
}
