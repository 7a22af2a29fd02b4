//! Drawn operations against a plain model, and the rules one by one.

mod model;

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::{Counters, Entry, LAST, Ledger, Order, Place, Rank, Unit};
use crate::residency::tests::{LeastRecent, Recency};
use model::{Known, Model};

/// What callers may do. Numbers choose among the units, leases, loads or memory that there are.
#[derive(Clone, Copy, Debug)]
enum Operation {
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

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    use Operation::{Add, Ask, Budget, Finish, Hint, Pin, Release, Retire, Start, Unpin, Want};
    let any = any::<usize>;
    let operation = prop_oneof![
        3 => (0u64..=12).prop_map(Add),
        1 => any().prop_map(Ask),
        6 => (any(), prop::option::weighted(0.7, prop_oneof![0u64..8, Just(Rank::MAX - 1)]))
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
    prop::collection::vec(operation, 0..if cfg!(miri) { 40 } else { 160 })
}

/// A ledger, the model of it, and what callers have of it.
struct Bench {
    ledger: Ledger,
    recency: Recency,
    model: Model,
    /// All units that there ever were.
    units: Vec<Unit>,
    leases: Vec<Unit>,
    loads: Vec<Unit>,
    /// Memory that is to be given back.
    owed: Vec<Unit>,
}

impl Bench {
    fn new(budget: Option<u64>) -> Self {
        let (policy, recency) = LeastRecent::new();
        let (ledger, model) = (Ledger::new(budget, Box::new(policy)), Model::new(budget));
        Self { ledger, recency, model, units: Vec::new(), leases: Vec::new(), loads: Vec::new(), owed: Vec::new() }
    }

    fn unit(&self, choice: usize) -> Option<Unit> {
        (!self.units.is_empty()).then(|| self.units[choice % self.units.len()])
    }

    fn add(&mut self, bytes: u64) -> Unit {
        let unit = self.ledger.add(bytes);
        self.model.add(unit, bytes);
        self.units.push(unit);
        unit
    }

    fn want(&mut self, unit: Unit, rank: Option<Rank>) {
        self.ledger.want(unit, rank);
        self.model.want(unit, rank);
    }

    fn start(&mut self) -> Option<Unit> {
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

    fn run(&mut self, operation: Operation) {
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
    fn plan(&mut self) -> Vec<Order> {
        let before = self.model.clone();
        let orders = self.ledger.plan();
        assert_eq!(orders, self.model.plan());
        check_rules(&before, &self.model);
        self.check();
        for order in &orders {
            match order {
                Order::Evict(unit) => self.owed.push(*unit),
                Order::Stop(unit) => assert!(self.loads.contains(unit), "expected the load of {unit:?} to run"),
                Order::Refuse(unit) => assert!(!self.ledger.fits(self.ledger.bytes(*unit))),
                Order::Forget(unit) => assert_eq!(self.ledger.place(*unit), None),
            }
        }
        orders
    }

    /// Everything in the ledger is as in the model, and as counted anew.
    fn check(&self) {
        let Self { ledger, model, .. } = self;
        for unit in &self.units {
            assert_eq!(ledger.place(*unit), model.units.get(unit).map(|known| known.place));
        }
        assert_eq!(*self.recency.lock().unwrap(), model.recency.iter().map(|unit| unit.id).collect::<Vec<_>>());
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
    fn settle(&mut self) {
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
    fn wanted(&self) -> Vec<Unit> {
        let units = self.model.units.iter().filter(|(_, known)| known.rank.is_some());
        let mut wanted: Vec<_> = units.collect();
        wanted.sort_by_key(|(unit, known)| (known.rank, known.place != Place::Resident, unit.id));
        wanted.into_iter().map(|(unit, _)| *unit).collect()
    }

    fn place(&self, unit: Unit) -> Place {
        self.ledger.place(unit).expect("a unit that there is")
    }
}

fn take(units: &mut Vec<Unit>, choice: usize) -> Option<Unit> {
    (!units.is_empty()).then(|| units.swap_remove(choice % units.len()))
}

/// What a plan may do, in whatever order it does it.
fn check_rules(before: &Model, after: &Model) {
    let is_here = |known: &Known| matches!(known.place, Place::Loading | Place::Resident);
    let is_here_after = |unit: &Unit| after.units.get(unit).is_some_and(is_here);
    let left = before.units.iter().filter(|(unit, known)| is_here(known) && !is_here_after(unit));
    let left: Vec<_> = left.map(|(_, known)| *known).collect();
    let came = after.units.iter().filter(|(unit, known)| is_here(known) && !is_here(&before.units[unit]));
    let came: Vec<_> = came.map(|(unit, known)| (known.turn(), unit.id)).collect();
    let waits = after.demanded().or(after.hinted()).map(|unit| (unit, after.units[&unit]));

    assert!(left.iter().all(|known| known.pins == 0), "nothing pinned leaves");
    assert!(came.is_empty() || !after.is_over(), "nothing is reserved above the budget");
    if let Some((unit, known)) = waits {
        let turn = (known.turn(), unit.id);
        assert!(
            came.iter().all(|other| *other < turn || known.rank.is_none()),
            "nothing overtakes the first that waits"
        );
        assert!(after.used() + known.bytes > after.budget.unwrap(), "nothing waits that has room");
        let may_leave = |other: &Known| other.is_idle() || other.may_leave() && other.turn() > known.turn();
        let missing = after.missing(known.bytes);
        assert!(missing == 0 || after.sum(may_leave) < missing, "nothing waits for which room could be made");
    }
    if before.missing(0) > 0 {
        let left = after.missing(0) == 0 || !after.units.values().any(Known::may_leave);
        assert!(left, "what may leave does while the budget is exceeded");
        return;
    }
    let for_what = came.iter().map(|(turn, _)| *turn).chain(waits.map(|(_, known)| known.turn())).min();
    for known in left.iter().filter(|known| !known.retired) {
        let first = for_what.expect("nothing leaves for nothing");
        assert!(known.is_idle() || first < known.turn(), "nothing leaves for a later request");
        assert!(
            !came.is_empty() || after.missing(waits.unwrap().1.bytes) == 0,
            "nothing leaves where it does not help"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 512 }))]

    #[test]
    fn a_ledger_is_its_model(budget in prop::option::weighted(0.9, 0u64..=24), operations in operations()) {
        let mut bench = Bench::new(budget);
        let mut asked = 0;
        for operation in operations {
            let used = bench.ledger.used();
            bench.run(operation);
            bench.plan();
            if !matches!(operation, Operation::Budget(_)) {
                let bound = bench.ledger.budget().map_or(u64::MAX, |budget| budget.max(used));
                prop_assert!(bench.ledger.used() <= bound, "a budget is not exceeded, but by becoming smaller");
            }
            asked += u64::from(matches!(operation, Operation::Ask(_)) && !bench.units.is_empty());
        }
        let Counters { hits, misses, .. } = bench.ledger.counters();
        prop_assert_eq!(hits + misses, asked);

        // Once nothing is pinned and loads end, requests are served in their order.
        for unit in std::mem::take(&mut bench.leases) {
            bench.ledger.unpin(unit);
            bench.model.unpin(unit);
        }
        loop {
            bench.settle();
            let wanted = bench.wanted();
            let mut bytes = 0;
            for unit in &wanted {
                bytes += bench.ledger.bytes(*unit);
                if !bench.ledger.fits(bytes) {
                    break;
                }
                prop_assert_eq!(bench.place(*unit), Place::Resident);
            }
            let Some(first) = wanted.first() else { break };
            prop_assert_eq!(bench.place(*first), Place::Resident);
            bench.want(*first, None);
        }
        for unit in bench.units.clone() {
            bench.ledger.retire(unit);
            bench.model.retire(unit);
        }
        bench.settle();
        prop_assert_eq!(bench.ledger.used(), 0);
        prop_assert!(bench.model.units.is_empty());
    }
}

/// A ledger with resident units of such sizes.
fn with_residents<const N: usize>(budget: u64, bytes: [u64; N]) -> (Bench, [Unit; N]) {
    let mut bench = Bench::new(Some(budget));
    let units = bytes.map(|bytes| bench.add(bytes));
    for unit in units {
        bench.want(unit, Some(0));
        bench.settle();
        assert_eq!(bench.place(unit), Place::Resident);
        bench.want(unit, None);
    }
    bench.plan();
    (bench, units)
}

#[test]
fn small_units_do_not_keep_a_large_one_out() {
    let (mut bench, [pinned]) = with_residents(10, [4]);
    assert!(bench.ledger.pin(pinned) && bench.model.pin(pinned));
    let [large, small] = [8, 2].map(|bytes| bench.add(bytes));
    bench.want(small, Some(2));
    bench.want(large, Some(1));
    bench.settle();
    assert_eq!([large, small].map(|unit| bench.place(unit)), [Place::Absent; 2]);
    bench.want(large, None); // the request went away
    bench.settle();
    assert_eq!(bench.place(small), Place::Resident);
}

#[test]
fn an_earlier_request_takes_room_of_a_later_one_and_never_the_other_way() {
    let (mut bench, [held]) = with_residents(10, [8]);
    bench.want(held, Some(5));
    let other = bench.add(8);
    for rank in [6, 5] {
        bench.want(other, Some(rank));
        assert_eq!(bench.plan(), []);
    }
    bench.want(other, Some(4));
    assert_eq!(bench.plan(), [Order::Evict(held)]);
    bench.settle();
    assert_eq!([other, held].map(|unit| bench.place(unit)), [Place::Resident, Place::Absent]);
}

#[test]
fn nothing_is_evicted_where_that_is_not_enough() {
    let (mut bench, [pinned, idle]) = with_residents(10, [6, 4]);
    assert!(bench.ledger.pin(pinned) && bench.model.pin(pinned));
    let large = bench.add(5);
    bench.want(large, Some(0));
    assert_eq!(bench.plan(), []);
    assert_eq!(bench.place(idle), Place::Resident);
}

#[test]
fn a_hint_takes_idle_units_and_nothing_else() {
    let (mut bench, [idle, held]) = with_residents(10, [4, 6]);
    bench.want(held, Some(9));
    let [small, large] = [4, 5].map(|bytes| bench.add(bytes));
    for unit in [large, small] {
        bench.run(Operation::Hint(unit.id as usize));
    }
    assert_eq!(bench.plan(), [Order::Evict(idle)]);
    bench.settle();
    assert_eq!([small, large, held].map(|unit| bench.place(unit)), [Place::Resident, Place::Absent, Place::Resident]);
}

#[test]
fn a_demand_joins_the_load_of_a_hint_and_overtakes_other_hints() {
    let mut bench = Bench::new(Some(30));
    let [first, second, third] = [10; 3].map(|bytes| bench.add(bytes));
    for choice in 0..3 {
        bench.run(Operation::Hint(choice));
    }
    bench.plan();
    assert_eq!(bench.start(), Some(first));
    bench.want(third, Some(7));
    bench.want(first, Some(8));
    bench.plan();
    assert_eq!(bench.start(), Some(third));
    assert_eq!(bench.start(), Some(second));
    assert_eq!(bench.start(), None); // the first is being loaded, once
    assert_eq!(bench.ledger.counters().stopped, 0);
}

#[test]
fn a_demand_takes_the_room_of_loads_that_nobody_waits_for() {
    let mut bench = Bench::new(Some(20));
    let [started, queued, wanted] = [10; 3].map(|bytes| bench.add(bytes));
    bench.run(Operation::Hint(0));
    bench.run(Operation::Hint(1));
    bench.plan();
    assert_eq!(bench.start(), Some(started));
    bench.want(wanted, Some(1));
    assert_eq!(bench.plan(), []); // nothing was read for the other
    assert_eq!([queued, wanted].map(|unit| bench.place(unit)), [Place::Absent, Place::Loading]);
    bench.want(queued, Some(2));
    assert_eq!(bench.plan(), [Order::Stop(started)]);
    assert_eq!(bench.place(queued), Place::Absent); // has room once the thread has let go
    bench.settle();
    assert_eq!([queued, wanted].map(|unit| bench.place(unit)), [Place::Resident; 2]);
}

#[test]
fn a_smaller_budget_stops_loads_evicts_and_refuses() {
    let (mut bench, [idle, pinned]) = with_residents(30, [5, 5]);
    assert!(bench.ledger.pin(pinned) && bench.model.pin(pinned));
    let [started, queued, later] = [6, 7, 4].map(|bytes| bench.add(bytes));
    for (unit, rank) in [(started, 1), (queued, 2), (later, 3)] {
        bench.want(unit, Some(rank));
    }
    bench.plan();
    assert_eq!(bench.start(), Some(started));
    bench.run(Operation::Budget(Some(6)));
    assert_eq!(bench.plan(), [Order::Evict(idle), Order::Stop(started), Order::Refuse(queued)]);
    assert_eq!(bench.place(later), Place::Absent);
    bench.ledger.unpin(pinned);
    bench.model.unpin(pinned);
    bench.settle();
    assert_eq!([started, pinned].map(|unit| bench.place(unit)), [Place::Resident, Place::Absent]);
    bench.want(started, None);
    bench.settle();
    assert_eq!([started, later].map(|unit| bench.place(unit)), [Place::Absent, Place::Resident]);
}

#[test]
fn a_load_that_gets_no_thread_is_forgotten_with_its_unit() {
    let mut bench = Bench::new(Some(10));
    let unit = bench.add(5);
    bench.want(unit, Some(0));
    bench.plan();
    bench.run(Operation::Retire(0));
    assert_eq!(bench.plan(), [Order::Forget(unit)]);
    let next = bench.add(5);
    assert_eq!(next.id, unit.id);
    assert_ne!(next, unit);
    bench.want(unit, Some(0)); // says nothing of its successor
    assert_eq!(bench.plan(), []);
    assert_eq!(bench.place(next), Place::Absent);
}
