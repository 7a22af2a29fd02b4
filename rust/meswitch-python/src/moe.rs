//! MoE experts of a checkpoint in memory, under a byte budget.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use meswitch_core::moe::{self, Extent, Slot, Store};
use meswitch_core::residency::{Lease, Unit};
use pyo3::exceptions::{PyBaseException, PyValueError};
use pyo3::prelude::*;

use crate::errors::to_python;
use crate::{dlpack, enter};

/// Matrices of MoE experts that are read from files when they are visited, or kept. One is named by the number that
/// `add` or `keep` returned.
#[pyclass(frozen)]
pub struct MoeStore {
    inner: RwLock<Option<Arc<Store>>>,
    /// Threads do not survive a fork: a child leaves what it inherited alone.
    process: u32,
}

#[pymethods]
impl MoeStore {
    #[new]
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn new(py: Python<'_>, budget: u64, files: Vec<PathBuf>) -> PyResult<Self> {
        let store = enter(py, || Store::open(budget, &files))?;
        Ok(Self { inner: RwLock::new(Some(Arc::new(store))), process: std::process::id() })
    }

    /// Adds a matrix, of extents: each a file's position, a first byte, a number of bytes. A trace calls it by `name`.
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn add(&self, name: &str, extents: Vec<(usize, u64, usize)>) -> PyResult<u64> {
        self.get()?.add(name, &extents_of(&extents)).map(Unit::to_bits).map_err(to_python)
    }

    /// The memory that a matrix takes.
    #[staticmethod]
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn bytes_of(extents: Vec<(usize, u64, usize)>) -> u64 {
        Store::bytes_of(&extents_of(&extents))
    }

    /// Begins a visit of matrices in turns, each of which must be named once.
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn visit(&self, turns: Vec<Vec<u64>>) -> PyResult<Visit> {
        let units = |turn: Vec<u64>| turn.into_iter().map(Unit::from_bits).collect();
        let visit = self.get()?.visit(turns.into_iter().map(units).collect()).map_err(to_python)?;
        Ok(Visit { hits: visit.hits(), inner: Mutex::new(Some(visit)) })
    }

    /// Reads a matrix in the background, of extents as in `add`, and keeps it until it is given up.
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn keep(&self, extents: Vec<(usize, u64, usize)>) -> PyResult<u64> {
        self.get()?.keep(&extents_of(&extents)).map(Unit::to_bits).map_err(to_python)
    }

    /// Ends that matrices are kept. Their memory is used again once no tensor is over it.
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn give_up(&self, units: Vec<u64>) -> PyResult<()> {
        let store = self.get()?;
        units.into_iter().for_each(|unit| store.give_up(Unit::from_bits(unit)));
        Ok(())
    }

    /// The kept matrices that are in memory since the last call, or why one will not be. With `wait`, waits until
    /// something has happened: for ever, where nothing is being read.
    fn arrived(&self, py: Python<'_>, wait: bool) -> PyResult<Vec<Arrival>> {
        let store = self.get()?;
        let arrived = enter(py, || Ok(store.arrived(wait)))?;
        let of = |(unit, lease): (Unit, meswitch_core::Result<Lease<Arc<Slot>>>)| match lease {
            Ok(lease) => (unit.to_bits(), Some(MoeMatrix(Mutex::new(Some(lease)))), None),
            Err(error) => (unit.to_bits(), None, Some(to_python(error).into_value(py))),
        };
        Ok(arrived.into_iter().map(of).collect())
    }

    /// Writes a trace to a file from now on.
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn start_trace(&self, path: PathBuf) -> PyResult<()> {
        self.get()?.start_trace(&path).map_err(to_python)
    }

    /// The error that has ended the trace, once.
    fn take_trace_error(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let error = self.get()?.take_trace_error();
        Ok(error.map(|error| to_python(error).into_value(py).into_any()))
    }

    /// Whether each of some matrices is in memory now.
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn has(&self, units: Vec<u64>) -> PyResult<Vec<bool>> {
        let store = self.get()?;
        Ok(units.into_iter().map(|unit| store.has(Unit::from_bits(unit))).collect())
    }

    /// Counts since the start, and bytes.
    fn counters(&self) -> PyResult<BTreeMap<&'static str, Option<u64>>> {
        let store = self.get()?;
        let (snapshot, allocated) = (store.snapshot(), store.allocated());
        let counters = snapshot.counters;
        Ok(BTreeMap::from([
            ("budget", snapshot.budget),
            ("bytes", Some(snapshot.used)),
            ("allocated_bytes", Some(allocated)),
            ("hits", Some(counters.hits)),
            ("misses", Some(counters.misses)),
            ("loads", Some(counters.loads)),
            ("failed_loads", Some(counters.failed)),
            ("evictions", Some(counters.evictions)),
            ("loaded_bytes", Some(counters.bytes_loaded)),
        ]))
    }

    /// Frees what nobody else uses. Every later call is a `ValueError`.
    fn close(&self, py: Python<'_>) {
        let inner = self.inner.write().unwrap_or_else(PoisonError::into_inner).take();
        if self.process == std::process::id() {
            py.detach(|| drop(inner)); // waits for threads
        } else {
            std::mem::forget(inner);
        }
    }
}

/// A kept matrix, or the error for which there is none.
type Arrival = (u64, Option<MoeMatrix>, Option<Py<PyBaseException>>);

fn extents_of(given: &[(usize, u64, usize)]) -> Vec<Extent> {
    given.iter().map(|(file, start, bytes)| Extent { file: *file, start: *start, bytes: *bytes }).collect()
}

impl MoeStore {
    fn get(&self) -> PyResult<Arc<Store>> {
        let inner = self.inner.read().unwrap_or_else(PoisonError::into_inner);
        inner.clone().ok_or_else(|| PyValueError::new_err("expected an open store, found a closed one"))
    }
}

impl Drop for MoeStore {
    fn drop(&mut self) {
        Python::attach(|py| self.close(py));
    }
}

/// Matrices that are visited.
#[pyclass(frozen)]
pub struct Visit {
    /// How many of them were in memory when the visit began.
    #[pyo3(get)]
    hits: usize,
    inner: Mutex<Option<moe::Visit>>,
}

#[pymethods]
impl Visit {
    /// The next one, by its position in its turn, once it is in memory; `None` after the last of a turn. The one before
    /// must have been released, and its tensor dropped.
    fn next(&self, py: Python<'_>) -> PyResult<Option<(usize, MoeMatrix)>> {
        let next = enter(py, || {
            let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
            inner.as_mut().and_then(moe::Visit::next).transpose()
        })?;
        Ok(next.map(|(position, lease)| (position, MoeMatrix(Mutex::new(Some(lease))))))
    }

    /// Ends the visit: what is still missing is not waited for any more.
    fn close(&self, py: Python<'_>) {
        py.detach(|| drop(self.inner.lock().unwrap_or_else(PoisonError::into_inner).take()));
    }
}

/// A matrix that stays in memory until it is released.
#[pyclass(frozen)]
pub struct MoeMatrix(Mutex<Option<Lease<Arc<Slot>>>>);

#[pymethods]
impl MoeMatrix {
    /// Its bytes as a DLPack capsule; they must not be written to.
    fn dlpack<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let lease = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = lease.as_deref().ok_or_else(|| PyValueError::new_err("expected a lease, found it released"))?;
        dlpack::capsule(py, slot.clone())
    }

    /// Ends the lease.
    fn release(&self) {
        drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}
