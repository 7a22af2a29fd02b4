//! The Python module `meswitch._native`: checks arguments, calls the core, turns its errors into Python's.

mod compress;
mod delta;
mod errors;
mod matrix;

use meswitch_core::kernels;
use pyo3::marker::Ungil;
use pyo3::prelude::*;

/// Runs work that the core shares out by rayon while other Python threads go on, in a forked process too.
fn detached<T: Send + Ungil>(py: Python<'_>, work: impl FnOnce() -> T + Send + Ungil) -> T {
    py.detach(|| kernels::threads::with_rayon_pool(work))
}

/// The Rust half of meswitch.
#[pymodule]
mod _native {
    #[pymodule_export]
    use super::compress::{compress, energies, probe, same, weigh, write};
    #[pymodule_export]
    use super::delta::{Checkpoint, Delta};
    #[pymodule_export]
    use super::matrix::{Matrix, Rows, Table, base_linear, base_linear_tokens, tile};

    use super::*;

    /// Refuses a `MESWITCH_BACKEND` that cannot run here before anything runs on another.
    #[pymodule_init]
    fn init(_module: &Bound<'_, PyModule>) -> PyResult<()> {
        kernels::threads::watch_forks();
        kernels::check().map_err(super::errors::to_python)
    }

    /// The instruction set in use: one of `backends`.
    #[pyfunction]
    fn backend() -> String {
        kernels::backend().to_string()
    }

    /// The instruction sets that run here, the least first; `MESWITCH_BACKEND` may name one.
    #[pyfunction]
    fn backends() -> Vec<String> {
        kernels::available().map(|backend| backend.to_string()).collect()
    }

    /// How many threads kernels run on, and whether they are torch's own.
    #[pyfunction]
    fn team() -> (usize, bool) {
        (kernels::threads::thread_count(), kernels::threads::uses_libgomp())
    }

    /// The processor features that kernels ask about, and whether each is there.
    #[pyfunction]
    fn cpu_features() -> std::collections::BTreeMap<&'static str, bool> {
        kernels::features().into_iter().collect()
    }
}
