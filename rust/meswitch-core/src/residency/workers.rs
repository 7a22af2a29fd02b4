//! The threads that load, and the one that tells the owner of events.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::time::Instant;

use super::sync::{AtomicBool, PoisonError, thread};
use super::{Event, Release, Room, Shared, Source, Spoken, Unit};
use crate::error::{Error, Result};

/// Starts a thread that calls `notify` when there are events, until the residency is closed.
pub(super) fn start_telling<V: Send + Sync + 'static>(
    shared: Arc<Shared<V>>,
    notify: impl Fn() + Send + 'static,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        loop {
            let mut state = shared.lock();
            while !state.untold && !state.closed {
                state = shared.happened.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.untold = false;
            if state.closed {
                return;
            }
            drop(state);
            notify();
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
            let to: Weak<dyn Release> = Arc::downgrade(shared) as Weak<dyn Release>;
            let room = Room(Arc::new(Spoken { unit, to }));
            return Some(Job { unit, source: content.source.clone(), room, stop });
        }
        state = shared.work.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
}

impl<V: Send + Sync + 'static> Job<V> {
    fn run(self, shared: &Shared<V>) {
        let (start, room) = (Instant::now(), self.room.clone());
        // Unwind safe: nothing of a load that panics is used again.
        let loaded = catch_unwind(AssertUnwindSafe(|| self.source.load(room, &self.stop)));
        let loaded = loaded.unwrap_or_else(|panic| Err(Error::Panic(text_of(&*panic))));
        self.finish(shared, loaded, start.elapsed().as_secs_f64());
        // The room is given back only now, after the ledger knows how the load ended.
    }

    /// Enters the outcome.
    fn finish(&self, shared: &Shared<V>, loaded: Result<V>, seconds: f64) {
        let unit = self.unit;
        let unwanted = shared.change(|state| {
            let Some(content) = state.units.get_mut(&unit).filter(|_| !state.closed) else { return Some(loaded) };
            content.stop = None;
            match loaded {
                Ok(value) if state.ledger.loaded(unit) => {
                    content.value = Some(Arc::new(value));
                    state.report(Event::Loaded(unit, seconds));
                }
                Err(error) if state.ledger.failed(unit) => state.report(Event::Failed(unit, error)),
                unwanted => return Some(unwanted),
            }
            None
        });
        drop(unwanted); // what was loaded gives its memory back, without the lock
    }
}

fn text_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}
