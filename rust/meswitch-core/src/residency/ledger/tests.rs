//! Drawn operations against a plain model, and the rules one by one.

mod harness;
mod model;

use proptest::prelude::*;

use super::{Counters, Order, Place, Unit};
use harness::{Harness, Operation, operations};
use model::{Known, Model};

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
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 512 }))]

    #[test]
    fn a_ledger_is_its_model(budget in prop::option::weighted(0.9, 0u64..=24), operations in operations()) {
        let mut harness = Harness::new(budget);
        let mut asked = 0;
        for operation in operations {
            let used = harness.ledger.used();
            harness.run(operation);
            harness.plan();
            if !matches!(operation, Operation::Budget(_)) {
                let bound = harness.ledger.budget().map_or(u64::MAX, |budget| budget.max(used));
                prop_assert!(harness.ledger.used() <= bound, "a budget is not exceeded, but by becoming smaller");
            }
            asked += u64::from(matches!(operation, Operation::Ask(_)) && !harness.units.is_empty());
        }
        let Counters { hits, misses, .. } = harness.ledger.counters();
        prop_assert_eq!(hits + misses, asked);

        // Once nothing is pinned and loads end, requests are served in their order.
        for unit in std::mem::take(&mut harness.leases) {
            harness.ledger.unpin(unit);
            harness.model.unpin(unit);
        }
        loop {
            harness.settle();
            let wanted = harness.wanted();
            let mut bytes = 0;
            for unit in &wanted {
                bytes += harness.ledger.bytes(*unit);
                if !harness.ledger.fits(bytes) {
                    break;
                }
                prop_assert_eq!(harness.place(*unit), Place::Resident);
            }
            let Some(first) = wanted.first() else { break };
            prop_assert_eq!(harness.place(*first), Place::Resident);
            harness.want(*first, None);
        }
        for unit in harness.units.clone() {
            harness.ledger.retire(unit);
            harness.model.retire(unit);
        }
        harness.settle();
        prop_assert_eq!(harness.ledger.used(), 0);
        prop_assert!(harness.model.units.is_empty());
    }
}

/// A ledger with resident units of such sizes.
fn with_residents<const N: usize>(budget: u64, bytes: [u64; N]) -> (Harness, [Unit; N]) {
    let mut harness = Harness::new(Some(budget));
    let units = bytes.map(|bytes| harness.add(bytes));
    for unit in units {
        harness.want(unit, Some(0));
        harness.settle();
        assert_eq!(harness.place(unit), Place::Resident);
        harness.want(unit, None);
    }
    harness.plan();
    (harness, units)
}

#[test]
fn small_units_do_not_keep_a_large_one_out() {
    let (mut harness, [pinned]) = with_residents(10, [4]);
    assert!(harness.ledger.pin(pinned) && harness.model.pin(pinned));
    let [large, small] = [8, 2].map(|bytes| harness.add(bytes));
    harness.want(small, Some(2));
    harness.want(large, Some(1));
    harness.settle();
    assert_eq!([large, small].map(|unit| harness.place(unit)), [Place::Absent; 2]);
    harness.want(large, None); // the request went away
    harness.settle();
    assert_eq!(harness.place(small), Place::Resident);
}

#[test]
fn an_earlier_request_takes_room_of_a_later_one_and_never_the_other_way() {
    let (mut harness, [held]) = with_residents(10, [8]);
    harness.want(held, Some(5));
    let other = harness.add(8);
    for rank in [6, 5] {
        harness.want(other, Some(rank));
        assert_eq!(harness.plan(), []);
    }
    harness.want(other, Some(4));
    assert_eq!(harness.plan(), [Order::Evict(held)]);
    harness.settle();
    assert_eq!([other, held].map(|unit| harness.place(unit)), [Place::Resident, Place::Absent]);
}

#[test]
fn nothing_is_evicted_where_that_is_not_enough() {
    let (mut harness, [pinned, idle]) = with_residents(10, [6, 4]);
    assert!(harness.ledger.pin(pinned) && harness.model.pin(pinned));
    let large = harness.add(5);
    harness.want(large, Some(0));
    assert_eq!(harness.plan(), []);
    assert_eq!(harness.place(idle), Place::Resident);
}

#[test]
fn a_hint_takes_idle_units_and_nothing_else() {
    let (mut harness, [idle, held]) = with_residents(10, [4, 6]);
    harness.want(held, Some(9));
    let [small, large] = [4, 5].map(|bytes| harness.add(bytes));
    for unit in [large, small] {
        harness.run(Operation::Hint(unit.id as usize));
    }
    assert_eq!(harness.plan(), [Order::Evict(idle)]);
    harness.settle();
    assert_eq!([small, large, held].map(|unit| harness.place(unit)), [Place::Resident, Place::Absent, Place::Resident]);
}

#[test]
fn a_demand_joins_the_load_of_a_hint_and_overtakes_other_hints() {
    let mut harness = Harness::new(Some(30));
    let [first, second, third] = [10; 3].map(|bytes| harness.add(bytes));
    for choice in 0..3 {
        harness.run(Operation::Hint(choice));
    }
    harness.plan();
    assert_eq!(harness.start(), Some(first));
    harness.want(third, Some(7));
    harness.want(first, Some(8));
    harness.plan();
    assert_eq!(harness.start(), Some(third));
    assert_eq!(harness.start(), Some(second));
    assert_eq!(harness.start(), None); // the first is being loaded, once
    assert_eq!(harness.ledger.counters().stopped, 0);
}

#[test]
fn a_demand_takes_the_room_of_loads_that_nobody_waits_for() {
    let mut harness = Harness::new(Some(20));
    let [started, queued, wanted] = [10; 3].map(|bytes| harness.add(bytes));
    harness.run(Operation::Hint(0));
    harness.run(Operation::Hint(1));
    harness.plan();
    assert_eq!(harness.start(), Some(started));
    harness.want(wanted, Some(1));
    assert_eq!(harness.plan(), []); // nothing was read for the other
    assert_eq!([queued, wanted].map(|unit| harness.place(unit)), [Place::Absent, Place::Loading]);
    harness.want(queued, Some(2));
    assert_eq!(harness.plan(), [Order::Stop(started)]);
    assert_eq!(harness.place(queued), Place::Absent); // has room once the thread has let go
    harness.settle();
    assert_eq!([queued, wanted].map(|unit| harness.place(unit)), [Place::Resident; 2]);
}

#[test]
fn a_smaller_budget_stops_loads_evicts_and_refuses() {
    let (mut harness, [idle, pinned]) = with_residents(30, [5, 5]);
    assert!(harness.ledger.pin(pinned) && harness.model.pin(pinned));
    let [started, queued, later] = [6, 7, 4].map(|bytes| harness.add(bytes));
    for (unit, rank) in [(started, 1), (queued, 2), (later, 3)] {
        harness.want(unit, Some(rank));
    }
    harness.plan();
    assert_eq!(harness.start(), Some(started));
    harness.run(Operation::Budget(Some(6)));
    assert_eq!(harness.plan(), [Order::Evict(idle), Order::Stop(started), Order::Refuse(queued)]);
    assert_eq!(harness.place(later), Place::Absent);
    harness.ledger.unpin(pinned);
    harness.model.unpin(pinned);
    harness.settle();
    assert_eq!([started, pinned].map(|unit| harness.place(unit)), [Place::Resident, Place::Absent]);
    harness.want(started, None);
    harness.settle();
    assert_eq!([started, later].map(|unit| harness.place(unit)), [Place::Absent, Place::Resident]);
}

#[test]
fn a_load_that_gets_no_thread_is_forgotten_with_its_unit() {
    let mut harness = Harness::new(Some(10));
    let unit = harness.add(5);
    harness.want(unit, Some(0));
    harness.plan();
    harness.run(Operation::Retire(0));
    assert_eq!(harness.plan(), [Order::Forget(unit)]);
    let next = harness.add(5);
    assert_eq!(next.id, unit.id);
    assert_ne!(next, unit);
    harness.want(unit, Some(0)); // says nothing of its successor
    assert_eq!(harness.plan(), []);
    assert_eq!(harness.place(next), Place::Absent);
}
