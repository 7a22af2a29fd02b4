//! Directories that were changed after they were written.

use std::fs;

use meswitch_core::Error;
use meswitch_core::delta::{Delta, MANIFEST, TENSORS};
use serde_json::json;

use crate::family::{Family, forge};

#[test]
fn every_flipped_bit_is_found() {
    let family = Family::new();
    family.compress().unwrap();
    let folder = family.path("delta");
    for file in [MANIFEST, TENSORS, "config.json"] {
        let path = folder.join(file);
        let sound = fs::read(&path).unwrap();
        for at in 0..sound.len() {
            let mut damaged = sound.clone();
            damaged[at] ^= 1 << (at % 8);
            fs::write(&path, &damaged).unwrap();
            assert!(
                Delta::open(&folder).and_then(|delta| delta.verify()).is_err(),
                "a flip at byte {at} of {file} went unseen"
            );
        }
        fs::write(&path, &sound).unwrap();
    }
    Delta::open(&folder).unwrap().verify().unwrap();
}

#[test]
fn truncated_and_swapped_files_do_not_open() {
    let family = Family::new();
    family.compress().unwrap();
    let folder = family.path("delta");
    for file in [MANIFEST, TENSORS, "config.json"] {
        let sound = fs::read(folder.join(file)).unwrap();
        for length in [0, 1, 8, sound.len() / 2, sound.len() - 1] {
            fs::write(folder.join(file), &sound[..length]).unwrap();
            assert!(
                matches!(Delta::open(&folder), Err(Error::Format(_) | Error::Checksum(_))),
                "{length} bytes of {file}"
            );
        }
        fs::remove_file(folder.join(file)).unwrap();
        assert!(matches!(Delta::open(&folder), Err(Error::Io { .. })));
        fs::write(folder.join(file), &sound).unwrap();
    }
    fs::rename(folder.join("config.json"), folder.join("spare")).unwrap();
    fs::rename(folder.join(TENSORS), folder.join("config.json")).unwrap();
    fs::rename(folder.join("spare"), folder.join(TENSORS)).unwrap();
    assert!(matches!(Delta::open(&folder), Err(Error::Format(_))));
}

#[test]
fn newer_formats_are_named() {
    let family = Family::new();
    family.compress().unwrap();
    let opened = forge(&family.path("delta"), |manifest| manifest["format_version"] = json!(99));
    let Err(Error::Format(message)) = opened else { panic!("accepted") };
    assert!(message.contains("format version 1 to 4 in meswitch.json, found 99"), "{message}");
}
