//! Deltas in memory, under a byte budget.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use meswitch_core::delta::{self, Tensors as CoreTensors};
use meswitch_core::residency::{self, Event, Place, Room, Source, Unit, policy};
use meswitch_core::{Error, Result};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::delta::{Delta, Tensors};
use crate::errors::to_python;

/// Tensors whose memory keeps its room, however long torch uses it; none of what only takes room.
type Shared = Option<Arc<CoreTensors>>;

/// The tensors of a delta directory, or of one of its sites.
struct DeltaSource {
    name: String,
    delta: Arc<delta::Delta>,
    site: Option<String>,
    bytes: u64,
}

impl Source<Shared> for DeltaSource {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn load(&self, room: Room, stop: &AtomicBool) -> Result<Shared> {
        let loaded = match &self.site {
            Some(site) => self.delta.load_site(site, Some(Box::new(room)), stop),
            None => self.delta.load(Some(Box::new(room)), stop),
        };
        loaded.map(|tensors| Some(Arc::new(tensors)))
    }
}

/// Room for what the caller keeps elsewhere.
struct Reserved {
    name: String,
    bytes: u64,
}

impl Source<Shared> for Reserved {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn load(&self, _room: Room, _stop: &AtomicBool) -> Result<Shared> {
        Ok(None)
    }
}

/// What happened, to which delta, after how many seconds of loading, and why it failed.
type Happened = (&'static str, u64, f64, Option<Py<PyAny>>);

/// Deltas that are loaded in the background, under a byte budget. A delta is named by the number that `add` returned.
#[pyclass(frozen)]
pub struct Residency {
    inner: RwLock<Option<residency::Residency<Shared>>>,
    policy: String,
    /// Threads do not survive a fork: a child leaves what it inherited alone.
    process: u32,
}

#[pymethods]
impl Residency {
    /// `notify` is called without arguments, on a thread of the residency's, when there are events to take.
    #[new]
    fn new(budget: Option<u64>, policy: String, notify: Py<PyAny>) -> PyResult<Self> {
        let notify = move || {
            Python::attach(|py| {
                if let Err(error) = notify.call0(py) {
                    error.write_unraisable(py, None);
                }
            });
        };
        let evicting = policy::by_name(&policy).map_err(to_python)?;
        let inner = residency::Residency::new(budget, evicting, notify);
        Ok(Self { inner: RwLock::new(Some(inner)), policy, process: std::process::id() })
    }

    /// Adds a delta, or one site of it; nothing is loaded yet. A trace calls it by `name`.
    #[pyo3(signature = (name, delta, site=None))]
    fn add(&self, name: String, delta: &Delta, site: Option<String>) -> PyResult<u64> {
        let bytes = site.as_deref().map_or_else(|| delta.0.memory_bytes(), |site| delta.0.site_memory_bytes(site));
        let source = DeltaSource { name, delta: delta.0.clone(), site, bytes: bytes.map_err(to_python)? as u64 };
        self.with(|residency| residency.add(Arc::new(source)).map(Unit::to_bits).map_err(to_python))?
    }

    /// Adds something that takes so many bytes of the budget and is kept by the caller: "loaded" says that there is room
    /// for it, "evicted" that it must go.
    fn reserve(&self, name: String, bytes: u64) -> PyResult<u64> {
        let source = Arc::new(Reserved { name, bytes });
        self.with(|residency| residency.add(source).map(Unit::to_bits).map_err(to_python))?
    }

    /// Counts a request for a delta, and says whether it is resident.
    fn ask(&self, unit: u64) -> PyResult<bool> {
        self.with(|residency| residency.ask(Unit::from_bits(unit)))
    }

    /// Says that requests wait for a delta, the first of them with that rank; `None` where none waits any more.
    #[pyo3(signature = (unit, rank))]
    fn want(&self, unit: u64, rank: Option<u64>) -> PyResult<()> {
        self.with(|residency| residency.want(Unit::from_bits(unit), rank))
    }

    /// Loads a delta where there is room for it.
    fn prefetch(&self, unit: u64) -> PyResult<()> {
        self.with(|residency| residency.prefetch(Unit::from_bits(unit)))
    }

    /// A lease of a resident delta; `None` where it is not resident.
    fn pin(&self, unit: u64) -> PyResult<Option<Lease>> {
        self.with(|residency| residency.pin(Unit::from_bits(unit)).map(Lease::new))
    }

    /// Forgets a delta as soon as its last lease ends.
    fn retire(&self, unit: u64) -> PyResult<()> {
        self.with(|residency| residency.retire(Unit::from_bits(unit)))
    }

    /// Changes the budget; what is pinned leaves when its lease ends.
    #[pyo3(signature = (budget))]
    fn set_budget(&self, budget: Option<u64>) -> PyResult<()> {
        self.with(|residency| residency.set_budget(budget))
    }

    /// Writes a trace to a file from now on.
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn start_trace(&self, path: PathBuf) -> PyResult<()> {
        self.with(|residency| residency.start_trace(&path, &self.policy).map_err(to_python))?
    }

    /// The error that has ended the trace, once.
    fn take_trace_error(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let error = self.with(residency::Residency::take_trace_error)?;
        Ok(error.map(|error| to_exception(py, error)))
    }

    /// Where a delta is: "disk", "loading", "host" or "leaving"; `None` where it is forgotten.
    fn place(&self, unit: u64) -> PyResult<Option<&'static str>> {
        let place = self.with(|residency| residency.place(Unit::from_bits(unit)))?;
        Ok(place.map(|place| match place {
            Place::Absent => "disk",
            Place::Loading => "loading",
            Place::Resident => "host",
            Place::Leaving => "leaving",
        }))
    }

    /// What has happened since the last call.
    fn take_events(&self, py: Python<'_>) -> PyResult<Vec<Happened>> {
        let events = self.with(residency::Residency::take_events)?;
        let happened = events.into_iter().map(|event| match event {
            Event::Loaded(unit, seconds) => ("loaded", unit.to_bits(), seconds, None),
            Event::Failed(unit, error) => ("failed", unit.to_bits(), 0.0, Some(to_exception(py, error))),
            Event::Evicted(unit) => ("evicted", unit.to_bits(), 0.0, None),
        });
        Ok(happened.collect())
    }

    /// Counts since the start, and bytes.
    fn counters(&self) -> PyResult<BTreeMap<&'static str, Option<u64>>> {
        let snapshot = self.with(residency::Residency::snapshot)?;
        let counters = snapshot.counters;
        Ok(BTreeMap::from([
            ("budget", snapshot.budget),
            ("bytes", Some(snapshot.used)),
            ("pinned_bytes", Some(snapshot.pinned)),
            ("hits", Some(counters.hits)),
            ("misses", Some(counters.misses)),
            ("loads", Some(counters.loads)),
            ("failed_loads", Some(counters.failed)),
            ("stopped_loads", Some(counters.stopped)),
            ("evictions", Some(counters.evictions)),
            ("loaded_bytes", Some(counters.bytes_loaded)),
        ]))
    }

    /// Stops loads and frees what nobody else uses. Every later call is a `ValueError`.
    fn close(&self, py: Python<'_>) {
        let inner = self.inner.write().unwrap_or_else(PoisonError::into_inner).take();
        if self.process == std::process::id() {
            py.detach(|| drop(inner)); // waits for threads, which may wait for Python
        } else {
            std::mem::forget(inner);
        }
    }
}

impl Residency {
    fn read(&self) -> RwLockReadGuard<'_, Option<residency::Residency<Shared>>> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, call: impl FnOnce(&residency::Residency<Shared>) -> T) -> PyResult<T> {
        self.read()
            .as_ref()
            .map(call)
            .ok_or_else(|| PyValueError::new_err("expected an open residency, found a closed one"))
    }
}

impl Drop for Residency {
    fn drop(&mut self) {
        Python::attach(|py| self.close(py));
    }
}

fn to_exception(py: Python<'_>, error: Error) -> Py<PyAny> {
    to_python(error).into_value(py).into_any()
}

/// A resident delta that is not evicted until the lease is released.
#[pyclass(frozen)]
pub struct Lease(Mutex<Option<residency::Lease<Shared>>>);

impl Lease {
    fn new(lease: residency::Lease<Shared>) -> Self {
        Self(Mutex::new(Some(lease)))
    }
}

#[pymethods]
impl Lease {
    /// The delta's tensors; `None` once the lease is released, and of what was reserved.
    fn tensors(&self) -> Option<Tensors> {
        let lease = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lease.as_ref().and_then(|lease| Shared::clone(lease)).map(Tensors)
    }

    /// Ends the lease.
    fn release(&self) {
        let lease = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(lease);
    }
}
