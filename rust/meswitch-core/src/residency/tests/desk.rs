//! An owner of a residency that lets callers wait for a unit, as an engine does.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

use crate::error::Result;
use crate::residency::policy::Lru;
use crate::residency::sync::{Condvar, Mutex};
use crate::residency::{Event, Lease, Rank, Residency, Source, Unit};

pub(super) struct Desk<V: Send + Sync + 'static> {
    pub(super) residency: Residency<V>,
    book: Mutex<Book>,
    changed: Condvar,
}

#[derive(Default)]
struct Book {
    next: Rank,
    /// Requests that wait for a unit.
    waiting: BTreeMap<Unit, BTreeSet<Rank>>,
    /// Requests whose unit could not be loaded, and why.
    failed: BTreeMap<Rank, String>,
    retired: BTreeSet<Unit>,
}

impl<V: Send + Sync + 'static> Desk<V> {
    pub(super) fn new(budget: u64) -> Arc<Self> {
        Arc::new_cyclic(|desk: &Weak<Self>| {
            let desk = desk.clone();
            let notify = move || desk.upgrade().iter().for_each(|desk| desk.tell());
            let residency = Residency::new(Some(budget), Box::<Lru>::default(), notify);
            Self { residency, book: Mutex::default(), changed: Condvar::new() }
        })
    }

    /// Waits for a unit and pins it; says why that cannot be.
    pub(super) fn lease(&self, unit: Unit) -> Result<Lease<V>, String> {
        self.residency.ask(unit);
        let mut book = self.book.lock().unwrap();
        if book.retired.contains(&unit) {
            return Err("retired".into());
        }
        let request = book.next;
        book.next += 1;
        book.waiting.entry(unit).or_default().insert(request);
        self.say(&book, unit);
        let outcome = loop {
            if let Some(error) = book.failed.remove(&request) {
                break Err(error);
            }
            if let Some(lease) = self.residency.pin(unit) {
                break Ok(lease);
            }
            book = self.changed.wait(book).unwrap();
        };
        book.waiting.entry(unit).or_default().remove(&request);
        self.say(&book, unit);
        outcome
    }

    pub(super) fn retire(&self, unit: Unit) {
        let mut book = self.book.lock().unwrap();
        book.retired.insert(unit);
        self.residency.retire(unit);
        book.fail(unit, "retired");
        self.changed.notify_all();
    }

    pub(super) fn add(&self, source: impl Source<V> + 'static) -> Result<Unit> {
        self.residency.add(Arc::new(source))
    }

    /// Drops the residency here, once the thread that notifies does not hold the last of it.
    #[cfg(not(shuttle))]
    pub(super) fn end(self: Arc<Self>) {
        let mut desk = self;
        while let Err(shared) = Arc::try_unwrap(desk) {
            desk = shared;
            std::thread::yield_now();
        }
    }

    /// Tells the residency which of a unit's requests is the first.
    fn say(&self, book: &Book, unit: Unit) {
        self.residency.want(unit, book.waiting.get(&unit).and_then(BTreeSet::first).copied());
    }

    /// Tells those who wait what has happened.
    fn tell(&self) {
        let mut book = self.book.lock().unwrap();
        for event in self.residency.take_events() {
            if let Event::Failed(unit, error) = event {
                book.fail(unit, &error.to_string());
            }
        }
        self.changed.notify_all();
    }
}

impl Book {
    fn fail(&mut self, unit: Unit, error: &str) {
        let requests = self.waiting.remove(&unit).unwrap_or_default();
        self.failed.extend(requests.into_iter().map(|request| (request, error.into())));
    }
}
