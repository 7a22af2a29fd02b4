//! Malformed delta directories: each is refused with the error that names what is wrong, and none makes the reader
//! panic.
//!
//! Every directory is made from a sound one by one change, and checksums and sizes are then corrected, so that only the
//! check for that change can refuse it.
#![cfg(not(miri))] // maps files

mod directory;

use meswitch_core::{Delta, Error};
use serde_json::{Value, json};

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
    directory.change_manifest(|manifest| match manifest.pointer_mut(pointer) {
        Some(field) => *field = value.clone(),
        None => {
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            manifest.pointer_mut(parent).unwrap()[key] = value.clone();
        }
    });
    assert_format(&format!("{pointer} = {value}"), refusal(&directory), expected);
}

#[test]
fn the_directory_that_all_others_are_made_of_is_sound() {
    let folder = tempfile::tempdir().unwrap();
    Directory::sound().write(folder.path());
    let delta = Delta::open(folder.path()).unwrap();
    delta.verify().unwrap();
    for (site, shape) in [("coded.weight", (3, 8)), ("sparse.weight", (2, 3))] {
        let matrix = delta.matrix(site).unwrap();
        assert_eq!((matrix.rows(), matrix.columns()), shape);
    }
    for site in ["whole.weight", "same.weight", "other.weight"] {
        assert!(matches!(delta.matrix(site), Err(Error::Argument(_))), "{site}");
    }
}

#[test]
fn versions_out_of_range_are_refused() {
    for (version, found) in [(json!(0), "0"), (json!(4), "4"), (json!("3"), "none"), (json!(-1), "none")] {
        assert_manifest("/format_version", version, &format!("expected format version 1 to 3, found {found}"));
    }
    assert_manifest("/format_version", json!(2), "the fields of version 2, found tiled");
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| {
        manifest["format_version"] = json!(1);
        for part in manifest["sites"][0]["parts"].as_array_mut().unwrap() {
            part.as_object_mut().unwrap().remove("tiled");
        }
    });
    assert_format("sparse", refusal(&directory), "the fields of version 1, found sparse");
}

#[test]
fn fields_of_other_names_and_types_are_refused() {
    assert_manifest("/extra", json!(1), "found unknown field `extra`");
    assert_manifest("/sites/0/extra", json!(1), "found unknown field `extra`");
    assert_manifest("/sites/0/parts/0/extra", json!(1), "found unknown field `extra`");
    assert_manifest("/base/name", json!(1), "found invalid type: integer `1`, expected a string");
    assert_manifest("/sites/0/relative_error", json!(null), "found invalid type: null, expected f64");
    assert_manifest("/sites/0/kind", json!("other"), "found unknown variant `other`");
    assert_manifest("/sites/0/shape", json!([-3, 8]), "the fields of version 3");
    assert_manifest("/sites/0/exponent", json!(1i64 << 40), "the fields of version 3");
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| drop(manifest["sites"][0].as_object_mut().unwrap().remove("shape")));
    assert_format("no shape", refusal(&directory), "found missing field `shape`");
}

#[test]
fn contradictions_are_refused() {
    let site = |number: usize, field: &str| format!("/sites/{number}/{field}");
    for kind in ["shared", "replaced"] {
        assert_manifest(&site(0, "kind"), json!(kind), "expected no codec fields in meswitch.json");
    }
    assert_manifest(&site(3, "added"), json!(1), "no codec fields");
    assert_manifest(&site(2, "rank"), json!(1), "no codec fields");
    assert_manifest(&site(0, "kind"), json!("low_rank"), "a rank and no codes");
    assert_manifest(&site(1, "kind"), json!("low_rank"), "a rank and no codes");
    assert_manifest(&site(1, "rank"), json!(1), "sparse entries alone");
    assert_manifest(&site(1, "column_scales"), json!(true), "sparse entries alone");
    assert_manifest(&site(3, "kind"), json!("replaced"), "a checksum for each tensor of same.weight");
}

#[test]
fn numbers_out_of_range_are_refused() {
    let part = "bits of 1, 2, 3, 4 or 8, a positive group size and no more rows than there are";
    assert_manifest("/sites/0/parts/0/bits", json!(5), part);
    assert_manifest("/sites/0/parts/0/group_size", json!(0), part);
    assert_manifest("/sites/0/parts/0/zero", json!(300), part);
    assert_manifest("/sites/0/parts/0/rows", json!(4), part);
    for (field, value) in [("shape", json!([usize::MAX, 3])), ("shape", json!([1u64 << 63, 2])), ("added", json!(99))] {
        assert_manifest(&format!("/sites/0/{field}"), value, "a shape that can be");
    }
    for entries in [json!(1u64 << 31), json!(u64::MAX)] {
        assert_manifest("/sites/1/sparse/entries", entries, "sparse entries below 2^31");
    }
}

#[test]
fn tensors_that_the_manifest_does_not_describe_are_refused() {
    assert_manifest("/sites/0/shape", json!([4, 8]), "coded.weight/salient of F16 [4, 1], found F16 [3, 1]");
    assert_manifest("/sites/0/parts/0/bits", json!(4), "coded.weight/codes.0 of I32 [8], found I32 [4]");
    assert_manifest("/sites/0/salient", json!(2), "coded.weight/salient_index of I32 [2], found I32 [1]");
    assert_manifest("/sites/0/rank", json!(2), "coded.weight/u of F16 [3, 2], found F16 [3, 1]");
    assert_manifest("/sites/1/sparse/entries", json!(4), "sparse.weight/sparse_gaps of U8 [4], found U8 [3]");
    assert_manifest("/sites/2/dtype", json!("I32"), "whole.weight/whole of I32 [2], found F32 [2]");
    assert_manifest("/sites/0/tensors/extra", json!("00"), "a checksum for each tensor of coded.weight");
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| drop(manifest["sites"].as_array_mut().unwrap().remove(1)));
    assert_format("no site", refusal(&directory), "expected 12 tensors that meswitch.json names, found 15");
    let mut directory = Directory::sound();
    directory.change_manifest(|_| ());
    directory.tensors.retain(|tensor| tensor.name != "whole.weight/whole");
    directory.change_file_entry();
    assert_format("no tensor", refusal(&directory), "a tensor whole.weight/whole, found none");
    let mut directory = Directory::sound();
    directory.tensors.push(directory::tensor("other.weight/u", "F16", &[1], &[0, 0]));
    assert_format("extra", refusal(&directory), "expected 15 tensors that meswitch.json names, found 16");
}

#[test]
fn files_that_are_not_plain_are_refused() {
    for name in ["../x", "a/b", "a\\b", ".x", ".journal", "a\nb"] {
        let entry = json!({"bytes": 0, "checksum": ""});
        let mut directory = Directory::sound();
        directory.change_manifest(|manifest| manifest["files"][name] = entry.clone());
        assert_format(name, refusal(&directory), "expected plain file names in meswitch.json, found");
    }
    assert_manifest("/files/config.json/bytes", json!(3), "expected config.json of 3 bytes, found 2");
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| drop(manifest["files"].as_object_mut().unwrap().remove("delta.safetensors")));
    assert_format("tensors", refusal(&directory), "expected delta.safetensors among the files of meswitch.json");
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| manifest["files"]["missing"] = json!({"bytes": 0, "checksum": ""}));
    assert!(matches!(refusal(&directory), Some(Error::Io { path, .. }) if path.ends_with("missing")));
}

#[test]
fn manifests_that_are_no_manifests_are_refused() {
    let sound = Directory::sound().manifest_text();
    let text = |change: &dyn Fn(&mut String)| {
        let mut directory = Directory::sound();
        let mut text = sound.clone();
        change(&mut text);
        directory.manifest = Some(text);
        refusal(&directory)
    };
    assert_format("empty", text(&|text| text.clear()), "a first line in meswitch.json");
    assert_format("one line", text(&|text| *text = text.replace('\n', " ")), "a first line in meswitch.json");
    assert_format("other", text(&|text| text.insert(0, ' ')), "a first line with its checksum, found another");
    assert_checksum("flip", text(&|text| *text = text.replace("coded", "codes")), "in meswitch.json, found");
    for length in [sound.len() - 1, sound.len() / 2, 60] {
        assert_checksum("cut", text(&|text| text.truncate(length)), "in meswitch.json");
    }
    for body in ["", "}", "\"sites\": [", "\"format_version\": 3}", &"[".repeat(100_000)] {
        let expected = if body.ends_with("3}") { "found missing field" } else { "expected JSON, found" };
        let expected = if body == "}" { "expected format version 1 to 3, found none" } else { expected };
        assert_format(body.get(..20).unwrap_or(body), text(&|text| *text = directory::with_checksum(body)), expected);
    }
}

#[test]
fn headers_that_do_not_fit_the_file_are_refused() {
    let header = |change: &dyn Fn(&mut Value)| {
        let mut directory = Directory::sound();
        directory.change_header(change);
        refusal(&directory)
    };
    let broken = "expected a safetensors header, found";
    let last = "whole.weight/whole";
    let offsets = |from: u64, to: u64| move |header: &mut Value| header[last]["data_offsets"] = json!([from, to]);
    assert_format("overlap", header(&offsets(0, 8)), broken);
    assert_format("beyond the end", header(&offsets(704, 1 << 40)), broken);
    assert_format("backwards", header(&offsets(8, 0)), broken);
    assert_format("overflow", header(&offsets(u64::MAX - 8, u64::MAX)), broken);
    assert_format("wrong dtype", header(&|header| header[last]["dtype"] = json!("F64")), broken);
    assert_format("no dtype", header(&|header| header[last]["dtype"] = json!("NOT_A_DTYPE")), broken);
    assert_format("wrong count", header(&|header| header[last]["shape"] = json!([3])), broken);
    assert_format("huge count", header(&|header| header[last]["shape"] = json!([u64::MAX, u64::MAX])), broken);
    assert_format("other dtype", header(&|header| header[last]["dtype"] = json!("I32")), "of F32 [2], found I32 [2]");
    assert_format("other shape", header(&|header| header[last]["shape"] = json!([1, 2])), "found F32 [1, 2]");
    for (what, change) in [("shorter", -1i64), ("longer", 1)] {
        let mut directory = Directory::sound();
        directory.change_file(move |file| file.resize((file.len() as i64 + change) as usize, 0));
        assert_format(what, refusal(&directory), broken);
    }
    for length in [0u64, 1, 7, 1 << 20, u64::MAX] {
        let mut directory = Directory::sound();
        directory.change_file(move |file| file[..8].copy_from_slice(&length.to_le_bytes()));
        assert_format(&format!("length {length}"), refusal(&directory), broken);
    }
    for length in [0, 4, 8, 100] {
        let mut directory = Directory::sound();
        directory.change_file(move |file| file.truncate(length));
        assert_format(&format!("{length} bytes"), refusal(&directory), broken);
    }
}

#[test]
fn misaligned_tensors_are_refused() {
    let mut directory = Directory::sound();
    directory.alignment = 1;
    let message = "coded.weight/scales.0 at a multiple of 64, found it at 16";
    assert_format("tensors without padding", refusal(&directory), message);
    let mut directory = Directory::sound();
    directory.change_file(|file| {
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) + 1;
        file[..8].copy_from_slice(&length.to_le_bytes());
        file.insert(length as usize + 7, b' ');
    });
    assert_format("header", refusal(&directory), "tensors from a multiple of 64 on, found them from");
}

/// Replaces a tensor's bytes, and expects both verifying and the site's matrix to fail, each with its own text.
#[track_caller]
fn assert_tensor(name: &str, bytes: &[u8], verify: &str, matrix: Option<&str>) {
    let mut directory = Directory::sound();
    directory.tensor_mut(name).bytes = bytes.to_vec();
    let folder = tempfile::tempdir().unwrap();
    directory.write(folder.path());
    let delta = Delta::open(folder.path()).unwrap();
    assert_format(name, delta.verify().err(), verify);
    let found = delta.matrix(name.split('/').next().unwrap()).err();
    match matrix {
        Some(expected) => assert_format(name, found, expected),
        None => assert!(found.is_none(), "{name}: {found:?}"),
    }
}

fn indices(indices: &[i32]) -> Vec<u8> {
    indices.iter().flat_map(|index| index.to_le_bytes()).collect()
}

#[test]
fn indices_out_of_range_are_refused() {
    let rising = Some("expected rising indices below 3, found others");
    for (rows, found) in [([0, 3], 3), ([0, -1], -1), ([2, 0], 0), ([1, 1], 1), ([i32::MIN, 0], i32::MIN)] {
        let expected = format!("expected rising indices below 3, found {found} in coded.weight/rows.0");
        assert_tensor("coded.weight/rows.0", &indices(&rows), &expected, rising);
    }
    for index in [8, -1, i32::MAX] {
        let expected = format!("expected rising indices below 8, found {index} in coded.weight/salient_index");
        let matrix = Some("expected rising indices below 8, found others");
        assert_tensor("coded.weight/salient_index", &indices(&[index]), &expected, matrix);
    }
    let twice = "expected every row of coded.weight in one part, found row 2 in two";
    assert_tensor("coded.weight/rows.1", &indices(&[2]), twice, Some("found row 2 in two"));
}

#[test]
fn sparse_entries_out_of_range_are_refused() {
    let starts = "sparse.weight/sparse_starts";
    let matrix = Some("expected 2 rows of sparse entries from 0 to 3, found others");
    let follow = "rows that follow each other, found otherwise after row";
    assert_tensor(starts, &indices(&[1, 2, 3]), "a first row from 0 on, found it from Some(1)", matrix);
    assert_tensor(starts, &indices(&[0, 4, 3]), follow, matrix);
    assert_tensor(starts, &indices(&[0, -1, 3]), follow, matrix);
    assert_tensor(starts, &indices(&[0, 2, 1]), follow, matrix);
    assert_tensor(starts, &indices(&[0, 2, 2]), "3 entries in its rows, found 2", matrix);
    // Kernels stop at a column that is out of range, so the matrix is not refused.
    assert_tensor("sparse.weight/sparse_gaps", &[1, 2, 0], "columns below 3, found 3 in row 0", None);
}

#[test]
fn changed_bytes_are_found() {
    let mut directory = Directory::sound();
    directory.change_written_file(|file| *file.last_mut().unwrap() ^= 1);
    assert_checksum("tensor", refusal(&directory), "of whole.weight/whole in delta.safetensors");
    let mut directory = Directory::sound();
    directory
        .change_written_file(|file| file[8..].iter_mut().filter(|byte| **byte == b' ').for_each(|byte| *byte = b'\t'));
    assert_checksum("header", refusal(&directory), "of delta.safetensors");
    let mut directory = Directory::sound();
    directory.padding = 1;
    assert_checksum("padding", refusal(&directory), "expected zeros in _pad.");
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| manifest["files"]["config.json"]["checksum"] = json!("zz"));
    assert_checksum("file", refusal(&directory), "expected checksum zz of config.json");
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| manifest["sites"][1]["tensors"]["sparse_gaps"] = json!(""));
    assert_checksum("stated", refusal(&directory), "of sparse.weight/sparse_gaps");
}

#[test]
fn no_byte_of_a_directory_makes_the_reader_panic() {
    let folder = tempfile::tempdir().unwrap();
    let file = Directory::sound().file();
    // Every byte of the header, and one of every eight bytes after it.
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    for at in (0..header).chain((header..file.len()).step_by(8)) {
        let mut directory = Directory::sound();
        directory.change_file(move |file| file[at] ^= 1 << (at % 8));
        directory.write(folder.path());
        if let Ok(delta) = Delta::open(folder.path()) {
            let _ = delta.verify();
            for site in &delta.manifest().sites {
                let _ = delta.matrix(&site.name);
            }
        }
    }
}

#[test]
#[ignore = "known fault: two sites of one name are accepted"]
fn two_sites_of_one_name_are_refused() {
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| {
        let same = manifest["sites"][3].clone();
        let mut other = same.clone();
        other["shape"] = json!([1]);
        manifest["sites"].as_array_mut().unwrap().push(other);
    });
    assert_format("two sites", refusal(&directory), "same.weight");
}

#[test]
#[ignore = "known fault: sizes that overflow are computed without checks"]
fn sizes_that_overflow_are_refused() {
    for shape in [json!([u64::MAX, 0]), json!([0, u64::MAX])] {
        assert_manifest("/sites/0/shape", shape, "coded.weight");
    }
}

#[test]
#[ignore = "known fault: numbers that only inform are not checked"]
fn numbers_that_cannot_be_are_refused() {
    assert_manifest("/sites/0/relative_error", json!(-5.0), "relative_error");
    assert_manifest("/sites/0/bytes", json!(1), "bytes");
    assert_manifest("/sites/3/dtype", json!("NOT_A_DTYPE"), "NOT_A_DTYPE");
    assert_manifest("/base/fingerprint", json!("zz"), "fingerprint");
}
