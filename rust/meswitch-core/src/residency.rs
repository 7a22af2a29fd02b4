//! What is in memory: units of data, loaded under a byte budget and evicted when something else needs the room.
//!
//! A unit is whatever can be loaded by itself: the tensors of a delta directory, a packed base, one MoE expert.
//!
//! ```text
//! requests ── ask, want, pin ──> Residency ── Source::load ──> values     on threads of its own
//!   events <── loaded, failed, evicted ──┘        each keeps a Room: its bytes of the budget
//! ```
//!
//! Who needs a unit says so with [`Residency::want`] and a rank; it is loaded in the background as soon as there is room.
//! [`Residency::pin`] gives a [`Lease`] of a resident unit, which stays until the lease ends. What is evicted is reported
//! at once and dropped by a thread of the residency soon after; its bytes count until its memory is given back, which is
//! when the last clone of its [`Room`] is dropped.
//!
//! A second residency, over the memory of a device, has sources that lease from the first.
//!
//! # Example
//! ```
//! use std::sync::{Arc, atomic::AtomicBool};
//! use meswitch_core::residency::{Event, Residency, Room, Source, policy::Lru};
//!
//! struct Zeros(usize);
//!
//! impl Source<Vec<u8>> for Zeros {
//!     fn bytes(&self) -> u64 {
//!         self.0 as u64
//!     }
//!     fn load(&self, _room: Room, _stop: &AtomicBool) -> meswitch_core::Result<Vec<u8>> {
//!         Ok(vec![0; self.0]) // nobody else keeps its memory, so the residency's own room is enough
//!     }
//! }
//!
//! # fn main() -> meswitch_core::Result<()> {
//! let residency = Residency::new(Some(100), Box::<Lru>::default(), || {});
//! let first = residency.add(Arc::new(Zeros(60)))?;
//! let second = residency.add(Arc::new(Zeros(70)))?;
//!
//! residency.want(first, Some(0));
//! assert!(matches!(residency.wait_for_events()[..], [Event::Loaded(unit, _)] if unit == first));
//! let lease = residency.pin(first).expect("it is loaded, and waited for");
//! residency.want(first, None);
//! assert_eq!(lease.len(), 60);
//!
//! residency.want(second, Some(1)); // has no room before the lease ends
//! drop(lease);
//! let mut events = residency.wait_for_events();
//! while events.len() < 2 {
//!     events.extend(residency.wait_for_events());
//! }
//! assert!(matches!(events[..], [Event::Evicted(out), Event::Loaded(unit, _)] if (out, unit) == (first, second)));
//! # Ok(())
//! # }
//! ```
//!
//! # Threads
//! Every method may be called from any thread. None but [`Residency::wait_for_events`] waits for a load or for memory to
//! be given back; dropping the residency waits for its threads. One lock is held for the time of a few look-ups; of what
//! the caller gave, only the policy and [`Source::name`] are called while it is held. So a source and a value, and a clone
//! of a room, may be dropped wherever it is convenient, and may use this or another residency meanwhile.

mod ledger;
pub mod policy;
pub mod replay;
mod shared;
mod sync;
#[cfg(test)]
mod tests;
pub mod timeline;
pub mod trace;
mod workers;

use std::path::Path;
use std::sync::Arc;

pub use ledger::{Counters, Place, Rank, Unit};
use policy::Policy;
use shared::{Content, Shared};
pub use shared::{Lease, Room};
use sync::{AtomicBool, PoisonError, thread};
use trace::TraceWriter;

use crate::error::{Error, Result};

/// Where the value of a unit comes from.
pub trait Source<V>: Send + Sync {
    /// The memory that the value takes, known before any of it is read. It is asked for once.
    fn bytes(&self) -> u64;

    /// What a trace calls the unit. It must not use the residency, which asks for it under its lock.
    fn name(&self) -> &str {
        ""
    }

    /// Reads the value, on a thread of the residency; never twice at a time. A load should end soon, with
    /// [`Error::Interrupted`], once `stop` is set.
    ///
    /// The bytes count until the value is dropped. Where its memory may outlive it, since others share it, that memory
    /// must keep `room` too. Memory that a failed load took must be given back before its `room` is dropped.
    ///
    /// # Errors
    /// Whatever is wrong with the unit; it is reported as [`Event::Failed`], and so is a panic.
    fn load(&self, room: Room, stop: &AtomicBool) -> Result<V>;
}

/// Something that has happened to a unit.
#[derive(Debug)]
pub enum Event {
    /// It is resident, after a load of so many seconds. Until it is pinned it may be evicted again.
    Loaded(Unit, f64),
    /// It could not be loaded: its load failed, or it is larger than the budget now. The residency has forgotten that
    /// requests wait for it.
    Failed(Unit, Error),
    /// It was evicted. Its bytes count until its memory is given back.
    Evicted(Unit),
}

/// The units of one budget. See the [module](self).
pub struct Residency<V: Send + Sync + 'static> {
    shared: Arc<Shared<V>>,
    threads: Vec<thread::JoinHandle<()>>,
}

/// How many loads run at a time, unless the owner says otherwise. Each may read with several threads.
const LOADS: usize = 2;

impl<V: Send + Sync + 'static> Residency<V> {
    /// A residency of at most `budget` bytes, without a bound where that is `None`.
    ///
    /// `notify` is called after events have come, on a thread that does nothing else; they may have been taken
    /// meanwhile. It must not panic, nor wait for the thread that drops the residency.
    pub fn new(budget: Option<u64>, policy: Box<dyn Policy>, notify: impl Fn() + Send + Sync + 'static) -> Self {
        Self::with_loads(LOADS, budget, policy, notify)
    }

    /// [`Residency::new`] with so many loads at a time.
    pub fn with_loads(
        loads: usize,
        budget: Option<u64>,
        policy: Box<dyn Policy>,
        notify: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        let shared = Arc::new(Shared::new(budget, policy));
        let mut threads: Vec<_> = (0..loads).map(|_| workers::start_loading(shared.clone())).collect();
        threads.push(workers::start_notifying(shared.clone(), notify));
        threads.push(workers::start_discarding(shared.clone()));
        Self { shared, threads }
    }

    /// A new unit; nothing is loaded yet.
    ///
    /// # Errors
    /// [`Error::Budget`] where it is larger than the budget.
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
        let mut state = self.shared.lock();
        state.note(unit, |expert, bytes| trace::Event::Request { expert, bytes });
        state.ledger.ask(unit)
    }

    /// Writes down from now on what is asked for and what is done about it; `policy` is the name of the policy.
    ///
    /// # Errors
    /// [`Error::Io`] where there can be no such file. A later one ends the trace: [`Residency::take_trace_error`].
    pub fn start_trace(&self, path: &Path, policy: &str) -> Result<()> {
        let budget = self.shared.lock().ledger.budget();
        let trace = TraceWriter::create(path, budget, policy)?;
        let before = self.shared.lock().trace.replace(trace);
        drop(before); // which writes what is left
        Ok(())
    }

    /// The error that has ended the trace, once.
    #[must_use]
    pub fn take_trace_error(&self) -> Option<Error> {
        self.shared.lock().trace.as_ref()?.take_error()
    }

    /// Says that requests wait for a unit, the first of them with that rank; `None` where none waits any more.
    ///
    /// The unit is loaded if it is not resident, those of the least rank first, and once resident it is not evicted for a
    /// unit of the same or a greater one. [`Event::Loaded`] or [`Event::Failed`] tells the end; the latter with
    /// [`Error::Budget`], where the budget has become smaller than the unit. A retired unit is ignored.
    pub fn want(&self, unit: Unit, rank: Option<Rank>) {
        self.shared.change(|state| state.ledger.want(unit, rank));
    }

    /// Loads a unit that requests may soon want, after all that requests wait for, evicting only what nobody uses or
    /// waits for. Forgotten where there is no such room; a load gives way to what requests wait for.
    pub fn prefetch(&self, unit: Unit) {
        self.shared.change(|state| state.ledger.hint(unit));
    }

    /// The value of a resident unit, which stays until the lease is dropped; `None` where it is not resident.
    #[must_use]
    pub fn pin(&self, unit: Unit) -> Option<Lease<V>> {
        self.shared.pin(unit)
    }

    /// Forgets a unit as soon as its last lease ends. It is not loaded again, and nobody is told who waits for it.
    pub fn retire(&self, unit: Unit) {
        self.shared.change(|state| {
            state.note(unit, |expert, bytes| trace::Event::Retire { expert, bytes });
            state.ledger.retire(unit);
        });
    }

    /// Changes the budget. Where it becomes smaller, units leave and loads are stopped until the rest fits, what requests
    /// wait for last; what is pinned leaves when its lease ends. Nothing is loaded before there is room under the new
    /// budget, and units that are larger than it fail where requests wait for them.
    pub fn set_budget(&self, budget: Option<u64>) {
        self.shared.change(|state| state.ledger.set_budget(budget));
    }

    /// Where a unit is; `None` where it was retired and is gone.
    #[must_use]
    pub fn place(&self, unit: Unit) -> Option<Place> {
        self.shared.lock().ledger.place(unit)
    }

    /// The state of the budget, and what has happened since the start.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let state = self.shared.lock();
        let ledger = &state.ledger;
        Snapshot { budget: ledger.budget(), used: ledger.used(), pinned: ledger.pinned(), counters: ledger.counters() }
    }

    /// The events since the last call, in the order in which they happened. They are kept until they are taken.
    #[must_use]
    pub fn take_events(&self) -> Vec<Event> {
        self.shared.lock().events.drain(..).collect()
    }

    /// As [`Residency::take_events`], but waits until there is one: for ever, where nothing is being loaded and nobody
    /// else does anything.
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
    /// Bytes that are reserved: of units that are loading, resident, or evicted and not given back yet.
    pub used: u64,
    /// Of these, bytes of units with a lease.
    pub pinned: u64,
    /// What has happened since the start.
    pub counters: Counters,
}

impl<V: Send + Sync + 'static> Drop for Residency<V> {
    /// Stops loads that are under way, and waits for their end, until all values without a lease are dropped, and until
    /// the trace is written. Leases may outlive the residency.
    fn drop(&mut self) {
        self.shared.close();
        for thread in self.threads.drain(..) {
            // Its last owner may be a value or a callback, dropped by one of its own threads.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join(); // whatever panicked has said so
            }
        }
    }
}
