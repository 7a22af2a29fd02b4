//! Opening a delta directory: everything is checked but content, which `verify` reads.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::SafeTensors;

use super::manifest::{Kind, MANIFEST, Manifest, SiteEntry, TENSORS};
use super::{ALIGNMENT, checksum};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, sample};
use crate::layout::shared_row;

/// A manifest larger than this is not one.
const MANIFEST_LIMIT: u64 = 1 << 30;

/// An opened delta directory.
pub struct Delta {
    path: PathBuf,
    manifest: Manifest,
    manifest_bytes: u64,
    map: Mmap,
    header_bytes: usize,
    offsets: HashMap<String, (usize, usize)>,
}

impl Delta {
    /// Opens a delta directory and checks its structure: manifest, sizes, names, dtypes, shapes, alignment.
    ///
    /// # Errors
    /// [`Error::Format`] or [`Error::Checksum`] for what is not a sound delta directory, [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let manifest_path = path.join(MANIFEST);
        let size = fs::metadata(&manifest_path).map_err(Error::io(&manifest_path))?.len();
        if size > MANIFEST_LIMIT {
            return Err(Error::Format(format!("expected a manifest of at most {MANIFEST_LIMIT} bytes, found {size}")));
        }
        let manifest = Manifest::parse(&fs::read(&manifest_path).map_err(Error::io(&manifest_path))?)?;
        check_files(path, &manifest)?;
        let tensors_path = path.join(TENSORS);
        let file = File::open(&tensors_path).map_err(Error::io(&tensors_path))?;
        // SAFETY: opened read-only; a delta directory is replaced by renaming, never written in place.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(&tensors_path))?;
        let (header_bytes, offsets) = check_header(&map, &manifest)?;
        Ok(Self { path: path.to_owned(), manifest, manifest_bytes: size, map, header_bytes, offsets })
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What manifest and tensors weigh.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.manifest_bytes + self.map.len() as u64
    }

    /// Where a tensor lies in `delta.safetensors`: its first byte and the one after its last.
    #[must_use]
    pub fn extent(&self, site: &str, role: &str) -> Option<(usize, usize)> {
        self.offsets.get(&format!("{site}/{role}")).copied()
    }

    /// A tensor's bytes.
    #[must_use]
    pub fn tensor(&self, site: &str, role: &str) -> Option<&[u8]> {
        self.extent(site, role).map(|(start, end)| &self.map[start..end])
    }

    /// Reads every byte and compares it with its checksum.
    ///
    /// # Errors
    /// [`Error::Checksum`] naming the first file or tensor that changed.
    pub fn verify(&self) -> Result<()> {
        for (name, entry) in &self.manifest.files {
            let found = if name == TENSORS {
                checksum(&self.map[..self.header_bytes])
            } else {
                let path = self.path.join(name);
                checksum(&fs::read(&path).map_err(Error::io(&path))?)
            };
            if found != entry.checksum {
                return Err(Error::Checksum(format!("expected checksum {} of {name}, found {found}", entry.checksum)));
            }
        }
        for site in &self.manifest.sites {
            self.verify_site(site)?;
        }
        for (name, (start, end)) in &self.offsets {
            if name.starts_with("_pad.") && self.map[*start..*end].iter().any(|byte| *byte != 0) {
                return Err(Error::Checksum(format!("expected zeros in {name} of {TENSORS}, found others")));
            }
        }
        Ok(())
    }

    fn verify_site(&self, site: &SiteEntry) -> Result<()> {
        for (role, stated) in &site.tensors {
            let found = self.tensor(&site.name, role).map(checksum).unwrap_or_default();
            if found != *stated {
                return Err(Error::Checksum(format!(
                    "expected checksum {stated} of {}/{role} in {TENSORS}, found {found}",
                    site.name
                )));
            }
        }
        let matrix = site.matrix().unwrap_or_default();
        for (role, limit) in [("salient_index", matrix.1)]
            .into_iter()
            .map(|(role, limit)| (role.to_owned(), limit))
            .chain((0..site.parts.len()).map(|at| (format!("rows.{at}"), matrix.0)))
        {
            let Some(bytes) = self.tensor(&site.name, &role) else { continue };
            check_rising(bytes, limit)
                .map_err(|what| Error::Format(format!("expected {what} in {}/{role}", site.name)))?;
        }
        let rows = |at: usize| {
            self.tensor(&site.name, &format!("rows.{at}")).map(|bytes| indices(bytes).map(i32::cast_unsigned))
        };
        if let Some(row) = shared_row(matrix.0, (0..site.parts.len()).map(rows)) {
            return Err(Error::Format(format!(
                "expected every row of {} in one part, found row {row} in two",
                site.name
            )));
        }
        let sparse = (self.tensor(&site.name, "sparse_starts"), self.tensor(&site.name, "sparse_gaps"));
        if let (Some(starts), Some(gaps)) = sparse {
            check_entries(starts, gaps, matrix.1)
                .map_err(|what| Error::Format(format!("expected {what} in the sparse entries of {}", site.name)))?;
        }
        Ok(())
    }

    /// Compares the base with the one the delta was made against: quickly, or all of its content.
    ///
    /// # Errors
    /// [`Error::BaseMismatch`].
    pub fn check_base(&self, base: &Checkpoint, whole: bool) -> Result<()> {
        let entry = &self.manifest.base;
        let (expected, found) =
            if whole { (&entry.fingerprint, Fingerprint::of(base)?.finish()) } else { (&entry.sample, sample(base)?) };
        if *expected == found {
            return Ok(());
        }
        Err(Error::BaseMismatch(format!(
            "expected the base {} that {} was made against, found another in {}",
            entry.name,
            self.path.display(),
            base.path().display()
        )))
    }
}

fn check_files(folder: &Path, manifest: &Manifest) -> Result<()> {
    if !manifest.files.contains_key(TENSORS) {
        return Err(Error::Format(format!("expected {TENSORS} among the files of {MANIFEST}, found none")));
    }
    for (name, entry) in &manifest.files {
        if name.contains(['/', '\\']) || name.starts_with('.') || name.chars().any(char::is_control) {
            return Err(Error::Format(format!("expected plain file names in {MANIFEST}, found {name:?}")));
        }
        let path = folder.join(name);
        let found = fs::metadata(&path).map_err(Error::io(&path))?.len();
        if found != entry.bytes {
            return Err(Error::Format(format!("expected {name} of {} bytes, found {found}", entry.bytes)));
        }
    }
    Ok(())
}

type Extents = HashMap<String, (usize, usize)>;

fn check_header(map: &[u8], manifest: &Manifest) -> Result<(usize, Extents)> {
    let broken = |what: String| Error::Format(format!("expected {what} in {TENSORS}"));
    let (length, metadata) =
        SafeTensors::read_metadata(map).map_err(|error| broken(format!("a safetensors header, found {error}")))?;
    let start = length + 8;
    if start % ALIGNMENT != 0 {
        return Err(broken(format!("tensors from a multiple of {ALIGNMENT} on, found them from {start}")));
    }
    let tensors = metadata.tensors();
    let mut extents = HashMap::with_capacity(tensors.len());
    let mut promised = 0;
    for site in &manifest.sites {
        let specs = site.specs()?;
        if specs.len() != site.tensors.len() || specs.iter().any(|spec| !site.tensors.contains_key(&spec.role)) {
            return Err(Error::Format(format!(
                "expected a checksum for each tensor of {} in {MANIFEST}, found otherwise",
                site.name
            )));
        }
        for spec in specs {
            let name = format!("{}/{}", site.name, spec.role);
            let info = tensors.get(&name).ok_or_else(|| broken(format!("a tensor {name}, found none")))?;
            let dtype = info.dtype.to_string();
            if dtype != spec.dtype || info.shape != spec.shape {
                return Err(broken(format!(
                    "{name} of {} {:?}, found {dtype} {:?}",
                    spec.dtype, spec.shape, info.shape
                )));
            }
            if info.data_offsets.0 % ALIGNMENT != 0 {
                return Err(broken(format!(
                    "{name} at a multiple of {ALIGNMENT}, found it at {}",
                    info.data_offsets.0
                )));
            }
            promised += 1;
        }
        if site.kind == Kind::Replaced && site.parameters().is_none() {
            return Err(broken(format!("a size that can be at {}", site.name)));
        }
    }
    for (name, info) in &tensors {
        extents.insert(name.clone(), (start + info.data_offsets.0, start + info.data_offsets.1));
    }
    let pads = extents.keys().filter(|name| name.starts_with("_pad.")).count();
    if promised + pads != extents.len() {
        return Err(broken(format!("{promised} tensors that {MANIFEST} names, found {}", extents.len() - pads)));
    }
    Ok((start, extents))
}

/// Little-endian 32-bit numbers.
fn indices(bytes: &[u8]) -> impl Iterator<Item = i32> {
    bytes.chunks_exact(4).map(|quad| i32::from_le_bytes([quad[0], quad[1], quad[2], quad[3]]))
}

/// Whether little-endian 32-bit indices rise and stay below a limit; what was expected where they do not.
fn check_rising(bytes: &[u8], limit: usize) -> std::result::Result<(), String> {
    let mut least = 0i64;
    for index in indices(bytes).map(i64::from) {
        if index < least || index >= limit as i64 {
            return Err(format!("rising indices below {limit}, found {index}"));
        }
        least = index + 1;
    }
    Ok(())
}

/// Whether rows follow each other over all entries, and no column lies beyond the last; what was expected where not.
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
