//! Writing a delta directory: under a temporary name, flushed, then renamed.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, BufWriter, ErrorKind, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::journal::JOURNAL;
use super::manifest::{FileEntry, MANIFEST, Manifest, SiteEntry, TENSORS, TensorSpec};
use super::{ALIGNMENT, Delta, checksum};
use crate::error::{Error, Result};

/// A folder that takes its name only when it is whole.
pub struct Folder {
    target: PathBuf,
    partial: PathBuf,
    // The partial folder, locked: a second writer of the same target is told, not mixed in.
    lock: File,
    kept: bool,
}

impl Folder {
    /// Makes `.NAME.incomplete` beside the target, emptied of what an interrupted writer left there. A failure leaves
    /// nothing.
    ///
    /// # Errors
    /// Those of [`Folder::open`].
    pub fn create(target: &Path) -> Result<Self> {
        let mut folder = Self::open(target)?;
        folder.empty()?;
        folder.keep(false);
        Ok(folder)
    }

    /// Makes `.NAME.incomplete` beside the target, or takes the one that an interrupted writer left. A failure leaves it to
    /// the next.
    ///
    /// # Errors
    /// [`Error::Argument`] where another process is writing the same folder; [`Error::Io`].
    pub fn open(target: &Path) -> Result<Self> {
        let name = target
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(|| Error::Argument(format!("expected a folder to write to, found {}", target.display())))?;
        let parent = parent_of(target);
        fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let partial = parent.join(format!(".{name}.incomplete"));
        match fs::create_dir(&partial) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(Error::io(&partial)(error)),
            _ => {}
        }
        let lock = File::open(&partial).map_err(Error::io(&partial))?;
        if lock.try_lock().is_err() || !same(&lock, &partial) {
            return Err(Error::Argument(format!(
                "expected to be alone in writing {}, found another process at it",
                target.display()
            )));
        }
        Ok(Self { target: target.to_owned(), partial, lock, kept: true })
    }

    /// Whether a failure leaves the folder to the next writer.
    pub fn keep(&mut self, kept: bool) {
        self.kept = kept;
    }

    /// Removes what lies in the folder.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn empty(&self) -> Result<()> {
        for left in fs::read_dir(&self.partial).map_err(Error::io(&self.partial))? {
            let left = left.map_err(Error::io(&self.partial))?.path();
            fs::remove_file(&left).map_err(Error::io(&left))?;
        }
        Ok(())
    }

    /// Where files are to be written.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Gives the folder its name. What stood there under that name is replaced.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(self) -> Result<()> {
        sync(&self.partial)?;
        // At the very last: a folder without its journal is one to start anew.
        let journal = self.partial.join(JOURNAL);
        match fs::remove_file(&journal) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(Error::io(&journal)(error)),
            _ => {}
        }
        if self.target.exists() {
            replace(&self.partial, &self.target)?;
        } else {
            fs::rename(&self.partial, &self.target).map_err(Error::io(&self.target))?;
        }
        sync(parent_of(&self.target))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // After `finish` this is another's folder or none.
        if !self.kept && same(&self.lock, &self.partial) {
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// Puts a folder in another's place, which a reader never finds empty where the file system can exchange two names.
fn replace(new: &Path, target: &Path) -> Result<()> {
    if exchange(new, target).is_ok() {
        return fs::remove_dir_all(new).map_err(Error::io(new));
    }
    let old = new.with_extension("old");
    let _ = fs::remove_dir_all(&old); // a crash between the two renames below may have left one
    fs::rename(target, &old).map_err(Error::io(target))?;
    fs::rename(new, target).map_err(Error::io(target))?;
    fs::remove_dir_all(&old).map_err(Error::io(&old))
}

#[cfg(target_os = "linux")]
fn exchange(a: &Path, b: &Path) -> std::io::Result<()> {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;

    let (a, b) = (CString::new(a.as_os_str().as_bytes())?, CString::new(b.as_os_str().as_bytes())?);
    // SAFETY: two C strings that outlive the call.
    let failed =
        unsafe { libc::renameat2(libc::AT_FDCWD, a.as_ptr(), libc::AT_FDCWD, b.as_ptr(), libc::RENAME_EXCHANGE) };
    if failed == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[cfg(not(target_os = "linux"))]
fn exchange(_: &Path, _: &Path) -> std::io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}

fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether an open folder is still the one of that path.
fn same(open: &File, path: &Path) -> bool {
    let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let named = fs::metadata(path).map(id);
    open.metadata().map(id).is_ok_and(|open| named.is_ok_and(|named| open == named))
}

fn sync(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))
}

/// What the header of `delta.safetensors` says, tensor by tensor.
struct Header {
    entries: serde_json::Map<String, Value>,
    position: usize,
    pads: usize,
}

impl Header {
    fn new() -> Self {
        let mut entries = serde_json::Map::new();
        entries.insert("__metadata__".into(), json!({"format": "meswitch"}));
        Self { entries, position: 0, pads: 0 }
    }

    /// Adds a tensor, and before it the gap to its alignment, whose size it returns.
    fn add(&mut self, name: &str, dtype: &str, shape: &[usize], size: usize) -> usize {
        let gap = self.position.next_multiple_of(ALIGNMENT) - self.position;
        if gap > 0 {
            self.entry(&format!("_pad.{}", self.pads), "U8", &[gap], gap);
            self.pads += 1;
        }
        self.entry(name, dtype, shape, size);
        gap
    }

    fn entry(&mut self, name: &str, dtype: &str, shape: &[usize], size: usize) {
        let offsets = [self.position, self.position + size];
        self.entries.insert(name.into(), json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        self.position += size;
    }

    fn text(self) -> Vec<u8> {
        serde_json::to_vec(&Value::Object(self.entries)).expect("plain data is always JSON")
    }
}

/// The room to keep for a header that may hold these tensors, by full name.
fn reserve(specs: &[TensorSpec]) -> usize {
    // The longest entry: braces, keys, two offsets of 13 digits, and a padding tensor beside it.
    let room: usize =
        specs.iter().map(|spec| spec.role.len() + spec.dtype.len() + 16 * spec.shape.len() + 80 + 110).sum();
    (8 + 64 + room).next_multiple_of(ALIGNMENT)
}

/// Where the tensors are to start: right after the header, but where the room kept for it is no burden.
fn place(header: usize, reserved: usize, position: usize) -> usize {
    let start = (header + 8).next_multiple_of(ALIGNMENT);
    if (reserved - start) * 256 > position { start } else { reserved }
}

/// What manifest and tensors of a delta directory will weigh, from its entries without errors and checksums: never too
/// little, and too much by the digits of those. `possible` are the tensors that [`Writer::create`] is told of.
///
/// # Errors
/// [`Error::Format`] where an entry contradicts itself.
pub fn weigh(mut manifest: Manifest, possible: &[TensorSpec]) -> Result<u64> {
    let mut header = Header::new();
    for site in &mut manifest.sites {
        site.bytes = 0;
        for spec in site.specs()? {
            let size = spec.size();
            header.add(&format!("{}/{}", site.name, spec.role), &spec.dtype, &spec.shape, size);
            site.tensors.insert(spec.role, checksum(&[]));
            site.bytes += size as u64;
        }
        site.bpw = bpw(site);
        (site.relative_error, site.exponent) = (1.234_567, -100);
    }
    let position = header.position;
    let start = place(header.text().len(), reserve(possible), position);
    let tensors = (start + position) as u64;
    manifest.files.insert(TENSORS.into(), FileEntry { bytes: tensors, checksum: checksum(&[]) });
    Ok(tensors + manifest.to_text().len() as u64)
}

fn bpw(site: &SiteEntry) -> f64 {
    let bpw = 8.0 * site.bytes as f64 / site.parameters().unwrap_or(1).max(1) as f64;
    (bpw * 1e4).round() / 1e4
}

/// The tensors and the manifest of one delta directory.
pub struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
    header: Header,
    reserved: usize,
    // Where the tensors start: after the room, or where a writer that was killed at the end had moved them.
    first: usize,
    files: BTreeMap<String, FileEntry>,
}

impl Writer {
    /// Starts `delta.safetensors` in a folder, or opens the one that is there, for [`Writer::find`]. `specs` are all
    /// tensors that may come, by full name: the header's room is kept before the first of them.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(folder: &Path, specs: &[TensorSpec]) -> Result<Self> {
        let path = folder.join(TENSORS);
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let mut file = BufWriter::with_capacity(1 << 20, file.map_err(Error::io(&path))?);
        let reserved = reserve(specs);
        let first = moved_to(file.get_ref(), reserved).unwrap_or(reserved);
        file.seek(SeekFrom::Start(first as u64)).map_err(Error::io(&path))?;
        Ok(Self { path, file, header: Header::new(), reserved, first, files: BTreeMap::new() })
    }

    /// Takes in a site that lies next in the file that was there, if its tensors are those of its entry.
    ///
    /// # Errors
    /// [`Error::Format`] where the entry contradicts itself.
    pub fn find(&mut self, entry: &SiteEntry) -> Result<bool> {
        let specs = entry.specs()?;
        let mut end = self.header.position;
        for spec in &specs {
            let start = end.next_multiple_of(ALIGNMENT);
            end = start + spec.size();
            let mut bytes = vec![0; spec.size()];
            let read = self.file.get_ref().read_exact_at(&mut bytes, (self.first + start) as u64);
            if read.is_err() || entry.tensors.get(&spec.role) != Some(&checksum(&bytes)) {
                return Ok(false);
            }
        }
        for spec in specs {
            self.header.add(&format!("{}/{}", entry.name, spec.role), &spec.dtype, &spec.shape, spec.size());
        }
        Ok(true)
    }

    /// Drops what lies in the file after the sites that were found: the next one goes there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn cut(&mut self) -> Result<()> {
        let end = (self.first + self.header.position) as u64;
        let sought = self.file.seek(SeekFrom::Start(end)).and_then(|_| self.file.get_ref().set_len(end));
        sought.map_err(Error::io(&self.path))
    }

    /// Gives all that was written to the operating system.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(Error::io(&self.path))
    }

    /// Writes a site's tensors, in the order of its entry's specs, and completes the entry with sizes and checksums.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] where bytes and entry disagree.
    pub fn site(&mut self, entry: &mut SiteEntry, tensors: &[&[u8]]) -> Result<()> {
        let specs = entry.specs()?;
        if specs.len() != tensors.len() {
            return Err(Error::Format(format!(
                "expected {} tensors of {}, found {}",
                specs.len(),
                entry.name,
                tensors.len()
            )));
        }
        for (spec, bytes) in specs.iter().zip(tensors) {
            self.tensor(&format!("{}/{}", entry.name, spec.role), &spec.dtype, &spec.shape, bytes)?;
            entry.tensors.insert(spec.role.clone(), checksum(bytes));
        }
        entry.bytes = tensors.iter().map(|bytes| bytes.len() as u64).sum();
        entry.bpw = bpw(entry);
        entry.relative_error = (entry.relative_error * 1e6).round() / 1e6;
        Ok(())
    }

    fn tensor(&mut self, name: &str, dtype: &str, shape: &[usize], bytes: &[u8]) -> Result<()> {
        let gap = [0; ALIGNMENT];
        let gap = &gap[..self.header.add(name, dtype, shape, bytes.len())];
        self.file.write_all(gap).and_then(|()| self.file.write_all(bytes)).map_err(Error::io(&self.path))
    }

    /// Copies a file of the fine-tune's folder beside the tensors.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn copy(&mut self, source: &Path) -> Result<()> {
        let bytes = fs::read(source).map_err(Error::io(source))?;
        let name = source.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let target = self.path.with_file_name(&name);
        write_synced(&target, &bytes)?;
        self.files.insert(name, FileEntry { bytes: bytes.len() as u64, checksum: checksum(&bytes) });
        Ok(())
    }

    /// Writes header and manifest. Returns the bytes of the two files.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(mut self, mut manifest: Manifest) -> Result<(Manifest, u64)> {
        let position = self.header.position;
        let mut header = self.header.text();
        assert!(header.len() + 8 <= self.reserved, "the header's room is an upper bound");
        let io = |error| Error::io(&self.path)(error);
        let mut file = self.file.into_inner().map_err(|error| io(error.into_error()))?;
        let start = place(header.len(), self.reserved, position);
        header.resize(start - 8, b' ');
        let head = [&(header.len() as u64).to_le_bytes()[..], &header].concat();
        let closer = self.path.with_file_name(CLOSER);
        if start != self.first {
            file.seek(SeekFrom::Start(self.first as u64)).map_err(io)?;
            write_closer(&closer, &head, &mut file).map_err(Error::io(&closer))?;
        } else {
            file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(&head)).map_err(io)?;
            file.sync_all().map_err(io)?;
        }
        let tensors = (start + position) as u64;
        self.files.insert(TENSORS.into(), FileEntry { bytes: tensors, checksum: checksum(&head) });
        manifest.files = self.files;
        let text = manifest.to_text();
        write_synced(&self.path.with_file_name(MANIFEST), text.as_bytes())?;
        if start != self.first {
            fs::rename(&closer, &self.path).map_err(io)?;
        }
        Ok((manifest, tensors + text.len() as u64))
    }
}

/// Where the header says that the tensors start, if it is written already and that is before `reserved`.
fn moved_to(file: &File, reserved: usize) -> Option<usize> {
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).ok()?;
    let length = usize::try_from(u64::from_le_bytes(length)).ok()?;
    (length > 0 && length < reserved - 8).then_some(8 + length)
}

/// The tensors anew, closer to the header: until all is flushed, the sites of a writer killed here lie where they were.
const CLOSER: &str = ".delta.safetensors";

fn write_closer(path: &Path, head: &[u8], tensors: &mut File) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(head)?;
    io::copy(tensors, &mut file)?;
    file.sync_all()
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(Error::io(path))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io(path))
}

/// The tensors that entries promise, by full name.
///
/// # Errors
/// [`Error::Format`] where an entry's fields contradict each other.
pub(super) fn full_specs(sites: &[SiteEntry]) -> Result<Vec<TensorSpec>> {
    let mut specs = Vec::new();
    for site in sites {
        specs.extend(
            site.specs()?.into_iter().map(|spec| TensorSpec { role: format!("{}/{}", site.name, spec.role), ..spec }),
        );
    }
    Ok(specs)
}

/// Writes a delta directory anew with some tensors replaced by others of the same size.
///
/// `tensors` are by `SITE/ROLE`, `errors` the new relative errors by site, and `settings` takes the old one's place.
///
/// # Errors
/// [`Error::Argument`] for a tensor that is not there or of another size; [`Error::Io`].
pub fn rewrite(
    source: &Delta,
    out: &Path,
    tensors: &HashMap<String, Vec<u8>>,
    errors: &HashMap<String, f64>,
    settings: Value,
) -> Result<()> {
    let manifest = source.manifest();
    for (name, bytes) in tensors {
        let there = name.rsplit_once('/').and_then(|(site, role)| source.tensor(site, role));
        if there.map(<[u8]>::len) != Some(bytes.len()) {
            let found = bytes.len();
            return Err(Error::Argument(format!(
                "expected a tensor of the delta in its size, found {name} of {found} bytes"
            )));
        }
    }
    let folder = Folder::create(out)?;
    let mut writer = Writer::create(folder.path(), &full_specs(&manifest.sites)?)?;
    let mut sites = manifest.sites.clone();
    for site in &mut sites {
        let slices: Vec<&[u8]> = site
            .specs()?
            .iter()
            .filter_map(|spec| {
                let replaced = tensors.get(&format!("{}/{}", site.name, spec.role)).map(Vec::as_slice);
                replaced.or_else(|| source.tensor(&site.name, &spec.role))
            })
            .collect();
        if let Some(error) = errors.get(&site.name) {
            site.relative_error = *error;
        }
        writer.site(site, &slices)?;
    }
    for name in manifest.files.keys().filter(|name| *name != TENSORS) {
        writer.copy(&source.path().join(name))?;
    }
    writer.finish(Manifest { settings, sites, ..manifest.clone() })?;
    folder.finish()
}
