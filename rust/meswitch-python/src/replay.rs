//! What traces say: replays, and who was in memory when.

use std::collections::BTreeMap;
use std::path::PathBuf;

use meswitch_core::residency::policy;
use meswitch_core::residency::replay::{self, Report};
use meswitch_core::residency::timeline;
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;

use crate::enter;

/// The requests of a trace.
#[pyclass(frozen)]
pub struct Trace(replay::Trace);

#[pymethods]
impl Trace {
    #[new]
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        enter(py, || replay::Trace::read(&path).map(Self))
    }

    /// How many requests there are.
    #[getter]
    fn requests(&self) -> u64 {
        self.0.requests()
    }

    /// How many experts are asked for.
    #[getter]
    fn experts(&self) -> usize {
        self.0.experts()
    }

    /// The bytes of the largest expert.
    #[getter]
    fn largest(&self) -> u64 {
        self.0.largest()
    }

    /// The bytes of all experts that are there at the same time.
    #[getter]
    fn total(&self) -> u64 {
        self.0.total()
    }

    /// The budget under which the trace was written.
    #[getter]
    fn budget(&self) -> Option<u64> {
        self.0.budget()
    }

    /// The policy under which the trace was written.
    #[getter]
    fn policy(&self) -> &str {
        self.0.policy()
    }

    /// What one of `policies` would have done under a budget.
    fn replay(&self, py: Python<'_>, budget: u64, policy: &str) -> PyResult<Counts> {
        enter(py, || Ok(counts(&self.0.replay(budget, &mut *policy::by_name(policy)?))))
    }

    /// What would have been best under a budget, if the future were known.
    fn optimal(&self, py: Python<'_>, budget: u64) -> PyResult<Counts> {
        enter(py, || Ok(counts(&self.0.optimal(budget))))
    }
}

/// Who was in memory when, as a trace says.
#[pyclass(frozen)]
pub struct Timeline(timeline::Timeline);

#[pymethods]
impl Timeline {
    #[new]
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        enter(py, || timeline::Timeline::read(&path).map(Self))
    }

    /// The time of the last event.
    #[getter]
    fn seconds(&self) -> f64 {
        self.0.seconds()
    }

    /// Of each unit its name, bytes, requests, and those that found it in memory.
    fn units(&self) -> Vec<(String, u64, u64, u64)> {
        let histories = self.0.histories().iter();
        histories.map(|unit| (unit.name.clone(), unit.bytes, unit.requests, unit.hits)).collect()
    }

    /// The share of each of `bins` equal parts of the time for which a unit, by its position among all, was in memory.
    fn residency(&self, unit: usize, bins: usize) -> PyResult<Vec<f64>> {
        let history = self.0.histories().get(unit).ok_or_else(|| PyIndexError::new_err("no such unit"))?;
        Ok(self.0.residency(history, bins))
    }
}

/// The names of all eviction policies, the default first.
#[pyfunction]
pub fn policies() -> Vec<&'static str> {
    policy::NAMES.to_vec()
}

type Counts = BTreeMap<&'static str, u64>;

fn counts(report: &Report) -> Counts {
    let Report { requests, hits, refused, loads, bytes_read, evictions } = *report;
    BTreeMap::from([
        ("requests", requests),
        ("hits", hits),
        ("refused", refused),
        ("loads", loads),
        ("bytes_read", bytes_read),
        ("evictions", evictions),
    ])
}
