//! Least recently used.

use hashlink::LinkedHashSet;

use super::{Policy, UnitId};

/// Evicts the unit that has been unused the longest: neither asked for nor made resident since.
///
/// A search costs as much as there are units before its victim that may not be evicted.
#[derive(Default)]
pub struct Lru {
    /// Resident units, the one used last at the back.
    order: LinkedHashSet<UnitId>,
}

impl Policy for Lru {
    fn requested(&mut self, unit: UnitId) {
        self.order.to_back(&unit);
    }

    fn admitted(&mut self, unit: UnitId, _bytes: u64) {
        self.order.insert(unit);
    }

    fn removed(&mut self, unit: UnitId) {
        self.order.remove(&unit);
    }

    fn forgotten(&mut self, _unit: UnitId) {}

    fn victim(&mut self, may: &mut dyn FnMut(UnitId) -> bool) -> Option<UnitId> {
        self.order.iter().copied().find(|unit| may(*unit))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::residency::policy::tests::{cases, check, happenings};

    /// The same with a clock: a unit and when it was asked for.
    #[derive(Default)]
    struct Naive {
        now: u64,
        asked: Vec<(UnitId, u64)>,
    }

    impl Policy for Naive {
        fn requested(&mut self, unit: UnitId) {
            if self.asked.iter().any(|(other, _)| *other == unit) {
                self.removed(unit);
                self.admitted(unit, 0);
            }
        }

        fn admitted(&mut self, unit: UnitId, _bytes: u64) {
            self.asked.push((unit, self.now));
            self.now += 1;
        }

        fn removed(&mut self, unit: UnitId) {
            self.asked.retain(|(other, _)| *other != unit);
        }

        fn forgotten(&mut self, _unit: UnitId) {}

        fn victim(&mut self, may: &mut dyn FnMut(UnitId) -> bool) -> Option<UnitId> {
            let mut sorted = self.asked.clone();
            sorted.sort_by_key(|(_, when)| *when);
            sorted.into_iter().map(|(unit, _)| unit).find(|unit| may(*unit))
        }
    }

    proptest! {
        #![proptest_config(cases())]

        #[test]
        fn evicts_what_a_clock_says(happenings in happenings()) {
            let victims = check(&mut Lru::default(), &happenings, false)?;
            prop_assert_eq!(victims, check(&mut Naive::default(), &happenings, false)?);
        }
    }
}
