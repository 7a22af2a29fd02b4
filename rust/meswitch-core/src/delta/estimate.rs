//! The size of a delta directory that is not written yet.

use super::header::{self, Header};
use super::manifest::{FileEntry, Manifest, TENSORS, json};
use super::site::{SiteKind, TermsEntry};
use super::tensor::TensorSpec;
use super::{ALIGNMENT, checksum};
use crate::error::Result;

/// An upper bound of the header's size, its length field included, for tensors by full name. No more than what readers
/// take: [`Header::add`] refuses what would not fit there.
pub(super) fn max_header_bytes(specs: &[TensorSpec]) -> usize {
    // The longest entry: braces, keys, two offsets of 13 digits, and a padding tensor beside it. The name and the dtype
    // without their quotes, which are counted there too, but with what JSON escapes in them.
    let length = |name: &str| json(name).len() - 2;
    let room: usize = specs
        .iter()
        .map(|spec| length(&spec.name) + spec.dtype.to_string().len() + 16 * spec.shape.len() + 80 + 110)
        .sum();
    let most = (header::MAX_BYTES + 8) / ALIGNMENT * ALIGNMENT;
    (8 + 128 + room).next_multiple_of(ALIGNMENT).min(most)
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
    let mut unused = 0;
    for site in &mut manifest.sites {
        let specs = site.tensor_specs()?;
        site.bytes = specs.iter().map(|spec| spec.size() as u64).sum();
        site.checksums = vec![checksum(&[]); specs.len()];
        site.bpw = site.exact_bpw();
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
    let header = Header::of(&manifest.sites, Some(checksum(&[])))?;
    let start = tensors_start(header.text().len(), max_header_bytes(possible), header.position);
    let tensors = (start + header.position) as u64;
    manifest.files.insert(TENSORS.into(), FileEntry { bytes: tensors, checksum: checksum(&[]) });
    Ok(tensors + manifest.to_text().len() as u64 + unused)
}
