//! What a ledger knows of one unit.

use super::{LAST, Rank};

/// Where a unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Not in memory.
    Absent,
    /// Its bytes are reserved, and it is being read, or will be.
    Loading,
    /// In memory.
    Resident,
    /// No longer to be used. Its bytes stay reserved until its memory is given back.
    Leaving,
}

/// One unit.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) generation: u32,
    pub(super) bytes: u64,
    pub(super) place: Place,
    /// Whether a thread has taken up its load.
    pub(super) started: bool,
    /// How many forbid that it is evicted.
    pub(super) pins: u32,
    /// Of the first request that waits for it.
    pub(super) rank: Option<Rank>,
    /// Its turn among the hints, where it is to be loaded before any request waits for it.
    pub(super) hint: Option<u64>,
    pub(super) retired: bool,
    /// False once it is forgotten.
    pub(super) known: bool,
}

impl Entry {
    /// An absent unit that nobody has asked for.
    pub(super) fn new(generation: u32, bytes: u64) -> Self {
        Self {
            generation,
            bytes,
            place: Place::Absent,
            started: false,
            pins: 0,
            rank: None,
            hint: None,
            retired: false,
            known: true,
        }
    }

    /// Whether it may leave: it is loading or resident, and not pinned.
    fn may_leave(&self) -> bool {
        matches!(self.place, Place::Loading | Place::Resident) && self.pins == 0
    }

    /// Whether it has to leave.
    pub(super) fn is_departing(&self) -> bool {
        self.retired && self.may_leave()
    }

    /// Whether it is resident, and nobody uses it or waits for it.
    pub(super) fn is_idle(&self) -> bool {
        self.place == Place::Resident && self.may_leave() && self.rank.is_none() && !self.retired
    }

    /// The rank of the requests after which it gives way to others; [`LAST`] for a load that none waits for. `None`
    /// where it does not give way by rank: it is pinned, idle, not in memory, or leaves anyway.
    pub(super) fn yields_at(&self) -> Option<Rank> {
        (self.may_leave() && !self.retired && !self.is_idle()).then(|| self.rank.unwrap_or(LAST))
    }

    /// Whether its load waits for a thread.
    pub(super) fn is_queued(&self) -> bool {
        self.place == Place::Loading && !self.started
    }

    /// The rank at which it waits for room.
    pub(super) fn demanded_at(&self) -> Option<Rank> {
        self.rank.filter(|_| self.place == Place::Absent && !self.retired)
    }

    /// Its turn among the hints that wait for room.
    pub(super) fn hinted_at(&self) -> Option<u64> {
        self.hint.filter(|_| self.place == Place::Absent && !self.retired)
    }
}
