//! Where a folder may be written.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The place of a folder that is to be written: its parent, which may not exist yet, and its name there.
pub struct Target {
    pub(super) parent: PathBuf,
    pub(super) name: OsString,
    /// The file that marks a folder which may be replaced.
    replaces: Option<String>,
}

impl Target {
    /// Decides whether a folder may be written at a path, and changes nothing. Only nothing, an empty folder, or one
    /// with a file called `replaces` may be there. A link leads to the place.
    ///
    /// # Errors
    /// [`Error::Output`] where it may not, [`Error::Io`].
    pub fn resolve(path: &Path, replaces: Option<&str>) -> Result<Self> {
        let (parent, name) = split(path)?;
        let mut target = Self { parent, name, replaces: replaces.map(str::to_owned) };
        if kind(&target.path())?.is_some_and(|kind| kind.is_symlink()) {
            let led = fs::canonicalize(target.path()).map_err(|error| match error.kind() {
                ErrorKind::NotFound => Error::Output(format!(
                    "expected a folder to write to, found a link to nothing at {}",
                    path.display()
                )),
                _ => Error::io(path)(error),
            })?;
            (target.parent, target.name) = split(&led)?;
        }
        target.check()?;
        target.check_hidden()?;
        Ok(target)
    }

    /// The place, which is not a link.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.parent.join(&self.name)
    }

    /// A name beside the place: `.NAME.SUFFIX`.
    pub(super) fn hidden(&self, suffix: &str) -> OsString {
        let mut hidden = OsString::from(".");
        hidden.push(&self.name);
        hidden.push(".");
        hidden.push(suffix);
        hidden
    }

    /// Whether what is at the place now may be replaced.
    pub(super) fn check(&self) -> Result<()> {
        let path = self.path();
        let Some(kind) = kind(&path)? else { return Ok(()) };
        let is_marked = |marker: &String| path.join(marker).is_file();
        let is_empty = || fs::read_dir(&path).map(|mut entries| entries.next().is_none()).map_err(Error::io(&path));
        if !kind.is_dir() || !(self.replaces.as_ref().is_some_and(is_marked) || is_empty()?) {
            let marked = self.replaces.as_ref().map(|marker| format!(", or one with {marker}")).unwrap_or_default();
            return Err(Error::Output(format!(
                "expected a new folder{marked} to write to, found something else at {}",
                path.display()
            )));
        }
        let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev()).map_err(Error::io(path));
        if device(&path)? != device(&self.parent)? {
            let found = path.display();
            return Err(Error::Output(format!(
                "expected a folder that can be renamed, found a mount point at {found}"
            )));
        }
        Ok(())
    }

    /// Whether what a writer puts beside the place can be there.
    fn check_hidden(&self) -> Result<()> {
        for (suffix, wanted) in [(super::INCOMPLETE, "folder"), (super::REPLACED, "folder"), (super::LOCK, "file")] {
            let path = self.parent.join(self.hidden(suffix));
            let fits = |kind: fs::FileType| if wanted == "file" { kind.is_file() } else { kind.is_dir() };
            if kind(&path)?.is_some_and(|kind| !fits(kind)) {
                return Err(Error::Output(format!(
                    "expected a {wanted} or nothing at {}, where the unfinished work is kept, found something else",
                    path.display()
                )));
            }
        }
        Ok(())
    }
}

/// What is at a path, which may be a link; `None` where there is nothing.
fn kind(path: &Path) -> Result<Option<fs::FileType>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata.file_type())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path)(error)),
    }
}

/// The parent of a path, and its name there.
fn split(path: &Path) -> Result<(PathBuf, OsString)> {
    let name = path.file_name().map(OsStr::to_owned).ok_or_else(|| {
        Error::Output(format!("expected a folder to write to, by its name, found {}", path.display()))
    })?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((parent.to_owned(), name))
}
