//! The memory of matrices: slots that are used again, since memory that was never touched is slow to read into.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::memory::Region;
use crate::residency::Room;

/// The memory of one matrix. It is used again once nobody has it any more.
pub struct Slot {
    /// Taken when it is dropped.
    region: Option<Region>,
    /// Where the matrix lies.
    place: Range<usize>,
    slots: Arc<Slots>,
    /// Dropped last, when the memory is free.
    _room: Room,
}

impl Slot {
    /// All of the memory.
    pub(super) fn memory(&mut self) -> &mut [u8] {
        self.region.as_deref_mut().unwrap_or_default()
    }
}

impl AsRef<[u8]> for Slot {
    fn as_ref(&self) -> &[u8] {
        self.region.as_deref().map_or(&[], |region| &region[self.place.clone()])
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(region) = self.region.take() {
            self.slots.put(region);
        }
    }
}

/// All slots of a store. Used and free, they never take more memory than the budget.
pub(super) struct Slots {
    budget: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    free: Vec<Region>,
    free_bytes: u64,
    used_bytes: u64,
}

impl Slots {
    pub(super) fn new(budget: u64) -> Self {
        Self { budget, state: Mutex::default() }
    }

    /// A slot of so many bytes, for which there is `room` in the budget.
    ///
    /// # Errors
    /// [`Error::Io`] where the operating system has no memory.
    pub(super) fn take(self: &Arc<Self>, bytes: usize, place: Range<usize>, room: Room) -> Result<Slot> {
        let region = Some(self.region(bytes)?);
        Ok(Slot { region, place, slots: self.clone(), _room: room })
    }

    /// A free region of just that size, or a new one, for which free ones of other sizes go where they must.
    fn region(&self, bytes: usize) -> Result<Region> {
        let mut state = self.lock();
        let found = state.free.iter().rposition(|region| region.len() == bytes);
        if let Some(found) = found {
            state.free_bytes -= bytes as u64;
            state.used_bytes += bytes as u64;
            return Ok(state.free.swap_remove(found));
        }
        while state.used_bytes + state.free_bytes + bytes as u64 > self.budget {
            let Some(region) = state.free.pop() else { break };
            state.free_bytes -= region.len() as u64;
        }
        let region = Region::new(bytes).map_err(|source| Error::Io { path: "memory".into(), source })?;
        // For the slot's whole life: a process that is forked meanwhile must not share pages that a disk writes to.
        region.set_inherited(false);
        state.used_bytes += bytes as u64;
        Ok(region)
    }

    fn put(&self, region: Region) {
        let mut state = self.lock();
        state.used_bytes -= region.len() as u64;
        state.free_bytes += region.len() as u64;
        state.free.push(region);
    }

    pub(super) fn allocated(&self) -> u64 {
        let state = self.lock();
        state.used_bytes + state.free_bytes
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
