//! Who was in memory when, as a trace says.

use std::collections::HashMap;
use std::path::Path;

use super::trace::{Event, Line, TraceReader};
use crate::error::{Error, Result};

/// What a trace says of its units, each with its requests and the times at which it was resident.
///
/// A trace that was begun before the first load says all of it: units that were resident already count as absent until
/// their next load.
pub struct Timeline {
    histories: Vec<History>,
    end: f64,
}

/// A unit of a trace. One of its name that is asked for after it was retired is the same here.
#[derive(Clone, Debug, PartialEq)]
pub struct History {
    /// Its name.
    pub name: String,
    /// Its memory.
    pub bytes: u64,
    /// How often it was asked for.
    pub requests: u64,
    /// Of these, how often it was resident.
    pub hits: u64,
    /// The seconds at which it came and left, one time after another; the last time it may have stayed.
    changes: Vec<f64>,
}

impl History {
    fn is_resident(&self) -> bool {
        self.changes.len() % 2 == 1
    }

    fn set_resident(&mut self, resident: bool, t: f64) {
        if resident != self.is_resident() {
            self.changes.push(t);
        }
    }
}

impl Timeline {
    /// Reads a trace.
    ///
    /// # Errors
    ///
    /// [`Error::Data`], naming the line, where it is broken, or where it has no request; [`Error::Io`].
    pub fn read(path: &Path) -> Result<Self> {
        let mut reader = TraceReader::open(path)?;
        let mut timeline = Self { histories: Vec::new(), end: 0.0 };
        let mut places = HashMap::new();
        while let Some(Line { t, event }) = reader.next()? {
            let (Event::Request { ref expert, bytes }
            | Event::Load { ref expert, bytes, .. }
            | Event::Evict { ref expert, bytes }
            | Event::Retire { ref expert, bytes }
            | Event::Fail { ref expert, bytes, .. }) = event
            else {
                continue;
            };
            timeline.end = timeline.end.max(t); // a trace of one's own may go back
            let history = timeline.history(&mut places, expert, bytes);
            let now = timeline.end;
            let history = &mut timeline.histories[history];
            match event {
                Event::Request { .. } => {
                    history.requests += 1;
                    history.hits += u64::from(history.is_resident());
                }
                Event::Load { .. } => history.set_resident(true, now),
                Event::Evict { .. } | Event::Retire { .. } => history.set_resident(false, now),
                Event::Start { .. } | Event::Fail { .. } => {}
            }
        }
        if timeline.histories.iter().all(|history| history.requests == 0) {
            return Err(Error::Data(format!("{}: expected requests, found none", path.display())));
        }
        Ok(timeline)
    }

    fn history(&mut self, places: &mut HashMap<String, usize>, name: &str, bytes: u64) -> usize {
        if let Some(place) = places.get(name) {
            return *place;
        }
        places.insert(name.to_owned(), self.histories.len());
        self.histories.push(History { name: name.to_owned(), bytes, requests: 0, hits: 0, changes: Vec::new() });
        self.histories.len() - 1
    }

    /// All units, in the order in which they are first named.
    #[must_use]
    pub fn histories(&self) -> &[History] {
        &self.histories
    }

    /// The time of the last event.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.end
    }

    /// The share of each of `bins` equal parts of the time for which a unit was resident. The same work however often it
    /// came and left within one of them: a bin or a change each.
    #[must_use]
    pub fn residency(&self, history: &History, bins: usize) -> Vec<f64> {
        let mut shares = vec![0.0; bins];
        let per_second = bins as f64 / self.end.max(1e-9);
        for stay in history.changes.chunks(2) {
            let from = stay[0] * per_second;
            let to = stay.get(1).map_or(bins as f64, |left| left * per_second);
            for (bin, share) in shares.iter_mut().enumerate().skip(from as usize) {
                let own = to.min((bin + 1) as f64) - from.max(bin as f64);
                if own <= 0.0 {
                    break;
                }
                *share += own;
            }
        }
        shares
    }
}
