//! Sources that fail in every way, and what is dropped when, and by whom.

use std::any::Any;
use std::io;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;

use super::{LeastRecent, Meter, Script, Taken, add, add_plain, residency, wait_for};
use crate::error::Error;
use crate::residency::{Event, Place, Residency, Room};

const BUDGET: u64 = 100;

/// Loads a unit that needs the whole budget, so that nothing else may be in memory or reserved.
fn the_whole_budget_is_free(residency: &Residency<Taken>, meter: &Arc<Meter>) {
    let unit = add_plain(residency, BUDGET, meter);
    residency.want(unit, Some(0));
    assert!(matches!(wait_for(residency, unit).last(), Some(Event::Loaded(..))));
    residency.retire(unit);
}

/// Waits for a load to be stopped.
fn wait_for_stop(stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        thread::yield_now();
    }
}

#[test]
fn every_error_is_reported_and_the_next_load_works() {
    let text = || String::from("of a test");
    let errors: [fn(String) -> Error; 14] = [
        Error::Format,
        Error::Checksum,
        Error::Checkpoint,
        Error::Architecture,
        Error::BaseMismatch,
        Error::NonFinite,
        Error::Backend,
        Error::Argument,
        Error::Output,
        |_| Error::Budget { bytes: 2, budget: 1 },
        Error::Panic,
        |_| Error::Interrupted,
        |text| Error::Io { path: text.into(), source: io::Error::from_raw_os_error(libc::EIO) },
        |text| Error::Io { path: text.into(), source: io::ErrorKind::OutOfMemory.into() },
    ];
    let (residency, meter) = (residency(BUDGET), Meter::new(BUDGET));
    for error in errors {
        let (attempts, of) = (AtomicUsize::new(0), meter.clone());
        let unit = add(&residency, BUDGET, move |_room, _stop| match attempts.fetch_add(1, Ordering::SeqCst) {
            0 => Err(error(text())),
            1 => {
                let _taken = of.take(BUDGET); // fails only after it has taken its memory
                Err(error(text()))
            }
            _ => Ok(of.take(BUDGET)),
        });
        for _ in 0..2 {
            residency.want(unit, Some(1));
            let events = wait_for(&residency, unit);
            let Some(Event::Failed(_, found)) = events.last() else { panic!("expected an error, found {events:?}") };
            assert_eq!(format!("{found:?}"), format!("{:?}", error(text())));
            assert!(residency.pin(unit).is_none());
        }
        residency.want(unit, Some(1));
        assert!(matches!(wait_for(&residency, unit).last(), Some(Event::Loaded(..))));
        residency.retire(unit);
    }
    let counters = residency.snapshot().counters;
    assert_eq!((counters.failed, counters.loads), (28, 14));
    drop(residency);
    meter.check();
}

#[test]
fn a_panic_is_reported_with_its_text_and_ends_no_thread() {
    let (residency, meter) = (residency(BUDGET), Meter::new(BUDGET));
    let payloads: [fn() -> Box<dyn Any + Send>; 3] =
        [|| Box::new("a slice"), || Box::new(String::from("a string")), || Box::new(7)];
    for (payload, text) in payloads.into_iter().zip(["a slice", "a string", ""]).cycle().take(7) {
        let of = meter.clone();
        let unit = add(&residency, BUDGET, move |_room, _stop| {
            let _taken = of.take(BUDGET);
            resume_unwind(payload()) // as a panic, without a message on the terminal
        });
        residency.want(unit, Some(0));
        let events = wait_for(&residency, unit);
        assert!(matches!(events.last(), Some(Event::Failed(_, Error::Panic(found))) if found == text), "{events:?}");
    }
    the_whole_budget_is_free(&residency, &meter);
    drop(residency);
    meter.check();
}

#[test]
fn a_load_that_is_stopped_makes_room_however_it_ends() {
    let ends: [fn(Taken) -> crate::Result<Taken>; 3] =
        [|_| Err(Error::Interrupted), Ok, |_| resume_unwind(Box::new("while it was stopped"))];
    for end in ends {
        let (residency, meter) = (residency(BUDGET), Meter::new(BUDGET));
        let ((started, starts), of) = (channel(), meter.clone());
        let hinted = add(&residency, 60, move |_room, stop| {
            let taken = of.take(60);
            started.send(()).unwrap();
            wait_for_stop(stop);
            end(taken)
        });
        residency.prefetch(hinted);
        starts.recv().unwrap();
        let wanted = add_plain(&residency, 60, &meter);
        residency.want(wanted, Some(0));
        let events = wait_for(&residency, wanted);
        assert!(matches!(events[..], [Event::Loaded(unit, _)] if unit == wanted), "nobody hears of it: {events:?}");
        assert_eq!(residency.place(hinted), Some(Place::Absent));
        let counters = residency.snapshot().counters;
        assert_eq!((counters.stopped, counters.failed, counters.loads), (1, 0, 1));
        drop(residency);
        meter.check();
    }
}

#[test]
fn a_demand_joins_a_load_that_runs() {
    let (residency, meter) = (residency(BUDGET), Meter::new(BUDGET));
    let ((started, starts), (go, gone), of) = (channel(), channel::<()>(), meter.clone());
    let gone = Mutex::new(gone);
    let unit = add(&residency, 60, move |_room, stop| {
        started.send(()).unwrap();
        gone.lock().unwrap().recv().unwrap();
        assert!(!stop.load(Ordering::Relaxed));
        Ok(of.take(60))
    });
    residency.prefetch(unit);
    starts.recv().unwrap();
    residency.want(unit, Some(3));
    residency.prefetch(unit);
    let other = add_plain(&residency, 60, &meter);
    residency.want(other, Some(4)); // later than the other's request: waits
    go.send(()).unwrap();
    assert!(matches!(wait_for(&residency, unit)[..], [Event::Loaded(..)]));
    assert!(starts.try_recv().is_err(), "it is loaded once");
    residency.want(unit, None);
    let events = wait_for(&residency, other);
    assert!(matches!(events[..], [Event::Evicted(out), Event::Loaded(..)] if out == unit), "{events:?}");
    drop(residency);
    meter.check();
}

#[test]
fn bytes_count_until_whoever_shares_the_memory_has_dropped_it() {
    type Shared = Arc<(Taken, Room)>;
    let (residency, meter) = (residency::<Shared>(BUDGET), Meter::new(BUDGET));
    let add_shared = |bytes| {
        let meter = meter.clone();
        add(&residency, bytes, move |room, _stop| Ok(Arc::new((meter.take(bytes), room))))
    };
    let [first, second] = [60, 50].map(add_shared);
    residency.want(first, Some(0));
    wait_for(&residency, first);
    let exported = Shared::clone(&residency.pin(first).unwrap());
    residency.want(first, None);
    residency.want(second, Some(1));
    let events = residency.wait_for_events();
    assert!(matches!(events[..], [Event::Evicted(unit)] if unit == first), "{events:?}");
    assert_eq!([first, second].map(|unit| residency.place(unit)), [Some(Place::Leaving), Some(Place::Absent)]);
    assert_eq!(residency.snapshot().used, 60);
    drop(exported);
    wait_for(&residency, second);
    assert_eq!(residency.snapshot().used, 50);
    drop(residency);
    meter.check();
}

#[test]
fn dropping_a_residency_stops_loads_and_leaves_leases() {
    let (residency, meter) = (residency(BUDGET), Meter::new(BUDGET));
    let [leased, idle] = [20, 30].map(|bytes| add_plain(&residency, bytes, &meter));
    for unit in [leased, idle] {
        residency.want(unit, Some(0));
        wait_for(&residency, unit);
    }
    let leases = [residency.pin(leased), residency.pin(leased)];
    let ((started, starts), of) = (channel(), meter.clone());
    let endless = add(&residency, 40, move |_room, stop| {
        let taken = of.take(40);
        started.send(()).unwrap();
        wait_for_stop(stop);
        Ok(taken)
    });
    residency.want(endless, Some(0));
    starts.recv().unwrap();
    drop(residency);
    assert_eq!(meter.now(), 20);
    drop(leases);
    meter.check();
}

#[test]
fn a_trace_ends_with_its_residency_whatever_leases_there_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace.jsonl");
    let (residency, meter) = (residency(BUDGET), Meter::new(BUDGET));
    residency.start_trace(&path, "of a test").unwrap();
    let unit = add_plain(&residency, 10, &meter);
    residency.ask(unit);
    residency.want(unit, Some(0));
    wait_for(&residency, unit);
    let lease = residency.pin(unit).unwrap();
    drop(residency);
    assert_eq!(std::fs::read_to_string(path).unwrap().lines().count(), 3); // start, request, load
    drop(lease);
    meter.check();
}

/// Does something when it is dropped.
struct OnDrop(Box<dyn Fn() + Send + Sync>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        (self.0)();
    }
}

#[test]
fn sources_and_values_may_use_the_residency_while_they_are_dropped() {
    let residency = Arc::new(residency::<OnDrop>(BUDGET));
    let (dropped, drops) = channel();
    let of = Arc::downgrade(&residency);
    let look = move || {
        let _ = of.upgrade().map(|residency| residency.snapshot());
        dropped.send(()).unwrap();
    };
    let source = |bytes| {
        let (look, kept) = (look.clone(), OnDrop(Box::new(look.clone())));
        let load = move |_room: Room, _stop: &AtomicBool| {
            let _ = &kept;
            Ok(OnDrop(Box::new(look.clone())))
        };
        Arc::new(Script { bytes, load })
    };
    assert!(matches!(residency.add(source(101)), Err(Error::Budget { bytes: 101, budget: BUDGET })));
    drops.recv().unwrap();

    let [absent, resident, left] = [10, 20, 30].map(|bytes| residency.add(source(bytes)).unwrap());
    for unit in [resident, left] {
        residency.want(unit, Some(0));
        wait_for(&residency, unit);
    }
    for (unit, count) in [(absent, 1), (resident, 2)] {
        residency.retire(unit);
        (0..count).for_each(|_| drops.recv().unwrap());
        assert_eq!(residency.place(unit), None);
    }
    drop(residency);
    assert_eq!(drops.try_iter().count(), 2);
}

#[test]
fn a_residency_may_be_dropped_by_its_own_threads() {
    // By the one that drops values.
    let last: Arc<Mutex<Option<Arc<Residency<OnDrop>>>>> = Arc::default();
    let (dropped, drops) = channel();
    let let_go = {
        let last = last.clone();
        move || {
            drop(last.lock().unwrap().take());
            dropped.send(()).unwrap();
        }
    };
    let owner = Arc::new(residency(BUDGET));
    let value = let_go.clone();
    let unit = add(&owner, 10, move |_room, _stop| Ok(OnDrop(Box::new(value.clone()))));
    owner.want(unit, Some(0));
    wait_for(&owner, unit);
    let lease = owner.pin(unit);
    owner.retire(unit);
    *last.lock().unwrap() = Some(owner);
    drop(lease);
    drops.recv().unwrap();

    // By one that loads.
    let owner = Arc::new(residency(BUDGET));
    let load = let_go.clone();
    let unit = add(&owner, 10, move |_room, _stop| {
        load();
        Ok(OnDrop(Box::new(|| {})))
    });
    let mut slot = last.lock().unwrap();
    owner.want(unit, Some(0));
    *slot = Some(owner);
    drop(slot);
    drops.recv().unwrap();

    // By the one that notifies.
    let owner = Arc::new(Residency::new(Some(BUDGET), Box::<LeastRecent>::default(), let_go));
    let unit = add(&owner, 10, |_room, _stop| Ok(OnDrop(Box::new(|| {}))));
    let mut slot = last.lock().unwrap();
    owner.want(unit, Some(0));
    *slot = Some(owner);
    drop(slot);
    drops.recv().unwrap();
}

#[test]
fn what_is_larger_than_the_budget_fails_and_lets_others_pass() {
    let (residency, meter) = (residency(BUDGET), Meter::new(BUDGET));
    let [pinned, large, small] = [40, 60, 20].map(|bytes| add_plain(&residency, bytes, &meter));
    residency.want(pinned, Some(0));
    wait_for(&residency, pinned);
    let lease = residency.pin(pinned).unwrap();
    residency.want(pinned, None);
    let blocker = add_plain(&residency, 70, &meter);
    residency.want(blocker, Some(1)); // has no room beside what is pinned
    for (unit, rank) in [(large, 2), (small, 3)] {
        residency.want(unit, Some(rank));
    }
    residency.set_budget(Some(69));
    let events = wait_for(&residency, blocker);
    assert!(matches!(events[..], [Event::Failed(_, Error::Budget { bytes: 70, budget: 69 })]), "{events:?}");
    residency.want(blocker, Some(1));
    let events = residency.wait_for_events();
    assert!(matches!(events[..], [Event::Failed(_, Error::Budget { bytes: 70, budget: 69 })]), "{events:?}");
    residency.want(large, None);
    wait_for(&residency, small);
    drop(lease);
    residency.set_budget(Some(BUDGET));
    residency.want(small, None);
    the_whole_budget_is_free(&residency, &meter);
    drop(residency);
    meter.check();
}
