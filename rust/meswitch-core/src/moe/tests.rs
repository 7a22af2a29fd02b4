#![cfg(not(miri))] // maps files

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use super::{Extent, Store, Visit};
use crate::error::Error;
use crate::residency::Unit;

/// Bytes of each file.
const FILE: usize = 5 << 20;

/// Two files beside the build, whose folder is not in memory, and what they hold.
struct Files {
    folder: tempfile::TempDir,
    content: Vec<Vec<u8>>,
}

impl Files {
    fn new() -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let content = |seed: u32| (0..FILE as u32).map(|at| (at.wrapping_mul(seed) >> 13) as u8).collect::<Vec<u8>>();
        let content = vec![content(2_654_435_761), content(2_246_822_519)];
        let files = Self { folder, content };
        for (path, bytes) in files.paths().iter().zip(&files.content) {
            fs::write(path, bytes).unwrap();
            // As a checkpoint that was written long ago: a later write changes its time.
            let times = fs::FileTimes::new().set_modified(SystemTime::now() - Duration::from_secs(60));
            OpenOptions::new().write(true).open(path).unwrap().set_times(times).unwrap();
        }
        files
    }

    fn paths(&self) -> Vec<PathBuf> {
        ["first", "second"].map(|name| self.folder.path().join(name)).to_vec()
    }

    fn store(&self, budget: u64) -> Arc<Store> {
        Arc::new(Store::open(budget, &self.paths()).unwrap())
    }

    fn matrix(&self, extents: &[Extent]) -> Vec<u8> {
        let bytes = |extent: &Extent| &self.content[extent.file][extent.start as usize..][..extent.bytes];
        extents.iter().flat_map(bytes).copied().collect()
    }
}

fn extent(file: usize, start: u64, bytes: usize) -> Extent {
    Extent { file, start, bytes }
}

/// Bytes of each of `matrices`, and of a slot for it.
const MATRIX: usize = 96 << 10;
const SLOT: u64 = (MATRIX + 4096) as u64;

/// One matrix after another in the first file, each with its second third first.
fn matrices(count: usize) -> Vec<Vec<Extent>> {
    let (third, start) = (MATRIX / 3, |number| (1000 + number * MATRIX) as u64);
    let of = |number| {
        let start = start(number);
        vec![
            extent(0, start + third as u64, third),
            extent(0, start, third),
            extent(0, start + 2 * third as u64, third),
        ]
    };
    (0..count).map(of).collect()
}

/// A store with some matrices.
struct Model<'a> {
    files: &'a Files,
    store: Arc<Store>,
    matrices: Vec<Vec<Extent>>,
    units: Vec<Unit>,
}

impl<'a> Model<'a> {
    fn new(files: &'a Files, budget: u64, matrices: Vec<Vec<Extent>>) -> Self {
        let store = files.store(budget);
        let units =
            matrices.iter().enumerate().map(|(at, extents)| store.add(&at.to_string(), extents).unwrap()).collect();
        Self { files, store, matrices, units }
    }

    fn begin(&self, turns: &[&[usize]]) -> Visit {
        let of = |turn: &&[usize]| turn.iter().map(|number| self.units[*number]).collect();
        self.store.visit(turns.iter().map(of).collect()).unwrap()
    }

    /// Visits matrices, and compares each with the files. Returns the order in which they came.
    fn visit(&self, turns: &[&[usize]]) -> Vec<usize> {
        let (mut visit, mut order) = (self.begin(turns), Vec::new());
        for turn in turns {
            let before = order.len();
            while let Some(next) = visit.next() {
                let (position, slot) = next.unwrap();
                let content: &[u8] = (**slot).as_ref();
                assert!(content == self.files.matrix(&self.matrices[turn[position]]), "not what the file holds");
                order.push(turn[position]);
            }
            assert_eq!(order.len() - before, turn.len(), "of a turn");
        }
        assert!(visit.next().is_none());
        order
    }

    /// Keeps matrices, and waits for them.
    fn keep(&self, numbers: &[usize]) -> Vec<Unit> {
        let units: Vec<Unit> = numbers.iter().map(|number| self.store.keep(&self.matrices[*number]).unwrap()).collect();
        let mut missing = units.len();
        while missing > 0 {
            for (unit, lease) in self.store.arrived(true) {
                let number = numbers[units.iter().position(|own| *own == unit).unwrap()];
                let lease = lease.unwrap();
                let content: &[u8] = (**lease).as_ref();
                assert!(content == self.files.matrix(&self.matrices[number]), "not what the file holds");
                missing -= 1;
            }
        }
        units
    }

    fn check_all_visited(&self, turns: &[&[usize]]) {
        let (mut order, mut all) = (self.visit(turns), turns.concat());
        order.sort_unstable();
        all.sort_unstable();
        assert_eq!(order, all);
    }
}

#[test]
fn matrices_are_what_their_extents_hold() {
    let files = Files::new();
    let odd = vec![
        vec![extent(0, 8, 3 << 20), extent(1, 17, 1 << 20)],
        vec![extent(1, 1 << 20, 4096), extent(0, 5, 1), extent(1, 4096 * 3, 4096 * 300)],
        vec![extent(1, 4096 * 303, 4096 * 150)],
        vec![extent(0, 0, 1)],
        vec![extent(0, FILE as u64 - 3, 3)],
        vec![],
    ];
    let model = Model::new(&files, 64 << 20, odd);
    for _ in 0..2 {
        model.check_all_visited(&[&[2, 0, 1], &[5, 3, 4]]);
    }
    let counters = model.store.snapshot().counters;
    assert_eq!((counters.hits, counters.misses, counters.loads), (6, 6, 6));
}

#[test]
fn matrices_start_where_any_dtype_may() {
    let files = Files::new();
    let model = Model::new(&files, 64 << 20, vec![vec![extent(0, 13, 100)], vec![extent(0, 4095, 9)]]);
    let mut visit = model.begin(&[&[0, 1]]);
    while let Some(next) = visit.next() {
        let address = (**next.unwrap().1).as_ref().as_ptr().addr();
        assert_eq!(address % super::MATRIX_ALIGNMENT, 0);
    }
}

#[test]
fn those_in_memory_come_first() {
    let files = Files::new();
    let model = Model::new(&files, 64 << 20, matrices(7));
    model.visit(&[&[1, 4], &[6]]);
    let visit = model.begin(&[&[0, 1, 2], &[4, 5]]);
    assert_eq!(visit.hits(), 2);
    drop(visit); // some of 0, 2 and 5 may be read by now
    assert_eq!(model.visit(&[&[3, 1, 4]]), [1, 4, 3]);
    assert!(model.store.has(model.units[1]));
}

#[test]
fn the_budget_holds_whatever_is_visited() {
    let files = Files::new();
    let mut all = matrices(20);
    all.push(vec![extent(1, 0, 200 << 10)]); // of another size
    for room in [1, 2, 3, 7] {
        let budget = (room * SLOT).max(204 << 10);
        let model = Model::new(&files, budget, all.clone());
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    assert!(model.store.snapshot().used <= budget && model.store.allocated() <= budget);
                }
            });
            for round in 0..8 {
                let chosen: Vec<usize> = (0..all.len()).filter(|number| (number * 7 + round) % 5 < 3).collect();
                let (one, other) = chosen.split_at(round % chosen.len());
                model.check_all_visited(&[one, other]);
            }
            done.store(true, Ordering::Relaxed);
        });
        let counters = model.store.snapshot().counters;
        assert!(counters.hits + counters.misses > 0 && counters.failed == 0);
    }
}

#[test]
fn each_is_read_once_at_most_however_many_fit() {
    let files = Files::new();
    let model = Model::new(&files, 3 * SLOT, matrices(20));
    let all: Vec<usize> = (0..20).collect();
    for _ in 0..3 {
        let before = model.store.snapshot().counters.loads;
        model.check_all_visited(&[&all]);
        assert!(model.store.snapshot().counters.loads - before <= 20);
    }
}

#[test]
fn what_is_used_again_needs_no_new_memory() {
    let files = Files::new();
    let model = Model::new(&files, 3 * SLOT, matrices(10));
    for start in 0..8 {
        model.visit(&[&[start, start + 1]]);
    }
    assert_eq!(model.store.allocated(), 3 * SLOT);
}

#[test]
fn memory_that_somebody_still_has_is_not_used_again() {
    let files = Files::new();
    let model = Model::new(&files, 2 * SLOT, matrices(4));
    let kept = Arc::clone(&model.begin(&[&[0]]).next().unwrap().unwrap().1);
    model.visit(&[&[1]]);
    thread::scope(|scope| {
        let waits = scope.spawn(|| model.visit(&[&[2, 3]]));
        while model.store.has(model.units[0]) {
            thread::yield_now();
        }
        assert!((*kept).as_ref() == files.matrix(&model.matrices[0]));
        drop(kept);
        assert_eq!(waits.join().unwrap().len(), 2);
    });
}

#[test]
fn a_file_that_is_written_to_is_refused_and_a_removed_one_is_not() {
    let files = Files::new();
    let others = vec![vec![extent(1, 0, 4096)], vec![extent(1, 4096, 4096)]];
    let model = Model::new(&files, 64 << 20, [matrices(3), others].concat());
    model.visit(&[&[0]]);
    let paths = files.paths();
    OpenOptions::new().write(true).open(&paths[0]).unwrap().write_all_at(b"other", 7).unwrap();
    fs::remove_file(&paths[1]).unwrap();
    for turns in [&[&[0, 1][..]][..], &[&[0], &[1]]] {
        let mut changed = model.begin(turns);
        assert!(changed.next().unwrap().is_ok(), "what is in memory is as it was");
        let error = changed.next().or_else(|| changed.next()).unwrap().err().expect("the file was written to");
        assert!(matches!(&error, Error::Checkpoint(text) if text.contains("first")), "{error}");
    }
    model.check_all_visited(&[&[0, 3], &[4]]);
    assert!(model.store.snapshot().counters.failed >= 2);
}

#[test]
fn a_file_that_is_cut_is_refused() {
    let files = Files::new();
    let model = Model::new(&files, 64 << 20, matrices(5));
    OpenOptions::new().write(true).open(&files.paths()[0]).unwrap().set_len(200_000).unwrap();
    let error = model.begin(&[&[4]]).next().unwrap().err().expect("the file was cut");
    assert!(matches!(error, Error::Checkpoint(_)), "{error}");
}

#[test]
fn what_cannot_be_is_refused() {
    let files = Files::new();
    let store = files.store(100_000);
    let refused = |extents: &[Extent]| store.add("matrix", extents).unwrap_err();
    assert!(matches!(refused(&[extent(0, FILE as u64, 1)]), Error::Checkpoint(_)));
    assert!(matches!(refused(&[extent(0, u64::MAX, 2)]), Error::Checkpoint(_)));
    assert!(matches!(refused(&[extent(2, 0, 2)]), Error::Argument(_)));
    assert!(matches!(refused(&[extent(0, 0, 100_000)]), Error::Budget { .. }));
    assert!(matches!(Store::open(1, &[PathBuf::from("no such file")]), Err(Error::Io { .. })));
}

#[test]
fn one_visit_at_a_time() {
    let files = Files::new();
    let model = Model::new(&files, 2 * SLOT, matrices(3));
    let unfinished = model.begin(&[&[0, 1], &[2]]);
    assert!(matches!(model.store.visit(vec![]), Err(Error::Argument(_))));
    drop(unfinished);
    model.check_all_visited(&[&[2], &[1, 0]]);
}

#[test]
fn what_is_kept_stays_until_it_is_given_up() {
    let files = Files::new();
    let model = Model::new(&files, 3 * SLOT, matrices(6));
    let kept = model.keep(&[0, 1, 2]);
    let fourth = model.store.keep(&model.matrices[3]).unwrap();
    assert!(model.store.arrived(false).is_empty() && !model.store.has(fourth), "there is no room for it");
    model.store.give_up(kept[1]);
    let events = std::iter::repeat_with(|| model.store.arrived(true)).find(|some| !some.is_empty()).unwrap();
    assert!(events.len() == 1 && events[0].0 == fourth && events[0].1.is_ok());
    assert!(model.store.has(kept[0]) && model.store.has(kept[2]) && !model.store.has(kept[1]));
    assert_eq!(model.store.snapshot().used, 3 * SLOT);
    assert_eq!(model.store.allocated(), 3 * SLOT);
}

#[test]
fn memory_of_what_was_given_up_is_used_again_when_nobody_has_it() {
    let files = Files::new();
    let model = Model::new(&files, SLOT, matrices(2));
    let first = model.store.keep(&model.matrices[0]).unwrap();
    let slot = Arc::clone(model.store.arrived(true)[0].1.as_ref().unwrap());
    model.store.give_up(first);
    let second = model.store.keep(&model.matrices[1]).unwrap();
    assert!((*slot).as_ref() == files.matrix(&model.matrices[0]) && !model.store.has(second));
    drop(slot);
    let events = std::iter::repeat_with(|| model.store.arrived(true)).find(|some| !some.is_empty()).unwrap();
    assert!(events[0].0 == second && events[0].1.is_ok());
}

#[test]
fn what_is_given_up_before_it_arrives_is_not_heard_of() {
    let files = Files::new();
    let model = Model::new(&files, 64 << 20, matrices(5));
    for _ in 0..50 {
        let given_up = model.store.keep(&model.matrices[0]).unwrap();
        model.store.give_up(given_up);
        let kept = model.store.keep(&model.matrices[1]).unwrap();
        let found = std::iter::repeat_with(|| model.store.arrived(true)).find(|some| !some.is_empty()).unwrap();
        assert!(found.iter().all(|(unit, _)| *unit == kept));
        model.store.give_up(kept);
    }
    drop(model); // while nothing is left to be read
    let model = Model::new(&files, 64 << 20, matrices(5));
    let _ = model.store.keep(&model.matrices[4]).unwrap();
    drop(model); // while something is being read
}

#[test]
fn what_cannot_be_kept_says_why() {
    let files = Files::new();
    let model = Model::new(&files, 64 << 20, matrices(5));
    model.keep(&[0]);
    OpenOptions::new().write(true).open(&files.paths()[0]).unwrap().write_all_at(b"other", 7).unwrap();
    let unit = model.store.keep(&model.matrices[1]).unwrap();
    let events = model.store.arrived(true);
    assert!(events[0].0 == unit && matches!(&events[0].1, Err(Error::Checkpoint(text)) if text.contains("first")));
    assert!(matches!(model.store.keep(&[extent(0, FILE as u64, 1)]), Err(Error::Checkpoint(_))));
}
