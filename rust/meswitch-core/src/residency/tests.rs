//! What the tests of a residency need.

use std::sync::{Arc, Mutex};

use super::policy::{Policy, UnitId};

/// The units that a policy holds resident, the one asked for longest ago first.
pub(super) type Recency = Arc<Mutex<Vec<UnitId>>>;

/// Evicts what was asked for longest ago.
pub(super) struct LeastRecent(Recency);

impl LeastRecent {
    pub(super) fn new() -> (Self, Recency) {
        let recency = Recency::default();
        (Self(recency.clone()), recency)
    }
}

impl Policy for LeastRecent {
    fn admitted(&mut self, unit: UnitId, _bytes: u64) {
        let mut recency = self.0.lock().unwrap();
        assert!(!recency.contains(&unit), "expected a unit that was not resident");
        recency.push(unit);
    }

    fn requested(&mut self, unit: UnitId) {
        if self.0.lock().unwrap().contains(&unit) {
            self.removed(unit);
            self.admitted(unit, 0);
        }
    }

    fn removed(&mut self, unit: UnitId) {
        let mut recency = self.0.lock().unwrap();
        let index = recency.iter().position(|other| *other == unit).expect("a resident unit");
        recency.remove(index);
    }

    fn forgotten(&mut self, unit: UnitId) {
        assert!(!self.0.lock().unwrap().contains(&unit), "expected a unit that is not resident");
    }

    fn victim(&mut self, may: &mut dyn FnMut(UnitId) -> bool) -> Option<UnitId> {
        self.0.lock().unwrap().iter().copied().find(|unit| may(*unit))
    }
}
