//! Loads of what is in a file, under faults that a disk or a kernel may have.
#![cfg(not(miri))] // maps files

use std::fs::File;
use std::io::{self, IoSliceMut, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::super::checksum::{Checksum, PIECE_BYTES, checksum};
use super::fill::DIRECT_ALIGNMENT;
use super::{FileSource, Item, Loader, Source};
use crate::error::{Error, Result};
use crate::memory::Region;

/// Where the tensors of every test start in the file.
const HEADER: usize = 64 * 7;

/// Sizes of tensors: none, a few bytes, less than a block, a piece, several and a bit.
const SIZES: [usize; 9] = [100, 0, 3 * PIECE_BYTES + 17, 64, 5000, PIECE_BYTES, 9, 2 * PIECE_BYTES, 700];

/// A file of tensors, each at a multiple of 64 bytes.
struct Tensors {
    file: File,
    content: Vec<u8>,
    extents: Vec<Range<usize>>,
}

impl Tensors {
    fn new() -> Self {
        let (mut extents, mut end) = (Vec::new(), HEADER);
        for size in SIZES {
            let start = end.next_multiple_of(64);
            end = start + size;
            extents.push(start..end);
        }
        let content: Vec<u8> = (0..end as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        // Beside the build, not in a folder that may be in memory.
        let mut file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all(&content).unwrap();
        Self { file, content, extents }
    }

    fn items(&self) -> Vec<Item<'static>> {
        let item = |extent: &Range<usize>| Item {
            extent: extent.start as u64..extent.end as u64,
            place: extent.start - HEADER..extent.end - HEADER,
            convert: None,
        };
        self.extents.iter().map(item).collect()
    }

    fn bytes(&self) -> usize {
        self.content.len() - HEADER
    }

    fn checksums(&self) -> Vec<Checksum> {
        self.extents.iter().map(|extent| checksum(&self.content[extent.clone()])).collect()
    }

    /// Makes the next read come from the disk.
    fn drop_from_cache(&self) {
        self.file.sync_all().unwrap();
        // SAFETY: an open descriptor; the call takes no pointers.
        #[cfg(target_os = "linux")]
        unsafe {
            libc::posix_fadvise(self.file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED)
        };
    }

    /// Loads all into a region that starts at a place of its page, and compares what comes.
    fn check(&self, source: &dyn Source, offset: usize) {
        let mut region = Region::with_offset(offset, self.bytes(), None).unwrap();
        assert_eq!(load(source, &self.items(), &mut region).unwrap(), self.checksums());
        for extent in &self.extents {
            assert!(region[extent.start - HEADER..extent.end - HEADER] == self.content[extent.clone()], "{extent:?}");
        }
    }
}

fn load(source: &dyn Source, items: &[Item<'_>], memory: &mut [u8]) -> Result<Vec<Checksum>> {
    Loader { source, path: Path::new("tensors"), hashed: true, yields: true, stop: &AtomicBool::new(false) }
        .load(items, memory)
}

/// What becomes of a read.
#[derive(Clone, Copy)]
enum Outcome {
    /// What the file gives.
    Real,
    /// At most so many bytes.
    Short(usize),
    Error(i32),
}

/// A file whose reads have outcomes that a test chooses, by whether they go past the cache and how many there were.
struct Faulty<'a, F> {
    file: FileSource<&'a File>,
    cached: bool,
    reads: AtomicUsize,
    outcome: F,
}

impl<'a, F: Fn(bool, usize) -> Outcome + Sync> Faulty<'a, F> {
    fn new(file: &'a File, cached: bool, outcome: F) -> Self {
        Self { file: FileSource::new(file), cached, reads: AtomicUsize::new(0), outcome }
    }

    fn outcome(&self, direct: bool) -> Outcome {
        (self.outcome)(direct, self.reads.fetch_add(1, Ordering::Relaxed))
    }
}

impl<F: Fn(bool, usize) -> Outcome + Sync> Source for Faulty<'_, F> {
    fn read(&self, out: &mut [u8], start: u64) -> io::Result<usize> {
        match self.outcome(false) {
            Outcome::Real => self.file.read(out, start),
            Outcome::Short(bytes) => {
                let bytes = bytes.min(out.len());
                self.file.read(&mut out[..bytes], start)
            }
            Outcome::Error(code) => Err(io::Error::from_raw_os_error(code)),
        }
    }

    fn read_direct(&self, parts: &mut [IoSliceMut<'_>], start: u64) -> io::Result<usize> {
        assert!(start.is_multiple_of(DIRECT_ALIGNMENT as u64));
        for part in parts.iter() {
            assert!(part.len().is_multiple_of(DIRECT_ALIGNMENT) && part.as_ptr().addr() % DIRECT_ALIGNMENT == 0);
        }
        match self.outcome(true) {
            Outcome::Real => self.file.read_direct(parts, start),
            Outcome::Short(bytes) => {
                let count = self.file.read_direct(parts, start)?;
                let mut kept = bytes.min(count);
                for part in parts {
                    let whole = part.len().min(kept);
                    part[whole..].fill(0xee); // was not read
                    kept -= whole;
                }
                Ok(bytes.min(count))
            }
            Outcome::Error(code) => Err(io::Error::from_raw_os_error(code)),
        }
    }

    fn is_cached(&self, _extent: Range<u64>) -> bool {
        self.cached
    }
}

#[test]
fn tensors_come_from_the_page_cache_and_from_the_disk() {
    let tensors = Tensors::new();
    tensors.check(&FileSource::cached(&tensors.file), HEADER);
    tensors.check(&FileSource::new(&tensors.file), HEADER);
    for offset in [HEADER, 0, HEADER + DIRECT_ALIGNMENT] {
        tensors.drop_from_cache();
        tensors.check(&FileSource::new(&tensors.file), offset);
    }
}

#[cfg(target_os = "linux")]
#[test]
fn reads_go_past_the_page_cache_where_it_does_not_hold_the_bytes() {
    let tensors = Tensors::new();
    let (direct, cached) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let outcome = |is_direct: bool, _: usize| {
        (if is_direct { &direct } else { &cached }).fetch_add(1, Ordering::Relaxed);
        Outcome::Real
    };
    tensors.check(&Faulty::new(&tensors.file, false, outcome), HEADER);
    assert!(direct.load(Ordering::Relaxed) >= 6); // one for each whole piece
    let before = direct.load(Ordering::Relaxed);
    tensors.check(&Faulty::new(&tensors.file, true, outcome), HEADER);
    tensors.check(&Faulty::new(&tensors.file, false, outcome), HEADER + 64); // pages would not fit
    assert_eq!(direct.load(Ordering::Relaxed), before);
}

#[cfg(target_os = "linux")]
#[test]
fn the_system_says_what_the_page_cache_holds() {
    let tensors = Tensors::new();
    let source = FileSource::new(&tensors.file);
    let all = 0..tensors.content.len() as u64;
    assert!(source.is_cached(all.clone()));
    assert!(source.is_cached(0..0) && source.is_cached(all.end + 10_000..all.end + 20_000));
    tensors.drop_from_cache();
    let on_disk = [0xef53, 0x5846_5342, 0x9123_683e]; // ext4, XFS, Btrfs
    if on_disk.contains(&rustix::fs::fstatfs(&tensors.file).unwrap().f_type) {
        assert!(!source.is_cached(all));
    }
}

#[test]
fn short_reads_signals_and_refusals_are_overcome() {
    let tensors = Tensors::new();
    for cached in [true, false] {
        let short = |_: bool, read: usize| Outcome::Short([1, 4096, 8192, 100_000, usize::MAX][read % 5]);
        tensors.check(&Faulty::new(&tensors.file, cached, short), HEADER);
        let signals =
            |_: bool, read: usize| if read.is_multiple_of(2) { Outcome::Error(libc::EINTR) } else { Outcome::Real };
        tensors.check(&Faulty::new(&tensors.file, cached, signals), HEADER);
        for code in [libc::EINVAL, libc::EOPNOTSUPP] {
            let refusals = |direct: bool, _: usize| if direct { Outcome::Error(code) } else { Outcome::Real };
            tensors.check(&Faulty::new(&tensors.file, cached, refusals), HEADER);
        }
    }
}

#[test]
fn errors_of_the_disk_are_reported() {
    let tensors = Tensors::new();
    for (cached, code) in [(true, libc::EIO), (false, libc::EIO), (true, libc::EINVAL), (false, libc::ENOMEM)] {
        for failing in [0, 3] {
            let outcome = |_: bool, read: usize| if read >= failing { Outcome::Error(code) } else { Outcome::Real };
            let source = Faulty::new(&tensors.file, cached, outcome);
            match load(&source, &tensors.items(), &mut vec![0; tensors.bytes()]) {
                Err(Error::Io { path, source }) => {
                    assert_eq!((path.as_path(), source.raw_os_error()), (Path::new("tensors"), Some(code)));
                }
                other => panic!("expected an error {code}, found {other:?}"),
            }
        }
    }
}

#[test]
fn a_file_that_became_shorter_is_reported_where_it_ends() {
    let tensors = Tensors::new();
    tensors.file.set_len(tensors.extents[2].start as u64 + 10).unwrap();
    let first = format!("expected at least {} bytes of tensors, found fewer", tensors.extents[2].start + PIECE_BYTES);
    for cached in [true, false] {
        let source = Faulty::new(&tensors.file, cached, |_, _| Outcome::Real);
        let mut region = Region::with_offset(HEADER, tensors.bytes(), None).unwrap();
        match load(&source, &tensors.items(), &mut region) {
            Err(Error::Checksum(message)) => assert_eq!(message, first),
            other => panic!("expected a checksum error, found {other:?}"),
        }
    }
}

#[test]
fn a_load_ends_when_it_is_stopped() {
    let tensors = Tensors::new();
    let stop = AtomicBool::new(false);
    let outcome = |_: bool, read: usize| {
        stop.store(read >= 2, Ordering::Relaxed);
        Outcome::Real
    };
    let source = Faulty::new(&tensors.file, true, outcome);
    let loader = Loader { source: &source, path: Path::new("tensors"), hashed: true, yields: true, stop: &stop };
    assert!(matches!(loader.load(&tensors.items(), &mut vec![0; tensors.bytes()]), Err(Error::Interrupted)));
    assert!(source.reads.load(Ordering::Relaxed) < 8, "went on after it was stopped");
}

#[test]
fn converted_tensors_lie_among_others() {
    let tensors = Tensors::new();
    let mut items = tensors.items();
    let first = items[2].place.clone();
    for item in [2, 6] {
        items[item].convert = Some(Box::new(|bytes| bytes.into_iter().rev().collect()));
    }
    let mut memory = vec![0; tensors.bytes()];
    assert_eq!(load(&FileSource::cached(&tensors.file), &items, &mut memory).unwrap(), tensors.checksums());
    assert!(memory[first].iter().eq(tensors.content[tensors.extents[2].clone()].iter().rev()));
    let plain = tensors.extents[7].clone();
    assert!(memory[plain.start - HEADER..plain.end - HEADER] == tensors.content[plain]);
}

#[test]
fn nothing_is_hashed_where_no_checksums_are_wanted() {
    let tensors = Tensors::new();
    let (source, stop) = (FileSource::cached(&tensors.file), AtomicBool::new(false));
    let loader = Loader { source: &source, path: Path::new("tensors"), hashed: false, yields: true, stop: &stop };
    let mut memory = vec![0; tensors.bytes()];
    assert_eq!(loader.load(&tensors.items(), &mut memory).unwrap(), []);
    assert!(
        memory[5 * PIECE_BYTES..][..DIRECT_ALIGNMENT]
            == tensors.content[HEADER + 5 * PIECE_BYTES..][..DIRECT_ALIGNMENT]
    );
    tensors.file.write_all_at(b"other", HEADER as u64).unwrap();
    assert!(loader.load(&tensors.items(), &mut memory).is_ok());
    assert!(memory.starts_with(b"other"));
}
