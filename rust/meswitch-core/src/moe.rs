//! MoE experts of a checkpoint in memory, under a byte budget: read from the checkpoint's own files when a gate has
//! chosen them.
//!
//! ```text
//! files      | … down | gate | up | …   … | down | gate | up |       extents, which need not be neighbours
//! slots        |  down  |    |  gate  up  |                            one matrix of one MoE expert each
//! ```
//!
//! A unit of the residency is one matrix of one MoE expert of one layer; its value is a [`Slot`]. A step *visits* the
//! matrices that its tokens need ([`Store::visit`]), in turns, one for each product: of a turn those in memory first, the
//! others in the order in which they are read, so that reads and the caller's arithmetic overlap. Where fewer fit the
//! budget than are visited, those that were visited make room for those that were not, and each is still read once at
//! most.
//!
//! A matrix may be *kept* instead ([`Store::keep`]): it is read in the background, nobody waits for it, and it stays until
//! it is given up. That is for who chooses what is in memory by themselves. A store is either visited or keeps: what a
//! visit takes notice of, it takes from [`Store::arrived`].
//!
//! # Files
//! They stay open, so files that are removed or replaced meanwhile do no harm. One that is written to is found by its
//! size and time of writing, before and after each read: whoever needs bytes of it gets [`Error::Checkpoint`].
//!
//! # Threads
//! A store may be used from any thread; one visit at a time.

mod file;
mod slots;
#[cfg(test)]
mod tests;
mod visit;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use self::file::WeightFile;
pub use self::slots::Slot;
use self::slots::Slots;
pub use self::visit::Visit;
use crate::delta::load::{DIRECT_ALIGNMENT, Item};
use crate::error::{Error, Result};
use crate::memory::Region;
use crate::residency::policy::Lru;
use crate::residency::{Event, Lease, Place, Residency, Room, Snapshot, Source, Unit};

/// Loads at a time, each by several threads: a disk wants about sixteen reads of a megabyte under way.
const LOADS: usize = 4;

/// Matrices start at multiples of this, which is enough for every dtype.
const MATRIX_ALIGNMENT: usize = 8;

/// A run of bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The file, by its position among those of the store.
    pub file: usize,
    /// Its first byte in the file.
    pub start: u64,
    /// How many there are.
    pub bytes: usize,
}

/// The matrices of a model's MoE experts. See the [module](self).
pub struct Store {
    residency: Residency<Arc<Slot>>,
    files: Vec<Arc<WeightFile>>,
    slots: Arc<Slots>,
    visited: AtomicBool,
}

impl Store {
    /// Opens files; nothing is read yet. At most `budget` bytes are ever in memory, those of free slots included.
    ///
    /// # Errors
    /// [`Error::Io`] where a file cannot be opened.
    pub fn open(budget: u64, paths: &[PathBuf]) -> Result<Self> {
        let files: Result<_> = paths.iter().map(|path| WeightFile::open(path).map(Arc::new)).collect();
        Ok(Self {
            residency: Residency::with_loads(LOADS, Some(budget), Box::<Lru>::default(), || {}),
            files: files?,
            slots: Arc::new(Slots::new(budget)),
            visited: AtomicBool::new(false),
        })
    }

    /// A new matrix: what its extents hold, one after another. A trace calls it by `name`.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for an extent beyond its file; [`Error::Budget`] for a matrix that is larger than the
    /// budget.
    pub fn add(&self, name: &str, extents: &[Extent]) -> Result<Unit> {
        for extent in extents {
            let file = self.files.get(extent.file).ok_or_else(|| {
                Error::Argument(format!("expected one of {} files, found number {}", self.files.len(), extent.file))
            })?;
            file.check_extent(extent)?;
        }
        let (place, bytes) = place_of(extents);
        let (name, extents) = (name.to_owned(), extents.to_vec());
        let (files, slots) = (self.files.clone(), self.slots.clone());
        self.residency.add(Arc::new(Matrix { name, extents, place, bytes, files, slots }))
    }

    /// The memory that the slot of a matrix takes: the same for all of one size.
    #[must_use]
    pub fn bytes_of(extents: &[Extent]) -> u64 {
        place_of(extents).1 as u64
    }

    /// Begins a visit of matrices, in turns, and counts each as asked for. Those that are in memory stay until they were
    /// visited, unless an earlier one needs the room; the others are being read from now on, in that order.
    ///
    /// # Errors
    /// [`Error::Argument`] during another visit.
    pub fn visit(self: &Arc<Self>, turns: Vec<Vec<Unit>>) -> Result<Visit> {
        if self.visited.swap(true, Ordering::Acquire) {
            return Err(Error::Argument("expected one visit of MoE experts at a time, found another".to_owned()));
        }
        Ok(Visit::new(self.clone(), turns))
    }

    /// Reads a new matrix in the background as soon as there is room for it, and keeps it until [`Store::give_up`];
    /// [`Store::arrived`] says when it is there.
    ///
    /// # Errors
    /// Those of [`Store::add`].
    pub fn keep(&self, extents: &[Extent]) -> Result<Unit> {
        let unit = self.add("", extents)?; // traces are of visits
        self.residency.want(unit, Some(0));
        Ok(unit)
    }

    /// Ends that a matrix is kept, or being read. Its memory is given back once nobody has it any more, and only then
    /// used again.
    pub fn give_up(&self, unit: Unit) {
        self.residency.retire(unit);
    }

    /// The kept matrices that are in memory since the last call, or the errors of those that will not be. With `wait`,
    /// waits until something has happened: for ever, where nothing is being read.
    #[must_use]
    pub fn arrived(&self, wait: bool) -> Vec<(Unit, Result<Lease<Arc<Slot>>>)> {
        let events = if wait { self.residency.wait_for_events() } else { self.residency.take_events() };
        let arrived = |event| match event {
            Event::Loaded(unit, _) => Some((unit, Ok(self.residency.pin(unit)?))), // unless it was given up since
            Event::Failed(unit, error) => Some((unit, Err(error))),
            Event::Evicted(_) => None,
        };
        events.into_iter().filter_map(arrived).collect()
    }

    /// [`Residency::start_trace`]. Each matrix of a visit is a request.
    ///
    /// # Errors
    /// [`Error::Io`] where there can be no such file.
    pub fn start_trace(&self, path: &Path) -> Result<()> {
        self.residency.start_trace(path, "lru")
    }

    /// The error that has ended the trace, once.
    #[must_use]
    pub fn take_trace_error(&self) -> Option<Error> {
        self.residency.take_trace_error()
    }

    /// Whether a matrix is in memory now.
    #[must_use]
    pub fn has(&self, unit: Unit) -> bool {
        self.residency.place(unit) == Some(Place::Resident)
    }

    /// The state of the budget, and what has happened since the start.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.residency.snapshot()
    }

    /// The memory of all slots, used and free.
    #[must_use]
    pub fn allocated(&self) -> u64 {
        self.slots.allocated()
    }
}

/// Where a matrix goes in its slot, and the bytes of the slot. It is as far into a page as in its file, so that it can be
/// read past the page cache.
fn place_of(extents: &[Extent]) -> (Range<usize>, usize) {
    let first = extents.first().map_or(0, |extent| extent.start as usize % DIRECT_ALIGNMENT);
    let start = first.next_multiple_of(MATRIX_ALIGNMENT);
    let size: usize = extents.iter().map(|extent| extent.bytes).sum();
    (start..start + size, Region::size_of(DIRECT_ALIGNMENT, size))
}

/// What a matrix is read from.
struct Matrix {
    name: String,
    extents: Vec<Extent>,
    place: Range<usize>,
    bytes: usize,
    files: Vec<Arc<WeightFile>>,
    slots: Arc<Slots>,
}

impl Source<Arc<Slot>> for Matrix {
    fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn load(&self, room: Room, stop: &AtomicBool) -> Result<Arc<Slot>> {
        let mut slot = self.slots.take(self.bytes, self.place.clone(), room)?;
        let mut end = self.place.start;
        for extents in self.extents.chunk_by(|one, next| one.file == next.file) {
            let items: Vec<_> = extents
                .iter()
                .map(|extent| {
                    let place = end..end + extent.bytes;
                    end = place.end;
                    Item { extent: extent.start..extent.start + extent.bytes as u64, place, convert: None }
                })
                .collect();
            self.files[extents[0].file].read(&items, slot.memory(), stop)?;
        }
        Ok(Arc::new(slot))
    }
}
