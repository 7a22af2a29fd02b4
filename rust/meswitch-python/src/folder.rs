//! Folders that appear complete or not at all.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use meswitch_core::folder;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::enter;

/// Where a folder may be written: the path itself, or where a link there leads. `replaces` names the file that marks a
/// folder which may be replaced.
#[pyfunction]
#[pyo3(signature = (path, replaces))]
#[allow(clippy::needless_pass_by_value)] // what Python hands over
pub fn resolve_target(py: Python<'_>, path: PathBuf, replaces: Option<&str>) -> PyResult<PathBuf> {
    enter(py, || folder::Target::resolve(&path, replaces).map(|target| target.path()))
}

/// The right to write at a place, which one writer at a time has.
#[pyclass(frozen)]
pub struct Lock(Mutex<Option<Arc<folder::Lock>>>);

#[pymethods]
impl Lock {
    #[new]
    #[pyo3(signature = (target, replaces))]
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn new(py: Python<'_>, target: PathBuf, replaces: Option<&str>) -> PyResult<Self> {
        let lock = enter(py, || folder::Lock::take(folder::Target::resolve(&target, replaces)?))?;
        Ok(Self(Mutex::new(Some(lock))))
    }

    /// The place: where a link at `target` leads.
    #[getter]
    fn path(&self) -> PyResult<PathBuf> {
        Ok(self.get()?.path())
    }

    /// Gives the right up.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let lock = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        enter(py, || {
            drop(lock);
            Ok(())
        })
    }
}

impl Lock {
    pub fn get(&self) -> PyResult<Arc<folder::Lock>> {
        let lock = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        lock.ok_or_else(|| PyValueError::new_err("expected an open lock, found it closed"))
    }
}

/// A folder that is being written beside its place, by this writer alone.
#[pyclass(frozen)]
pub struct Folder {
    /// Where files are written.
    #[pyo3(get)]
    path: PathBuf,
    open: Mutex<Option<folder::Folder>>,
}

#[pymethods]
impl Folder {
    #[new]
    #[pyo3(signature = (target, replaces))]
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn new(py: Python<'_>, target: PathBuf, replaces: Option<&str>) -> PyResult<Self> {
        let open =
            enter(py, || folder::Folder::create(folder::Lock::take(folder::Target::resolve(&target, replaces)?)?))?;
        Ok(Self { path: open.path().to_owned(), open: Mutex::new(Some(open)) })
    }

    /// Flushes the folder's files to disk and gives it its name, in place of what is there.
    fn commit(&self, py: Python<'_>) -> PyResult<()> {
        let open = self.take().ok_or_else(|| PyValueError::new_err("expected an open folder, found it closed"))?;
        enter(py, || open.commit().map(drop))
    }

    /// Removes what was written, unless it was committed.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        let open = self.take();
        enter(py, || {
            drop(open);
            Ok(())
        })
    }
}

impl Folder {
    fn take(&self) -> Option<folder::Folder> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
