//! Writing the files of a delta directory.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::estimate::{max_header_bytes, tensors_start};
use super::header::Header;
use super::manifest::{FileEntry, MANIFEST, Manifest, TENSORS, check_file_name};
use super::site::SiteEntry;
use super::tensor::TensorSpec;
use super::{ALIGNMENT, PADDING, checksum};
use crate::checkpoint::{Content, View};
use crate::crash::crash_point;
use crate::directory::Directory;
use crate::error::{Error, Result};

/// Writes the tensors, the copied files and the manifest of one delta directory.
pub(crate) struct Writer {
    folder: Directory,
    /// The path of the tensors' file, for messages.
    path: PathBuf,
    file: BufWriter<File>,
    header: Header,
    /// Bytes reserved for the header.
    reserved: usize,
    /// Where the tensors start: after the reserved bytes, or where a writer that was killed at the end had moved them.
    first: usize,
    files: BTreeMap<String, FileEntry>,
}

impl Writer {
    /// Opens `delta.safetensors` in a folder, and creates it if it does not exist. `specs` are all tensors that may be
    /// written, by full name; they decide how many bytes are reserved for the header.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Output`].
    pub(super) fn create(folder: &Directory, specs: &[TensorSpec]) -> Result<Self> {
        let path = folder.path().join(TENSORS);
        let mut file = BufWriter::with_capacity(1 << 20, folder.open_file(TENSORS)?);
        let reserved = max_header_bytes(specs);
        let first = moved_start(file.get_ref(), reserved).map_err(Error::io(&path))?.unwrap_or(reserved);
        file.seek(SeekFrom::Start(first as u64)).map_err(Error::io(&path))?;
        let folder = folder.clone();
        Ok(Self { folder, path, file, header: Header::new(), reserved, first, files: BTreeMap::new() })
    }

    /// Takes over a site that an earlier writer has written next in the file. Returns false, and changes nothing, where
    /// the file's bytes are not those of the entry's checksums.
    ///
    /// # Errors
    /// [`Error::Format`] where a number of the entry is out of range, [`Error::Io`].
    pub(super) fn resume_site(&mut self, entry: &SiteEntry) -> Result<bool> {
        let specs = entry.tensor_specs()?;
        let file = self.file.get_ref();
        let written = file.metadata().map_err(Error::io(&self.path))?.len();
        let mut end = self.header.position;
        for (index, spec) in specs.iter().enumerate() {
            let start = end.next_multiple_of(ALIGNMENT);
            end = start + spec.size();
            if (self.first + end) as u64 > written {
                return Ok(false);
            }
            let mut bytes = vec![0; spec.size()];
            file.read_exact_at(&mut bytes, (self.first + start) as u64).map_err(Error::io(&self.path))?;
            if entry.checksums.get(index) != Some(&checksum(&bytes)) {
                return Ok(false);
            }
        }
        for spec in specs {
            self.header.add(&spec.of_site(&entry.name))?;
        }
        Ok(true)
    }

    /// Cuts the file after the sites that were taken over.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn truncate(&mut self) -> Result<()> {
        let end = (self.first + self.header.position) as u64;
        let cut = self.file.seek(SeekFrom::Start(end)).and_then(|_| self.file.get_ref().set_len(end));
        cut.map_err(Error::io(&self.path))
    }

    /// Passes buffered bytes to the operating system; does not wait for the disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(Error::io(&self.path))
    }

    /// Writes a site's tensors, in the order of [`SiteEntry::tensor_specs`], and sets the entry's sizes and checksums.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] where the number of tensors is not the entry's, or where the header becomes too
    /// long for a reader.
    pub(crate) fn write_site(&mut self, entry: &mut SiteEntry, tensors: &[&[u8]]) -> Result<()> {
        let specs = entry.tensor_specs()?;
        if specs.len() != tensors.len() {
            return Err(Error::Format(format!(
                "expected {} tensors of {}, found {}",
                specs.len(),
                entry.name,
                tensors.len()
            )));
        }
        entry.checksums = tensors.iter().map(|bytes| checksum(bytes)).collect();
        for (spec, bytes) in specs.into_iter().zip(tensors) {
            self.write_tensor(&spec.of_site(&entry.name), bytes)?;
        }
        entry.bytes = tensors.iter().map(|bytes| bytes.len() as u64).sum();
        entry.bpw = entry.exact_bpw();
        entry.relative_error = (entry.relative_error * 1e6).round() / 1e6;
        Ok(())
    }

    fn write_tensor(&mut self, spec: &TensorSpec, bytes: &[u8]) -> Result<()> {
        if spec.size() != bytes.len() {
            let (name, expected) = (&spec.name, spec.size());
            return Err(Error::Argument(format!("expected {expected} bytes of {name}, found {}", bytes.len())));
        }
        let padding = &[0; ALIGNMENT][..self.header.add(spec)?];
        self.file.write_all(padding).and_then(|()| self.file.write_all(bytes)).map_err(Error::io(&self.path))?;
        crash_point!("tensor");
        Ok(())
    }

    /// Copies a file, whose name [`check_copied_files`] has checked, into the folder.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn copy_file(&mut self, source: &Path) -> Result<()> {
        let bytes = fs::read(source).map_err(Error::io(source))?;
        self.write_file(&copied_name(source), &bytes)
    }

    /// Writes a file that is neither manifest nor tensors.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn write_file(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.folder.write_file(name, bytes)?;
        crash_point!("copied file");
        self.files.insert(name.to_owned(), FileEntry { bytes: bytes.len() as u64, checksum: checksum(bytes) });
        Ok(())
    }

    /// Writes header and manifest and flushes all files to disk. Returns the manifest, and the size of manifest and
    /// tensors.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// Where tensors were written that [`Writer::create`] was not given.
    pub(super) fn finish(mut self, mut manifest: Manifest) -> Result<(Manifest, u64)> {
        let position = self.header.position;
        self.header.bind(manifest.binding());
        let mut header = self.header.text();
        assert!(header.len() + 8 <= self.reserved, "the header fits in the bytes reserved for it");
        let io = |error| Error::io(&self.path)(error);
        let mut file = self.file.into_inner().map_err(|error| io(error.into_error()))?;
        let start = tensors_start(header.len(), self.reserved, position);
        header.resize(start - 8, b' ');
        let head = [&(header.len() as u64).to_le_bytes()[..], &header].concat();
        if start != self.first {
            file.seek(SeekFrom::Start(self.first as u64)).map_err(io)?;
            let moved = self.folder.create_file(MOVED)?;
            write_moved(moved, &head, &mut file).map_err(Error::io(&self.path.with_file_name(MOVED)))?;
        } else {
            file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&head)).map_err(io)?;
            file.sync_all().map_err(io)?;
        }
        crash_point!("header");
        let tensors = (start + position) as u64;
        self.files.insert(TENSORS.into(), FileEntry { bytes: tensors, checksum: checksum(&head) });
        manifest.files = self.files;
        let text = manifest.to_text();
        self.folder.write_file(MANIFEST, text.as_bytes())?;
        crash_point!("manifest");
        if start != self.first {
            self.folder.rename(MOVED, TENSORS)?;
            crash_point!("moved tensors");
        }
        Ok((manifest, tensors + text.len() as u64))
    }
}

/// Where the tensors start according to the file's header, if it has one and that is before `reserved`.
fn moved_start(file: &File, reserved: usize) -> io::Result<Option<usize>> {
    let mut length = [0; 8];
    match file.read_exact_at(&mut length, 0) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let length = usize::try_from(u64::from_le_bytes(length)).ok();
    Ok(length.filter(|length| *length > 0 && *length < reserved - 8).map(|length| 8 + length))
}

/// The name of a copy whose tensors start right after the header. Until it is flushed, the file that a killed writer
/// can resume from stays as it was.
const MOVED: &str = ".delta.safetensors";

fn write_moved(mut file: File, head: &[u8], tensors: &mut File) -> io::Result<()> {
    file.write_all(head)?;
    io::copy(tensors, &mut file)?;
    file.sync_all()
}

/// The name that a file is copied under: its own.
fn copied_name(source: &Path) -> String {
    source.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Checks that files can be copied into a delta directory: by names that a reader takes, one file a name.
///
/// # Errors
/// [`Error::Argument`].
pub(crate) fn check_copied_files(files: &[PathBuf]) -> Result<()> {
    let mut names = HashSet::from([MANIFEST.to_owned(), TENSORS.to_owned()]);
    for file in files {
        let name = copied_name(file);
        if check_file_name(&name).is_err() || !names.insert(name) {
            return Err(Error::Argument(format!(
                "expected files of plain names, each another, beside the delta's own, found {}",
                file.display()
            )));
        }
    }
    Ok(())
}

/// Checks that a parameter's tensors can be told from padding by their names.
///
/// # Errors
/// [`Error::Architecture`].
pub(crate) fn check_site_name(name: &str) -> Result<()> {
    if name.starts_with(PADDING) {
        return Err(Error::Architecture(format!("expected parameters of other names than {PADDING}*, found {name}")));
    }
    Ok(())
}

/// Checks the size of each tensor of a site, in the order of [`SiteEntry::tensor_specs`], and that its floats are finite.
///
/// # Errors
/// [`Error::Argument`], [`Error::NonFinite`]; [`Error::Format`] where a number of the entry is out of range.
pub(super) fn check_tensors(entry: &SiteEntry, tensors: &[&[u8]]) -> Result<()> {
    for (spec, data) in entry.tensor_specs()?.into_iter().zip(tensors) {
        let name = format!("{}/{}", entry.name, spec.name);
        if data.len() != spec.size() {
            return Err(Error::Argument(format!("expected {} bytes of {name}, found {}", spec.size(), data.len())));
        }
        View { dtype: spec.dtype, shape: spec.shape, data: Content::Borrowed(data) }.check_finite(&name)?;
    }
    Ok(())
}

/// The tensors of all sites, by full name.
///
/// # Errors
/// [`Error::Format`] where a number of an entry is out of range.
pub(super) fn full_specs(sites: &[SiteEntry]) -> Result<Vec<TensorSpec>> {
    let mut specs = Vec::new();
    for site in sites {
        specs.extend(site.tensor_specs()?.into_iter().map(|spec| spec.of_site(&site.name)));
    }
    Ok(specs)
}
