//! Folders that appear under their name complete, or not at all.
//!
//! ```text
//! NAME              the place: the old folder or the new one at any time
//! .NAME.incomplete  the folder while it is written
//! .NAME.replaced    the old folder while it is removed
//! .NAME.lock        what a writer holds; never renamed, so that there is one lock whatever becomes of the folders
//! ```

mod lock;
mod target;

use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use self::lock::Lock;
pub use self::target::Target;
use crate::crash::crash_point;
use crate::directory::Directory;
use crate::error::Result;

const INCOMPLETE: &str = "incomplete";
const REPLACED: &str = "replaced";
const LOCK: &str = "lock";

/// A folder that is being written, by this writer alone.
///
/// Dropping it removes what was written unless [`Folder::leave_on_failure`] says otherwise.
pub struct Folder {
    /// Held until this is dropped.
    lock: Arc<Lock>,
    files: Directory,
    leave: bool,
    committed: bool,
}

impl Folder {
    /// Creates an empty folder. What an interrupted writer left there is removed. A failure leaves nothing.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn create(lock: Arc<Lock>) -> Result<Self> {
        let mut folder = Self::open(lock)?;
        folder.files.clear()?;
        folder.leave_on_failure(false);
        Ok(folder)
    }

    /// Creates a folder, or opens the one that an interrupted writer left. A failure leaves it for the next writer.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn open(lock: Arc<Lock>) -> Result<Self> {
        crash_point!("locked");
        remove_replaced(&lock)?;
        let files = lock.parent.subfolder(&lock.target.hidden(INCOMPLETE))?;
        Ok(Self { lock, files, leave: true, committed: false })
    }

    /// Sets whether a failure leaves the folder for the next writer.
    pub fn leave_on_failure(&mut self, leave: bool) {
        self.leave = leave;
    }

    /// Where files are written.
    pub(crate) fn files(&self) -> &Directory {
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
        self.lock.target.check()
    }

    /// Flushes the folder's files to disk and gives it its name, in place of what is there. Returns its path.
    ///
    /// # Errors
    /// [`Error::Output`] where something else has come to the place meanwhile, [`Error::Io`].
    pub fn commit(mut self) -> Result<PathBuf> {
        self.check()?;
        self.files.sync_all()?;
        crash_point!("flushed");
        let (incomplete, name) = (self.lock.target.hidden(INCOMPLETE), &self.lock.target.name);
        let replaces = self.lock.parent.has(name)?;
        if !replaces {
            self.lock.parent.rename(&incomplete, name)?;
        } else if self.lock.parent.exchange(&incomplete, name).is_err() {
            // A file system that cannot exchange two names; `remove_replaced` mends a crash between the two.
            self.lock.parent.rename(name, self.lock.target.hidden(REPLACED))?;
            crash_point!("moved away");
            self.lock.parent.rename(&incomplete, name)?;
        }
        self.committed = true;
        crash_point!("renamed");
        // Before anything is removed: else a power failure could leave neither.
        self.lock.parent.sync()?;
        if replaces {
            // What is left of the old folder is removed by the next writer.
            let _ = self.remove_old(&incomplete);
        }
        Ok(self.lock.target.path())
    }

    /// Removes the folder that was replaced, under a name by which no writer takes it for its own.
    fn remove_old(&self, incomplete: &std::ffi::OsStr) -> Result<()> {
        let replaced = self.lock.target.hidden(REPLACED);
        if self.lock.parent.has(incomplete)? {
            self.lock.parent.rename(incomplete, &replaced)?;
        }
        crash_point!("old folder named");
        self.lock.parent.remove(&replaced)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.committed && !self.leave {
            let _ = self.lock.parent.remove(&self.lock.target.hidden(INCOMPLETE));
        }
    }
}

/// Removes the old folder that a killed writer had moved away, or moves it back where nothing took its place.
fn remove_replaced(lock: &Lock) -> Result<()> {
    let (parent, target) = (&lock.parent, &lock.target);
    let replaced = target.hidden(REPLACED);
    if parent.has(&target.name)? || !parent.has(&replaced)? {
        return parent.remove(&replaced);
    }
    parent.rename(&replaced, &target.name)?;
    parent.sync()
}
