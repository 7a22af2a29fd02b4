//! What the tests of a residency share: memory that is counted where it is taken, sources that do what a test says, and
//! an owner that lets callers wait for a unit.

mod desk;
#[cfg(not(shuttle))]
mod faults;
#[cfg(shuttle)]
mod interleavings;
#[cfg(not(shuttle))]
mod stress;
#[cfg(not(shuttle))]
mod tiers;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::policy::{Policy, UnitId};
use super::sync::AtomicBool;
use super::{Event, Residency, Room, Source, Unit};
use crate::error::Result;

/// What a policy was told.
#[derive(Default)]
pub(super) struct Told {
    /// The resident units, the one asked for longest ago first.
    pub(super) recency: Vec<UnitId>,
    /// Units that are gone for good.
    pub(super) forgotten: Vec<UnitId>,
}

/// Evicts what was asked for longest ago, and shows what it was told.
#[derive(Default)]
pub(super) struct LeastRecent(pub(super) Arc<Mutex<Told>>);

impl Policy for LeastRecent {
    fn requested(&mut self, unit: UnitId) {
        let recency = &mut self.0.lock().unwrap().recency;
        if let Some(index) = recency.iter().position(|other| *other == unit) {
            recency[index..].rotate_left(1);
        }
    }

    fn admitted(&mut self, unit: UnitId, _bytes: u64) {
        let recency = &mut self.0.lock().unwrap().recency;
        assert!(!recency.contains(&unit), "expected a unit that was not resident");
        recency.push(unit);
    }

    fn removed(&mut self, unit: UnitId) {
        let recency = &mut self.0.lock().unwrap().recency;
        let index = recency.iter().position(|other| *other == unit).expect("a resident unit");
        recency.remove(index);
    }

    fn forgotten(&mut self, unit: UnitId) {
        let told = &mut self.0.lock().unwrap();
        assert!(!told.recency.contains(&unit), "expected a unit that is not resident");
        told.forgotten.push(unit);
    }

    fn victim(&mut self, may: &mut dyn FnMut(UnitId) -> bool) -> Option<UnitId> {
        self.0.lock().unwrap().recency.iter().copied().find(|unit| may(*unit))
    }
}

/// Counts memory from before it is taken until after it is given back.
pub(super) struct Meter {
    limit: u64,
    now: AtomicU64,
    most: AtomicU64,
}

impl Meter {
    pub(super) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, now: AtomicU64::new(0), most: AtomicU64::new(0) })
    }

    pub(super) fn take(self: &Arc<Self>, bytes: u64) -> Taken {
        let now = self.now.fetch_add(bytes, Ordering::SeqCst) + bytes;
        self.most.fetch_max(now, Ordering::SeqCst);
        Taken { meter: self.clone(), bytes }
    }

    pub(super) fn now(&self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }

    /// Nothing is in memory, and never was more than the limit.
    pub(super) fn check(&self) {
        assert_eq!(self.now(), 0, "everything is given back");
        let most = self.most.load(Ordering::SeqCst);
        assert!(most <= self.limit, "expected at most {} bytes, found {most}", self.limit);
    }
}

/// Bytes that a meter counts.
pub(super) struct Taken {
    meter: Arc<Meter>,
    bytes: u64,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.meter.now.fetch_sub(self.bytes, Ordering::SeqCst);
    }
}

/// A source that does what a function says.
pub(super) struct Script<F> {
    bytes: u64,
    load: F,
}

impl<V, F: Fn(Room, &AtomicBool) -> Result<V> + Send + Sync> Source<V> for Script<F> {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn load(&self, room: Room, stop: &AtomicBool) -> Result<V> {
        (self.load)(room, stop)
    }
}

/// A residency with an eviction policy and nobody to be notified.
pub(super) fn residency<V: Send + Sync + 'static>(budget: u64) -> Residency<V> {
    Residency::new(Some(budget), Box::<LeastRecent>::default(), || {})
}

/// A unit whose source does what a function says.
pub(super) fn add<V: Send + Sync + 'static>(
    residency: &Residency<V>,
    bytes: u64,
    load: impl Fn(Room, &AtomicBool) -> Result<V> + Send + Sync + 'static,
) -> Unit {
    residency.add(Arc::new(Script { bytes, load })).unwrap()
}

/// A unit whose value is its counted memory and nothing else.
pub(super) fn add_plain(residency: &Residency<Taken>, bytes: u64, meter: &Arc<Meter>) -> Unit {
    let meter = meter.clone();
    add(residency, bytes, move |_room, _stop| Ok(meter.take(bytes)))
}

/// Waits for the end of a unit's load. Returns all events up to then.
pub(super) fn wait_for<V: Send + Sync + 'static>(residency: &Residency<V>, unit: Unit) -> Vec<Event> {
    let mut events = Vec::new();
    let ends = |event: &Event| matches!(event, Event::Loaded(of, _) | Event::Failed(of, _) if *of == unit);
    while !events.iter().any(ends) {
        events.extend(residency.wait_for_events());
    }
    events
}
