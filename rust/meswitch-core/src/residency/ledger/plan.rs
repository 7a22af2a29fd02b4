//! What is to be done next: which units get room, and which leave for them.

use std::mem;

use super::{LAST, Ledger, Order, Place, Turn, UnitId};

/// Units that give way to nobody: what a hint may take, besides idle units.
const NONE: Turn = (LAST, UnitId::MAX);

/// Units that give way to anybody: what leaves where the budget has become smaller.
const ALL: Turn = (0, 0);

impl Ledger {
    /// Decides what is loaded and what leaves, now that something has changed. Returns what the caller must do for it,
    /// in that order.
    ///
    /// Room goes to the unit whose request is first. While that one has none, no later one gets any, so that small
    /// units cannot keep a large one out. Hints come after all of them.
    #[must_use]
    pub(in crate::residency) fn plan(&mut self) -> Vec<Order> {
        while let Some(id) = self.departing.first().copied() {
            self.let_go(id);
        }
        self.shrink(self.missing(0), ALL);
        self.reserve();
        mem::take(&mut self.orders)
    }

    /// Gives room to units in their order, until one has to wait for it.
    fn reserve(&mut self) {
        while let Some((rank, id)) = self.demanded.first().copied() {
            let bytes = self.entries[id as usize].bytes;
            if !self.fits(bytes) {
                self.update(id, |entry| entry.rank = None); // the budget has become smaller
                self.orders.push(Order::Refuse(self.unit(id)));
            } else if self.make_room(bytes, (rank, UnitId::MAX)) {
                self.update(id, |entry| (entry.place, entry.hint) = (Place::Loading, None));
            } else {
                return;
            }
        }
        while let Some((_, id)) = self.hints.first().copied() {
            let bytes = self.entries[id as usize].bytes;
            if self.missing(bytes) > self.idle {
                self.update(id, |entry| entry.hint = None); // what is not idle stays
            } else if self.make_room(bytes, NONE) {
                self.update(id, |entry| (entry.place, entry.hint) = (Place::Loading, None));
            } else {
                return;
            }
        }
    }

    /// Lets go of as much as a unit of `bytes` needs: of idle units, and of those that yield after `turn`. Nothing
    /// leaves where that would not be enough. Returns whether there is room now, not only once the memory of what
    /// leaves is given back.
    fn make_room(&mut self, bytes: u64, turn: Turn) -> bool {
        let missing = self.missing(bytes);
        if missing > 0 && self.can_free(missing, turn) {
            self.shrink(missing, turn);
        }
        self.fits(self.used + bytes)
    }

    /// The bytes that must be let go of before others of `bytes` have room; those that are leaving are not among them.
    fn missing(&self, bytes: u64) -> u64 {
        self.budget.map_or(0, |budget| (self.used - self.leaving + bytes).saturating_sub(budget))
    }

    /// Whether [`Ledger::shrink`] would let go of `bytes`.
    fn can_free(&self, bytes: u64, turn: Turn) -> bool {
        let mut sum = self.idle;
        let mut later = self.yielding.range(turn..).rev();
        while sum < bytes {
            let Some((_, id)) = later.next() else { return false };
            sum += self.entries[*id as usize].bytes;
        }
        true
    }

    /// Lets go of `bytes`, or of all that may leave: first idle units, in the order of the policy, then those that
    /// yield after `turn`, the last first.
    fn shrink(&mut self, bytes: u64, turn: Turn) {
        let staying = self.used - self.leaving;
        let enough = staying.saturating_sub(bytes);
        while self.used - self.leaving > enough {
            let Self { policy, entries, yielding, .. } = self;
            let idle = policy.victim(&mut |id| entries[id as usize].is_idle());
            debug_assert!(idle.is_none_or(|id| entries[id as usize].is_idle()), "expected a victim that may leave");
            let Some(victim) = idle.or_else(|| yielding.range(turn..).next_back().map(|(_, id)| *id)) else { return };
            self.let_go(victim);
        }
    }

    /// Evicts a resident unit, or stops a load.
    fn let_go(&mut self, id: UnitId) {
        let unit = self.unit(id);
        let entry = &self.entries[id as usize];
        let (resident, started) = (entry.place == Place::Resident, entry.started);
        if resident {
            self.policy.removed(id);
            self.counters.evictions += 1;
            self.orders.push(Order::Evict(unit));
        } else {
            self.counters.stopped += 1;
            self.orders.extend(started.then_some(Order::Stop(unit)));
        }
        if resident || started {
            self.update(id, |entry| entry.place = Place::Leaving);
        } else {
            self.vacate(id); // no memory was taken yet
        }
    }
}
