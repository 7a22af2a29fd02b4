//! Least recently and least frequently used, in a proportion that the requests decide.

use std::collections::BTreeSet;

use super::{Policy, UnitId};

/// The half-lives of requests, in turns.
const HALF_LIVES: [f64; 4] = [1.0, 4.0, 16.0, 64.0];
/// For how many turns a prediction counts.
const MEMORY: f64 = 16.0;

/// Evicts the unit that is least likely to be asked for, by how often it was and how long ago.
///
/// A request counts 1 at first and half as much after every half-life (LRFU: Lee and others, IEEE Transactions on
/// Computers 50, 2001). With a short half-life the unit of the least count is the least recently used one, with a long
/// one the least frequently used. Which is better depends on the requests, so several half-lives are kept side by side:
/// each says before every request how probable it was, and the one that has said so best of late decides.
///
/// A turn is as many requests as there are resident units. Counts of evicted units are kept until they are forgotten. A
/// unit's bytes do not matter: what a byte of memory saves is the time to read it, in small units and in large ones.
pub struct Lrfu {
    counts: [Counts; HALF_LIVES.len()],
    /// Whether a unit is resident, by its number.
    resident: Vec<bool>,
    residents: usize,
    /// How many units have been asked for and are not forgotten.
    known: usize,
    /// Time in turns.
    now: f64,
}

/// The counts of one half-life. Times are in half-lives.
struct Counts {
    half_life: f64,
    /// By a unit's number, the logarithm to base 2 of its count as it would be at time 0, from which all have been
    /// halved equally often since: greater or equal to 0, or minus infinity where there is no count.
    levels: Vec<f64>,
    /// The sum of all counts now.
    total: f64,
    /// The sum of logarithms of what was said of requests before they came.
    evidence: f64,
    /// Resident units by level, whose bits have its order, since it is not negative.
    order: BTreeSet<(u64, UnitId)>,
}

impl Default for Lrfu {
    fn default() -> Self {
        let counts = HALF_LIVES.map(|half_life| Counts {
            half_life,
            levels: Vec::new(),
            total: 0.0,
            evidence: 0.0,
            order: BTreeSet::new(),
        });
        Self { counts, resident: Vec::new(), residents: 0, known: 0, now: 0.0 }
    }
}

impl Lrfu {
    fn make_place(&mut self, unit: UnitId) {
        let places = self.resident.len().max(unit as usize + 1);
        self.resident.resize(places, false);
        for counts in &mut self.counts {
            counts.levels.resize(places, f64::NEG_INFINITY);
        }
    }

    fn is_known(&self, unit: UnitId) -> bool {
        self.counts[0].levels.get(unit as usize).is_some_and(|level| level.is_finite())
    }
}

impl Policy for Lrfu {
    fn requested(&mut self, unit: UnitId) {
        self.make_place(unit);
        let turn = 1.0 / self.residents.max(1) as f64;
        self.now += turn;
        let (known, resident) = (self.known, self.resident[unit as usize]);
        self.known += usize::from(!self.is_known(unit));
        for counts in &mut self.counts {
            counts.total *= (-turn / counts.half_life).exp2();
            let count = counts.count(unit, self.now);
            // One request more, spread over all units and one that is not known yet: nothing is impossible.
            let said = (count + 1.0 / (known as f64 + 1.0)) / (counts.total + 1.0);
            counts.evidence = counts.evidence * (1.0 - turn / MEMORY) + said.log2();
            counts.set(unit, count + 1.0, self.now, resident);
        }
    }

    /// Counts as a request for a unit that was not asked for, since whoever had it loaded expects one.
    fn admitted(&mut self, unit: UnitId, _bytes: u64) {
        self.make_place(unit);
        self.known += usize::from(!self.is_known(unit));
        self.resident[unit as usize] = true;
        self.residents += 1;
        for counts in &mut self.counts {
            let count = counts.count(unit, self.now);
            counts.set(unit, count.max(1.0), self.now, true);
        }
    }

    fn removed(&mut self, unit: UnitId) {
        self.resident[unit as usize] = false;
        self.residents -= 1;
        for counts in &mut self.counts {
            let key = (counts.levels[unit as usize].to_bits(), unit);
            counts.order.remove(&key);
        }
    }

    fn forgotten(&mut self, unit: UnitId) {
        if self.is_known(unit) {
            self.known -= 1;
            for counts in &mut self.counts {
                counts.set(unit, 0.0, self.now, false);
            }
        }
    }

    fn victim(&mut self, may: &mut dyn FnMut(UnitId) -> bool) -> Option<UnitId> {
        let best =
            self.counts.iter().reduce(|best, other| if other.evidence > best.evidence { other } else { best })?;
        best.order.iter().map(|(_, unit)| *unit).find(|unit| may(*unit))
    }
}

impl Counts {
    /// A unit's count now.
    fn count(&self, unit: UnitId, now: f64) -> f64 {
        (self.levels[unit as usize] - now / self.half_life).exp2()
    }

    fn set(&mut self, unit: UnitId, count: f64, now: f64, resident: bool) {
        self.total = (self.total + count - self.count(unit, now)).max(0.0);
        let level = &mut self.levels[unit as usize];
        let before = std::mem::replace(level, count.log2() + now / self.half_life);
        if resident {
            self.order.remove(&(before.to_bits(), unit));
            self.order.insert((level.to_bits(), unit));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::residency::policy::tests::{cases, check, happenings};

    /// The same by its definition: counts are sums over all requests so far, each with its unit, time and weight.
    #[derive(Default)]
    struct Naive {
        now: f64,
        requests: [Vec<(UnitId, f64, f64)>; HALF_LIVES.len()],
        said: Vec<(f64, [f64; HALF_LIVES.len()])>,
        resident: Vec<UnitId>,
    }

    impl Naive {
        fn count(&self, at: usize, of: impl Fn(UnitId) -> bool) -> f64 {
            let age = |then: f64| (self.now - then) / HALF_LIVES[at];
            let requests = self.requests[at].iter().filter(|(unit, ..)| of(*unit));
            requests.map(|(_, then, weight)| weight * 0.5f64.powf(age(*then))).sum()
        }

        fn evidence(&self, at: usize) -> f64 {
            self.said.iter().fold(0.0, |sum, (turn, said)| sum * (1.0 - turn / MEMORY) + said[at])
        }
    }

    impl Policy for Naive {
        fn requested(&mut self, unit: UnitId) {
            let turn = 1.0 / self.resident.len().max(1) as f64;
            self.now += turn;
            let mut known: Vec<_> = self.requests[0].iter().map(|(unit, ..)| *unit).collect();
            known.sort_unstable();
            known.dedup();
            let chance = 1.0 / (known.len() as f64 + 1.0);
            let said = |at| (self.count(at, |other| other == unit) + chance) / (self.count(at, |_| true) + 1.0);
            self.said.push((turn, std::array::from_fn(|at| said(at).log2())));
            self.requests.iter_mut().for_each(|requests| requests.push((unit, self.now, 1.0)));
        }

        fn admitted(&mut self, unit: UnitId, _bytes: u64) {
            self.resident.push(unit);
            let missing =
                std::array::from_fn::<_, { HALF_LIVES.len() }, _>(|at| 1.0 - self.count(at, |other| other == unit));
            for (requests, missing) in self.requests.iter_mut().zip(missing) {
                if missing > 0.0 {
                    requests.push((unit, self.now, missing));
                }
            }
        }

        fn removed(&mut self, unit: UnitId) {
            self.resident.retain(|other| *other != unit);
        }

        fn forgotten(&mut self, unit: UnitId) {
            self.requests.iter_mut().for_each(|requests| requests.retain(|(other, ..)| *other != unit));
        }

        fn victim(&mut self, may: &mut dyn FnMut(UnitId) -> bool) -> Option<UnitId> {
            let best = (1..HALF_LIVES.len())
                .fold(0, |best, at| if self.evidence(at) > self.evidence(best) + 1e-9 { at } else { best });
            let mut units: Vec<_> =
                self.resident.iter().map(|unit| (self.count(best, |other| other == *unit), *unit)).collect();
            units.sort_by_key(|(_, unit)| *unit);
            while !units.is_empty() {
                let least = (1..units.len())
                    .fold(0, |least, at| if units[at].0 < units[least].0 * (1.0 - 1e-9) { at } else { least });
                let (_, unit) = units.remove(least);
                if may(unit) {
                    return Some(unit);
                }
            }
            None
        }
    }

    proptest! {
        #![proptest_config(cases())]

        #[test]
        #[cfg_attr(miri, ignore)] // rounds at random
        fn evicts_what_its_definition_says(happenings in happenings()) {
            let victims = check(&mut Lrfu::default(), &happenings, false)?;
            prop_assert_eq!(victims, check(&mut Naive::default(), &happenings, false)?);
        }
    }

    /// Asks for units in a memory that holds `room` of them, and returns how many were resident.
    fn hits(policy: &mut Lrfu, room: usize, requests: impl Iterator<Item = UnitId>) -> usize {
        let mut hits = 0;
        for unit in requests {
            policy.requested(unit);
            if policy.resident.get(unit as usize) == Some(&true) {
                hits += 1;
                continue;
            }
            if policy.residents == room {
                let victim = policy.victim(&mut |_| true).unwrap();
                policy.removed(victim);
            }
            policy.admitted(unit, 1);
        }
        hits
    }

    fn half_life(policy: &Lrfu) -> f64 {
        let best = policy.counts.iter().max_by(|a, b| a.evidence.total_cmp(&b.evidence)).unwrap();
        best.half_life
    }

    #[test]
    #[cfg_attr(miri, ignore)] // too slow
    fn requests_choose_the_half_life() {
        // Unit 0 every other time, and 40 others in turn: how often they came is all there is to know.
        let mut policy = Lrfu::default();
        hits(&mut policy, 4, (0..4000).map(|at| if at % 2 == 0 { 0 } else { 1 + at / 2 % 40 }));
        assert_eq!(half_life(&policy), HALF_LIVES[3]);
        // Each unit 50 times in a row: how lately they came is all there is to know.
        hits(&mut policy, 4, (0..4000).map(|at| at / 50 % 41));
        assert_eq!(half_life(&policy), HALF_LIVES[0]);
    }
}
