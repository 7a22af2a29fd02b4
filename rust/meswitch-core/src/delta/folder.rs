//! The folder that a delta directory is written in: under a temporary name, flushed to disk, then renamed.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::journal::JOURNAL;
use crate::error::{Error, Result};

/// The folder `.NAME.incomplete` beside the target, which takes the target's name when it is complete.
///
/// It is locked: a second process that writes the same target gets an error. Dropping it removes it unless
/// [`Folder::leave_on_failure`] says otherwise.
pub(super) struct Folder {
    target: PathBuf,
    partial: PathBuf,
    /// The partial folder, opened and locked.
    lock: File,
    leave: bool,
}

impl Folder {
    /// Creates an empty folder. What an interrupted writer left there is removed. A failure leaves nothing.
    ///
    /// # Errors
    /// Those of [`Folder::open`].
    pub(super) fn create(target: &Path) -> Result<Self> {
        let mut folder = Self::open(target)?;
        folder.empty()?;
        folder.leave_on_failure(false);
        Ok(folder)
    }

    /// Creates a folder, or opens the one that an interrupted writer left. A failure leaves it for the next writer.
    ///
    /// # Errors
    /// [`Error::Argument`] where another process is writing the same folder; [`Error::Io`].
    pub(super) fn open(target: &Path) -> Result<Self> {
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
        if lock.try_lock().is_err() || !is_at(&lock, &partial) {
            return Err(Error::Argument(format!(
                "expected to be alone in writing {}, found another process at it",
                target.display()
            )));
        }
        Ok(Self { target: target.to_owned(), partial, lock, leave: true })
    }

    /// Sets whether a failure leaves the folder for the next writer.
    pub(super) fn leave_on_failure(&mut self, leave: bool) {
        self.leave = leave;
    }

    /// Removes all files of the folder.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn empty(&self) -> Result<()> {
        for file in fs::read_dir(&self.partial).map_err(Error::io(&self.partial))? {
            let path = file.map_err(Error::io(&self.partial))?.path();
            fs::remove_file(&path).map_err(Error::io(&path))?;
        }
        Ok(())
    }

    /// Where files are written.
    pub(super) fn path(&self) -> &Path {
        &self.partial
    }

    /// Renames the folder to the target, replacing a directory of that name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(super) fn finish(self) -> Result<()> {
        sync(&self.partial)?;
        // Removed last: without a journal, the next writer would start over.
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
        // After `finish` the name is free, or belongs to another writer's folder.
        if !self.leave && is_at(&self.lock, &self.partial) {
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// Renames `new` to `target`, which exists, and removes the old one. Where the file system can exchange two names, a
/// reader finds one of the two at any time.
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
    // SAFETY: both C strings outlive the call.
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

/// Whether an opened folder is still the one at that path.
fn is_at(open: &File, path: &Path) -> bool {
    let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let named = fs::metadata(path).map(id);
    open.metadata().map(id).is_ok_and(|open| named.is_ok_and(|named| open == named))
}

fn sync(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(Error::io(folder))
}
