//! The threads of a residency: those that load, the one that notifies the owner of events, and the one that drops what
//! was evicted.

use std::any::Any;
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use super::shared::{Loaded, Room, Shared};
use super::sync::{AtomicBool, PoisonError, thread};
use super::trace;
use super::{Event, Source, Unit};
use crate::error::{Error, Result};

/// Starts a thread that calls `notify` when there are events, until the residency is closed.
pub(super) fn start_notifying<V: Send + Sync + 'static>(
    shared: Arc<Shared<V>>,
    notify: impl Fn() + Send + 'static,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        loop {
            let mut state = shared.lock();
            while !state.unnotified && !state.closed {
                state = shared.happened.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.closed {
                return;
            }
            state.unnotified = false;
            drop(state);
            notify();
        }
    })
}

/// Starts a thread that drops what was evicted or forgotten, until the residency is closed and nothing is left to drop.
pub(super) fn start_discarding<V: Send + Sync + 'static>(shared: Arc<Shared<V>>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        loop {
            let mut state = shared.lock();
            while state.discard.is_empty() && !state.closed {
                state = shared.discarded.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            let discard = mem::take(&mut state.discard);
            drop(state);
            if discard.is_empty() {
                return;
            }
            drop(discard); // gives rooms back, for which the lock is taken again
        }
    })
}

/// Starts a thread that loads units until the residency is closed.
pub(super) fn start_loading<V: Send + Sync + 'static>(shared: Arc<Shared<V>>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        while let Some(job) = next(&shared) {
            job.run(&shared);
        }
    })
}

/// One load.
struct Job<V> {
    unit: Unit,
    source: Arc<dyn Source<V>>,
    room: Room,
    stop: Arc<AtomicBool>,
}

/// Waits for the next load; `None` where the residency is closed.
fn next<V: Send + Sync + 'static>(shared: &Arc<Shared<V>>) -> Option<Job<V>> {
    let mut state = shared.lock();
    loop {
        if state.closed {
            return None;
        }
        if let Some(unit) = state.ledger.start() {
            let content = state.units.get_mut(&unit).expect("a unit of the ledger has a source");
            let stop = Arc::new(AtomicBool::new(false));
            content.stop = Some(stop.clone());
            return Some(Job { unit, source: content.source.clone(), room: shared.room(unit), stop });
        }
        state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
}

impl<V: Send + Sync + 'static> Job<V> {
    fn run(self, shared: &Shared<V>) {
        let start = Instant::now();
        // Unwind safe: nothing of a load that panics is used again.
        let loaded = catch_unwind(AssertUnwindSafe(|| self.source.load(self.room.clone(), &self.stop)));
        let loaded = loaded.unwrap_or_else(|panic| Err(Error::Panic(text_of(&*panic))));
        let loaded = loaded.map(|value| Loaded { value, room: self.room.clone() });
        self.finish(shared, loaded, start.elapsed().as_secs_f64());
        // What is left of the room is given back only now, when the ledger knows how the load ended.
    }

    /// Enters the outcome.
    fn finish(&self, shared: &Shared<V>, loaded: Result<Loaded<V>>, seconds: f64) {
        let unit = self.unit;
        let unwanted = shared.change(|state| {
            let Some(content) = state.units.get_mut(&unit) else { return Some(loaded) }; // it is closed
            content.stop = None;
            match loaded {
                Ok(loaded) if state.ledger.loaded(unit) => {
                    content.value = Some(Arc::new(loaded));
                    let ms = seconds * 1e3;
                    state.note(unit, |expert, bytes| trace::Event::Load { expert, bytes, ms });
                    state.report(Event::Loaded(unit, seconds));
                }
                Err(error) if state.ledger.failed(unit) => {
                    state.note_failure(unit, &error);
                    state.report(Event::Failed(unit, error));
                }
                unwanted => return Some(unwanted),
            }
            None
        });
        drop(unwanted); // of a load that was stopped: without the lock
    }
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}
