//! The tensors of a delta in memory.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::checksum::{Checksum, Hasher};
use super::manifest::TENSORS;
use super::reader::Contents;
use super::site::{PartEntry, SiteEntry};
use super::tensor::{Role, TensorSpec};
use super::{ALIGNMENT, Delta};
use crate::error::{Error, Result};
use crate::layout::legacy::{Order, current_codes, current_scales};
use crate::memory::Region;

/// Bytes that are read and hashed at a time.
const PIECE_BYTES: usize = 1 << 20;

/// From so many bytes on, reading is shared by threads.
#[cfg(feature = "rayon")]
const PARALLEL_BYTES: usize = 1 << 20;

/// The tensors of one site or of all, in memory of their own.
///
/// They are in the order of today's format, whatever the version that was read. Each starts at a multiple of 64 bytes,
/// and was compared with its checksum.
pub struct Tensors {
    contents: Arc<Contents>,
    /// The sites that are there, by position in the manifest.
    sites: Range<usize>,
    /// Where the tensors of each of them start, not yet aligned.
    starts: Vec<usize>,
    region: Arc<Region>,
}

impl Tensors {
    /// Reads the tensors of some sites into the `memory` that is made for their size, until `stop` is set.
    pub(super) fn read(
        delta: &Delta,
        sites: Range<usize>,
        memory: impl FnOnce(usize) -> io::Result<Region>,
        stop: &AtomicBool,
    ) -> Result<Self> {
        let entries = &delta.manifest().sites[sites.clone()];
        let (starts, size) = places(entries)?;
        let mut region = memory(size).map_err(Error::io(&delta.path().join(TENSORS)))?;
        let mut jobs = Vec::new();
        let (mut rest, mut position) = (&mut region[..], 0usize);
        for (index, entry) in sites.clone().zip(entries) {
            let current = entry.clone().into_current()?.tensor_specs()?;
            for (((start, spec), current), checksum) in
                delta.file_tensors(index)?.into_iter().zip(current).zip(&entry.checksums)
            {
                let skipped = position.next_multiple_of(ALIGNMENT) - position;
                let (out, after) = std::mem::take(&mut rest)[skipped..].split_at_mut(current.size());
                (rest, position) = (after, position + skipped + current.size());
                jobs.push(Job { entry, spec, start, checksum: *checksum, out });
            }
        }
        run(&delta.file, &delta.path().join(TENSORS), &mut jobs, stop)?;
        Ok(Self { contents: delta.contents.clone(), sites, starts, region: Arc::new(region) })
    }

    /// A tensor's bytes; `None` where there is no such tensor.
    #[must_use]
    pub fn tensor(&self, site: &str, role: &str) -> Option<&[u8]> {
        self.extent(site, role).map(|range| &self.region[range])
    }

    /// Where a tensor lies in the region; `None` where there is no such tensor.
    #[must_use]
    pub fn extent(&self, site: &str, role: &str) -> Option<Range<usize>> {
        let index = self.contents.position(site).filter(|index| self.sites.contains(index))?;
        let entry = self.contents.manifest.sites[index].clone().into_current().ok()?;
        let mut end = self.starts[index - self.sites.start];
        for spec in entry.tensor_specs().ok()? {
            let start = end.next_multiple_of(ALIGNMENT);
            end = start + spec.size();
            if spec.name == role {
                return Some(start..end);
            }
        }
        None
    }

    /// The memory that all of them lie in.
    #[must_use]
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// The memory, for others; `None` where somebody else uses it too.
    pub(super) fn into_region(self) -> Option<Region> {
        Arc::into_inner(self.region)
    }

    /// The entry of a site that is there.
    pub(super) fn site(&self, name: &str) -> Option<&SiteEntry> {
        let index = self.contents.position(name).filter(|index| self.sites.contains(index))?;
        Some(&self.contents.manifest.sites[index])
    }
}

/// Where the tensors of each site start in memory, not yet aligned, and the size of all.
pub(super) fn places(entries: &[SiteEntry]) -> Result<(Vec<usize>, usize)> {
    let (mut starts, mut position) = (Vec::with_capacity(entries.len()), 0usize);
    for entry in entries {
        starts.push(position);
        for spec in entry.clone().into_current()?.tensor_specs()? {
            position = position.next_multiple_of(ALIGNMENT) + spec.size();
        }
    }
    Ok((starts, position))
}

/// One tensor to be read.
struct Job<'a> {
    entry: &'a SiteEntry,
    spec: TensorSpec,
    /// Its first byte in the file.
    start: u64,
    checksum: Checksum,
    out: &'a mut [u8],
}

/// Reads tensors, many bytes on rayon's pool, where there is one.
fn run(file: &File, path: &Path, jobs: &mut [Job<'_>], stop: &AtomicBool) -> Result<()> {
    #[cfg(feature = "rayon")]
    if jobs.iter().map(|job| job.out.len()).sum::<usize>() > PARALLEL_BYTES {
        use rayon::prelude::*;
        return jobs.par_iter_mut().map(|job| job.run(file, path, stop)).collect();
    }
    jobs.iter_mut().try_for_each(|job| job.run(file, path, stop))
}

impl Job<'_> {
    fn run(&mut self, file: &File, path: &Path, stop: &AtomicBool) -> Result<()> {
        let Some((part, rows)) = self.old_part() else {
            let found = read(file, path, self.start, self.out, stop)?;
            return self.check(found);
        };
        let mut bytes = vec![0; self.spec.size()];
        self.check(read(file, path, self.start, &mut bytes, stop)?)?;
        let (_, columns) = self.entry.matrix_shape().unwrap_or_default();
        self.out.copy_from_slice(&match self.spec.role {
            Role::Codes(_) => current_codes(bytes, part.order, part.bits, rows, columns),
            _ => current_scales(&bytes, rows),
        });
        Ok(())
    }

    /// The part and its number of rows, for codes and scales that lie in the order of an older version.
    fn old_part(&self) -> Option<(&PartEntry, usize)> {
        let (Role::Codes(index) | Role::Scales(index)) = self.spec.role else { return None };
        let part = self.entry.parts().get(index).filter(|part| part.order != Order::Current)?;
        Some((part, part.rows.unwrap_or(self.entry.matrix_shape()?.0)))
    }

    fn check(&self, found: Checksum) -> Result<()> {
        let (expected, name) = (self.checksum, format!("{}/{}", self.entry.name, self.spec.name));
        if expected == found {
            return Ok(());
        }
        Err(Error::Checksum(format!("expected checksum {expected} of {name} in {TENSORS}, found {found}")))
    }
}

/// Reads bytes of the file, which may have become shorter since it was opened, and their checksum. Each piece is hashed
/// while it is in the processor's cache.
fn read(file: &File, path: &Path, mut start: u64, out: &mut [u8], stop: &AtomicBool) -> Result<Checksum> {
    let (mut hasher, end) = (Hasher::default(), start + out.len() as u64);
    for piece in out.chunks_mut(PIECE_BYTES) {
        if stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        file.read_exact_at(piece, start).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => {
                Error::Checksum(format!("expected at least {end} bytes of {}, found fewer", path.display()))
            }
            _ => Error::io(path)(error),
        })?;
        hasher.update(piece);
        start += piece.len() as u64;
    }
    Ok(hasher.finish())
}
