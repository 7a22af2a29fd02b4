//! Folders that appear under their name complete, or not at all.
//!
//! ```text
//! NAME              the place: the old folder or the new one at any time
//! .NAME.incomplete  the folder while it is written
//! .NAME.replaced    the old folder while it is removed
//! .NAME.lock        what a writer holds; never renamed, so that there is one lock whatever becomes of the folders
//! ```

mod open;
mod target;

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

pub(crate) use self::open::OpenFolder;
pub use self::target::Target;
use crate::crash::crash_point;
use crate::error::{Error, Result};

const INCOMPLETE: &str = "incomplete";
const REPLACED: &str = "replaced";
const LOCK: &str = "lock";

/// A folder that is being written, by this writer alone.
///
/// Dropping it removes what was written unless [`Folder::leave_on_failure`] says otherwise.
pub struct Folder {
    target: Target,
    parent: OpenFolder,
    files: OpenFolder,
    /// Held until this is dropped.
    _lock: File,
    leave: bool,
    committed: bool,
}

impl Folder {
    /// Creates an empty folder. What an interrupted writer left there is removed. A failure leaves nothing.
    ///
    /// # Errors
    /// Those of [`Folder::open`].
    pub fn create(target: Target) -> Result<Self> {
        let mut folder = Self::open(target)?;
        folder.files.clear()?;
        folder.leave_on_failure(false);
        Ok(folder)
    }

    /// Creates a folder, or opens the one that an interrupted writer left. A failure leaves it for the next writer.
    ///
    /// # Errors
    /// [`Error::Output`] where another writer is at it, [`Error::Io`].
    pub fn open(target: Target) -> Result<Self> {
        create_folders(&target.parent)?;
        let parent = OpenFolder::open(&target.parent)?;
        let lock = lock(&parent, &target)?;
        crash_point!("locked");
        remove_replaced(&parent, &target)?;
        let files = parent.subfolder(&target.hidden(INCOMPLETE))?;
        Ok(Self { target, parent, files, _lock: lock, leave: true, committed: false })
    }

    /// Sets whether a failure leaves the folder for the next writer.
    pub fn leave_on_failure(&mut self, leave: bool) {
        self.leave = leave;
    }

    /// Where files are written.
    pub(crate) fn files(&self) -> &OpenFolder {
        &self.files
    }

    /// The path of [`Self::files`].
    #[must_use]
    pub fn path(&self) -> &Path {
        self.files.path()
    }

    /// Checks that what is at the place now may be replaced.
    ///
    /// # Errors
    /// [`Error::Output`] where something else has come to the place, [`Error::Io`].
    pub(crate) fn check(&self) -> Result<()> {
        self.target.check()
    }

    /// Flushes the folder's files to disk and gives it its name, in place of what is there. Returns its path.
    ///
    /// # Errors
    /// [`Error::Output`] where something else has come to the place meanwhile, [`Error::Io`].
    pub fn commit(mut self) -> Result<PathBuf> {
        self.check()?;
        self.files.sync_all()?;
        crash_point!("flushed");
        let (incomplete, name) = (self.target.hidden(INCOMPLETE), &self.target.name);
        let replaces = self.parent.has(name)?;
        if !replaces {
            self.parent.rename(&incomplete, name)?;
        } else if self.parent.exchange(&incomplete, name).is_err() {
            // A file system that cannot exchange two names; `remove_replaced` mends a crash between the two.
            self.parent.rename(name, self.target.hidden(REPLACED))?;
            crash_point!("moved away");
            self.parent.rename(&incomplete, name)?;
        }
        self.committed = true;
        crash_point!("renamed");
        // Before anything is removed: else a power failure could leave neither.
        self.parent.sync()?;
        if replaces {
            // What is left of the old folder is removed by the next writer.
            let _ = self.remove_old(&incomplete);
        }
        Ok(self.target.path())
    }

    /// Removes the folder that was replaced, under a name by which no writer takes it for its own.
    fn remove_old(&self, incomplete: &std::ffi::OsStr) -> Result<()> {
        let replaced = self.target.hidden(REPLACED);
        if self.parent.has(incomplete)? {
            self.parent.rename(incomplete, &replaced)?;
        }
        crash_point!("old folder named");
        self.parent.remove(&replaced)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.committed && !self.leave {
            let _ = self.parent.remove(&self.target.hidden(INCOMPLETE));
        }
        // While it is locked: who opened it meanwhile sees that it has lost its name.
        let _ = self.parent.remove(&self.target.hidden(LOCK));
    }
}

/// Locks `.NAME.lock`, which is removed by its holder.
fn lock(parent: &OpenFolder, target: &Target) -> Result<File> {
    let name = target.hidden(LOCK);
    loop {
        let file = parent.open_lock(&name)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Output(format!(
                    "expected to be alone in writing {}, found another writer at it",
                    target.path().display()
                )));
            }
            Err(TryLockError::Error(error)) => return Err(Error::io(&parent.path().join(&name))(error)),
        }
        if parent.is_at(&file, &name)? {
            return Ok(file);
        }
    }
}

/// Removes the old folder that a killed writer had moved away, or moves it back where nothing took its place.
fn remove_replaced(parent: &OpenFolder, target: &Target) -> Result<()> {
    let replaced = target.hidden(REPLACED);
    if parent.has(&target.name)? || !parent.has(&replaced)? {
        return parent.remove(&replaced);
    }
    parent.rename(&replaced, &target.name)?;
    parent.sync()
}

/// Creates a folder and those above it, each flushed to disk.
fn create_folders(folder: &Path) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    let above = folder.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    create_folders(above)?;
    match fs::create_dir(folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(Error::io(folder)(error)),
        _ => {}
    }
    OpenFolder::open(above)?.sync()
}
