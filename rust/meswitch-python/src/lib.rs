//! The Python module `meswitch._native`: checks arguments, calls the core, turns its errors into Python's.

mod compress;
mod delta;
mod errors;
mod matrix;

use pyo3::prelude::*;

/// The Rust half of meswitch.
#[pymodule]
mod _native {
    #[pymodule_export]
    use super::compress::{compress, energies, probe, same, weigh, write};
    #[pymodule_export]
    use super::delta::{Checkpoint, Delta};
    #[pymodule_export]
    use super::matrix::Matrix;

    use super::*;

    /// The instruction set in use: "scalar", "avx2" or "avx512".
    #[pyfunction]
    fn backend() -> String {
        meswitch_core::kernels::backend().to_string()
    }

    /// How many threads kernels run on, and whether they are torch's own.
    #[pyfunction]
    fn team() -> (usize, bool) {
        (meswitch_core::kernels::team::threads(), meswitch_core::kernels::team::is_shared())
    }

    /// The processor features that kernels ask about, and whether each is there.
    #[pyfunction]
    fn cpu_features() -> std::collections::BTreeMap<&'static str, bool> {
        meswitch_core::kernels::features().into_iter().collect()
    }
}
