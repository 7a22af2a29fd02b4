//! The Python module `meswitch._native`: checks arguments, calls the core, turns its errors into Python's.

mod compress;
mod cuda;
mod delta;
mod dlpack;
mod errors;
mod folder;
mod matrix;
mod moe;
mod replay;
mod residency;
mod table;
mod tensor;

use std::panic::{AssertUnwindSafe, catch_unwind};

use meswitch_core::{Error, Result, kernels};
use pyo3::marker::Ungil;
use pyo3::prelude::*;

/// Runs work of the core while other Python threads go on. Its errors become Python's, and a panic a `RuntimeError`.
fn enter<T: Send + Ungil>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send + Ungil) -> PyResult<T> {
    // Unwind safe: whatever the work had borrowed to write is given up with the error.
    match py.detach(|| catch_unwind(AssertUnwindSafe(work))) {
        Ok(outcome) => outcome.map_err(errors::to_python),
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(ToString::to_string);
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            Err(errors::to_python(Error::Panic(text)))
        }
    }
}

/// As `enter`, for work that the core shares out by rayon: in a forked process it runs on threads of its own.
fn enter_pool<T: Send + Ungil>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send + Ungil) -> PyResult<T> {
    enter(py, || kernels::threads::with_rayon_pool(work))
}

/// The Rust half of meswitch.
#[pymodule]
mod _native {
    #[pymodule_export]
    use super::compress::{compress, estimate_bytes, is_shared, probe, row_energies, write};
    #[pymodule_export]
    use super::cuda::{CudaKernels, cuda_slot, cuda_status};
    #[pymodule_export]
    use super::delta::{Checkpoint, Delta, Tensors, checksum};
    #[pymodule_export]
    use super::folder::{Folder, Lock, resolve_target};
    #[pymodule_export]
    use super::matrix::Matrix;
    #[pymodule_export]
    use super::moe::{MoeMatrix, MoeStore, Visit};
    #[pymodule_export]
    use super::replay::{Timeline, Trace, policies};
    #[pymodule_export]
    use super::residency::{Lease, Residency};
    #[pymodule_export]
    use super::table::{Rows, Table, base_linear, base_linear_tokens};

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
    fn kernel_threads() -> (usize, bool) {
        (kernels::threads::thread_count(), kernels::threads::uses_openmp())
    }

    /// The processor features that kernels ask about, and whether each is there.
    #[pyfunction]
    fn cpu_features() -> std::collections::BTreeMap<&'static str, bool> {
        kernels::features().into_iter().collect()
    }
}
