//! What can go wrong, one variant per cause.

use std::io;
use std::path::{Path, PathBuf};

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure. Messages say what was expected, then what was found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A delta directory that is not one: a missing or malformed file, tensor or field.
    #[error("{0}")]
    Format(String),
    /// Bytes that are not the bytes that were written.
    #[error("{0}")]
    Checksum(String),
    /// A folder that is not a whole Hugging Face checkpoint.
    #[error("{0}")]
    Checkpoint(String),
    /// A fine-tune whose parameters do not match the base's.
    #[error("{0}")]
    Architecture(String),
    /// A delta made against another base.
    #[error("{0}")]
    BaseMismatch(String),
    /// A NaN or an infinity in a weight.
    #[error("{0}")]
    NonFinite(String),
    /// An instruction set that is unknown or not there.
    #[error("{0}")]
    Backend(String),
    /// An argument outside its range.
    #[error("{0}")]
    Argument(String),
    /// The caller asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// The operating system said no.
    #[error("{path}: {source}")]
    Io {
        /// The file or folder at which it happened.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

impl Error {
    /// Binds the path to an I/O error.
    pub fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}
