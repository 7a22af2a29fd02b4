//! The right to write at a place.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{LOCK, Target};
use crate::directory::Directory;
use crate::error::{Error, Result};

/// The right to write at a place, which one writer at a time has. [`super::Folder`] takes it for as long as one folder
/// is written; whoever works longer for a place, or has more to write beside it, takes it first and hands it on, to one
/// folder at a time.
///
/// Dropping the last handle gives it up. So does the end of the process.
pub struct Lock {
    pub(super) target: Target,
    pub(super) parent: Directory,
    _file: File,
}

impl Lock {
    /// Takes the right to write at a place, and creates the folders above it.
    ///
    /// # Errors
    /// [`Error::Output`] where another writer has it, [`Error::Io`].
    pub fn take(target: Target) -> Result<Arc<Self>> {
        create_folders(&target.parent)?;
        let parent = Directory::open(&target.parent)?;
        let file = lock(&parent, &target)?;
        Ok(Arc::new(Self { target, parent, _file: file }))
    }

    /// The place.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.target.path()
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is locked: who opened it meanwhile sees that it has lost its name.
        let _ = self.parent.remove(&self.target.hidden(LOCK));
    }
}

/// Locks `.NAME.lock`, which is removed by its holder.
fn lock(parent: &Directory, target: &Target) -> Result<File> {
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
    Directory::open(above)?.sync()
}
