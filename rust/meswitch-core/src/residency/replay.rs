//! What a policy would have done about the requests of a trace, and the best that any could have done.

mod optimal;

use std::collections::HashMap;
use std::path::Path;

use super::policy::{Policy, UnitId};
use super::trace::{Event, Line, TraceReader};
use crate::error::{Error, Result};

use optimal::Optimal;

/// What happens to units, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// A request asks for a unit.
    Request(UnitId),
    /// A unit is gone for good.
    Retire(UnitId),
}

/// The requests of a trace.
///
/// What was loaded and evicted as it was written does not matter here. An expert of a name that was retired, or that has
/// another size now, is another unit.
pub struct Trace {
    steps: Vec<Step>,
    /// The bytes of each unit.
    sizes: Vec<u64>,
    requests: u64,
    /// The most bytes that units which are there at the same time have together.
    peak: u64,
    budget: Option<u64>,
    policy: String,
}

/// The experts that are there at one moment of a trace, by name.
#[derive(Default)]
struct Present {
    units: HashMap<String, UnitId>,
    bytes: u64,
}

/// What came of replaying a trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// All requests: `hits`, `loads` and `refused`.
    pub requests: u64,
    /// Requests for a resident expert.
    pub hits: u64,
    /// Requests for an expert that is larger than the budget.
    pub refused: u64,
    /// Requests for an expert that then was loaded.
    pub loads: u64,
    /// The bytes of these.
    pub bytes_read: u64,
    /// How often an expert was let go to make room.
    pub evictions: u64,
}

impl Report {
    /// The share of requests whose expert was resident; 0 where there were none.
    #[must_use]
    pub fn hit_rate(&self) -> f64 {
        self.hits as f64 / self.requests.max(1) as f64
    }
}

impl Trace {
    /// Reads a trace.
    ///
    /// # Errors
    ///
    /// [`Error::Data`], naming the line, where it is broken, or where it has no request; [`Error::Io`].
    pub fn read(path: &Path) -> Result<Self> {
        let mut reader = TraceReader::open(path)?;
        let (budget, policy) = (reader.budget(), reader.policy().to_owned());
        let mut trace = Self { steps: Vec::new(), sizes: Vec::new(), requests: 0, peak: 0, budget, policy };
        let mut present = Present::default();
        while let Some(Line { event, .. }) = reader.next()? {
            match event {
                Event::Request { expert, bytes } => trace.request(&mut present, &expert, bytes),
                Event::Retire { expert, .. } => trace.retire(&mut present, &expert),
                Event::Start { .. } | Event::Load { .. } | Event::Evict { .. } | Event::Fail { .. } => {}
            }
        }
        if trace.requests == 0 {
            return Err(Error::Data(format!("{}: expected requests, found none", path.display())));
        }
        Ok(trace)
    }

    fn request(&mut self, present: &mut Present, expert: &str, bytes: u64) {
        let unit = match present.units.get(expert) {
            Some(unit) if self.sizes[*unit as usize] == bytes => *unit,
            _ => {
                self.retire(present, expert);
                let unit = self.sizes.len() as UnitId;
                self.sizes.push(bytes);
                present.units.insert(expert.to_owned(), unit);
                present.bytes = present.bytes.saturating_add(bytes);
                self.peak = self.peak.max(present.bytes);
                unit
            }
        };
        self.requests += 1;
        self.steps.push(Step::Request(unit));
    }

    fn retire(&mut self, present: &mut Present, expert: &str) {
        if let Some(unit) = present.units.remove(expert) {
            present.bytes = present.bytes.saturating_sub(self.sizes[unit as usize]);
            self.steps.push(Step::Retire(unit));
        }
    }

    /// How many requests there are.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// How many experts are asked for.
    #[must_use]
    pub fn experts(&self) -> usize {
        self.sizes.len()
    }

    /// The bytes of the largest expert.
    #[must_use]
    pub fn largest(&self) -> u64 {
        self.sizes.iter().copied().max().unwrap_or(0)
    }

    /// The bytes of all experts that are there at the same time: with that budget nothing is ever evicted.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.peak
    }

    /// The budget under which the trace was written.
    #[must_use]
    pub fn budget(&self) -> Option<u64> {
        self.budget
    }

    /// The name of the policy under which the trace was written.
    #[must_use]
    pub fn policy(&self) -> &str {
        &self.policy
    }

    /// Asks for one expert after the other, in a memory of `budget` bytes that is empty at first, and lets a new policy
    /// decide what leaves. A load ends before the next request, and nothing is ever pinned.
    ///
    /// # Panics
    ///
    /// Where the policy breaks its promises: it evicts what is not resident, or nothing.
    pub fn replay(&self, budget: u64, policy: &mut dyn Policy) -> Report {
        let mut report = Report { requests: self.requests, ..Report::default() };
        let mut resident = vec![false; self.sizes.len()];
        let mut used = 0;
        for step in &self.steps {
            match *step {
                Step::Request(unit) if self.sizes[unit as usize] > budget => report.refused += 1,
                Step::Request(unit) => {
                    policy.requested(unit);
                    if resident[unit as usize] {
                        report.hits += 1;
                        continue;
                    }
                    let bytes = self.sizes[unit as usize];
                    while used > budget - bytes {
                        let victim = policy.victim(&mut |_| true).expect("a resident unit may be evicted");
                        assert!(std::mem::take(&mut resident[victim as usize]), "expected a resident unit as victim");
                        policy.removed(victim);
                        used -= self.sizes[victim as usize];
                        report.evictions += 1;
                    }
                    policy.admitted(unit, bytes);
                    resident[unit as usize] = true;
                    used += bytes;
                    report.loads += 1;
                    report.bytes_read = report.bytes_read.saturating_add(bytes);
                }
                Step::Retire(unit) => {
                    if std::mem::take(&mut resident[unit as usize]) {
                        policy.removed(unit);
                        used -= self.sizes[unit as usize];
                    }
                    policy.forgotten(unit);
                }
            }
        }
        report
    }

    /// Replays with the policy that knows the future: what is asked for last, or never again, leaves first (MIN: Belady,
    /// IBM Systems Journal 5, 1966).
    ///
    /// Where all experts have the same size, no policy loads less. Where sizes differ, the least is NP-hard to find
    /// (Chrobak and others, Algorithmica 63, 2012), and this is a mark to compare with, not a bound: a policy that keeps
    /// small experts may have more hits.
    #[must_use]
    pub fn optimal(&self, budget: u64) -> Report {
        self.replay(budget, &mut Optimal::of(self))
    }
}
