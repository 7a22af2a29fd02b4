//! The rules of a ledger, written down plainly: a dictionary of units, all of which are looked at in every step.

use std::collections::BTreeMap;

use crate::residency::ledger::{Counters, Order, Place, Rank, Unit};

/// What the model knows of a unit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub(super) bytes: u64,
    pub(super) place: Place,
    pub(super) started: bool,
    pub(super) pins: u32,
    pub(super) rank: Option<Rank>,
    pub(super) hint: Option<u64>,
    pub(super) retired: bool,
}

impl Known {
    pub(super) fn may_leave(&self) -> bool {
        matches!(self.place, Place::Loading | Place::Resident) && self.pins == 0
    }

    pub(super) fn is_idle(&self) -> bool {
        self.place == Place::Resident && self.pins == 0 && self.rank.is_none() && !self.retired
    }

    /// The rank of the first request that waits for it; later than any where none does.
    pub(super) fn turn(&self) -> Rank {
        self.rank.unwrap_or(Rank::MAX)
    }
}

/// For what room is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum For {
    Budget,
    Demand(Rank),
    Hint,
}

#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) units: BTreeMap<Unit, Known>,
    /// Resident units, the one asked for longest ago first.
    pub(super) recency: Vec<Unit>,
    pub(super) budget: Option<u64>,
    pub(super) counters: Counters,
    orders: Vec<Order>,
    hints: u64,
}

impl Model {
    pub(super) fn new(budget: Option<u64>) -> Self {
        let counters = Counters::default();
        Self { units: BTreeMap::new(), recency: Vec::new(), budget, counters, orders: Vec::new(), hints: 0 }
    }

    // What is asked of it.

    pub(super) fn sum(&self, of: impl Fn(&Known) -> bool) -> u64 {
        self.units.values().filter(|known| of(known)).map(|known| known.bytes).sum()
    }

    pub(super) fn used(&self) -> u64 {
        self.sum(|known| known.place != Place::Absent)
    }

    pub(super) fn is_over(&self) -> bool {
        self.budget.is_some_and(|budget| self.used() > budget)
    }

    /// The bytes that must leave before so many more have room.
    pub(super) fn missing(&self, bytes: u64) -> u64 {
        let staying = self.sum(|known| known.place != Place::Absent && known.place != Place::Leaving);
        self.budget.map_or(0, |budget| (staying + bytes).saturating_sub(budget))
    }

    /// The first unit in an order, of those that have a place in it.
    pub(super) fn first<T: Ord>(&self, turn: impl Fn(&Known) -> Option<T>) -> Option<Unit> {
        let all = self.units.iter().filter_map(|(unit, known)| Some(((turn(known)?, unit.id), *unit)));
        all.min_by(|(a, _), (b, _)| a.cmp(b)).map(|(_, unit)| unit)
    }

    /// The absent unit that has waited for room since the earliest request.
    pub(super) fn demanded(&self) -> Option<Unit> {
        self.first(|known| known.rank.filter(|_| known.place == Place::Absent && !known.retired))
    }

    pub(super) fn hinted(&self) -> Option<Unit> {
        self.first(|known| known.hint.filter(|_| known.place == Place::Absent && !known.retired))
    }

    // What happens.

    pub(super) fn add(&mut self, unit: Unit, bytes: u64) {
        let known =
            Known { bytes, place: Place::Absent, started: false, pins: 0, rank: None, hint: None, retired: false };
        assert!(self.units.insert(unit, known).is_none(), "a new unit is none that there is");
    }

    pub(super) fn ask(&mut self, unit: Unit) -> bool {
        let hit = self.recency.contains(&unit);
        if hit {
            self.recency.retain(|other| *other != unit);
            self.recency.push(unit);
        }
        *if hit { &mut self.counters.hits } else { &mut self.counters.misses } += 1;
        hit
    }

    pub(super) fn want(&mut self, unit: Unit, rank: Option<Rank>) {
        if let Some(known) = self.units.get_mut(&unit).filter(|known| !known.retired) {
            known.rank = rank.map(|rank| rank.min(Rank::MAX - 1));
        }
    }

    pub(super) fn hint(&mut self, unit: Unit) {
        let away = |known: &&mut Known| matches!(known.place, Place::Absent | Place::Leaving) && known.hint.is_none();
        if let Some(known) = self.units.get_mut(&unit).filter(away) {
            known.hint = Some(self.hints);
            self.hints += 1;
        }
    }

    pub(super) fn pin(&mut self, unit: Unit) -> bool {
        let known = self.units.get_mut(&unit).filter(|known| known.place == Place::Resident && !known.retired);
        known.map(|known| known.pins += 1).is_some()
    }

    pub(super) fn unpin(&mut self, unit: Unit) {
        self.unit(unit).pins -= 1;
    }

    pub(super) fn retire(&mut self, unit: Unit) {
        if let Some(known) = self.units.get_mut(&unit) {
            (known.retired, known.rank) = (true, None);
            if known.place == Place::Absent {
                self.vacate(unit);
            }
        }
    }

    pub(super) fn start(&mut self) -> Option<Unit> {
        let waits = |known: &Known| (known.place == Place::Loading && !known.started).then(|| known.turn());
        let unit = self.first(waits)?;
        self.unit(unit).started = true;
        Some(unit)
    }

    /// A load ends. Returns whether that is news, not the end of one that was stopped.
    pub(super) fn finish(&mut self, unit: Unit, loaded: bool) -> bool {
        let known = self.unit(unit);
        if known.place != Place::Loading {
            return false;
        }
        if loaded {
            (known.place, known.started) = (Place::Resident, false);
            let bytes = known.bytes;
            self.recency.push(unit);
            self.counters.loads += 1;
            self.counters.bytes_loaded += bytes;
        } else {
            (known.place, known.rank) = (Place::Leaving, None);
            self.counters.failed += 1;
        }
        true
    }

    /// A unit's memory is given back.
    pub(super) fn vacate(&mut self, unit: Unit) {
        let known = self.unit(unit);
        (known.place, known.started) = (Place::Absent, false);
        if known.retired {
            self.units.remove(&unit);
            self.orders.push(Order::Forget(unit));
        }
    }

    fn unit(&mut self, unit: Unit) -> &mut Known {
        self.units.get_mut(&unit).expect("a unit that there is")
    }

    // What follows from it.

    pub(super) fn plan(&mut self) -> Vec<Order> {
        while let Some(unit) = self.first(|known| (known.retired && known.may_leave()).then_some(())) {
            self.let_go(unit);
        }
        let missing = self.missing(0);
        for unit in self.victims(missing, For::Budget) {
            self.let_go(unit);
        }
        self.reserve();
        std::mem::take(&mut self.orders)
    }

    fn reserve(&mut self) {
        while let Some(unit) = self.demanded() {
            let Known { bytes, rank, .. } = self.units[&unit];
            if self.budget.is_some_and(|budget| bytes > budget) {
                self.unit(unit).rank = None;
                self.orders.push(Order::Refuse(unit));
            } else if !self.load(unit, For::Demand(rank.expect("a demanded unit has a rank"))) {
                return;
            }
        }
        while let Some(unit) = self.hinted() {
            if self.missing(self.units[&unit].bytes) > self.sum(Known::is_idle) {
                self.unit(unit).hint = None;
            } else if !self.load(unit, For::Hint) {
                return;
            }
        }
    }

    /// Reserves the bytes of a unit if there is room, and else makes some if that can be.
    fn load(&mut self, unit: Unit, reason: For) -> bool {
        let bytes = self.units[&unit].bytes;
        let missing = self.missing(bytes);
        let victims = self.victims(missing, reason);
        if victims.iter().map(|unit| self.units[unit].bytes).sum::<u64>() >= missing {
            victims.into_iter().for_each(|unit| self.let_go(unit));
        }
        let room = self.budget.is_none_or(|budget| self.used() + bytes <= budget);
        if room {
            let known = self.unit(unit);
            (known.place, known.hint) = (Place::Loading, None);
        }
        room
    }

    /// The units that leave so that so many bytes do, as far as that can be.
    fn victims(&self, bytes: u64, reason: For) -> Vec<Unit> {
        let idle = self.recency.iter().copied().filter(|unit| self.units[unit].is_idle());
        let gives_way = |known: &Known| {
            let later = match reason {
                For::Budget => true,
                For::Demand(rank) => known.turn() > rank,
                For::Hint => false,
            };
            later && known.may_leave() && !known.retired && !known.is_idle()
        };
        let mut later: Vec<_> = self.units.iter().filter(|(_, known)| gives_way(known)).collect();
        later.sort_by_key(|(unit, known)| std::cmp::Reverse((known.turn(), unit.id)));
        let mut sum = 0;
        let all = idle.chain(later.into_iter().map(|(unit, _)| *unit));
        all.take_while(|unit| {
            let more = sum < bytes;
            sum += self.units[unit].bytes;
            more
        })
        .collect()
    }

    fn let_go(&mut self, unit: Unit) {
        let known = self.unit(unit);
        let (resident, started) = (known.place == Place::Resident, known.started);
        if resident || started {
            known.place = Place::Leaving;
        }
        if resident {
            self.recency.retain(|other| *other != unit);
            self.counters.evictions += 1;
            self.orders.push(Order::Evict(unit));
            return;
        }
        self.counters.stopped += 1;
        if started {
            self.orders.push(Order::Stop(unit));
        } else {
            self.vacate(unit);
        }
    }
}
