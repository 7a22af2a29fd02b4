//! The truth of one residency: which unit is where, how many bytes are spoken for, and what is to be done next.
//!
//! One state machine without threads, I/O or clock. Every call that may change what is to be done is followed by
//! [`Ledger::plan`], which says it.
//!
//! ```text
//!            plan              started, loaded             plan, retire
//! absent ───────────> loading ─────────────────> resident ─────────────> leaving ──┐
//!    ^                   │  stopped, failed         │ ^                            │ its bytes are given back
//!    └───────────────────┴──────────────────────    pins                           │
//!    └─────────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! A unit's bytes are spoken for from before its load begins until after its memory is given back, so the sum of all
//! never exceeds the budget.

use std::collections::{BTreeSet, VecDeque};

use super::policy::{Policy, UnitId};

/// The place of a waiting request in the order in which requests are served: the least first.
pub type Rank = u64;

/// A unit of one residency. A number is used again after its unit is forgotten, with another generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Unit {
    pub(super) id: UnitId,
    pub(super) generation: u32,
}

/// Where a unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Not in memory.
    Absent,
    /// Its bytes are spoken for, and it is being read, or will be.
    Loading,
    /// In memory.
    Resident,
    /// No longer to be used; its memory, or its load, has not ended yet.
    Leaving,
}

/// Something to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Stop a load that was started.
    Stop(Unit),
    /// Let go of a resident unit's value.
    Evict(Unit),
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
    /// Loads that were stopped, since nothing waited for the unit any more or something else needed the room.
    pub stopped: u64,
    /// Units that were let go to make room, or because they were retired.
    pub evictions: u64,
    /// Bytes of units that became resident.
    pub bytes_loaded: u64,
}

/// What the ledger knows of a unit.
#[derive(Debug)]
struct Entry {
    generation: u32,
    bytes: u64,
    place: Place,
    /// Whether its load has a thread.
    started: bool,
    pins: u32,
    /// Of the first request that waits for it.
    rank: Option<Rank>,
    hinted: bool,
    retired: bool,
    /// False once it is forgotten.
    known: bool,
}

pub(super) struct Ledger {
    entries: Vec<Entry>,
    free: Vec<UnitId>,
    policy: Box<dyn Policy>,
    budget: Option<u64>,
    /// Bytes of units that are loading, resident or leaving.
    used: u64,
    /// Of these, bytes that will be given back without anything more to be done.
    leaving: u64,
    /// Of these, bytes of resident units that nobody uses or waits for.
    idle: u64,
    pinned: u64,
    /// Absent units that requests wait for.
    demanded: BTreeSet<(Rank, UnitId)>,
    /// Resident units that requests wait for and nobody uses yet.
    held: BTreeSet<(Rank, UnitId)>,
    /// Loads without a thread, and the order in which they get one: those that requests wait for first.
    queued: BTreeSet<(Rank, UnitId)>,
    /// Loads that nobody waits for, whose room a demand may take, and their bytes.
    early: BTreeSet<UnitId>,
    early_bytes: u64,
    /// Units that are retired, that nobody uses any more, and that have not left yet.
    departing: BTreeSet<UnitId>,
    /// Absent units to be loaded where there is room, in the order of the hints.
    hints: VecDeque<Unit>,
    counters: Counters,
}

/// The rank of what nobody waits for.
const LAST: Rank = Rank::MAX;

impl Ledger {
    pub(super) fn new(budget: Option<u64>, policy: Box<dyn Policy>) -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            policy,
            budget,
            used: 0,
            leaving: 0,
            idle: 0,
            pinned: 0,
            demanded: BTreeSet::new(),
            held: BTreeSet::new(),
            queued: BTreeSet::new(),
            early: BTreeSet::new(),
            early_bytes: 0,
            departing: BTreeSet::new(),
            hints: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    // What others ask.

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    pub(super) fn budget(&self) -> Option<u64> {
        self.budget
    }

    /// Bytes of memory that are spoken for.
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

    /// Whether a unit could ever be loaded.
    pub(super) fn fits(&self, bytes: u64) -> bool {
        self.budget.is_none_or(|budget| bytes <= budget)
    }

    /// Whether a load should end without a result.
    pub(super) fn is_stopped(&self, unit: Unit) -> bool {
        self.place(unit) != Some(Place::Loading)
    }

    // What happens to units.

    pub(super) fn add(&mut self, bytes: u64) -> Unit {
        let entry = Entry {
            generation: 0,
            bytes,
            place: Place::Absent,
            started: false,
            pins: 0,
            rank: None,
            hinted: false,
            retired: false,
            known: true,
        };
        if let Some(id) = self.free.pop() {
            let generation = self.entries[id as usize].generation + 1;
            self.entries[id as usize] = Entry { generation, ..entry };
            return Unit { id, generation };
        }
        self.entries.push(entry);
        Unit { id: self.entries.len() as UnitId - 1, generation: 0 }
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
        if self.entry(unit).is_some_and(|entry| entry.rank != rank) {
            self.update(unit.id, |entry| entry.rank = rank);
        }
    }

    /// Asks for a unit to be loaded where there is room for it, before any request waits for it.
    pub(super) fn hint(&mut self, unit: Unit) {
        let Some(entry) = self.entry_mut(unit) else { return };
        if entry.place == Place::Absent && !entry.hinted && !entry.retired {
            entry.hinted = true;
            self.hints.push_back(unit);
        }
    }

    /// Forbids eviction of a resident unit until [`Ledger::unpin`]; false where it is not resident.
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
        if self.entry(unit).is_none() {
            return;
        }
        self.update(unit.id, |entry| (entry.retired, entry.rank) = (true, None));
        if self.place(unit) == Some(Place::Absent) {
            self.forget_if_retired(unit.id);
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

    /// The next load that needs a thread. Somebody must now call `loaded`, or `failed`, and give its bytes back.
    pub(super) fn start(&mut self) -> Option<Unit> {
        let (_, id) = *self.queued.first()?;
        self.update(id, |entry| entry.started = true);
        Some(self.unit(id))
    }

    /// A load has ended. Returns whether its value is to be kept.
    pub(super) fn loaded(&mut self, unit: Unit) -> bool {
        if self.is_stopped(unit) {
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
        if self.is_stopped(unit) {
            return false;
        }
        self.counters.failed += 1;
        self.update(unit.id, |entry| (entry.place, entry.rank) = (Place::Leaving, None));
        true
    }

    /// The memory of a unit that was loading or leaving is given back.
    pub(super) fn released(&mut self, unit: Unit) {
        if self.entry(unit).is_none_or(|entry| entry.place == Place::Absent) {
            return;
        }
        debug_assert_ne!(self.place(unit), Some(Place::Resident), "expected the memory of a resident unit to stay");
        self.update(unit.id, |entry| (entry.place, entry.started) = (Place::Absent, false));
        self.forget_if_retired(unit.id);
    }

    // What is to be done.

    /// Decides what is loaded and what leaves, now that something has changed.
    ///
    /// Room goes to the unit whose request is first. While that one has none, no later one gets any, so that small
    /// units cannot keep a large one out. Hints come after all of them.
    pub(super) fn plan(&mut self, orders: &mut Vec<Order>) {
        while let Some(id) = self.departing.first().copied() {
            self.let_go(id, orders);
        }
        self.shrink(self.missing(0), 0, orders); // the budget may have become smaller
        while let Some((rank, id)) = self.demanded.first().copied() {
            if !self.make_room(self.entries[id as usize].bytes, rank, orders) {
                return;
            }
            self.update(id, |entry| entry.place = Place::Loading);
        }
        while let Some(unit) = self.hints.front().copied() {
            let bytes = self.bytes(unit);
            let absent = self.place(unit) == Some(Place::Absent) && !self.entries[unit.id as usize].retired;
            if absent && self.missing(bytes) <= self.idle {
                if !self.make_room(bytes, LAST, orders) {
                    return;
                }
                self.update(unit.id, |entry| entry.place = Place::Loading);
            }
            self.hints.pop_front();
            if let Some(entry) = self.entry_mut(unit) {
                entry.hinted = false;
            }
        }
    }

    /// Lets go of as much as a unit of `bytes` needs; nothing where that would not be enough. Returns whether there is
    /// room now: it may still have to be given back.
    fn make_room(&mut self, bytes: u64, rank: Rank, orders: &mut Vec<Order>) -> bool {
        let missing = self.missing(bytes);
        if missing > 0 && self.evictable(missing, rank) {
            self.shrink(missing, rank, orders);
        }
        self.fits(self.used + bytes)
    }

    /// The bytes that must be let go before others of `bytes` have room; what is leaving already is not among them.
    fn missing(&self, bytes: u64) -> u64 {
        self.budget.map_or(0, |budget| (self.used - self.leaving + bytes).saturating_sub(budget))
    }

    /// Whether what may leave for a request of that rank is `bytes` or more.
    fn evictable(&self, bytes: u64, rank: Rank) -> bool {
        let mut sum = self.idle + if rank < LAST { self.early_bytes } else { 0 };
        let mut later = self.held.range((rank, UnitId::MAX)..).rev();
        while sum < bytes {
            let Some((_, id)) = later.next() else { return false };
            sum += self.entries[*id as usize].bytes;
        }
        true
    }

    /// Lets go of `bytes`, or of all that may leave for a request of that rank: first what nobody waits for, in the
    /// order of the policy, then loads that nobody waits for, then units whose requests come after it, the last first.
    fn shrink(&mut self, bytes: u64, rank: Rank, orders: &mut Vec<Order>) {
        let enough = self.used - self.leaving - bytes.min(self.used - self.leaving);
        while self.used - self.leaving > enough {
            let Self { policy, entries, .. } = self;
            let victim = policy
                .victim(&mut |id| entries[id as usize].is_idle())
                .or_else(|| self.early.first().copied().filter(|_| rank < LAST))
                .or_else(|| self.held.range((rank, UnitId::MAX)..).next_back().map(|(_, id)| *id));
            let Some(victim) = victim else { return };
            self.let_go(victim, orders);
        }
    }

    /// Evicts a resident unit, or stops a load.
    fn let_go(&mut self, id: UnitId, orders: &mut Vec<Order>) {
        let (unit, place, started) =
            (self.unit(id), self.entries[id as usize].place, self.entries[id as usize].started);
        let resident = place == Place::Resident;
        if resident {
            self.policy.removed(id);
            self.counters.evictions += 1;
            orders.push(Order::Evict(unit));
        } else {
            self.counters.stopped += 1;
            orders.extend(started.then_some(Order::Stop(unit)));
        }
        if resident || started {
            self.update(id, |entry| entry.place = Place::Leaving);
        } else {
            self.update(id, |entry| entry.place = Place::Absent);
            self.forget_if_retired(id);
        }
    }

    // Entries.

    fn unit(&self, id: UnitId) -> Unit {
        Unit { id, generation: self.entries[id as usize].generation }
    }

    fn entry(&self, unit: Unit) -> Option<&Entry> {
        self.entries.get(unit.id as usize).filter(|entry| entry.known && entry.generation == unit.generation)
    }

    fn entry_mut(&mut self, unit: Unit) -> Option<&mut Entry> {
        self.entries.get_mut(unit.id as usize).filter(|entry| entry.known && entry.generation == unit.generation)
    }

    fn forget_if_retired(&mut self, id: UnitId) {
        if self.entries[id as usize].retired {
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
        let (bytes, rank, pinned) = (entry.bytes, entry.rank, entry.pins > 0);
        let sum = |sum: &mut u64, of: bool| match (of, add) {
            (false, _) => {}
            (true, true) => *sum += bytes,
            (true, false) => *sum -= bytes,
        };
        sum(&mut self.used, entry.place != Place::Absent);
        sum(&mut self.leaving, entry.place == Place::Leaving);
        sum(&mut self.pinned, entry.place == Place::Resident && pinned);
        sum(&mut self.idle, entry.is_idle());
        sum(&mut self.early_bytes, entry.is_early());
        set(&mut self.early, id, entry.is_early(), add);
        set(&mut self.departing, id, entry.retired && !pinned && entry.is_here(), add);
        let waiting = (rank.unwrap_or(LAST), id);
        set(&mut self.queued, waiting, entry.place == Place::Loading && !entry.started, add);
        let wanted = rank.is_some() && !entry.retired;
        set(&mut self.demanded, waiting, wanted && entry.place == Place::Absent, add);
        set(&mut self.held, waiting, wanted && entry.place == Place::Resident && !pinned, add);
    }
}

impl Entry {
    /// Whether it is loading or resident.
    fn is_here(&self) -> bool {
        matches!(self.place, Place::Loading | Place::Resident)
    }

    /// Whether it is resident, and nobody uses it or waits for it.
    fn is_idle(&self) -> bool {
        self.place == Place::Resident && self.pins == 0 && self.rank.is_none() && !self.retired
    }

    /// Whether it is loading, and nobody waits for it.
    fn is_early(&self) -> bool {
        self.place == Place::Loading && self.rank.is_none() && !self.retired
    }
}

fn set<T: Ord>(set: &mut BTreeSet<T>, item: T, of: bool, add: bool) {
    match (of, add) {
        (false, _) => {}
        (true, true) => drop(set.insert(item)),
        (true, false) => drop(set.remove(&item)),
    }
}
