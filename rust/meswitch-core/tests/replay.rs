//! Replays: every request is counted once, budgets hold, and the optimal policy is the optimum.
#![cfg(not(miri))] // writes files

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write;
use std::fs;

use meswitch_core::residency::policy::{self, Policy, UnitId};
use meswitch_core::residency::replay::{Report, Trace};
use meswitch_core::{Error, Result};
use proptest::prelude::*;
use tempfile::TempDir;

/// Something in a trace: a request for an expert of so many bytes, or the end of one.
#[derive(Clone, Copy, Debug)]
enum Line {
    Request(u8, u64),
    Retire(u8),
}
use Line::{Request, Retire};

fn read(lines: &[Line]) -> Result<Trace> {
    let mut text = "{\"event\":\"start\",\"version\":1,\"budget\":5,\"policy\":\"lru\"}\n".to_owned();
    for line in lines {
        let (event, expert, bytes) = match line {
            Request(expert, bytes) => ("request", expert, *bytes),
            Retire(expert) => ("retire", expert, 0),
        };
        writeln!(text, "{{\"event\":\"{event}\",\"expert\":\"{expert}\",\"bytes\":{bytes}}}").unwrap();
    }
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("trace.jsonl");
    fs::write(&path, text).unwrap();
    Trace::read(&path)
}

fn requests(experts: impl IntoIterator<Item = u8>, bytes: u64) -> Vec<Line> {
    experts.into_iter().map(|expert| Request(expert, bytes)).collect()
}

fn lru(trace: &Trace, budget: u64) -> Report {
    trace.replay(budget, &mut *policy::by_name("lru").unwrap())
}

/// A policy under watch: what it knows as resident has `bytes`, which never exceed `budget`.
struct Watched {
    inner: Box<dyn Policy>,
    sizes: HashMap<UnitId, u64>,
    budget: u64,
}

impl Policy for Watched {
    fn requested(&mut self, unit: UnitId) {
        self.inner.requested(unit);
    }

    fn admitted(&mut self, unit: UnitId, bytes: u64) {
        assert!(self.sizes.insert(unit, bytes).is_none());
        assert!(self.sizes.values().sum::<u64>() <= self.budget);
        self.inner.admitted(unit, bytes);
    }

    fn removed(&mut self, unit: UnitId) {
        self.sizes.remove(&unit).unwrap();
        self.inner.removed(unit);
    }

    fn forgotten(&mut self, unit: UnitId) {
        assert!(!self.sizes.contains_key(&unit));
        self.inner.forgotten(unit);
    }

    fn victim(&mut self, may: &mut dyn FnMut(UnitId) -> bool) -> Option<UnitId> {
        self.inner.victim(may)
    }
}

/// The fewest loads of experts of one size, in room for so many: every choice is tried.
fn fewest_loads(experts: &[u8], room: usize) -> u64 {
    let mut states = HashMap::from([(BTreeSet::new(), 0u64)]);
    for expert in experts {
        let mut following: HashMap<BTreeSet<u8>, u64> = HashMap::new();
        for (resident, loads) in states {
            let mut reach = |state: BTreeSet<u8>, loads| {
                let least = following.entry(state).or_insert(loads);
                *least = loads.min(*least);
            };
            if resident.contains(expert) {
                reach(resident, loads);
            } else if resident.len() < room {
                reach(&resident | &[*expert].into(), loads + 1);
            } else {
                for victim in &resident {
                    reach(&(&resident - &[*victim].into()) | &[*expert].into(), loads + 1);
                }
            }
        }
        states = following;
    }
    states.into_values().min().unwrap_or(0)
}

#[test]
fn a_replay_by_hand() {
    let trace = read(&requests([1, 2, 3, 1, 2, 2, 3], 10)).unwrap();
    assert_eq!((trace.requests(), trace.experts(), trace.largest(), trace.total()), (7, 3, 10, 30));
    assert_eq!((trace.budget(), trace.policy()), (Some(5), "lru"));
    let report = lru(&trace, 29);
    assert_eq!(report, Report { requests: 7, hits: 1, refused: 0, loads: 6, bytes_read: 60, evictions: 4 });
    assert!((report.hit_rate() - 1.0 / 7.0).abs() < 1e-9);
    // 3 takes the place of 2, and 2 that of 1.
    let best = Report { requests: 7, hits: 3, refused: 0, loads: 4, bytes_read: 40, evictions: 2 };
    assert_eq!(trace.optimal(20), best);
}

#[test]
fn an_expert_larger_than_the_budget_is_refused_and_changes_nothing() {
    let trace = read(&[Request(1, 4), Request(2, 9), Request(1, 4), Request(2, 9)]).unwrap();
    let expected = Report { requests: 4, hits: 1, refused: 2, loads: 1, bytes_read: 4, evictions: 0 };
    assert_eq!((lru(&trace, 8), trace.optimal(8)), (expected, expected));
    assert_eq!((trace.largest(), trace.total()), (9, 13));
}

#[test]
fn a_retired_expert_and_one_of_another_size_are_loaded_anew() {
    let trace = read(&[Retire(2), Request(1, 4), Retire(1), Request(1, 4), Request(1, 5), Request(1, 5)]).unwrap();
    let expected = Report { requests: 4, hits: 1, refused: 0, loads: 3, bytes_read: 13, evictions: 0 };
    assert_eq!((lru(&trace, 5), trace.optimal(5)), (expected, expected));
    assert_eq!((trace.experts(), trace.total()), (3, 5));
}

#[test]
fn a_trace_without_requests_is_refused() {
    match read(&[Retire(1)]) {
        Err(Error::Data(message)) => assert!(message.ends_with("trace.jsonl: expected requests, found none")),
        other => panic!("expected an error, found {:?}", other.map(|trace| trace.requests())),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_optimal_policy_loads_as_little_as_any(
        experts in prop::collection::vec(0u8..6, 1..24),
        room in 1usize..5,
    ) {
        let trace = read(&requests(experts.iter().copied(), 10)).unwrap();
        let budget = 10 * room as u64 + 3;
        let best = trace.optimal(budget);
        prop_assert_eq!(best.loads, fewest_loads(&experts, room));
        for name in policy::NAMES {
            prop_assert!(trace.replay(budget, &mut *policy::by_name(name).unwrap()).loads >= best.loads);
        }
    }

    #[test]
    fn every_request_is_counted_once_and_budgets_hold(
        lines in prop::collection::vec(
            prop_oneof![
                8 => (0u8..8).prop_map(|expert| Request(expert, u64::from(expert % 5) * 3)),
                1 => (0u8..8, 0u64..20).prop_map(|(expert, bytes)| Request(expert, bytes)),
                1 => (0u8..8).prop_map(Retire),
            ],
            1..200,
        ),
        budget in 1u64..40,
    ) {
        prop_assume!(lines.iter().any(|line| matches!(line, Request(..))));
        let trace = read(&lines).unwrap();
        let replay = |name, budget| {
            let inner = policy::by_name(name).unwrap();
            trace.replay(budget, &mut Watched { inner, sizes: HashMap::new(), budget })
        };
        for name in policy::NAMES {
            let report = replay(name, budget);
            prop_assert_eq!(report.requests, report.hits + report.refused + report.loads);
            prop_assert!(report.evictions <= report.loads);
            let all = replay(name, trace.total());
            prop_assert_eq!((all.loads, all.refused, all.evictions), (trace.experts() as u64, 0, 0));
            prop_assert_eq!(all, trace.optimal(trace.total()));
        }
    }
}
