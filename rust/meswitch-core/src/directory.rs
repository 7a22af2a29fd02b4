//! A folder opened once, and what lies in it: that is reached by the folder's descriptor, so a rename of the folder, or
//! another one that takes its path's place, does not change what is read or written.

#[cfg(feature = "compress")]
mod write;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, Dir, Mode, OFlags, fstat, openat};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::error::{Error, Result};

/// How folders are opened.
const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// An open folder.
#[derive(Clone)]
pub(crate) struct Directory {
    path: PathBuf,
    folder: Arc<OwnedFd>,
}

/// Which file or folder of the system it is: its device and number. Another of the same name has another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity(u64, u64);

impl Directory {
    /// Opens the folder at a path; links to it are followed.
    ///
    /// # Errors
    /// [`Error::Io`] where there is none.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let open = || openat(CWD, path, FOLDER, Mode::empty());
        let folder = with_descriptor(open).map_err(|error| Error::io(path)(error.into()))?;
        Ok(Self { path: path.to_owned(), folder: Arc::new(folder) })
    }

    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn identity(&self) -> Result<Identity> {
        let found = fstat(&self.folder).map_err(|error| self.error("", error))?;
        Ok(Identity(found.st_dev, found.st_ino))
    }

    /// Opens a file of the folder. A link is followed, but only to a regular file: a pipe would block, and a device may
    /// never end.
    ///
    /// # Errors
    /// [`Error::Io`] where there is none, [`Error::Format`] where it is no regular file.
    pub(crate) fn file(&self, name: &str) -> Result<File> {
        let path = self.path.join(name);
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let open = || openat(&self.folder, name, flags, Mode::empty());
        let file = File::from(with_descriptor(open).map_err(|error| self.error(name, error))?);
        let kind = file.metadata().map_err(Error::io(&path))?.file_type();
        if kind.is_file() {
            return Ok(file);
        }
        let found = if kind.is_dir() { "a folder" } else { "a pipe or a device" };
        Err(Error::Format(format!("expected a file at {}, found {found}", path.display())))
    }

    /// Reads a whole file of at most `limit` bytes.
    ///
    /// # Errors
    /// Those of [`Directory::file`], and [`Error::Format`] for a larger one.
    pub(crate) fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>> {
        let (file, path) = (self.file(name)?, self.path.join(name));
        let size = file.metadata().map_err(Error::io(&path))?.size();
        let mut bytes = Vec::with_capacity(size.min(limit) as usize);
        // The file may have grown since.
        file.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io(&path))?;
        if bytes.len() as u64 > limit {
            return Err(Error::Format(format!("expected {name} of at most {limit} bytes, found more")));
        }
        Ok(bytes)
    }

    /// The names of everything in the folder.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn names(&self) -> Result<Vec<OsString>> {
        let broken = |error| self.error("", error);
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.folder).map_err(broken)? {
            let entry = entry.map_err(broken)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// The error of something in the folder, or with an empty name of the folder itself.
    fn error(&self, name: impl AsRef<OsStr>, error: Errno) -> Error {
        let name = name.as_ref();
        Error::io(&if name.is_empty() { self.path.clone() } else { self.path.join(name) })(error.into())
    }
}

/// Opens something. Where the process may have no more descriptors open, and the system allows it more than it asked
/// for, it asks for them first: an engine keeps one open for each of its experts.
fn with_descriptor(open: impl Fn() -> rustix::io::Result<OwnedFd>) -> rustix::io::Result<OwnedFd> {
    match open() {
        Err(Errno::MFILE) => {
            let mut limit = getrlimit(Resource::Nofile);
            limit.current = limit.maximum;
            setrlimit(Resource::Nofile, limit)?;
            open()
        }
        opened => opened,
    }
}
