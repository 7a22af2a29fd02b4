//! Which unit leaves first.

mod lrfu;
mod lru;

use crate::error::{Error, Result};

pub use lrfu::Lrfu;
pub use lru::Lru;

/// A unit of one residency: a small number that is used again once the unit is gone for good.
pub type UnitId = u32;

/// Decides which resident unit is evicted next.
///
/// A policy knows which units are resident and which were asked for, and may remember units that were evicted: they keep
/// their number. It is called under a lock: no operation may do I/O, and each costs the same however many units there
/// are, or grows with their logarithm.
pub trait Policy: Send {
    /// A request asked for a unit, resident or not. If it is not, it may become resident later, or never.
    fn requested(&mut self, unit: UnitId);

    /// A unit of so many bytes became resident. It is none that is resident already.
    fn admitted(&mut self, unit: UnitId, bytes: u64);

    /// A unit is resident no more: it was this policy's victim, or it was taken away. It may become resident again.
    fn removed(&mut self, unit: UnitId);

    /// A unit that is not resident is gone for good, and its number may soon mean another.
    fn forgotten(&mut self, unit: UnitId);

    /// The unit to evict, of those that `may` be. It stays resident until [`Policy::removed`].
    ///
    /// Asks about a unit once at most, and about none after the first that may be evicted. Where none may, the order of
    /// evictions is what it was.
    fn victim(&mut self, may: &mut dyn FnMut(UnitId) -> bool) -> Option<UnitId>;
}

/// The names of all policies, the default first.
pub const NAMES: [&str; 2] = ["lru", "lrfu"];

/// A policy by its name, of no units yet.
///
/// # Errors
///
/// [`Error::Argument`] for a name that is not among [`NAMES`].
pub fn by_name(name: &str) -> Result<Box<dyn Policy>> {
    match name {
        "lru" => Ok(Box::new(Lru::default())),
        "lrfu" => Ok(Box::new(Lrfu::default())),
        _ => Err(Error::Argument(format!("expected one of {}, found {name:?}", NAMES.join(", ")))),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use proptest::test_runner::TestCaseResult;

    use super::*;

    const UNITS: UnitId = 12;

    /// What may happen to a policy.
    #[derive(Clone, Debug)]
    pub(super) enum Happening {
        /// A request, for a resident unit or one that may become resident later.
        Request(UnitId),
        /// A unit becomes resident where it is not.
        Admit(UnitId),
        /// An eviction; a bit a unit says whether it may be the victim.
        Evict(u32),
        /// A unit is taken away.
        Remove(UnitId),
        /// A unit is taken away for good.
        Forget(UnitId),
    }

    pub(super) fn happenings() -> impl Strategy<Value = Vec<Happening>> {
        let one = prop_oneof![
            6 => (0..UNITS).prop_map(Happening::Request),
            6 => (0..UNITS).prop_map(Happening::Admit),
            4 => any::<u32>().prop_map(Happening::Evict),
            1 => (0..UNITS).prop_map(Happening::Remove),
            1 => (0..UNITS).prop_map(Happening::Forget),
        ];
        prop::collection::vec(one, 0..120)
    }

    pub(super) fn cases() -> ProptestConfig {
        ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 })
    }

    pub(super) fn size(unit: UnitId) -> u64 {
        100 * (1 + u64::from(unit) % 4)
    }

    /// The victim, and which units were asked about.
    fn ask(policy: &mut dyn Policy, mask: u32) -> (Option<UnitId>, Vec<UnitId>) {
        let mut asked = Vec::new();
        let victim = policy.victim(&mut |unit| {
            asked.push(unit);
            mask >> unit & 1 == 1
        });
        (victim, asked)
    }

    /// Holds what the trait promises of any policy; returns the victims in order.
    pub(super) fn check(
        policy: &mut dyn Policy,
        happenings: &[Happening],
        distract: bool,
    ) -> Result<Vec<Option<UnitId>>, TestCaseError> {
        let (mut resident, mut victims) = (BTreeSet::new(), Vec::new());
        for happening in happenings {
            match *happening {
                Happening::Request(unit) => policy.requested(unit),
                Happening::Admit(unit) => {
                    if resident.insert(unit) {
                        policy.admitted(unit, size(unit));
                    }
                }
                Happening::Evict(mask) => {
                    let (victim, asked) = ask(policy, mask);
                    prop_assert_eq!(victim.is_some(), resident.iter().any(|unit| mask >> unit & 1 == 1));
                    let once: BTreeSet<_> = asked.iter().copied().collect();
                    prop_assert!(once.len() == asked.len() && once.is_subset(&resident));
                    if let Some(victim) = victim {
                        prop_assert_eq!(asked.last(), Some(&victim));
                        prop_assert_eq!(asked.iter().filter(|unit| mask >> **unit & 1 == 1).count(), 1);
                        resident.remove(&victim);
                        policy.removed(victim);
                    }
                    victims.push(victim);
                }
                Happening::Remove(unit) | Happening::Forget(unit) => {
                    if resident.remove(&unit) {
                        policy.removed(unit);
                    }
                    if matches!(happening, Happening::Forget(_)) {
                        policy.forgotten(unit);
                    }
                }
            }
            if distract {
                prop_assert_eq!(ask(policy, 0).0, None);
            }
        }
        // The units that it knows are those that are resident: all can be evicted, and then there is none.
        while let Some(victim) = policy.victim(&mut |_| true) {
            prop_assert!(resident.remove(&victim));
            policy.removed(victim);
            victims.push(Some(victim));
        }
        prop_assert!(resident.is_empty());
        Ok(victims)
    }

    fn promises(happenings: &[Happening]) -> TestCaseResult {
        for name in NAMES {
            let victims = check(&mut *by_name(name).unwrap(), happenings, false)?;
            let distracted = check(&mut *by_name(name).unwrap(), happenings, true)?;
            prop_assert_eq!(victims, distracted, "{} is changed by a search that finds nothing", name);
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(cases())]

        #[test]
        #[cfg_attr(miri, ignore)] // rounds at random
        fn every_policy_keeps_the_promises_of_the_trait(happenings in happenings()) {
            promises(&happenings)?;
        }
    }

    #[test]
    fn an_unknown_name_is_refused_with_those_that_are_known() {
        let error = by_name("fifo").err().expect("an error");
        assert_eq!(error.to_string(), "expected one of lru, lrfu, found \"fifo\"");
    }
}
