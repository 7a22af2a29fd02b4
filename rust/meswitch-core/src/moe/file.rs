//! A file of weights that stays open.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::Extent;
use crate::delta::load::{FileSource, Item, Loader, Stamp};
use crate::error::{Error, Result};

/// A file of weights, as it was when it was opened.
pub(super) struct WeightFile {
    path: PathBuf,
    file: File,
    source: FileSource<File>,
    stamp: Stamp,
}

impl WeightFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let open = || {
            let file = File::open(path)?;
            let (source, stamp) = (FileSource::new(file.try_clone()?), Stamp::of(&file)?);
            Ok(Self { path: path.to_owned(), file, source, stamp })
        };
        open().map_err(Error::io(path))
    }

    /// Refuses an extent that is not in the file.
    pub(super) fn check_extent(&self, extent: &Extent) -> Result<()> {
        let end = extent.start.checked_add(extent.bytes as u64);
        if end.is_none_or(|end| end > self.stamp.bytes()) {
            return Err(Error::Checkpoint(format!(
                "expected {} bytes from byte {} on in {}, found a file of {}",
                extent.bytes,
                extent.start,
                self.path.display(),
                self.stamp.bytes()
            )));
        }
        Ok(())
    }

    /// Reads extents into memory. The threads that wait for it have nothing else to do.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where the file was written to since it was opened, [`Error::Io`], and
    /// [`Error::Interrupted`] once `stop` is set.
    pub(super) fn read(&self, items: &[Item<'_>], memory: &mut [u8], stop: &AtomicBool) -> Result<()> {
        self.check_unchanged()?;
        let loader = Loader { source: &self.source, path: &self.path, hashed: false, yields: false, stop };
        match loader.load(items, memory) {
            Err(Error::Checksum(_)) => Err(self.changed()), // it was cut
            Err(error) => Err(error),
            Ok(_) => self.check_unchanged(),
        }
    }

    fn check_unchanged(&self) -> Result<()> {
        let now = Stamp::of(&self.file).map_err(Error::io(&self.path))?;
        if now.has_content_of(&self.stamp) { Ok(()) } else { Err(self.changed()) }
    }

    fn changed(&self) -> Error {
        Error::Checkpoint(format!(
            "expected {} as it was when its MoE experts were first served, found it written to since",
            self.path.display()
        ))
    }
}
