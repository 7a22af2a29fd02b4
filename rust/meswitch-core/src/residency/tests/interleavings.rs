//! Small scenes of a few threads, each played in thousands of orders. A scene in which a thread waits for ever fails.

use std::collections::BTreeSet;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::mpsc::channel;
use shuttle::thread;
use shuttle::{Config, Runner};

use super::desk::Desk;
use super::{Meter, Script, Taken, add, add_plain, residency, wait_for};
use crate::error::Error;
use crate::residency::{Event, Residency, Room, Unit, sync::AtomicBool};

/// Orders that each of two ways to choose them plays.
const ORDERS: usize = 3000;
/// The most preemptions at places that matter, of which the one way has as many as it can.
const PREEMPTIONS: usize = 3;

const BUDGET: u64 = 10;

fn play(scene: fn()) {
    let mut config = Config::new();
    config.stack_size = 1 << 18;
    Runner::new(RandomScheduler::new(ORDERS), config.clone()).run(scene);
    Runner::new(PctScheduler::new(PREEMPTIONS, ORDERS), config).run(scene);
}

fn is_loaded(events: &[Event], unit: Unit) -> bool {
    matches!(events.last(), Some(Event::Loaded(last, _)) if *last == unit)
}

/// A budget with a unit that is resident and wanted no more.
fn with_resident(bytes: u64) -> (Arc<Residency<Taken>>, Arc<Meter>, Unit) {
    let (residency, meter) = (Arc::new(residency(BUDGET)), Meter::new(BUDGET));
    let unit = add_plain(&residency, bytes, &meter);
    residency.want(unit, Some(0));
    assert!(is_loaded(&wait_for(&residency, unit), unit));
    residency.want(unit, None);
    (residency, meter, unit)
}

#[test]
fn two_requests_share_room_for_one() {
    play(|| {
        let (residency, meter) = (Arc::new(residency(BUDGET)), Meter::new(BUDGET));
        let mut threads = Vec::new();
        for (bytes, rank) in [(7, 1), (8, 2)] {
            let (residency, unit) = (residency.clone(), add_plain(&residency, bytes, &meter));
            threads.push(thread::spawn(move || residency.want(unit, Some(rank))));
        }
        let mut served = BTreeSet::new();
        while served.len() < 2 {
            for event in residency.wait_for_events() {
                let Event::Loaded(unit, _) = event else { continue };
                let Some(lease) = residency.pin(unit) else { continue }; // evicted again, and still wanted
                residency.want(unit, None);
                served.insert(unit);
                threads.push(thread::spawn(move || drop(lease)));
            }
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        drop(residency);
        meter.check();
    });
}

#[test]
fn a_lease_ends_while_its_unit_is_retired_and_its_room_is_wanted() {
    play(|| {
        let (residency, meter, old) = with_resident(7);
        let new = add_plain(&residency, 8, &meter);
        let lease = residency.pin(old).unwrap();
        let threads = [
            thread::spawn(move || drop(lease)),
            thread::spawn({
                let residency = residency.clone();
                move || residency.want(new, Some(1))
            }),
            thread::spawn({
                let residency = residency.clone();
                move || residency.retire(old)
            }),
            thread::spawn({
                let residency = residency.clone();
                move || {
                    if let Some(lease) = residency.pin(old) {
                        assert_eq!(lease.bytes, 7);
                    }
                }
            }),
        ];
        assert!(is_loaded(&wait_for(&residency, new), new));
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(residency.place(old), None);
        assert_eq!(residency.snapshot().used, 8);
        drop(residency);
        meter.check();
    });
}

#[test]
fn a_load_that_panics_leaves_its_memory_to_another_thread() {
    play(|| {
        let (residency, meter) = (Arc::new(residency(BUDGET)), Meter::new(BUDGET));
        let (of, failed) = (meter.clone(), AtomicBool::new(false));
        let unit = add(&residency, BUDGET, move |room, _stop| {
            let memory = (of.take(BUDGET), room);
            if failed.swap(true, Ordering::SeqCst) {
                return Ok(memory.0);
            }
            thread::spawn(move || drop(memory));
            resume_unwind(Box::new("with memory that another thread has"))
        });
        residency.want(unit, Some(0));
        let events = wait_for(&residency, unit);
        assert!(matches!(events[..], [Event::Failed(_, Error::Panic(_))]), "{events:?}");
        residency.want(unit, Some(0));
        assert!(is_loaded(&wait_for(&residency, unit), unit));
        drop(residency);
        meter.check();
    });
}

#[test]
fn a_residency_ends_during_a_load() {
    play(|| {
        let (residency, meter, unit) = with_resident(4);
        let lease = residency.pin(unit).unwrap();
        let (of, (started, starts)) = (meter.clone(), channel());
        let endless = add(&residency, 6, move |_room, stop| {
            let taken = of.take(6);
            started.send(()).unwrap();
            while !stop.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            Ok(taken)
        });
        let threads = [
            thread::spawn({
                let residency = residency.clone();
                move || residency.want(endless, Some(0))
            }),
            thread::spawn(move || drop(lease)),
        ];
        starts.recv().unwrap();
        drop(residency);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        meter.check();
    });
}

#[test]
fn a_hint_gives_way_to_a_demand() {
    play(|| {
        let (residency, meter, idle) = with_resident(5);
        let of = meter.clone();
        let hinted = add(&residency, 5, move |_room, stop| {
            let taken = of.take(5);
            thread::yield_now();
            if stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(taken) }
        });
        let wanted = add_plain(&residency, 6, &meter);
        let threads = [
            thread::spawn({
                let residency = residency.clone();
                move || residency.prefetch(hinted)
            }),
            thread::spawn({
                let residency = residency.clone();
                move || residency.want(wanted, Some(0))
            }),
            thread::spawn({
                let residency = residency.clone();
                move || drop(residency.pin(idle))
            }),
        ];
        let mut events = Vec::new();
        while !events.iter().any(|event| matches!(event, Event::Loaded(unit, _) if *unit == wanted)) {
            events.extend(residency.wait_for_events());
        }
        assert!(!events.iter().any(|event| matches!(event, Event::Failed(..))), "{events:?}");
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        drop(residency);
        meter.check();
    });
}

#[test]
fn whoever_waits_for_events_gets_one() {
    play(|| {
        let (residency, meter) = (Arc::new(residency(BUDGET)), Meter::new(BUDGET));
        let [first, second] = [4, 5].map(|bytes| add_plain(&residency, bytes, &meter));
        let waits = thread::spawn({
            let residency = residency.clone();
            move || assert!(!residency.wait_for_events().is_empty())
        });
        residency.want(first, Some(0));
        let _ = residency.take_events();
        residency.want(second, Some(0));
        waits.join().unwrap();
        drop(residency);
        meter.check();
    });
}

#[test]
fn a_budget_becomes_smaller_for_a_while() {
    play(|| {
        let (residency, meter, old) = with_resident(4);
        let unit = add_plain(&residency, 8, &meter);
        let threads = [
            thread::spawn({
                let residency = residency.clone();
                move || {
                    residency.set_budget(Some(3));
                    residency.set_budget(Some(BUDGET));
                }
            }),
            thread::spawn({
                let residency = residency.clone();
                move || drop(residency.pin(old))
            }),
        ];
        residency.want(unit, Some(1));
        while !is_loaded(&wait_for(&residency, unit), unit) {
            thread::yield_now(); // it was larger than the budget
            residency.want(unit, Some(1));
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        drop(residency);
        meter.check();
    });
}

#[test]
fn whoever_waits_is_told() {
    play(|| {
        let (desk, meter) = (Desk::<Taken>::new(BUDGET), Meter::new(BUDGET));
        let source = |bytes| {
            let (meter, failed) = (meter.clone(), AtomicBool::new(false));
            let load = move |_: Room, _: &AtomicBool| match failed.swap(true, Ordering::SeqCst) {
                true => Ok(meter.take(bytes)),
                false => Err(Error::Checksum("the first time".into())),
            };
            desk.add(Script { bytes, load }).unwrap()
        };
        let [first, second] = [6, 7].map(source);
        let threads: Vec<_> = [first, second, first]
            .into_iter()
            .map(|unit| {
                let desk = desk.clone();
                thread::spawn(move || drop(desk.lease(unit)))
            })
            .collect();
        desk.retire(second);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        while let Err(error) = desk.lease(first).map(drop) {
            assert!(error.contains("the first time"), "{error}");
        }
        drop(desk); // which may leave the end of the residency to one of its own threads
    });
}
