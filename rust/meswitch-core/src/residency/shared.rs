//! What all threads share: the state behind the one lock, and the values that keep a part of it.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::mem;
use std::sync::{Arc, Weak};

use super::ledger::{Ledger, Order, Unit};
use super::sync::{AtomicBool, Condvar, Mutex, MutexGuard, Ordering, PoisonError};
use super::trace::{self, TraceWriter};
use super::{Event, Policy, Source};
use crate::error::Error;

pub(super) struct Shared<V> {
    state: Mutex<State<V>>,
    /// There is a load to take up, or the residency is closed.
    pub(super) work: Condvar,
    /// There is an event, or the residency is closed.
    pub(super) happened: Condvar,
    /// There is something to drop, or the residency is closed.
    pub(super) discarded: Condvar,
}

pub(super) struct State<V> {
    pub(super) ledger: Ledger,
    pub(super) units: BTreeMap<Unit, Content<V>>,
    pub(super) events: VecDeque<Event>,
    /// Whether there are events of which the owner was not notified.
    pub(super) unnotified: bool,
    /// What is to be dropped by a thread that does nothing else: giving back gigabytes takes a while.
    pub(super) discard: Vec<Discarded<V>>,
    pub(super) trace: Option<TraceWriter>,
    /// Whether the residency is being dropped. Nothing is decided from then on.
    pub(super) closed: bool,
}

/// What belongs to a unit, besides what the ledger knows.
pub(super) struct Content<V> {
    pub(super) source: Arc<dyn Source<V>>,
    pub(super) value: Option<Arc<Loaded<V>>>,
    /// Stops the load that is under way.
    pub(super) stop: Option<Arc<AtomicBool>>,
}

/// A value, and after it, in the order in which fields are dropped, the bytes that are reserved for it.
pub(super) struct Loaded<V> {
    pub(super) value: V,
    #[allow(dead_code, reason = "kept to be dropped")]
    pub(super) room: Room,
}

/// What nobody uses any more.
#[allow(dead_code, reason = "kept to be dropped")]
pub(super) enum Discarded<V> {
    Value(Arc<Loaded<V>>),
    Content(Content<V>),
}

/// Bytes of a budget: reserved until this, and every clone of it, is dropped.
#[derive(Clone)]
pub struct Room(#[allow(dead_code, reason = "kept to be dropped")] Arc<Reservation>);

struct Reservation {
    unit: Unit,
    of: Weak<dyn Release>,
}

trait Release: Send + Sync {
    fn release(&self, unit: Unit);
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(residency) = self.of.upgrade() {
            residency.release(self.unit);
        }
    }
}

impl<V: Send + Sync + 'static> Release for Shared<V> {
    fn release(&self, unit: Unit) {
        self.change(|state| {
            if !state.closed {
                state.ledger.released(unit);
            }
        });
    }
}

/// The value of a resident unit. The unit is not evicted before the lease is dropped.
pub struct Lease<V> {
    value: Arc<Loaded<V>>,
    /// Dropped after the value, which thus is not dropped here.
    #[allow(dead_code, reason = "kept to be dropped")]
    pin: Pin<V>,
}

impl<V> std::ops::Deref for Lease<V> {
    type Target = V;

    fn deref(&self) -> &V {
        &self.value.value
    }
}

struct Pin<V> {
    unit: Unit,
    shared: Arc<Shared<V>>,
}

impl<V> Drop for Pin<V> {
    fn drop(&mut self) {
        self.shared.change(|state| state.ledger.unpin(self.unit));
    }
}

impl<V> Shared<V> {
    pub(super) fn new(budget: Option<u64>, policy: Box<dyn Policy>) -> Self {
        let state = State {
            ledger: Ledger::new(budget, policy),
            units: BTreeMap::new(),
            events: VecDeque::new(),
            unnotified: false,
            discard: Vec::new(),
            trace: None,
            closed: false,
        };
        Self { state: Mutex::new(state), work: Condvar::new(), happened: Condvar::new(), discarded: Condvar::new() }
    }

    /// A thread that panicked while it held the lock did so in a policy, which then is to blame for what follows.
    pub(super) fn lock(&self) -> MutexGuard<'_, State<V>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes something, and carries out what follows from it.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State<V>) -> T) -> T {
        let mut state = self.lock();
        let result = change(&mut state);
        state.follow();
        let (work, happened, discarded) = (state.ledger.has_loads(), state.unnotified, !state.discard.is_empty());
        drop(state);
        for (condition, holds) in [(&self.work, work), (&self.happened, happened), (&self.discarded, discarded)] {
            if holds {
                condition.notify_all();
            }
        }
        result
    }

    /// Says that nothing is decided any more, stops what is under way, discards what nobody uses, and ends the trace.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        for content in state.units.values() {
            content.stop();
        }
        let (units, trace) = (mem::take(&mut state.units), state.trace.take());
        state.discard.extend(units.into_values().map(Discarded::Content));
        drop(state);
        for condition in [&self.work, &self.happened, &self.discarded] {
            condition.notify_all();
        }
        drop(trace); // which writes what is left
    }
}

impl<V: Send + Sync + 'static> Shared<V> {
    /// A lease of a resident unit.
    pub(super) fn pin(self: &Arc<Self>, unit: Unit) -> Option<Lease<V>> {
        self.change(|state| {
            let value = state.units.get(&unit)?.value.as_ref()?;
            let lease = || Lease { value: value.clone(), pin: Pin { unit, shared: self.clone() } };
            state.ledger.pin(unit).then(lease)
        })
    }

    /// The bytes that the ledger has reserved for a load.
    pub(super) fn room(self: &Arc<Self>, unit: Unit) -> Room {
        let of: Weak<dyn Release> = Arc::downgrade(self) as Weak<dyn Release>;
        Room(Arc::new(Reservation { unit, of }))
    }
}

impl<V> State<V> {
    /// Writes down what happens to a unit, if there is a trace.
    pub(super) fn note<'a>(&'a self, unit: Unit, event: impl FnOnce(Cow<'a, str>, u64) -> trace::Event<'a>) {
        if let (Some(trace), Some(content)) = (&self.trace, self.units.get(&unit)) {
            trace.write(&event(Cow::Borrowed(content.source.name()), self.ledger.bytes(unit)));
        }
    }

    pub(super) fn report(&mut self, event: Event) {
        self.events.push_back(event);
        self.unnotified = true;
    }

    pub(super) fn note_failure(&self, unit: Unit, error: &Error) {
        let error = Cow::Owned(error.to_string());
        self.note(unit, |expert, bytes| trace::Event::Fail { expert, bytes, error });
    }

    /// Carries out what the ledger says is to be done.
    fn follow(&mut self) {
        if self.closed {
            return;
        }
        for order in self.ledger.plan() {
            match order {
                Order::Stop(unit) => {
                    if let Some(content) = self.units.get(&unit) {
                        content.stop();
                    }
                }
                Order::Evict(unit) => {
                    let value = self.units.get_mut(&unit).and_then(|content| content.value.take());
                    self.discard.extend(value.map(Discarded::Value));
                    self.note(unit, |expert, bytes| trace::Event::Evict { expert, bytes });
                    self.report(Event::Evicted(unit));
                }
                Order::Refuse(unit) => {
                    let (bytes, budget) = (self.ledger.bytes(unit), self.ledger.budget().unwrap_or(u64::MAX));
                    let error = Error::Budget { bytes, budget };
                    self.note_failure(unit, &error);
                    self.report(Event::Failed(unit, error));
                }
                Order::Forget(unit) => self.discard.extend(self.units.remove(&unit).map(Discarded::Content)),
            }
        }
    }
}

impl<V> Content<V> {
    fn stop(&self) {
        if let Some(stop) = &self.stop {
            stop.store(true, Ordering::Relaxed);
        }
    }
}
