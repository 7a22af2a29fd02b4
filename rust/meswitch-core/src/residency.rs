//! What is in memory: units of data, loaded under a byte budget and let go when something else needs the room.
//!
//! A unit is whatever can be loaded by itself: the tensors of a delta directory, a packed base, one MoE expert.
//!
//! ```text
//! requests ── ask, want, pin ──> Residency ── Source::load ──> values     on threads of its own
//!   events <── loaded, failed, evicted ──┘        each holds a Room: its bytes of the budget
//! ```
//!
//! Who needs a unit says so with [`Residency::want`] and a rank; it is loaded in the background as soon as there is room.
//! [`Residency::pin`] gives a [`Lease`] of a resident unit, which stays until the lease ends. What leaves is
//! dropped here and reported; its bytes count until its memory is given back, which is when its [`Room`] is dropped.
//!
//! A second residency, over the memory of a device, has sources that lease from the first.
//!
//! # Threads
//! Every method may be called from any thread and returns without waiting for a load. One lock is held for the time of a
//! few look-ups; no value is loaded or dropped, and nothing of the caller is called, while it is held.

mod ledger;
pub mod policy;
mod sync;
pub mod trace;
mod workers;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};

pub use ledger::{Counters, Place, Rank, Unit};
use ledger::{Ledger, Order};
use policy::Policy;
use sync::{AtomicBool, Condvar, Mutex, MutexGuard, Ordering, PoisonError};

use crate::error::{Error, Result};

/// Where the value of a unit comes from.
pub trait Source<V>: Send + Sync {
    /// The memory that the value takes, known before any of it is read.
    fn bytes(&self) -> u64;

    /// Reads the value. Whoever owns its memory must keep `room` until that is given back. A load should end
    /// soon, with [`Error::Interrupted`], once `stop` is set.
    ///
    /// # Errors
    /// Whatever is wrong with the unit; it is reported as [`Event::Failed`].
    fn load(&self, room: Room, stop: &AtomicBool) -> Result<V>;
}

/// Something that has happened to a unit.
#[derive(Debug)]
pub enum Event {
    /// It is resident, after a load of so many seconds.
    Loaded(Unit, f64),
    /// It could not be loaded; nobody waits for it any more.
    Failed(Unit, Error),
    /// Its value was let go. Its bytes count until whoever else has the value has dropped it too.
    Evicted(Unit),
}

/// Bytes of a budget, for as long as it or a clone of it exists.
#[derive(Clone)]
pub struct Room(#[allow(dead_code, reason = "kept to be dropped")] Arc<Spoken>);

/// What a room gives back.
struct Spoken {
    unit: Unit,
    to: Weak<dyn Release>,
}

trait Release: Send + Sync {
    fn release(&self, unit: Unit);
}

impl Drop for Spoken {
    fn drop(&mut self) {
        if let Some(residency) = self.to.upgrade() {
            residency.release(self.unit);
        }
    }
}

/// A pinned unit's value. The unit is not evicted before the lease is dropped.
pub struct Lease<V> {
    unit: Unit,
    value: Arc<V>,
    shared: Arc<Shared<V>>,
}

impl<V> std::ops::Deref for Lease<V> {
    type Target = V;

    fn deref(&self) -> &V {
        &self.value
    }
}

impl<V> Drop for Lease<V> {
    fn drop(&mut self) {
        self.shared.change(|state| state.ledger.unpin(self.unit));
    }
}

/// The units of one budget. See the [module](self).
pub struct Residency<V: Send + Sync + 'static> {
    shared: Arc<Shared<V>>,
    threads: Vec<sync::thread::JoinHandle<()>>,
}

struct Shared<V> {
    state: Mutex<State<V>>,
    /// There is a load to start, or the residency is closed.
    work: Condvar,
    /// There is an event, or the residency is closed.
    happened: Condvar,
}

struct State<V> {
    ledger: Ledger,
    units: HashMap<Unit, Content<V>>,
    events: VecDeque<Event>,
    /// Whether there are events that the owner was not told of.
    untold: bool,
    closed: bool,
}

struct Content<V> {
    source: Arc<dyn Source<V>>,
    value: Option<Arc<V>>,
    stop: Option<Arc<AtomicBool>>,
}

/// How many loads run at a time. Each may read with several threads.
const LOADS: usize = 2;

impl<V: Send + Sync + 'static> Residency<V> {
    /// A residency of at most `budget` bytes, without a bound where that is `None`. `notify` is called when there are
    /// events to take, on a thread that does nothing else.
    pub fn new(budget: Option<u64>, policy: Box<dyn Policy>, notify: impl Fn() + Send + Sync + 'static) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                ledger: Ledger::new(budget, policy),
                units: HashMap::new(),
                events: VecDeque::new(),
                untold: false,
                closed: false,
            }),
            work: Condvar::new(),
            happened: Condvar::new(),
        });
        let mut threads: Vec<_> = (0..LOADS).map(|_| workers::start_loading(shared.clone())).collect();
        threads.push(workers::start_telling(shared.clone(), notify));
        Self { shared, threads }
    }

    /// A new unit; nothing is loaded yet.
    ///
    /// # Errors
    /// [`Error::Budget`] where it could never be loaded.
    pub fn add(&self, source: Arc<dyn Source<V>>) -> Result<Unit> {
        let bytes = source.bytes();
        let mut state = self.shared.lock();
        if let Some(budget) = state.ledger.budget().filter(|budget| bytes > *budget) {
            return Err(Error::Budget { bytes, budget });
        }
        let unit = state.ledger.add(bytes);
        state.units.insert(unit, Content { source, value: None, stop: None });
        Ok(unit)
    }

    /// Counts a request for a unit. Returns whether the unit is resident.
    pub fn ask(&self, unit: Unit) -> bool {
        self.shared.lock().ledger.ask(unit)
    }

    /// Says that requests wait for a unit, the first of them with that rank; `None` where none waits any more.
    ///
    /// # Errors
    /// [`Error::Budget`] where the unit is larger than the budget, which may have changed since it was added.
    pub fn want(&self, unit: Unit, rank: Option<Rank>) -> Result<()> {
        self.shared.change(|state| {
            let bytes = state.ledger.bytes(unit);
            match state.ledger.budget().filter(|budget| rank.is_some() && bytes > *budget) {
                Some(budget) => Err(Error::Budget { bytes, budget }),
                None => {
                    state.ledger.want(unit, rank);
                    Ok(())
                }
            }
        })
    }

    /// Loads a unit where there is room for it, evicting only what nobody waits for.
    pub fn prefetch(&self, unit: Unit) {
        self.shared.change(|state| state.ledger.hint(unit));
    }

    /// The value of a resident unit, which stays until the lease is dropped; `None` where it is not resident.
    #[must_use]
    pub fn pin(&self, unit: Unit) -> Option<Lease<V>> {
        self.shared.change(|state| {
            let value = state.units.get(&unit)?.value.clone()?;
            state.ledger.pin(unit).then(|| Lease { unit, value, shared: self.shared.clone() })
        })
    }

    /// Forgets a unit as soon as its last lease ends. It is not loaded again.
    pub fn retire(&self, unit: Unit) {
        self.shared.change(|state| {
            state.ledger.retire(unit);
            if state.ledger.place(unit).is_none() {
                state.units.remove(&unit);
            }
        });
    }

    /// Changes the budget. Where it becomes smaller, what nobody uses leaves now, and what is pinned when its lease ends;
    /// nothing is loaded before there is room under the new one.
    pub fn set_budget(&self, budget: Option<u64>) {
        self.shared.change(|state| state.ledger.set_budget(budget));
    }

    /// Where a unit is; `None` where it was retired and is gone.
    #[must_use]
    pub fn place(&self, unit: Unit) -> Option<Place> {
        self.shared.lock().ledger.place(unit)
    }

    /// What has happened since the start, and the state of the budget.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let state = self.shared.lock();
        let ledger = &state.ledger;
        Snapshot { budget: ledger.budget(), used: ledger.used(), pinned: ledger.pinned(), counters: ledger.counters() }
    }

    /// The events since the last call, in the order in which they happened.
    #[must_use]
    pub fn take_events(&self) -> Vec<Event> {
        self.shared.lock().events.drain(..).collect()
    }

    /// As [`Residency::take_events`], but waits until there is one.
    #[must_use]
    pub fn wait_for_events(&self) -> Vec<Event> {
        let mut state = self.shared.lock();
        while state.events.is_empty() {
            state = self.shared.happened.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.events.drain(..).collect()
    }
}

/// The state of a residency at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The most bytes that may be in memory.
    pub budget: Option<u64>,
    /// Bytes that are spoken for: of units that are loading, resident, or not given back yet.
    pub used: u64,
    /// Of these, bytes of units with a lease.
    pub pinned: u64,
    /// What has happened since the start.
    pub counters: Counters,
}

impl<V: Send + Sync + 'static> Drop for Residency<V> {
    /// Stops loads that are under way and waits for their end.
    fn drop(&mut self) {
        let values: Vec<_> = {
            let mut state = self.shared.lock();
            state.closed = true;
            for content in state.units.values() {
                if let Some(stop) = &content.stop {
                    stop.store(true, Ordering::Relaxed);
                }
            }
            state.units.drain().collect()
        };
        self.shared.work.notify_all();
        self.shared.happened.notify_all();
        drop(values);
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // a load that panics is reported, and ends no thread
        }
    }
}

impl<V> Shared<V> {
    /// A thread that panicked while it held the lock did so in a policy; the ledger is whole before and after each call.
    fn lock(&self) -> MutexGuard<'_, State<V>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes something, and carries out what follows from it.
    fn change<T>(&self, change: impl FnOnce(&mut State<V>) -> T) -> T {
        let mut state = self.lock();
        let result = change(&mut state);
        let dropped = state.follow();
        let (loads, untold) = (state.ledger.has_loads(), state.untold);
        drop(state);
        if loads {
            self.work.notify_all();
        }
        if untold {
            self.happened.notify_all();
        }
        drop(dropped); // gives rooms back, which comes here again
        result
    }
}

impl<V> State<V> {
    fn report(&mut self, event: Event) {
        self.events.push_back(event);
        self.untold = true;
    }

    /// Carries out what the ledger says is to be done. Returns the values to be dropped once the lock is not held.
    fn follow(&mut self) -> Vec<Arc<V>> {
        let mut orders = Vec::new();
        self.ledger.plan(&mut orders);
        let mut dropped = Vec::new();
        for order in orders {
            match order {
                Order::Stop(unit) => {
                    if let Some(stop) = self.units.get(&unit).and_then(|content| content.stop.as_ref()) {
                        stop.store(true, Ordering::Relaxed);
                    }
                }
                Order::Evict(unit) => {
                    dropped.extend(self.units.get_mut(&unit).and_then(|content| content.value.take()));
                    self.report(Event::Evicted(unit));
                }
            }
        }
        dropped
    }
}

impl<V: Send + Sync + 'static> Release for Shared<V> {
    fn release(&self, unit: Unit) {
        self.change(|state| {
            state.ledger.released(unit);
            if state.ledger.place(unit).is_none() {
                state.units.remove(&unit);
            }
        });
    }
}
