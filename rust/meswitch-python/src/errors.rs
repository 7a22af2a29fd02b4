//! The core's errors as Python's.

use meswitch_core::Error;
use pyo3::exceptions::{PyKeyboardInterrupt, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The Python exception of a core error. Those of meswitch live in `meswitch.errors`.
#[allow(clippy::needless_pass_by_value)] // so that it fits `map_err`
pub fn to_python(error: Error) -> PyErr {
    let (class, hint) = match &error {
        Error::Format(_) => ("FormatError", "the directory is not a delta, is damaged, or comes from a newer version"),
        Error::Checksum(_) => ("ChecksumError", "copy the directory again, or compress the fine-tune again"),
        Error::Checkpoint(_) => (
            "CheckpointError",
            "a checkpoint folder holds config.json and model.safetensors, or shards and their index",
        ),
        Error::Architecture(_) => {
            ("ArchitectureError", "a fine-tune has the parameters and shapes of the base it was trained from")
        }
        Error::BaseMismatch(_) => ("BaseMismatchError", "give the base that the fine-tune was compressed against"),
        Error::QuantizedBase(_) => (
            "BaseMismatchError",
            "compress the fine-tune against the quantized base, or allow it (allow_quantized_base=True, \
            --allow-quantized-base); `meswitch evaluate` says what that loses",
        ),
        Error::NonFinite(_) => ("NonFiniteError", "the checkpoint is damaged, or its training diverged"),
        Error::Backend(_) => ("BackendError", "unset MESWITCH_BACKEND: the best that the processor has is then used"),
        Error::Data(_) => {
            ("DataError", "the file is damaged, of another kind, or comes from another version of meswitch")
        }
        Error::Output(_) => {
            ("OutputError", "choose another folder; only an empty one or what meswitch wrote is replaced")
        }
        Error::Budget { .. } => ("BudgetError", "raise the budget, or compress with fewer bits"),
        Error::Panic(message) => return PyRuntimeError::new_err(format!("a bug in meswitch: {message}")),
        Error::Argument(message) => return PyValueError::new_err(message.clone()),
        Error::Interrupted => return PyKeyboardInterrupt::new_err(()),
        Error::Io { path, source } => {
            return match source.raw_os_error() {
                Some(code) => PyOSError::new_err((code, strip(source), path.display().to_string())),
                None => PyOSError::new_err(error.to_string()),
            };
        }
    };
    Python::attach(|py| raise(py, class, &error.to_string(), hint).unwrap_or_else(|failure| failure))
}

/// The Python exception of an error of CUDA.
#[allow(clippy::needless_pass_by_value)] // so that it fits `map_err`
pub fn cuda_to_python(error: meswitch_cuda::Error) -> PyErr {
    use meswitch_cuda::Error;
    let hint = "`meswitch doctor` says which kernels, driver and GPUs there are";
    let class = match &error {
        Error::NoDriver(_) | Error::NoKernels(_) => "CudaUnavailableError",
        Error::Driver { .. } => "BackendError",
        Error::Argument(message) => return PyValueError::new_err(message.clone()),
    };
    Python::attach(|py| raise(py, class, &error.to_string(), hint).unwrap_or_else(|failure| failure))
}

/// "No space left on device", without the code that Rust adds.
fn strip(source: &std::io::Error) -> String {
    let text = source.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

fn raise(py: Python<'_>, class: &str, message: &str, hint: &str) -> PyResult<PyErr> {
    let keywords = PyDict::new(py);
    keywords.set_item("hint", hint)?;
    let class = py.import("meswitch.errors")?.getattr(class)?;
    Ok(PyErr::from_value(class.call((message,), Some(&keywords))?))
}
