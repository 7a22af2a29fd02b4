//! The truth of one residency: which unit is where, how many bytes are reserved, and what is to be done next.
//!
//! One state machine without threads, I/O or clock. Every call that may change what is to be done is followed by
//! [`Ledger::plan`], which says it. A unit is in one of four places:
//!
//! ```text
//!                    plan: there is room             a load ends with a value
//!          ┌─────> absent ───────────────────> loading ───────────────────> resident
//!          │          ^                        │    │                           │
//!          │          └────────────────────────┘    │ plan: stopped, or         │ plan: evicted; never
//!          │          plan: stopped before          │ the load fails            │ while it is pinned
//!          │          a thread took it up           v                           │
//!          └───────────────────────────────────  leaving  <─────────────────────┘
//!                  its memory is given back
//! ```
//!
//! Its bytes are reserved in all places but *absent*: from before its load begins until after its memory is given back.
//! So the memory of all units never exceeds the budget. A retired unit is forgotten when it is absent.

mod entry;
mod plan;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use entry::Entry;
pub use entry::Place;

use super::policy::{Policy, UnitId};

/// The place of a waiting request in the order in which requests are served: the least first.
pub type Rank = u64;

/// A unit of one residency. A number is used again after its unit is forgotten, with another generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Unit {
    pub(super) id: UnitId,
    pub(super) generation: u32,
}

impl Unit {
    /// The unit as a number, for those who cannot keep a `Unit`.
    #[must_use]
    pub fn to_bits(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.id)
    }

    /// The unit that became this number.
    #[must_use]
    pub fn from_bits(bits: u64) -> Self {
        Self { id: bits as UnitId, generation: (bits >> 32) as u32 }
    }
}

/// Something to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Stop a load that a thread has taken up.
    Stop(Unit),
    /// Let go of a resident unit's value.
    Evict(Unit),
    /// Tell those who wait for a unit that it is larger than the budget. None waits any more.
    Refuse(Unit),
    /// Drop everything that is known of a unit: it is none any more.
    Forget(Unit),
}

/// What has happened since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests whose unit was resident when they came.
    pub hits: u64,
    /// Requests whose unit was not.
    pub misses: u64,
    /// Loads that ended with the unit resident.
    pub loads: u64,
    /// Loads that ended with an error.
    pub failed: u64,
    /// Loads that were stopped, or given up before they began: something else needed the room, or the unit was retired.
    pub stopped: u64,
    /// Units that were let go of: something else needed the room, or they were retired.
    pub evictions: u64,
    /// Bytes of units that became resident.
    pub bytes_loaded: u64,
}

/// A rank and a unit that has it: an order without ties.
type Turn = (Rank, UnitId);

/// The rank of what no request waits for. Requests have smaller ones.
const LAST: Rank = Rank::MAX;

/// The sums and sets follow from the entries and are kept up by [`Ledger::update`], so that no call looks at all units.
pub(super) struct Ledger {
    entries: Vec<Entry>,
    /// Numbers of forgotten units.
    free: Vec<UnitId>,
    policy: Box<dyn Policy>,
    budget: Option<u64>,
    counters: Counters,
    /// What is to be done and was not yet said.
    orders: Vec<Order>,
    /// The turn of the next hint.
    next_hint: u64,

    /// Bytes that are reserved.
    used: u64,
    /// Of these, bytes that will be given back without anything more to be done.
    leaving: u64,
    /// Of these, bytes of resident units that nobody uses or waits for.
    idle: u64,
    /// Of these, bytes of pinned units.
    pinned: u64,
    /// Absent units that requests wait for.
    demanded: BTreeSet<Turn>,
    /// Absent units to be loaded where there is room, in the order of the hints.
    hints: BTreeSet<(u64, UnitId)>,
    /// Loads that no thread has taken up, in the order in which they are: those that requests wait for first.
    queued: BTreeSet<Turn>,
    /// What gives way to an earlier request, the last first: units in memory that later ones wait for, and all loads.
    yielding: BTreeSet<Turn>,
    /// Retired units that may leave and have not yet.
    departing: BTreeSet<UnitId>,
}

impl Ledger {
    pub(super) fn new(budget: Option<u64>, policy: Box<dyn Policy>) -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            policy,
            budget,
            counters: Counters::default(),
            orders: Vec::new(),
            next_hint: 0,
            used: 0,
            leaving: 0,
            idle: 0,
            pinned: 0,
            demanded: BTreeSet::new(),
            hints: BTreeSet::new(),
            queued: BTreeSet::new(),
            yielding: BTreeSet::new(),
            departing: BTreeSet::new(),
        }
    }

    // What others ask.

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    pub(super) fn budget(&self) -> Option<u64> {
        self.budget
    }

    /// Bytes of memory that are reserved.
    pub(super) fn used(&self) -> u64 {
        self.used
    }

    /// Bytes of units that are pinned.
    pub(super) fn pinned(&self) -> u64 {
        self.pinned
    }

    /// Where a unit is; `None` where it is none any more.
    pub(super) fn place(&self, unit: Unit) -> Option<Place> {
        self.entry(unit).map(|entry| entry.place)
    }

    pub(super) fn bytes(&self, unit: Unit) -> u64 {
        self.entry(unit).map_or(0, |entry| entry.bytes)
    }

    /// Whether the budget is enough for so many bytes.
    pub(super) fn fits(&self, bytes: u64) -> bool {
        self.budget.is_none_or(|budget| bytes <= budget)
    }

    // What happens to units. A unit that was forgotten is ignored.

    pub(super) fn add(&mut self, bytes: u64) -> Unit {
        if let Some(id) = self.free.pop() {
            let generation = self.entries[id as usize].generation + 1;
            self.entries[id as usize] = Entry::new(generation, bytes);
            return Unit { id, generation };
        }
        self.entries.push(Entry::new(0, bytes));
        self.unit(self.entries.len() as UnitId - 1)
    }

    /// A request asks for a unit. Returns whether it is resident.
    pub(super) fn ask(&mut self, unit: Unit) -> bool {
        let place = self.place(unit);
        if place.is_some() {
            self.policy.requested(unit.id);
        }
        let resident = place == Some(Place::Resident);
        if resident {
            self.counters.hits += 1;
        } else {
            self.counters.misses += 1;
        }
        resident
    }

    /// Says which rank the first request that waits for a unit has; `None` where none waits any more.
    pub(super) fn want(&mut self, unit: Unit, rank: Option<Rank>) {
        let rank = rank.map(|rank| rank.min(LAST - 1));
        if self.entry(unit).is_some_and(|entry| entry.rank != rank && !entry.retired) {
            self.update(unit.id, |entry| entry.rank = rank);
        }
    }

    /// Asks for a unit to be loaded where there is room for it, before any request waits for it.
    pub(super) fn hint(&mut self, unit: Unit) {
        let away = matches!(self.place(unit), Some(Place::Absent | Place::Leaving));
        if away && self.entries[unit.id as usize].hint.is_none() {
            let turn = self.next_hint;
            self.next_hint += 1;
            self.update(unit.id, |entry| entry.hint = Some(turn));
        }
    }

    /// Forbids eviction of a resident unit until [`Ledger::unpin`]; false where it is not resident, or retired.
    pub(super) fn pin(&mut self, unit: Unit) -> bool {
        let resident = self.entry(unit).is_some_and(|entry| entry.place == Place::Resident && !entry.retired);
        if resident {
            self.update(unit.id, |entry| entry.pins += 1);
        }
        resident
    }

    pub(super) fn unpin(&mut self, unit: Unit) {
        debug_assert!(self.entry(unit).is_some_and(|entry| entry.pins > 0), "expected a pinned unit");
        self.update(unit.id, |entry| entry.pins -= 1);
    }

    /// A unit will not be asked for again: it leaves once nothing has it pinned, and is forgotten.
    pub(super) fn retire(&mut self, unit: Unit) {
        let Some(place) = self.place(unit) else { return };
        self.update(unit.id, |entry| (entry.retired, entry.rank) = (true, None));
        if place == Place::Absent {
            self.vacate(unit.id);
        }
    }

    pub(super) fn set_budget(&mut self, budget: Option<u64>) {
        self.budget = budget;
    }

    // Loads.

    /// Whether a load needs a thread.
    pub(super) fn has_loads(&self) -> bool {
        !self.queued.is_empty()
    }

    /// The next load that needs a thread. Whoever takes it up must call `loaded` or `failed`, and `released` once its
    /// memory is given back.
    pub(super) fn start(&mut self) -> Option<Unit> {
        let (_, id) = *self.queued.first()?;
        self.update(id, |entry| entry.started = true);
        Some(self.unit(id))
    }

    /// A load has ended. Returns whether its value is to be kept, not that of a load that was stopped.
    pub(super) fn loaded(&mut self, unit: Unit) -> bool {
        if self.place(unit) != Some(Place::Loading) {
            return false;
        }
        let bytes = self.bytes(unit);
        self.update(unit.id, |entry| (entry.place, entry.started) = (Place::Resident, false));
        self.counters.loads += 1;
        self.counters.bytes_loaded += bytes;
        self.policy.admitted(unit.id, bytes);
        true
    }

    /// A load has ended without a value. Returns whether that is a failure, not the end of one that was stopped; then
    /// nobody waits for the unit any more.
    pub(super) fn failed(&mut self, unit: Unit) -> bool {
        if self.place(unit) != Some(Place::Loading) {
            return false;
        }
        self.counters.failed += 1;
        self.update(unit.id, |entry| (entry.place, entry.rank) = (Place::Leaving, None));
        true
    }

    /// The memory of a unit is given back, or none was taken for it.
    pub(super) fn released(&mut self, unit: Unit) {
        debug_assert_eq!(self.place(unit), Some(Place::Leaving), "expected a unit that was let go of");
        self.vacate(unit.id);
    }

    // Entries.

    fn unit(&self, id: UnitId) -> Unit {
        Unit { id, generation: self.entries[id as usize].generation }
    }

    fn entry(&self, unit: Unit) -> Option<&Entry> {
        self.entries.get(unit.id as usize).filter(|entry| entry.known && entry.generation == unit.generation)
    }

    /// A unit is not in memory. Where it is retired, that was the last of it.
    fn vacate(&mut self, id: UnitId) {
        self.update(id, |entry| (entry.place, entry.started) = (Place::Absent, false));
        if self.entries[id as usize].retired {
            self.orders.push(Order::Forget(self.unit(id)));
            self.entries[id as usize].known = false;
            self.policy.forgotten(id);
            self.free.push(id);
        }
    }

    /// Changes an entry, and with it every sum and set that it is in.
    fn update(&mut self, id: UnitId, change: impl FnOnce(&mut Entry)) {
        self.count(id, false);
        change(&mut self.entries[id as usize]);
        self.count(id, true);
    }

    /// Adds an entry to the sums and sets that it belongs to, or takes it out of them.
    fn count(&mut self, id: UnitId, add: bool) {
        let entry = &self.entries[id as usize];
        let bytes = |counts: bool| if counts { entry.bytes } else { 0 };
        sum(&mut self.used, bytes(entry.place != Place::Absent), add);
        sum(&mut self.leaving, bytes(entry.place == Place::Leaving), add);
        sum(&mut self.idle, bytes(entry.is_idle()), add);
        sum(&mut self.pinned, bytes(entry.pins > 0), add);
        set(&mut self.demanded, entry.demanded_at().map(|rank| (rank, id)), add);
        set(&mut self.hints, entry.hinted_at().map(|turn| (turn, id)), add);
        set(&mut self.queued, entry.is_queued().then(|| (entry.rank.unwrap_or(LAST), id)), add);
        set(&mut self.yielding, entry.yields_at().map(|rank| (rank, id)), add);
        set(&mut self.departing, entry.is_departing().then_some(id), add);
    }
}

fn sum(sum: &mut u64, bytes: u64, add: bool) {
    *sum = if add { *sum + bytes } else { *sum - bytes };
}

fn set<T: Ord>(set: &mut BTreeSet<T>, item: Option<T>, add: bool) {
    match item {
        None => {}
        Some(item) if add => drop(set.insert(item)),
        Some(item) => drop(set.remove(&item)),
    }
}
