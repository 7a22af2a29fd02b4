//! Which files there are, and of what kind.

use meswitch_core::{Delta, Error};
use serde_json::json;

use crate::directory::Directory;
use crate::{assert_format, assert_manifest, refusal};

#[test]
fn files_that_are_not_plain_are_refused() {
    let entry = || json!({"bytes": 0, "checksum": "0".repeat(32)});
    for name in ["", "../x", "a/b", "a\\b", ".x", ".journal", "a\nb", "meswitch.json"] {
        let mut directory = Directory::sound();
        directory.change_manifest(move |manifest| manifest["files"][name] = entry());
        assert_format(name, refusal(&directory), "expected plain names of other files in meswitch.json, found");
    }
    assert_manifest("/files/config.json/bytes", json!(3), "expected config.json of 3 bytes, found 2");
    let digits = "expected a checksum of 32 lower-case hexadecimal digits";
    for checksum in ["", "zz", &"A".repeat(32), &"0".repeat(33)] {
        assert_manifest("/files/config.json/checksum", json!(checksum), digits);
    }
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| drop(manifest["files"].as_object_mut().unwrap().remove("delta.safetensors")));
    assert_format("tensors", refusal(&directory), "expected delta.safetensors among the files in meswitch.json");
    let mut directory = Directory::sound();
    directory.change_manifest(move |manifest| manifest["files"]["missing"] = entry());
    assert!(matches!(refusal(&directory), Some(Error::Io { path, .. }) if path.ends_with("missing")));
}

#[test]
fn what_is_no_regular_file_is_refused() {
    use std::ffi::CString;
    use std::os::unix::{ffi::OsStrExt, fs::symlink};

    for name in ["meswitch.json", "delta.safetensors", "config.json"] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        Directory::sound().write(folder.path());
        std::fs::rename(&path, folder.path().join(".moved")).unwrap();
        symlink(folder.path().join(".moved"), &path).unwrap();
        Delta::open(folder.path()).unwrap().verify().unwrap();
        let refused = |what: &str| {
            let error = Delta::open(folder.path()).err();
            assert_format(name, error, what);
            std::fs::remove_file(&path).unwrap();
        };
        std::fs::remove_file(&path).unwrap();
        symlink("/dev/zero", &path).unwrap();
        refused("found a pipe or a device");
        let text = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: a C string.
        assert_eq!(unsafe { libc::mkfifo(text.as_ptr(), 0o600) }, 0);
        refused("found a pipe or a device");
        symlink(folder.path(), &path).unwrap();
        refused("found a folder");
    }
}

#[test]
fn a_file_that_the_manifest_does_not_name_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    Directory::sound().write(folder.path());
    std::fs::write(folder.path().join(".note"), "hidden files are no part of it").unwrap();
    Delta::open(folder.path()).unwrap().verify().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    let error = Delta::open(folder.path()).unwrap().verify().err();
    assert_format("tokenizer", error, "expected only files that meswitch.json names, found tokenizer.json");
}
