//! A ledger beside its model, and what callers may do to both.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::check_rules;
use super::model::{Known, Model};
use crate::residency::ledger::{Entry, LAST, Ledger, Order, Place, Rank, Unit};
use crate::residency::tests::{LeastRecent, Told};

/// What callers may do. Numbers choose among the units, leases, loads or memory that there are.
#[derive(Clone, Copy, Debug)]
pub(super) enum Operation {
    Add(u64),
    Ask(usize),
    Want(usize, Option<Rank>),
    Hint(usize),
    Pin(usize),
    Unpin(usize),
    Retire(usize),
    Budget(Option<u64>),
    Start,
    Finish(usize, bool),
    Release(usize),
}

pub(super) fn operations() -> impl Strategy<Value = Vec<Operation>> {
    use Operation::{Add, Ask, Budget, Finish, Hint, Pin, Release, Retire, Start, Unpin, Want};
    let any = any::<usize>;
    let operation = prop_oneof![
        3 => (0u64..=12).prop_map(Add),
        1 => any().prop_map(Ask),
        6 => (any(), prop::option::weighted(0.7, prop_oneof![0u64..8, Just(Rank::MAX)]))
            .prop_map(|(unit, rank)| Want(unit, rank)),
        3 => any().prop_map(Hint),
        3 => any().prop_map(Pin),
        3 => any().prop_map(Unpin),
        1 => any().prop_map(Retire),
        1 => prop::option::weighted(0.9, 0u64..=24).prop_map(Budget),
        5 => Just(Start),
        5 => (any(), prop::bool::weighted(0.8)).prop_map(|(load, loaded)| Finish(load, loaded)),
        5 => any().prop_map(Release),
    ];
    prop::collection::vec(operation, 0..if cfg!(miri) { 20 } else { 160 })
}

/// A ledger, the model of it, and what callers have of it.
pub(super) struct Harness {
    pub(super) ledger: Ledger,
    told: Arc<Mutex<Told>>,
    pub(super) model: Model,
    /// All units that there ever were.
    pub(super) units: Vec<Unit>,
    pub(super) leases: Vec<Unit>,
    loads: Vec<Unit>,
    /// Memory that is to be given back.
    owed: Vec<Unit>,
}

impl Harness {
    pub(super) fn new(budget: Option<u64>) -> Self {
        let policy = LeastRecent::default();
        let told = policy.0.clone();
        let (ledger, model) = (Ledger::new(budget, Box::new(policy)), Model::new(budget));
        Self { ledger, told, model, units: Vec::new(), leases: Vec::new(), loads: Vec::new(), owed: Vec::new() }
    }

    fn unit(&self, choice: usize) -> Option<Unit> {
        (!self.units.is_empty()).then(|| self.units[choice % self.units.len()])
    }

    pub(super) fn add(&mut self, bytes: u64) -> Unit {
        let unit = self.ledger.add(bytes);
        self.model.add(unit, bytes);
        self.units.push(unit);
        unit
    }

    pub(super) fn want(&mut self, unit: Unit, rank: Option<Rank>) {
        self.ledger.want(unit, rank);
        self.model.want(unit, rank);
    }

    pub(super) fn start(&mut self) -> Option<Unit> {
        let unit = self.ledger.start();
        assert_eq!(unit, self.model.start());
        assert!(unit.is_none_or(|unit| !self.loads.contains(&unit)), "one load a unit");
        self.loads.extend(unit);
        unit
    }

    fn finish(&mut self, unit: Unit, loaded: bool) {
        self.loads.retain(|other| *other != unit);
        let news = if loaded { self.ledger.loaded(unit) } else { self.ledger.failed(unit) };
        assert_eq!(news, self.model.finish(unit, loaded));
        if !loaded || !news {
            self.owed.push(unit);
        }
    }

    pub(super) fn run(&mut self, operation: Operation) {
        match operation {
            Operation::Add(bytes) => drop(self.add(bytes)),
            Operation::Ask(choice) => {
                let Some(unit) = self.unit(choice) else { return };
                assert_eq!(self.ledger.ask(unit), self.model.ask(unit));
            }
            Operation::Want(choice, rank) => {
                let Some(unit) = self.unit(choice) else { return };
                self.want(unit, rank);
            }
            Operation::Hint(choice) => {
                let Some(unit) = self.unit(choice) else { return };
                self.ledger.hint(unit);
                self.model.hint(unit);
            }
            Operation::Pin(choice) => {
                let Some(unit) = self.unit(choice) else { return };
                let pinned = self.ledger.pin(unit);
                assert_eq!(pinned, self.model.pin(unit));
                self.leases.extend(pinned.then_some(unit));
            }
            Operation::Unpin(choice) => {
                let Some(unit) = take(&mut self.leases, choice) else { return };
                self.ledger.unpin(unit);
                self.model.unpin(unit);
            }
            Operation::Retire(choice) => {
                let Some(unit) = self.unit(choice) else { return };
                self.ledger.retire(unit);
                self.model.retire(unit);
            }
            Operation::Budget(budget) => {
                self.ledger.set_budget(budget);
                self.model.budget = budget;
            }
            Operation::Start => drop(self.start()),
            Operation::Finish(choice, loaded) => {
                let Some(unit) = take(&mut self.loads, choice) else { return };
                self.finish(unit, loaded);
            }
            Operation::Release(choice) => {
                let Some(unit) = take(&mut self.owed, choice) else { return };
                self.ledger.released(unit);
                self.model.vacate(unit);
            }
        }
    }

    /// Has the ledger say what follows, and compares that with the model and with the rules.
    pub(super) fn plan(&mut self) -> Vec<Order> {
        let before = self.model.clone();
        let orders = self.ledger.plan();
        assert_eq!(orders, self.model.plan());
        check_rules(&before, &self.model);
        self.check();
        let mut forgotten = Vec::new();
        for order in &orders {
            match order {
                Order::Evict(unit) => self.owed.push(*unit),
                Order::Stop(unit) => assert!(self.loads.contains(unit), "expected the load of {unit:?} to run"),
                Order::Refuse(unit) => assert!(!self.ledger.fits(self.ledger.bytes(*unit))),
                Order::Forget(unit) => {
                    assert_eq!(self.ledger.place(*unit), None);
                    forgotten.push(unit.id);
                }
            }
        }
        assert_eq!(std::mem::take(&mut self.told.lock().unwrap().forgotten), forgotten);
        orders
    }

    /// Everything in the ledger is as in the model, and as counted anew.
    fn check(&self) {
        let Self { ledger, model, .. } = self;
        for unit in &self.units {
            assert_eq!(ledger.place(*unit), model.units.get(unit).map(|known| known.place));
        }
        assert_eq!(self.told.lock().unwrap().recency, model.recency.iter().map(|unit| unit.id).collect::<Vec<_>>());
        assert_eq!(ledger.counters(), model.counters);
        assert_eq!(ledger.used, model.used());
        assert_eq!(ledger.leaving, model.sum(|known| known.place == Place::Leaving));
        assert_eq!(ledger.idle, model.sum(Known::is_idle));
        assert_eq!(ledger.pinned, model.sum(|known| known.pins > 0));
        let listed = |of: fn(&Entry) -> Option<u64>| -> BTreeSet<_> {
            let entries = ledger.entries.iter().zip(0..).filter(|(entry, _)| entry.known);
            entries.filter_map(|(entry, id)| Some((of(entry)?, id))).collect()
        };
        assert_eq!(ledger.demanded, listed(Entry::demanded_at));
        assert_eq!(ledger.hints, listed(Entry::hinted_at));
        assert_eq!(ledger.queued, listed(|entry| entry.is_queued().then(|| entry.rank.unwrap_or(LAST))));
        assert_eq!(ledger.yielding, listed(Entry::yields_at));
        assert!(ledger.departing.is_empty(), "what has to leave does so at once");
        assert_eq!(ledger.has_loads(), !ledger.queued.is_empty());
    }

    /// Lets every load end well and all memory be given back.
    pub(super) fn settle(&mut self) {
        self.plan();
        loop {
            if let Some(unit) = self.start() {
                self.finish(unit, true);
            } else if let Some(unit) = self.loads.pop() {
                self.finish(unit, true);
            } else if let Some(unit) = take(&mut self.owed, 0) {
                self.ledger.released(unit);
                self.model.vacate(unit);
            } else {
                return;
            }
            self.plan();
        }
    }

    /// The units that requests wait for, in order; of the same rank those that are resident first, which stay.
    pub(super) fn wanted(&self) -> Vec<Unit> {
        let units = self.model.units.iter().filter(|(_, known)| known.rank.is_some());
        let mut wanted: Vec<_> = units.collect();
        wanted.sort_by_key(|(unit, known)| (known.rank, known.place != Place::Resident, unit.id));
        wanted.into_iter().map(|(unit, _)| *unit).collect()
    }

    pub(super) fn place(&self, unit: Unit) -> Place {
        self.ledger.place(unit).expect("a unit that there is")
    }
}

fn take(units: &mut Vec<Unit>, choice: usize) -> Option<Unit> {
    (!units.is_empty()).then(|| units.swap_remove(choice % units.len()))
}
