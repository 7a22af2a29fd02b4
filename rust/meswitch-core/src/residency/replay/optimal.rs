//! The policy that knows the future.

use std::collections::BTreeSet;

use super::{Step, Trace};
use crate::residency::policy::{Policy, UnitId};

/// Evicts the unit that is asked for last, or never again. It is good for one replay of its trace.
pub(super) struct Optimal<'a> {
    steps: &'a [Step],
    /// For each step that asks for a unit, the next one that asks for it.
    following: Vec<u32>,
    /// The step after the last that was replayed.
    at: usize,
    /// By unit, the step that asks for it next.
    next: Vec<u32>,
    resident: Vec<bool>,
    /// Resident units by the step that asks for them next.
    order: BTreeSet<(u32, UnitId)>,
}

const NEVER: u32 = u32::MAX;

impl<'a> Optimal<'a> {
    pub(super) fn of(trace: &'a Trace) -> Self {
        let mut next = vec![NEVER; trace.sizes.len()];
        let mut following = vec![NEVER; trace.steps.len()];
        for (at, step) in trace.steps.iter().enumerate().rev() {
            if let Step::Request(unit) = step {
                following[at] = std::mem::replace(&mut next[*unit as usize], at as u32);
            }
        }
        let resident = vec![false; next.len()];
        Self { steps: &trace.steps, following, at: 0, next, resident, order: BTreeSet::new() }
    }
}

impl Policy for Optimal<'_> {
    fn requested(&mut self, unit: UnitId) {
        // Requests that are refused are not told of.
        let refused = self.steps[self.at..].iter().take_while(|step| **step != Step::Request(unit)).count();
        self.at += refused + 1;
        let next = std::mem::replace(&mut self.next[unit as usize], self.following[self.at - 1]);
        if self.resident[unit as usize] {
            self.order.remove(&(next, unit));
            self.order.insert((self.next[unit as usize], unit));
        }
    }

    fn admitted(&mut self, unit: UnitId, _bytes: u64) {
        self.resident[unit as usize] = true;
        self.order.insert((self.next[unit as usize], unit));
    }

    fn removed(&mut self, unit: UnitId) {
        self.resident[unit as usize] = false;
        self.order.remove(&(self.next[unit as usize], unit));
    }

    fn forgotten(&mut self, _unit: UnitId) {}

    fn victim(&mut self, may: &mut dyn FnMut(UnitId) -> bool) -> Option<UnitId> {
        self.order.iter().rev().map(|(_, unit)| *unit).find(|unit| may(*unit))
    }
}
