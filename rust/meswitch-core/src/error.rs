//! Errors, one variant per cause.

use std::io;
use std::path::{Path, PathBuf};

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error. Messages say what was expected, then what was found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A malformed delta directory: a file, tensor or field is missing or wrong.
    #[error("{0}")]
    Format(String),
    /// Bytes that differ from those that were written.
    #[error("{0}")]
    Checksum(String),
    /// An incomplete or damaged Hugging Face checkpoint.
    #[error("{0}")]
    Checkpoint(String),
    /// A fine-tune whose parameters do not match the base's.
    #[error("{0}")]
    Architecture(String),
    /// A delta made against another base.
    #[error("{0}")]
    BaseMismatch(String),
    /// A delta made against the base that a quantized model was made of.
    #[error("{0}")]
    QuantizedBase(String),
    /// A NaN or an infinity in a weight.
    #[error("{0}")]
    NonFinite(String),
    /// An instruction set that is unknown or not available.
    #[error("{0}")]
    Backend(String),
    /// An argument outside its range.
    #[error("{0}")]
    Argument(String),
    /// A data file that is not what it should be.
    #[error("{0}")]
    Data(String),
    /// A place where nothing can be written: something else is there, or another writer is at it.
    #[error("{0}")]
    Output(String),
    /// A unit that is larger than the budget of memory.
    #[error("expected at most {budget} bytes, which is the budget, found a unit of {bytes}")]
    Budget {
        /// The memory that the unit takes.
        bytes: u64,
        /// The most that may be taken.
        budget: u64,
    },
    /// A bug: work on another thread panicked.
    #[error("a panic: {0}")]
    Panic(String),
    /// The caller's callback asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// The operating system reported an error.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

impl Error {
    /// Adds a path to an I/O error; for `map_err`.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}
