//! One step's way through the matrices that it needs.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Slot, Store};
use crate::error::Result;
use crate::residency::{Event, Lease, Unit};

/// Matrices that are visited, each once: see [`Store::visit`]. What was not visited when this is dropped is not waited for
/// any more.
pub struct Visit {
    store: Arc<Store>,
    /// Those of the turn that are in memory, by position in it.
    ready: VecDeque<(usize, Lease<Arc<Slot>>)>,
    /// The positions of the turn's others.
    missing: BTreeMap<Unit, usize>,
    /// The turns that have not begun.
    turns: VecDeque<Vec<Unit>>,
    hits: usize,
}

impl Visit {
    pub(super) fn new(store: Arc<Store>, turns: Vec<Vec<Unit>>) -> Self {
        drop(store.residency.take_events()); // of what an earlier visit did not wait for
        let hits = turns.iter().flatten().filter(|unit| store.residency.ask(**unit)).count();
        let (ready, missing) = Default::default();
        let mut visit = Self { store, ready, missing, turns: turns.into(), hits };
        visit.begin();
        for (place, unit) in visit.turns.iter().flatten().enumerate() {
            visit.store.residency.want(*unit, Some((visit.missing.len() + place) as u64));
        }
        visit
    }

    /// How many matrices, of all turns, were in memory when the visit began.
    #[must_use]
    pub fn hits(&self) -> usize {
        self.hits
    }

    /// The next one, by its position in its turn, once it is in memory. `None` after the last of a turn; the next call
    /// begins the next turn.
    ///
    /// Where the budget has no room for another beside it, the one before must have been given up: lease, and whatever
    /// else has its memory.
    ///
    /// # Errors
    /// What is wrong with one of those that are still missing.
    #[allow(clippy::should_implement_trait)] // it may wait for the caller to give up what it got last
    pub fn next(&mut self) -> Option<Result<(usize, Lease<Arc<Slot>>)>> {
        let next = self.take();
        if next.is_none() {
            self.begin();
        }
        next
    }

    /// Begins the next turn: keeps what is in memory of it, and waits for the rest, before all of later turns.
    fn begin(&mut self) {
        for (position, unit) in self.turns.pop_front().into_iter().flatten().enumerate() {
            match self.store.residency.pin(unit) {
                Some(lease) => {
                    self.store.residency.want(unit, None);
                    self.ready.push_back((position, lease));
                }
                None => {
                    self.store.residency.want(unit, Some(self.missing.len() as u64));
                    self.missing.insert(unit, position);
                }
            }
        }
    }

    fn take(&mut self) -> Option<Result<(usize, Lease<Arc<Slot>>)>> {
        if let Some(ready) = self.ready.pop_front() {
            return Some(Ok(ready));
        }
        let residency = &self.store.residency;
        while !self.missing.is_empty() {
            let arrived = self.missing.iter().find_map(|(unit, at)| Some((*unit, *at, residency.pin(*unit)?)));
            if let Some((unit, position, lease)) = arrived {
                residency.want(unit, None);
                self.missing.remove(&unit);
                return Some(Ok((position, lease)));
            }
            for event in residency.wait_for_events() {
                match event {
                    Event::Failed(unit, error) if self.missing.contains_key(&unit) => return Some(Err(error)),
                    _ => {} // of a later turn, too: it is read again when that begins
                }
            }
        }
        None
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        for unit in self.missing.keys().chain(self.turns.iter().flatten()) {
            self.store.residency.want(*unit, None);
        }
        self.ready.clear();
        self.store.visited.store(false, Ordering::Release);
    }
}
