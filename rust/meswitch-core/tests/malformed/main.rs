//! Malformed delta directories: each is refused with the error that names what is wrong, and none makes the reader
//! panic.
//!
//! Every directory is made from a sound one by one change, and checksums and sizes are then corrected, so that only the
//! check for that change can refuse it.
#![cfg(not(miri))] // maps files

mod directory;
mod files;
mod header;
mod manifest;
mod page;
mod tensors;

use meswitch_core::{Delta, Error};
use serde_json::Value;

use directory::Directory;

/// What refuses a directory: opening it, or verifying it.
fn refusal(directory: &Directory) -> Option<Error> {
    let folder = tempfile::tempdir().unwrap();
    directory.write(folder.path());
    Delta::open(folder.path()).and_then(|delta| delta.verify()).err()
}

#[track_caller]
fn assert_format(what: &str, error: Option<Error>, expected: &str) {
    match error {
        Some(Error::Format(message)) => assert!(message.contains(expected), "{what}: {message}"),
        Some(other) => panic!("{what}: expected a format error, found {other:?}"),
        None => panic!("{what}: accepted"),
    }
}

#[track_caller]
fn assert_checksum(what: &str, error: Option<Error>, expected: &str) {
    match error {
        Some(Error::Checksum(message)) => assert!(message.contains(expected), "{what}: {message}"),
        Some(other) => panic!("{what}: expected a checksum error, found {other:?}"),
        None => panic!("{what}: accepted"),
    }
}

/// Changes the manifest, and expects opening to fail.
#[track_caller]
#[allow(clippy::needless_pass_by_value)] // callers build values in place
fn assert_manifest(pointer: &str, value: Value, expected: &str) {
    let mut directory = Directory::sound();
    directory.set(pointer, value.clone());
    assert_format(&format!("{pointer} = {value}"), refusal(&directory), expected);
}

#[test]
fn the_directory_that_all_others_are_made_of_is_sound() {
    let folder = tempfile::tempdir().unwrap();
    Directory::sound().write(folder.path());
    let delta = Delta::open(folder.path()).unwrap();
    delta.verify().unwrap();
    for (site, shape) in [("coded.weight", (3, 8)), ("sparse.weight", (2, 3))] {
        let tensors = delta.site_tensors(site).unwrap();
        let matrix = tensors.matrix(site).unwrap();
        assert_eq!((matrix.rows(), matrix.columns()), shape);
    }
    let tensors = delta.tensors().unwrap();
    for site in ["whole.weight", "same.weight", "other.weight"] {
        assert!(matches!(tensors.matrix(site), Err(Error::Argument(_))), "{site}");
    }
}
