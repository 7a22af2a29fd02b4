//! Verifying a delta directory: every byte against its checksum, every index against its range.

use std::fs::File;
use std::io::Read;

use super::manifest::{FileEntry, TENSORS};
use super::site::SiteEntry;
use super::tensor::Role;
use super::{Delta, PADDING, checksum};
#[cfg(feature = "compress")]
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
#[cfg(feature = "compress")]
use crate::fingerprint::{Fingerprint, sample};
use crate::layout::row_in_two_parts;

fn check_bytes(name: &str, entry: &FileEntry, bytes: &[u8]) -> Result<()> {
    let found = checksum(bytes);
    if found == entry.checksum {
        return Ok(());
    }
    Err(Error::Checksum(format!("expected checksum {} of {name}, found {found}", entry.checksum)))
}

impl Delta {
    /// Reads every byte, compares it with its checksum, and checks that indices are in range.
    ///
    /// # Errors
    /// [`Error::Checksum`] naming the first file or tensor that has changed, [`Error::Format`] for indices out of
    /// range, [`Error::Io`] where a file cannot be read.
    pub fn verify(&self) -> Result<()> {
        for (name, entry) in &self.manifest().files {
            if name == TENSORS {
                check_bytes(name, entry, &self.map[..self.header_bytes])?;
            } else {
                self.read_file(name)?;
            }
        }
        for site in &self.manifest().sites {
            self.verify_site(site)?;
        }
        for (name, (start, end)) in &self.extents {
            if name.starts_with(PADDING) && self.map[*start..*end].iter().any(|byte| *byte != 0) {
                return Err(Error::Checksum(format!("expected zeros in {name} of {TENSORS}, found others")));
            }
        }
        Ok(())
    }

    /// The bytes of one of the small files that the manifest names: those that were written, or an error.
    ///
    /// # Errors
    /// [`Error::Checksum`] where the file has changed, [`Error::Format`] where the manifest names no such file,
    /// [`Error::Io`] where it cannot be read.
    pub fn read_file(&self, name: &str) -> Result<Vec<u8>> {
        let entry = self.manifest().files.get(name).filter(|_| name != TENSORS);
        let entry = entry.ok_or_else(|| Error::Format(format!("expected {name} among the small files, found none")))?;
        let path = self.path().join(name);
        let mut bytes = Vec::new();
        // A byte more than it should have, so that a file that has grown is not read to its end.
        let read = File::open(&path).and_then(|file| file.take(entry.bytes + 1).read_to_end(&mut bytes));
        read.map_err(Error::io(&path))?;
        check_bytes(name, entry, &bytes)?;
        Ok(bytes)
    }

    fn verify_site(&self, site: &SiteEntry) -> Result<()> {
        for (role, stated) in &site.checksums {
            let found = self.tensor(&site.name, role).map(checksum).unwrap_or_default();
            if found != *stated {
                return Err(Error::Checksum(format!(
                    "expected checksum {stated} of {}/{role} in {TENSORS}, found {found}",
                    site.name
                )));
            }
        }
        let (rows, columns) = site.matrix_shape().unwrap_or_default();
        let tensor = |role: Role| self.tensor(&site.name, &role.to_string());
        let parts = 0..site.parts().len();
        let lists = [(Role::SalientIndex, columns)].into_iter();
        for (role, limit) in lists.chain(parts.clone().map(|part| (Role::Rows(part), rows))) {
            let Some(bytes) = tensor(role) else { continue };
            check_rising(bytes, limit)
                .map_err(|what| Error::Format(format!("expected {what} in {}/{role}", site.name)))?;
        }
        let rows_of = |part| tensor(Role::Rows(part)).map(|bytes| indices(bytes).map(i32::cast_unsigned));
        if let Some(row) = row_in_two_parts(rows, parts.map(rows_of)) {
            return Err(Error::Format(format!(
                "expected every row of {} in one part, found row {row} in two",
                site.name
            )));
        }
        if let (Some(starts), Some(gaps)) = (tensor(Role::SparseStarts), tensor(Role::SparseGaps)) {
            check_entries(starts, gaps, columns)
                .map_err(|what| Error::Format(format!("expected {what} in the sparse entries of {}", site.name)))?;
        }
        Ok(())
    }

    /// Compares a base with the one that the delta was made against: a sample of three kilobytes per tensor, or with
    /// `whole` all of its content.
    ///
    /// # Errors
    /// [`Error::BaseMismatch`] where they differ, [`Error::Checkpoint`] where a tensor cannot be read.
    #[cfg(feature = "compress")]
    pub fn check_base(&self, base: &Checkpoint, whole: bool) -> Result<()> {
        let entry = &self.manifest().base;
        let (expected, found) =
            if whole { (&entry.fingerprint, Fingerprint::of(base)?.finish()) } else { (&entry.sample, sample(base)?) };
        if *expected == found {
            return Ok(());
        }
        Err(Error::BaseMismatch(format!(
            "expected the base {} that {} was made against, found another in {}",
            entry.name,
            self.path().display(),
            base.path().display()
        )))
    }
}

/// Little-endian 32-bit numbers.
fn indices(bytes: &[u8]) -> impl Iterator<Item = i32> {
    bytes.chunks_exact(4).map(|quad| i32::from_le_bytes([quad[0], quad[1], quad[2], quad[3]]))
}

/// Checks that little-endian 32-bit indices rise and stay below a limit. The error is what was expected.
fn check_rising(bytes: &[u8], limit: usize) -> std::result::Result<(), String> {
    let mut next = 0i64;
    for index in indices(bytes).map(i64::from) {
        if index < next || index >= limit as i64 {
            return Err(format!("rising indices below {limit}, found {index}"));
        }
        next = index + 1;
    }
    Ok(())
}

/// Checks that the rows of sparse entries follow each other over all entries, and that columns are in range. The error
/// is what was expected.
fn check_entries(starts: &[u8], gaps: &[u8], columns: usize) -> std::result::Result<(), String> {
    let mut starts = indices(starts);
    let mut start = match starts.next() {
        Some(0) => 0,
        first => return Err(format!("a first row from 0 on, found it from {first:?}")),
    };
    for (row, end) in starts.enumerate() {
        let end = usize::try_from(end).ok().filter(|end| (start..=gaps.len()).contains(end));
        let end = end.ok_or_else(|| format!("rows that follow each other, found otherwise after row {row}"))?;
        let column: usize = gaps[start..end].iter().map(|gap| usize::from(*gap)).sum();
        if end > start && column >= columns {
            return Err(format!("columns below {columns}, found {column} in row {row}"));
        }
        start = end;
    }
    if start == gaps.len() { Ok(()) } else { Err(format!("{} entries in its rows, found {start}", gaps.len())) }
}
