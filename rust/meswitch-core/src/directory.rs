//! A folder opened once, and the files below it. A rename of the folder does not change what is read.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Dir, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::error::{Error, Result};

/// An open folder.
pub(crate) struct Directory {
    path: PathBuf,
    folder: OwnedFd,
}

/// Which file or folder of the system it is: its device and number. Another of the same name has another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Identity(u64, u64);

impl Directory {
    /// # Errors
    /// [`Error::Io`] where there is no folder.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = with_descriptor(|| openat(CWD, path, flags, Mode::empty())).map_err(Error::io(path))?;
        Ok(Self { path: path.to_owned(), folder })
    }

    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn identity(&self) -> Result<Identity> {
        let found = rustix::fs::fstat(&self.folder).map_err(|error| Error::io(&self.path)(error.into()))?;
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
        let file = with_descriptor(|| openat(&self.folder, name, flags, Mode::empty())).map_err(Error::io(&path))?;
        let file = File::from(file);
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
    pub(crate) fn names(&self) -> Result<Vec<String>> {
        let broken = |error: Errno| Error::io(&self.path)(error.into());
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.folder).map_err(broken)? {
            let entry = entry.map_err(broken)?;
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
        Ok(names)
    }
}

/// Opens something. Where the process may have no more descriptors open, and the system allows it more than it asked
/// for, it asks for them first: an engine keeps one open for each of its experts.
fn with_descriptor(open: impl Fn() -> rustix::io::Result<OwnedFd>) -> io::Result<OwnedFd> {
    match open() {
        Err(Errno::MFILE) => {
            let mut limit = getrlimit(Resource::Nofile);
            limit.current = limit.maximum;
            setrlimit(Resource::Nofile, limit)?;
            Ok(open()?)
        }
        opened => Ok(opened?),
    }
}
