//! Reading tensors out of a file into memory: large reads, several at a time, each hashed by the thread that has just
//! read it, while the bytes are in the processor's cache.
//!
//! ```text
//! tensors   |a |b|        c         |d|e |
//! pieces    |a |b|   c   |   c   | c|d|e |    of a large tensor: subtrees of its hash
//! reads     |a  b|   c   |   c   | c d e |    neighbours share a read of at most a piece's size
//! ```

mod fill;
mod plan;
mod source;
mod stamp;
#[cfg(test)]
mod tests;
mod threads;

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use super::checksum::{Checksum, PIECE_BYTES, PieceHash};
use crate::error::{Error, Result};

pub(crate) use self::fill::DIRECT_ALIGNMENT;
use self::fill::{Scratch, fill};
use self::plan::{Job, Piece, plan};
pub(crate) use self::source::{FileSource, Source};
pub(crate) use self::stamp::Stamp;

/// Makes the bytes of a tensor in the order of an older format version those of today's.
pub(crate) type Convert<'a> = Box<dyn Fn(Vec<u8>) -> Vec<u8> + Sync + 'a>;

/// A tensor to be read.
pub(crate) struct Item<'a> {
    /// Where it lies in the file.
    pub(crate) extent: Range<u64>,
    /// Where it goes in memory: as many bytes, unless they are converted.
    pub(crate) place: Range<usize>,
    /// Where its bytes do not go there as they are.
    pub(crate) convert: Option<Convert<'a>>,
}

/// How tensors are read.
pub(crate) struct Loader<'a> {
    pub(crate) source: &'a dyn Source,
    /// The file, for messages.
    pub(crate) path: &'a Path,
    /// Whether checksums are wanted.
    pub(crate) hashed: bool,
    /// Whether it leaves the processors to threads that have work meanwhile, not where these wait for it.
    pub(crate) yields: bool,
    /// Ends the load when it is set.
    pub(crate) stop: &'a AtomicBool,
}

impl Loader<'_> {
    /// Reads tensors into memory, where they come in the same order as in the file. Returns their checksums in that
    /// order; none unless they are wanted. Memory between tensors may get what lies between them in the file.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Checksum`] where the file has become too short: of several, the first in the file.
    /// [`Error::Interrupted`] where it was stopped before all was read.
    pub(crate) fn load(&self, items: &[Item<'_>], memory: &mut [u8]) -> Result<Vec<Checksum>> {
        let mut jobs = plan(items, memory);
        threads::run(&mut jobs, self.yields, &|job, scratch| self.run(job, scratch))?;
        if !self.hashed {
            return Ok(Vec::new());
        }
        let mut hashes = vec![Vec::new(); items.len()];
        for piece in jobs.iter().flat_map(|job| &job.pieces) {
            hashes[piece.item].extend(piece.hash);
        }
        Ok(hashes.iter().map(|pieces| PieceHash::join(pieces)).collect())
    }

    fn run(&self, job: &mut Job<'_>, scratch: &mut Scratch) -> Result<()> {
        let Some(convert) = job.convert else {
            self.fill(job.out, job.extent.start, scratch)?;
            self.hash(&mut job.pieces, job.out);
            return Ok(());
        };
        let mut bytes = vec![0; (job.extent.end - job.extent.start) as usize];
        for (piece, start) in bytes.chunks_mut(PIECE_BYTES).zip(job.extent.clone().step_by(PIECE_BYTES)) {
            self.fill(piece, start, scratch)?;
        }
        self.hash(&mut job.pieces, &bytes);
        job.out.copy_from_slice(&convert(bytes));
        Ok(())
    }

    fn hash(&self, pieces: &mut [Piece], bytes: &[u8]) {
        for piece in pieces.iter_mut().filter(|_| self.hashed) {
            piece.hash = Some(PieceHash::new(&bytes[piece.range.clone()], piece.offset, piece.of));
        }
    }

    fn fill(&self, out: &mut [u8], start: u64, scratch: &mut Scratch) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        fill(self.source, out, start, scratch).map_err(|error: io::Error| match error.kind() {
            ErrorKind::UnexpectedEof => {
                let (end, path) = (start + out.len() as u64, self.path.display());
                Error::Checksum(format!("expected at least {end} bytes of {path}, found fewer"))
            }
            _ => Error::io(self.path)(error),
        })
    }
}
