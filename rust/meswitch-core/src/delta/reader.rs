//! Opening a delta directory: everything is checked but the content of tensors and of other files.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::checksum::Checksum;
use super::header::{self, Header};
use super::load::{DIRECT_ALIGNMENT, FileSource, Loader, Source, Stamp};
use super::manifest::{self, MANIFEST, Manifest, TENSORS};
use super::site::SiteEntry;
use super::tensor::TensorSpec;
use super::tensors::{Tensors, places};
use super::{ALIGNMENT, checksum};
use crate::directory::{Directory, Identity};
use crate::error::{Error, Result};
use crate::memory::{KeepAlive, Region};

/// An opened delta directory.
///
/// It holds the manifest and the open file of tensors, but none of them: [`Delta::tensors`] and
/// [`Delta::site_tensors`] read them. A directory that is replaced or removed meanwhile does no harm, since the file
/// stays open; one whose file is changed in place is found by its checksums.
pub struct Delta {
    path: PathBuf,
    folder: Identity,
    pub(super) contents: Arc<Contents>,
    manifest_bytes: u64,
    manifest_checksum: Checksum,
    pub(super) file: File,
    /// What the file was when all tensors had their checksums.
    verified: Mutex<Option<Stamp>>,
    /// Bytes of the header, its length included.
    pub(super) header_bytes: u64,
}

/// A manifest whose sites can be looked up.
pub(super) struct Contents {
    pub(super) manifest: Manifest,
    /// The positions of sites in the manifest, by their names in order.
    by_name: Vec<u32>,
    /// Where the tensors of each site start in the file, not yet aligned, counted from the end of the header.
    pub(super) starts: Vec<usize>,
}

impl Contents {
    fn new(manifest: Manifest) -> Result<Self> {
        let mut by_name: Vec<u32> = (0..manifest.sites.len() as u32).collect();
        by_name.sort_unstable_by_key(|index| &manifest.sites[*index as usize].name);
        let (mut starts, mut position) = (Vec::with_capacity(manifest.sites.len()), 0usize);
        for site in &manifest.sites {
            starts.push(position);
            for spec in site.tensor_specs()? {
                position = position.next_multiple_of(ALIGNMENT) + spec.size();
            }
        }
        Ok(Self { manifest, by_name, starts })
    }

    /// The position of a site in the manifest.
    pub(super) fn position(&self, name: &str) -> Option<usize> {
        let name_of = |index: &u32| self.manifest.sites[*index as usize].name.as_str();
        let found = self.by_name.binary_search_by_key(&name, name_of).ok()?;
        Some(self.by_name[found] as usize)
    }
}

impl Delta {
    /// Opens a delta directory and checks its structure: manifest, sizes, names, dtypes, shapes, order, and that
    /// manifest and tensors belong together.
    ///
    /// # Errors
    /// [`Error::Format`] or [`Error::Checksum`] for what is not a sound delta directory; [`Error::Io`] where a file is
    /// missing or cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let directory = Directory::open(path)?;
        let text = directory.read(MANIFEST, manifest::MAX_BYTES)?;
        let manifest = Manifest::parse(&text)?;
        for (name, entry) in &manifest.files {
            let found = directory.file(name)?.metadata().map_err(Error::io(&path.join(name)))?.size();
            if found != entry.bytes {
                return Err(Error::Format(format!("expected {name} of {} bytes, found {found}", entry.bytes)));
            }
        }
        let file = directory.file(TENSORS)?;
        let header_bytes = check_header(&file, &path.join(TENSORS), &manifest)?;
        Ok(Self {
            path: path.to_owned(),
            folder: directory.identity()?,
            contents: Arc::new(Contents::new(manifest)?),
            manifest_bytes: text.len() as u64,
            manifest_checksum: checksum(&text),
            file,
            verified: Mutex::new(None),
            header_bytes,
        })
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.contents.manifest
    }

    /// The entry of a site; `None` where there is none of that name.
    #[must_use]
    pub fn site(&self, name: &str) -> Option<&SiteEntry> {
        self.contents.position(name).map(|index| &self.manifest().sites[index])
    }

    /// The size of manifest and tensors in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.manifest_bytes + self.manifest().files[TENSORS].bytes
    }

    /// Reads all tensors. The first time they are compared with their checksums, and later again unless the file has
    /// been the same since. The operating system says whether it has, by the times of the last writes, which it may not
    /// note for writes through a shared map.
    ///
    /// # Errors
    /// [`Error::Checksum`] naming the first tensor that has changed; [`Error::Io`] where the file cannot be read, or
    /// there is no memory.
    pub fn tensors(&self) -> Result<Tensors> {
        self.load(None, &AtomicBool::new(false))
    }

    /// [`Delta::tensors`] that another thread can end by setting `stop`, and with a value that is dropped once the
    /// operating system has the tensors' memory back: when the last user of [`Tensors::region`] is gone, and before
    /// this returns an error.
    ///
    /// # Errors
    /// Those of [`Delta::tensors`], and [`Error::Interrupted`] soon after `stop` was set.
    pub fn load(&self, keep_alive: Option<KeepAlive>, stop: &AtomicBool) -> Result<Tensors> {
        let memory = |offset, bytes| Region::with_offset(offset, bytes, keep_alive);
        self.load_from(&FileSource::new(&self.file), memory, stop)
    }

    /// [`Delta::load`] out of a source of the file's bytes, into the memory that is made.
    fn load_from(
        &self,
        source: &dyn Source,
        memory: impl FnOnce(usize, usize) -> io::Result<Region>,
        stop: &AtomicBool,
    ) -> Result<Tensors> {
        let (path, sites, now) = (self.path.join(TENSORS), 0..self.manifest().sites.len(), SystemTime::now());
        let stamp = || Stamp::of(&self.file).map_err(Error::io(&path));
        let (before, verified) = (stamp()?, *self.verified());
        let loader = |hashed| Loader { source, path: &path, hashed, yields: true, stop };
        if verified != Some(before) {
            let tensors = Tensors::read(self, sites, memory, &loader(true))?;
            if before.is_settled(now) && stamp()? == before {
                *self.verified() = Some(before);
            }
            return Ok(tensors);
        }
        let tensors = Tensors::read(self, sites.clone(), memory, &loader(false))?;
        if stamp()? == before {
            return Ok(tensors);
        }
        // Written to while it was read.
        let region = tensors.into_region().expect("nobody else has it yet");
        Tensors::read(self, sites, |_, _| Ok(region), &loader(true))
    }

    fn verified(&self) -> MutexGuard<'_, Option<Stamp>> {
        self.verified.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the tensors of one site and compares them with their checksums.
    ///
    /// # Errors
    /// Those of [`Delta::tensors`], and [`Error::Argument`] where there is no such site.
    pub fn site_tensors(&self, site: &str) -> Result<Tensors> {
        self.read_site(self.position(site)?, Region::new)
    }

    /// [`Delta::site_tensors`] as [`Delta::load`] reads: past the page cache, to be ended by `stop`, and with a value that
    /// is dropped once the operating system has the memory back.
    ///
    /// # Errors
    /// Those of [`Delta::site_tensors`], and [`Error::Interrupted`] soon after `stop` was set.
    pub fn load_site(&self, site: &str, keep_alive: Option<KeepAlive>, stop: &AtomicBool) -> Result<Tensors> {
        let (index, source, path) = (self.position(site)?, FileSource::new(&self.file), self.path.join(TENSORS));
        let memory = |offset, bytes| Region::with_offset(offset, bytes, keep_alive);
        let loader = Loader { source: &source, path: &path, hashed: true, yields: true, stop };
        Tensors::read(self, index..index + 1, memory, &loader)
    }

    /// The memory that [`Delta::load_site`] takes.
    ///
    /// # Errors
    /// [`Error::Argument`] where there is no such site; [`Error::Format`] as [`Delta::memory_bytes`].
    pub fn site_memory_bytes(&self, site: &str) -> Result<usize> {
        let index = self.position(site)?;
        Ok(Region::size_of(self.page_offset(index), places(&self.manifest().sites[index..=index])?.1))
    }

    fn position(&self, site: &str) -> Result<usize> {
        let found = self.contents.position(site);
        found.ok_or_else(|| Error::Argument(format!("expected a site of {}, found {site}", self.path().display())))
    }

    /// Reads the tensors of one site, by position, into the memory that is made, and compares them with their
    /// checksums.
    pub(super) fn read_site(&self, site: usize, memory: impl FnOnce(usize) -> io::Result<Region>) -> Result<Tensors> {
        let (source, path) = (FileSource::cached(&self.file), self.path.join(TENSORS));
        let stop = AtomicBool::new(false);
        let loader = Loader { source: &source, path: &path, hashed: true, yields: true, stop: &stop };
        Tensors::read(self, site..site + 1, |_, bytes| memory(bytes), &loader)
    }

    /// The memory that [`Delta::tensors`] takes.
    ///
    /// # Errors
    /// [`Error::Format`] where that is more than there are addresses.
    pub fn memory_bytes(&self) -> Result<usize> {
        Ok(Region::size_of(self.page_offset(0), places(&self.manifest().sites)?.1))
    }

    /// Where memory for the tensors from a site on starts in a page, so that pages of the file are pages of memory.
    pub(super) fn page_offset(&self, site: usize) -> usize {
        let start = self.contents.starts.get(site).map_or(0, |start| start.next_multiple_of(ALIGNMENT));
        (self.header_bytes as usize + start) % DIRECT_ALIGNMENT
    }

    /// Reads one of the directory's small files, as it was when the directory was opened.
    ///
    /// # Errors
    /// [`Error::Checksum`] where it has changed; [`Error::Format`] where the directory was replaced
    /// or the manifest names no such file; [`Error::Io`].
    pub fn read_file(&self, name: &str) -> Result<Vec<u8>> {
        let entry = self.manifest().files.get(name).filter(|_| name != TENSORS);
        let entry = entry
            .ok_or_else(|| Error::Argument(format!("expected a file of {}, found {name}", self.path.display())))?;
        let bytes = self.directory()?.read(name, entry.bytes)?;
        let found = checksum(&bytes);
        if found == entry.checksum {
            return Ok(bytes);
        }
        Err(Error::Checksum(format!("expected checksum {} of {name}, found {found}", entry.checksum)))
    }

    /// The range of a tensor's bytes in `delta.safetensors`; `None` where there is no such tensor.
    #[must_use]
    pub fn extent(&self, site: &str, role: &str) -> Option<Range<u64>> {
        let index = self.contents.position(site)?;
        let (start, spec) = self.file_tensors(index).ok()?.into_iter().find(|(_, spec)| spec.name == role)?;
        Some(start..start + spec.size() as u64)
    }

    /// The tensors of a site, each with where it starts in the file.
    pub(super) fn file_tensors(&self, index: usize) -> Result<Vec<(u64, TensorSpec)>> {
        let mut end = self.contents.starts[index];
        let place = |spec: TensorSpec| {
            let start = end.next_multiple_of(ALIGNMENT);
            end = start + spec.size();
            (self.header_bytes + start as u64, spec)
        };
        Ok(self.manifest().sites[index].tensor_specs()?.into_iter().map(place).collect())
    }

    /// Opens the folder again, for its other files.
    ///
    /// # Errors
    /// [`Error::Format`] where another one has taken its place; [`Error::Io`].
    pub(crate) fn directory(&self) -> Result<Directory> {
        let directory = Directory::open(&self.path)?;
        let text = directory.read(MANIFEST, manifest::MAX_BYTES)?;
        if directory.identity()? == self.folder && checksum(&text) == self.manifest_checksum {
            return Ok(directory);
        }
        let path = self.path.display();
        Err(Error::Format(format!("expected {path} as it was opened, found another delta in its place")))
    }
}

/// Checks the header of the tensors' file against the manifest. Returns its size, its length included.
fn check_header(file: &File, path: &Path, manifest: &Manifest) -> Result<u64> {
    let header = Header::of(&manifest.sites, manifest.binding)?;
    let broken =
        |expected: &str, found: &str| Error::Format(format!("expected {expected} in {TENSORS}, found {found}"));
    let size = manifest.files[TENSORS].bytes;
    let mut length = [0; 8];
    if size < 8 {
        return Err(broken("a safetensors header", &format!("{size} bytes")));
    }
    file.read_exact_at(&mut length, 0).map_err(Error::io(path))?;
    let length = u64::from_le_bytes(length);
    if length > header::MAX_BYTES as u64 || length > size - 8 {
        return Err(broken("a safetensors header", &format!("one of {length} bytes in a file of {size}")));
    }
    let start = length + 8;
    let mut text = vec![0; length as usize];
    file.read_exact_at(&mut text, 8).map_err(Error::io(path))?;
    header.check(&text)?;
    if !start.is_multiple_of(ALIGNMENT as u64) {
        return Err(broken(&format!("tensors from a multiple of {ALIGNMENT} on"), &format!("them from {start}")));
    }
    if start + header.position as u64 != size {
        return Err(broken(&format!("{} bytes", start + header.position as u64), &format!("{size}")));
    }
    Ok(start)
}

#[cfg(test)]
mod tests;
