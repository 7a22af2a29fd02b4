//! An open folder, whose files are reached by its descriptor.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, fsync, mkdirat, openat, renameat, statat, unlinkat};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// The mode of new files and folders, less the process's mask.
const FILE: Mode = Mode::from_raw_mode(0o666);
const FOLDER: Mode = Mode::from_raw_mode(0o777);

/// An open folder. What lies in it is reached by its descriptor, so that a folder which takes its path's place does not
/// matter, and links in it are never followed.
#[derive(Clone)]
pub(crate) struct OpenFolder {
    descriptor: Arc<OwnedFd>,
    path: PathBuf,
}

impl OpenFolder {
    /// Opens the folder at a path; links to it are followed.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptor = openat(CWD, path, flags, Mode::empty()).map_err(|error| io_error(path, error))?;
        Ok(Self { descriptor: Arc::new(descriptor), path: path.to_owned() })
    }

    /// Opens a folder of that name in this one, and creates it where there is none.
    pub(crate) fn subfolder(&self, name: &OsStr) -> Result<Self> {
        match mkdirat(&*self.descriptor, name, FOLDER) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(self.error(name, error)),
        }
        self.existing_subfolder(name)
    }

    fn existing_subfolder(&self, name: &OsStr) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = openat(&*self.descriptor, name, flags, Mode::empty()).map_err(|error| self.error(name, error))?;
        Ok(Self { descriptor: Arc::new(opened), path: self.path.join(name) })
    }

    /// The folder's path when it was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a file of its own for reading and writing, and creates it where there is none.
    ///
    /// # Errors
    /// [`Error::Io`]; for a link and anything else that is not a file, [`Error::Output`].
    pub(crate) fn open_file(&self, name: impl AsRef<OsStr>) -> Result<File> {
        self.open_with(name.as_ref(), OFlags::RDWR | OFlags::CREATE)
    }

    /// As [`Self::open_file`], for a file that others may own: it is not opened for writing.
    pub(crate) fn open_lock(&self, name: &OsStr) -> Result<File> {
        self.open_with(name, OFlags::RDONLY | OFlags::CREATE)
    }

    fn open_with(&self, name: &OsStr, flags: OFlags) -> Result<File> {
        // Without blocking: a pipe of that name would wait for its other end.
        let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let not_a_file =
            || Error::Output(format!("expected a file at {}, found something else", self.path.join(name).display()));
        let file = match openat(&*self.descriptor, name, flags, FILE) {
            Ok(file) => File::from(file),
            Err(Errno::LOOP | Errno::ISDIR | Errno::NXIO) => return Err(not_a_file()),
            Err(error) => return Err(self.error(name, error)),
        };
        let is_file = file.metadata().map_err(Error::io(&self.path.join(name)))?.is_file();
        if is_file { Ok(file) } else { Err(not_a_file()) }
    }

    /// Creates a file. One of that name is removed first, so that nothing is written through another name of it.
    pub(crate) fn create_file(&self, name: impl AsRef<OsStr>) -> Result<File> {
        let name = name.as_ref();
        self.remove(name)?;
        self.open_with(name, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL)
    }

    /// Creates a file of these bytes and flushes it to disk.
    pub(crate) fn write_file(&self, name: impl AsRef<OsStr>, bytes: &[u8]) -> Result<()> {
        let name = name.as_ref();
        let mut file = self.create_file(name)?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io(&self.path.join(name)))
    }

    /// The bytes of a file; `None` where there is none.
    pub(crate) fn read_file(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let name = OsStr::new(name);
        let mut file = match self.open_with(name, OFlags::RDONLY) {
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(Error::io(&self.path.join(name)))?;
        Ok(Some(bytes))
    }

    /// Renames a file or folder in this folder.
    pub(crate) fn rename(&self, from: impl AsRef<OsStr>, to: impl AsRef<OsStr>) -> Result<()> {
        let (from, to) = (from.as_ref(), to.as_ref());
        renameat(&*self.descriptor, from, &*self.descriptor, to).map_err(|error| self.error(to, error))
    }

    /// Exchanges the names of two files or folders, so that both exist at any time.
    pub(crate) fn exchange(&self, one: &OsStr, other: &OsStr) -> Result<()> {
        #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
        let exchanged = {
            use rustix::fs::{RenameFlags, renameat_with};
            renameat_with(&*self.descriptor, one, &*self.descriptor, other, RenameFlags::EXCHANGE)
        };
        #[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
        let exchanged: rustix::io::Result<()> = Err(Errno::NOSYS);
        exchanged.map_err(|error| self.error(other, error))
    }

    /// Removes a file, a link or a folder with all that it holds, if there is one of that name.
    pub(crate) fn remove(&self, name: &OsStr) -> Result<()> {
        match unlinkat(&*self.descriptor, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            // Linux says that it is a folder, others that folders are not unlinked.
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(error) => return Err(self.error(name, error)),
        }
        self.existing_subfolder(name)?.clear()?;
        unlinkat(&*self.descriptor, name, AtFlags::REMOVEDIR).map_err(|error| self.error(name, error))
    }

    /// Removes everything in the folder.
    pub(crate) fn clear(&self) -> Result<()> {
        self.clear_all_but(&[])
    }

    /// Removes everything in the folder but the files of those names.
    pub(crate) fn clear_all_but(&self, kept: &[&str]) -> Result<()> {
        let names = self.names()?;
        let others = names.iter().filter(|name| kept.iter().all(|kept| kept != name));
        others.into_iter().try_for_each(|name| self.remove(name))
    }

    fn names(&self) -> Result<Vec<OsString>> {
        let entries = Dir::read_from(&*self.descriptor).map_err(|error| io_error(&self.path, error))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| io_error(&self.path, error))?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name != "." && name != ".." {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Whether there is anything of that name, a link to nothing included.
    pub(crate) fn has(&self, name: &OsStr) -> Result<bool> {
        match statat(&*self.descriptor, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(self.error(name, error)),
        }
    }

    /// Whether an open file is still the one of that name.
    pub(crate) fn is_at(&self, file: &File, name: &OsStr) -> Result<bool> {
        let path = self.path.join(name);
        let open = file.metadata().map_err(Error::io(&path))?;
        match statat(&*self.descriptor, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(named) => Ok((named.st_dev, named.st_ino) == (open.dev(), open.ino())),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(self.error(name, error)),
        }
    }

    /// Flushes the folder's names to disk.
    pub(crate) fn sync(&self) -> Result<()> {
        fsync(&*self.descriptor).map_err(|error| io_error(&self.path, error))
    }

    /// Flushes the folder's files, and then its names, to disk.
    pub(crate) fn sync_all(&self) -> Result<()> {
        for name in self.names()? {
            let file = self.open_with(&name, OFlags::RDONLY)?;
            file.sync_all().map_err(Error::io(&self.path.join(&name)))?;
        }
        self.sync()
    }

    fn error(&self, name: &OsStr, error: Errno) -> Error {
        io_error(&self.path.join(name), error)
    }
}

fn io_error(path: &Path, error: Errno) -> Error {
    Error::io(path)(error.into())
}
