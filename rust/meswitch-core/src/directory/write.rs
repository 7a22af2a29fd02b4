//! Writing in an open folder. Links in it are never followed.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags, fsync, mkdirat, openat, renameat, statat, unlinkat};
use rustix::io::Errno;

use super::{Directory, FOLDER, with_descriptor};
use crate::error::{Error, Result};

/// The modes of new files and folders, less the process's mask.
const NEW_FILE: Mode = Mode::from_raw_mode(0o666);
const NEW_FOLDER: Mode = Mode::from_raw_mode(0o777);

impl Directory {
    /// Opens a folder of that name in this one, and creates it where there is none.
    pub(crate) fn subfolder(&self, name: &OsStr) -> Result<Self> {
        match mkdirat(&self.folder, name, NEW_FOLDER) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(self.error(name, error)),
        }
        self.existing_subfolder(name)
    }

    fn existing_subfolder(&self, name: &OsStr) -> Result<Self> {
        let open = || openat(&self.folder, name, FOLDER | OFlags::NOFOLLOW, Mode::empty());
        let folder = with_descriptor(open).map_err(|error| self.error(name, error))?;
        Ok(Self { path: self.path.join(name), folder: Arc::new(folder) })
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
        let file = match with_descriptor(|| openat(&self.folder, name, flags, NEW_FILE)) {
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
        renameat(&self.folder, from, &self.folder, to).map_err(|error| self.error(to, error))
    }

    /// Exchanges the names of two files or folders, so that both exist at any time.
    pub(crate) fn exchange(&self, one: &OsStr, other: &OsStr) -> Result<()> {
        #[cfg(any(target_os = "linux", target_os = "android", target_vendor = "apple"))]
        let exchanged = {
            use rustix::fs::{RenameFlags, renameat_with};
            renameat_with(&self.folder, one, &self.folder, other, RenameFlags::EXCHANGE)
        };
        #[cfg(not(any(target_os = "linux", target_os = "android", target_vendor = "apple")))]
        let exchanged: rustix::io::Result<()> = Err(Errno::NOSYS);
        exchanged.map_err(|error| self.error(other, error))
    }

    /// Removes a file, a link or a folder with all that it holds, if there is one of that name.
    pub(crate) fn remove(&self, name: &OsStr) -> Result<()> {
        match unlinkat(&self.folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            // Linux says that it is a folder, others that folders are not unlinked.
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(error) => return Err(self.error(name, error)),
        }
        self.existing_subfolder(name)?.clear()?;
        unlinkat(&self.folder, name, AtFlags::REMOVEDIR).map_err(|error| self.error(name, error))
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

    /// Whether there is anything of that name, a link to nothing included.
    pub(crate) fn has(&self, name: &OsStr) -> Result<bool> {
        match statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(self.error(name, error)),
        }
    }

    /// Whether an open file is still the one of that name.
    pub(crate) fn is_at(&self, file: &File, name: &OsStr) -> Result<bool> {
        let path = self.path.join(name);
        let open = file.metadata().map_err(Error::io(&path))?;
        match statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(named) => Ok((named.st_dev, named.st_ino) == (open.dev(), open.ino())),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(self.error(name, error)),
        }
    }

    /// Flushes the folder's names to disk.
    pub(crate) fn sync(&self) -> Result<()> {
        fsync(&self.folder).map_err(|error| self.error("", error))
    }

    /// Flushes the folder's files, and then its names, to disk.
    pub(crate) fn sync_all(&self) -> Result<()> {
        for name in self.names()? {
            let file = self.open_with(&name, OFlags::RDONLY)?;
            file.sync_all().map_err(Error::io(&self.path.join(&name)))?;
        }
        self.sync()
    }
}
