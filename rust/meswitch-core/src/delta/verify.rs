//! Verifying a delta directory: every byte against its checksum, every index against its range.

use std::os::unix::fs::FileExt;

use super::checksum::checksum_of;
use super::manifest::{MANIFEST, TENSORS};
use super::site::SiteEntry;
use super::tensor::{Role, TensorSpec};
use super::tensors::Tensors;
use super::{ALIGNMENT, Delta, checksum};
#[cfg(feature = "compress")]
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
#[cfg(feature = "compress")]
use crate::fingerprint::Fingerprint;
use crate::layout::legacy::{self, Order};
use crate::layout::{first_stray_bit, row_in_two_parts};
use crate::memory::Region;

impl Delta {
    /// Reads every byte, compares it with its checksum, and checks that indices are in range. So everything holds that
    /// docs/format.md says of a directory.
    ///
    /// # Errors
    /// [`Error::Checksum`] naming the first file or tensor that has changed, [`Error::Format`] for indices out of range
    /// and for what does not belong there, [`Error::Io`] where a file cannot be read.
    pub fn verify(&self) -> Result<()> {
        self.verify_files()?;
        // New memory costs more than what is written to it, so sites share it.
        let (mut end, mut spare) = (self.header_bytes, None::<Region>);
        for (index, site) in self.manifest().sites.iter().enumerate() {
            let places = self.file_tensors(index)?;
            for (start, spec) in &places {
                self.verify_padding(end, *start)?;
                end = start + spec.size() as u64;
            }
            let memory = |bytes| match spare.take().filter(|spare| spare.len() >= bytes) {
                Some(spare) => Ok(spare),
                None => Region::new(bytes),
            };
            let tensors = self.read_site(index, memory)?;
            verify_site(site, &tensors)?;
            places.iter().try_for_each(|(start, spec)| self.verify_old_rows(site, *start, spec))?;
            spare = tensors.into_region();
        }
        Ok(())
    }

    fn verify_files(&self) -> Result<()> {
        let directory = self.directory()?;
        for (name, entry) in &self.manifest().files {
            let path = self.path().join(name);
            let (found, bytes) = if name == TENSORS {
                let mut header = vec![0; self.header_bytes as usize];
                self.file.read_exact_at(&mut header, 0).map_err(Error::io(&path))?;
                (checksum(&header), entry.bytes)
            } else {
                checksum_of(directory.file(name)?).map_err(Error::io(&path))?
            };
            if found != entry.checksum || bytes != entry.bytes {
                return Err(Error::Checksum(format!("expected checksum {} of {name}, found {found}", entry.checksum)));
            }
        }
        let is_known = |name: &String| {
            name.starts_with('.') || name == MANIFEST || self.manifest().files.contains_key(name.as_str())
        };
        let mut names = directory.names()?.into_iter().map(|name| name.to_string_lossy().into_owned());
        match names.find(|name| !is_known(name)) {
            None => Ok(()),
            Some(name) => Err(Error::Format(format!("expected only files that {MANIFEST} names, found {name}"))),
        }
    }

    /// Checks that the bytes between two tensors are zero.
    fn verify_padding(&self, start: u64, end: u64) -> Result<()> {
        let mut padding = [0; ALIGNMENT];
        let padding = &mut padding[..(end - start) as usize];
        self.file.read_exact_at(padding, start).map_err(Error::io(&self.path().join(TENSORS)))?;
        if padding.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        Err(Error::Checksum(format!("expected zeros in bytes {start} to {end} of {TENSORS}, found others")))
    }

    /// Checks the codes of versions 1 and 2 as they lie in the file: reading drops what is no code of theirs.
    fn verify_old_rows(&self, site: &SiteEntry, start: u64, spec: &TensorSpec) -> Result<()> {
        let Role::Codes(index) = spec.role else { return Ok(()) };
        let part = &site.parts()[index];
        if part.order != Order::Rows {
            return Ok(());
        }
        let mut bytes = vec![0; spec.size()];
        self.file.read_exact_at(&mut bytes, start).map_err(Error::io(&self.path().join(TENSORS)))?;
        let (_, columns) = site.matrix_shape().unwrap_or_default();
        refuse_stray_bit(site, index, legacy::first_stray_bit(&bytes, part.bits, columns))
    }

    /// Compares a base with the one that the delta was made against: a sample of three kilobytes per tensor, or with
    /// `whole` all of its content. `allow_quantized`: whether a quantized form of that base will do.
    ///
    /// # Errors
    /// [`Error::BaseMismatch`] where they differ, [`Error::QuantizedBase`] where a quantized form will not do,
    /// [`Error::Checkpoint`] where a tensor cannot be read.
    #[cfg(feature = "compress")]
    pub fn check_base(&self, base: &Checkpoint, whole: bool, allow_quantized: bool) -> Result<()> {
        let entry = &self.manifest().base;
        let same =
            if whole { entry.fingerprint == Fingerprint::of(base)?.finish() } else { entry.sample == base.sample()? };
        let is_quantized_form = || base.quantized_from().is_some_and(|from| from.fingerprint == entry.fingerprint);
        if same || (allow_quantized && is_quantized_form()) {
            return Ok(());
        }
        let made_against = format!("expected the base {} that {} was made against", entry.name, self.path().display());
        let path = base.path().display();
        Err(if is_quantized_form() {
            Error::QuantizedBase(format!("{made_against}, found a quantized form of it in {path}"))
        } else {
            Error::BaseMismatch(format!("{made_against}, found another in {path}"))
        })
    }
}

/// Checks what the tensors of a site hold; their checksums were compared when they were read.
fn verify_site(site: &SiteEntry, tensors: &Tensors) -> Result<()> {
    let (rows, columns) = site.matrix_shape().unwrap_or_default();
    let tensor = |role: Role| tensors.tensor(&site.name, &role.to_string());
    let parts = 0..site.parts().len();
    let lists = [(Role::SalientIndex, columns)].into_iter();
    for (role, limit) in lists.chain(parts.clone().map(|part| (Role::Rows(part), rows))) {
        let Some(bytes) = tensor(role) else { continue };
        check_rising(bytes, limit).map_err(|what| Error::Format(format!("expected {what} in {}/{role}", site.name)))?;
    }
    for (index, part) in site.parts().iter().enumerate() {
        let codes = tensor(Role::Codes(index)).unwrap_or_default();
        let rows = part.rows.unwrap_or(rows);
        refuse_stray_bit(site, index, first_stray_bit(codes, part.bits, rows, columns))?;
    }
    let rows_of = |part| tensor(Role::Rows(part)).map(|bytes| indices(bytes).map(i32::cast_unsigned));
    if let Some(row) = row_in_two_parts(rows, parts.map(rows_of)) {
        return Err(Error::Format(format!("expected every row of {} in one part, found row {row} in two", site.name)));
    }
    if let (Some(starts), Some(gaps)) = (tensor(Role::SparseStarts), tensor(Role::SparseGaps)) {
        check_entries(starts, gaps, columns)
            .map_err(|what| Error::Format(format!("expected {what} in the sparse entries of {}", site.name)))?;
    }
    Ok(())
}

/// The error for the row of a part, if any, that has a bit of no code.
fn refuse_stray_bit(site: &SiteEntry, part: usize, row: Option<usize>) -> Result<()> {
    let Some(row) = row else { return Ok(()) };
    let (name, role) = (&site.name, Role::Codes(part));
    let expected = "zeros after the last column and the last row";
    Err(Error::Format(format!("expected {expected} in {name}/{role}, found others in row {row}")))
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
