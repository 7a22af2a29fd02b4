//! Loads of a delta whose file changes, or is out of order.
#![cfg(not(miri))] // maps files

use std::fs::{self, OpenOptions};
use std::io::IoSliceMut;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tempfile::TempDir;

use super::*;

static NOT_STOPPED: AtomicBool = AtomicBool::new(false);

/// A copy of a golden directory, opened; `None` where the repository's tests are out of reach, as in a packaged crate.
fn golden() -> Option<(TempDir, Delta)> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/v4/default");
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(golden).ok()? {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let delta = Delta::open(copy.path()).unwrap();
    Some((copy, delta))
}

impl Delta {
    /// As if all had been verified just now, and the file had been old, so that a write changes its stamp.
    fn set_verified(&self) {
        let file = OpenOptions::new().write(true).open(self.path().join(TENSORS)).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000)).unwrap();
        *self.verified() = Some(Stamp::of(&self.file).unwrap());
    }

    /// Changes the first byte of the first tensor in place.
    fn damage(&self) {
        let file = OpenOptions::new().write(true).open(self.path().join(TENSORS)).unwrap();
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, self.header_bytes).unwrap();
        file.write_all_at(&[!byte[0]], self.header_bytes).unwrap();
    }

    fn load_out_of(&self, source: &dyn Source) -> Result<Tensors> {
        self.load_from(source, |_, bytes| Region::new(bytes), &NOT_STOPPED)
    }
}

/// A file whose first read is preceded by something, and whose bytes are changed on the way.
struct Changed<'a, F> {
    file: FileSource<&'a File>,
    before: F,
    mask: u8,
}

impl<F: Fn() + Sync> Source for Changed<'_, F> {
    fn read(&self, out: &mut [u8], start: u64) -> io::Result<usize> {
        (self.before)();
        let count = self.file.read(out, start)?;
        out[..count].iter_mut().for_each(|byte| *byte ^= self.mask);
        Ok(count)
    }

    fn read_direct(&self, _parts: &mut [IoSliceMut<'_>], _start: u64) -> io::Result<usize> {
        Ok(0)
    }

    fn is_cached(&self, _extent: Range<u64>) -> bool {
        true
    }
}

fn message(result: Result<Tensors>) -> String {
    match result {
        Err(Error::Checksum(message)) => message,
        Err(other) => panic!("expected a checksum error, found {other:?}"),
        Ok(_) => panic!("expected a checksum error"),
    }
}

#[test]
fn what_was_verified_is_not_hashed_again() {
    let Some((_copy, delta)) = golden() else { return };
    let changed = Changed { file: FileSource::new(&delta.file), before: || (), mask: 1 };
    assert!(message(delta.load_out_of(&changed)).starts_with("expected checksum"));
    let sound = delta.tensors().unwrap();
    delta.set_verified();
    assert!(sound.region()[..] == delta.tensors().unwrap().region()[..]);
    let unhashed = delta.load_out_of(&changed).unwrap();
    assert!(sound.region()[..] != unhashed.region()[..]);
}

#[test]
fn a_file_that_is_old_enough_is_verified_once() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/v4/default");
    let Ok(delta) = Delta::open(&golden) else { return };
    let stamp = Stamp::of(&delta.file).unwrap();
    if stamp.is_settled(SystemTime::now()) {
        assert_eq!(*delta.verified(), None);
        delta.tensors().unwrap();
        assert_eq!(*delta.verified(), Some(stamp));
    }
}

#[test]
fn a_change_between_loads_is_found() {
    let Some((copy, delta)) = golden() else { return };
    delta.set_verified();
    delta.damage();
    assert!(message(delta.tensors()).starts_with("expected checksum"));
    assert!(message(delta.tensors()).starts_with("expected checksum"), "the damage was taken for verified");
    delta.damage();
    delta.tensors().unwrap();

    delta.set_verified();
    let file = OpenOptions::new().write(true).open(copy.path().join(TENSORS)).unwrap();
    file.set_len(delta.header_bytes + 10).unwrap();
    let found = message(delta.tensors());
    assert!(found.starts_with("expected at least ") && found.ends_with(", found fewer"), "{found}");
}

#[test]
fn a_change_during_a_load_is_found() {
    let Some((_copy, delta)) = golden() else { return };
    let before = || {
        if *delta.verified() == Some(Stamp::of(&delta.file).unwrap()) {
            delta.damage();
        }
    };
    let changing = Changed { file: FileSource::new(&delta.file), before, mask: 0 };
    delta.set_verified();
    assert!(message(delta.load_out_of(&changing)).starts_with("expected checksum"));

    // Nothing but its times is another: what was read is compared with its checksums after all.
    delta.damage();
    let before = || {
        if *delta.verified() == Some(Stamp::of(&delta.file).unwrap()) {
            delta.damage();
            delta.damage();
        }
    };
    delta.set_verified();
    let changing = Changed { file: FileSource::new(&delta.file), before, mask: 0 };
    delta.load_out_of(&changing).unwrap();
}

#[test]
fn a_load_without_memory_gives_its_value_back_and_the_next_one_works() {
    let Some((_copy, delta)) = golden() else { return };
    let token = Arc::new(());
    let memory = |_, _| Err(io::Error::from_raw_os_error(libc::ENOMEM));
    match delta.load_from(&FileSource::new(&delta.file), memory, &NOT_STOPPED) {
        Err(Error::Io { path, source }) => {
            assert_eq!((path, source.raw_os_error()), (delta.path().join(TENSORS), Some(libc::ENOMEM)));
        }
        _ => panic!("expected an error of the operating system"),
    }
    delta.load(Some(Box::new(token.clone())), &NOT_STOPPED).unwrap();
    assert_eq!(Arc::strong_count(&token), 1);
}

#[test]
fn a_site_that_is_loaded_by_itself_is_checked_and_takes_what_it_says() {
    let Some((_folder, delta)) = golden() else { return };
    let names: Vec<String> = delta.manifest().sites.iter().map(|site| site.name.clone()).collect();
    for name in &names {
        let (alone, whole) = (delta.load_site(name, None, &NOT_STOPPED).unwrap(), delta.site_tensors(name).unwrap());
        let (took, asked) = (alone.region().len(), delta.site_memory_bytes(name).unwrap());
        assert!(took <= asked && asked < took + 2 * DIRECT_ALIGNMENT);
        for spec in delta.site(name).unwrap().clone().into_current().unwrap().tensor_specs().unwrap() {
            assert_eq!(alone.tensor(name, &spec.name), whole.tensor(name, &spec.name));
        }
    }
    delta.set_verified();
    delta.damage();
    let damaged = names.iter().filter(|name| delta.load_site(name, None, &NOT_STOPPED).is_err()).count();
    assert_eq!(damaged, 1);
    assert!(matches!(delta.load_site("none", None, &NOT_STOPPED), Err(Error::Argument(_))));
    assert!(matches!(delta.site_memory_bytes("none"), Err(Error::Argument(_))));
    assert!(matches!(delta.load_site(&names[1], None, &AtomicBool::new(true)), Err(Error::Interrupted)));
}
