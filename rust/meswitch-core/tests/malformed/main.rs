//! Malformed delta directories: each is refused with the error that names what is wrong, and none makes the reader
//! panic.
//!
//! Every directory is made from a sound one by one change, and checksums and sizes are then corrected, so that only the
//! check for that change can refuse it.
#![cfg(not(miri))] // maps files

mod directory;
mod page;

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

#[test]
fn versions_out_of_range_are_refused() {
    for (version, found) in [(json!(0), "0"), (json!(5), "5"), (json!(-1), "-1")] {
        assert_manifest(
            "/format_version",
            version,
            &format!("expected format version 1 to 4 in meswitch.json, found {found}"),
        );
    }
    assert_manifest("/format_version", json!("3"), "expected JSON in meswitch.json, found invalid");
    assert_manifest("/sites/0/parts/0/tiled", json!(true), "the fields of version 4 in meswitch.json, found tiled");
    let old = |version: u32, change: fn(&mut Value)| {
        let mut directory = Directory::sound();
        directory.change_manifest(move |manifest| {
            manifest["format_version"] = json!(version);
            let manifest = manifest.as_object_mut().unwrap();
            manifest.remove("kind");
            manifest.remove("binding");
            change(&mut manifest["sites"]);
        });
        refusal(&directory)
    };
    let tiled = |sites: &mut Value| {
        let site = &mut sites[0];
        (site["parts"][0]["tiled"], site["parts"][1]["tiled"]) = (json!(true), json!(true));
        (site["bytes"], site["bpw"]) = (json!(90), json!(30.0));
    };
    assert_format("tiled", old(2, tiled), "the fields of version 2 in meswitch.json, found tiled");
    assert_format("sparse", old(1, |_| ()), "the fields of version 1 in meswitch.json, found sparse");
    let owner = |sites: &mut Value| sites[0]["owner"] = json!({"layer": 1});
    assert_format("owner", old(3, owner), "the fields of version 3 in meswitch.json, found owner");
    // Version 3 pads codes to 8 rows, where version 4 pads them to 16.
    assert_format("codes", old(3, tiled), "coded.weight/codes.0 of I32 [4] in delta.safetensors, found I32 [8]");
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| manifest["format_version"] = json!(3));
    assert_format("kind", refusal(&directory), "expected kind none in meswitch.json, found delta");
}

#[test]
fn manifest_and_tensors_of_two_directories_are_refused() {
    assert_manifest("/kind", json!("base"), "expected a delta in meswitch.json, found a base");
    assert_manifest("/kind", json!("other"), "expected kind delta in meswitch.json, found other");
    assert_manifest("/binding", json!("0".repeat(32)), "in meswitch.json, found 00000000000000000000000000000000");
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| drop(manifest.as_object_mut().unwrap().remove("binding")));
    assert_format("no binding", refusal(&directory), "in meswitch.json, found none");
    let mut directory = Directory::sound();
    directory.change_header(|header| header["__metadata__"]["binding"] = json!("0".repeat(32)));
    assert_format("another", refusal(&directory), "expected the tensors of meswitch.json, bound by");
    // Two directories of the same shapes: each file is sound, and they do not belong together.
    let folder = tempfile::tempdir().unwrap();
    let mut other = Directory::sound();
    other.change_manifest(|manifest| manifest["sites"][0]["exponent"] = json!(4));
    other.write(folder.path());
    let manifest = std::fs::read(folder.path().join("meswitch.json")).unwrap();
    Directory::sound().write(folder.path());
    std::fs::write(folder.path().join("meswitch.json"), manifest).unwrap();
    assert_format("mixed", Delta::open(folder.path()).err(), "expected the tensors of meswitch.json, bound by");
}

#[test]
fn fields_of_other_names_and_types_are_refused() {
    assert_manifest("/extra", json!(1), "found unknown field `extra`");
    assert_manifest("/sites/0/extra", json!(1), "found unknown field `extra`");
    assert_manifest("/sites/0/parts/0/extra", json!(1), "found unknown field `extra`");
    assert_manifest("/base/name", json!(1), "found invalid type: integer `1`, expected a string");
    assert_manifest("/sites/0/relative_error", json!(null), "found invalid type: null, expected f64");
    assert_manifest("/sites/0/kind", json!("other"), "found unknown variant `other`");
    assert_manifest("/sites/0/shape", json!([-3, 8]), "the fields of version 4");
    assert_manifest("/sites/0/exponent", json!(1i64 << 40), "the fields of version 4");
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| drop(manifest["sites"][0].as_object_mut().unwrap().remove("shape")));
    assert_format("no shape", refusal(&directory), "found missing field `shape`");
}

#[test]
fn owners_are_a_layer_and_at_most_the_number_of_an_expert() {
    for owner in [json!({"layer": 0}), json!({"layer": 7, "moe_expert": 0})] {
        let folder = tempfile::tempdir().unwrap();
        let mut directory = Directory::sound();
        directory.set("/sites/0/owner", owner.clone());
        directory.write(folder.path());
        let delta = Delta::open(folder.path()).unwrap();
        delta.verify().unwrap();
        let site = delta.site("coded.weight").unwrap();
        let expected = (owner["layer"].as_u64(), owner["moe_expert"].as_u64());
        let found = site.owner.map(|owner| (Some(owner.layer.into()), owner.moe_expert.map(u64::from)));
        assert_eq!(found, Some(expected));
        assert_eq!(serde_json::to_value(site).unwrap()["owner"], owner);
        assert!(delta.site("sparse.weight").unwrap().owner.is_none());
    }
    assert_manifest("/sites/0/owner", json!({}), "found missing field `layer`");
    assert_manifest("/sites/0/owner", json!({"moe_expert": 1}), "found missing field `layer`");
    assert_manifest("/sites/0/owner", json!({"layer": 1, "block": 1}), "found unknown field `block`");
    for wrong in [json!(-1), json!(1u64 << 32), json!(0.5), json!("1")] {
        assert_manifest("/sites/0/owner", json!({"layer": wrong}), "the fields of version 4");
        assert_manifest("/sites/0/owner", json!({"layer": 1, "moe_expert": wrong}), "the fields of version 4");
    }
    for wrong in [json!(1), json!("layer"), json!([1, 2, 3])] {
        assert_manifest("/sites/0/owner", wrong, "the fields of version 4");
    }
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
    assert_manifest(&site(3, "kind"), json!("replaced"), "a checksum for each tensor in meswitch.json");
    assert_manifest(&site(3, "exponent"), json!(1), "no codec fields");
}

#[test]
fn numbers_out_of_range_are_refused() {
    let part = "bits of 1, 2, 3, 4 or 8, a positive group size and no more rows than there are";
    assert_manifest("/sites/0/parts/0/bits", json!(5), part);
    assert_manifest("/sites/0/parts/0/group_size", json!(0), part);
    assert_manifest("/sites/0/parts/0/zero", json!(300), part);
    assert_manifest("/sites/0/parts/0/rows", json!(4), part);
    let shapes = [json!([usize::MAX, 3]), json!([1u64 << 63, 2]), json!([1u64 << 31, 0]), json!([1u64 << 46, 1])];
    for (field, value) in shapes.map(|shape| ("shape", shape)).into_iter().chain([("added", json!(99))]) {
        assert_manifest(&format!("/sites/0/{field}"), value, "a shape that can be");
    }
    for entries in [json!(1u64 << 31), json!(u64::MAX)] {
        assert_manifest("/sites/1/sparse/entries", entries, "sparse entries below 2^31");
    }
    for exponent in [-127, 128, i32::MIN, i32::MAX] {
        assert_manifest("/sites/0/exponent", json!(exponent), "an exponent from -126 to 127");
    }
}

#[test]
fn tensors_that_the_manifest_does_not_describe_are_refused() {
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| {
        (manifest["sites"][0]["shape"], manifest["sites"][0]["bytes"]) = (json!([4, 8]), json!(118));
        manifest["sites"][0]["bpw"] = json!(29.5);
    });
    let message = "coded.weight/salient of F16 [4, 1] in delta.safetensors, found F16 [3, 1]";
    assert_format("other shape", refusal(&directory), message);
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| drop(manifest["sites"].as_array_mut().unwrap().remove(1)));
    let message = "only tensors that meswitch.json names in delta.safetensors, found sparse.weight/sparse_gaps";
    assert_format("no site", refusal(&directory), message);
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| {
        let site = &mut manifest["sites"][3];
        (site["kind"], site["tensors"]) = (json!("replaced"), json!({"whole": "0".repeat(32)}));
        (site["bytes"], site["bpw"]) = (json!(8), json!(16.0));
    });
    assert_format("no tensor", refusal(&directory), "a tensor same.weight/whole in delta.safetensors, found none");
    let mut directory = Directory::sound();
    directory.tensors.push(directory::tensor("other.weight/u", "F16", &[1], &[0, 0]));
    assert_format("extra", refusal(&directory), "only tensors that meswitch.json names");
    let mut directory = Directory::sound();
    directory.tensors.push(directory::tensor("_pad.evil/whole", "F16", &[1], &[0, 0]));
    assert_format("padding", refusal(&directory), "only tensors that meswitch.json names");
    let mut directory = Directory::sound();
    directory.tensors.swap(2, 5);
    assert_format("order", refusal(&directory), "coded.weight/rows.0 in bytes");
}

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
fn manifests_that_are_no_manifests_are_refused() {
    let sound = Directory::sound().manifest_text();
    let text = |change: &dyn Fn(&mut String)| {
        let mut directory = Directory::sound();
        let mut text = sound.clone();
        change(&mut text);
        directory.manifest = Some(text);
        refusal(&directory)
    };
    assert_format("empty", text(&|text| text.clear()), "expected a first line in meswitch.json");
    assert_format("one line", text(&|text| *text = text.replace('\n', " ")), "a first line in meswitch.json");
    assert_format("other", text(&|text| text.insert(0, ' ')), "a first line with its checksum in meswitch.json");
    assert_checksum("flip", text(&|text| *text = text.replace("coded", "codes")), "in meswitch.json, found");
    for length in [sound.len() - 1, sound.len() / 2, 60] {
        assert_checksum("cut", text(&|text| text.truncate(length)), "in meswitch.json");
    }
    for body in ["", "\"sites\": [", "\"sites\": 1", &"[".repeat(100_000)] {
        let expected = "expected JSON in meswitch.json, found";
        assert_format(body.get(..20).unwrap_or(body), text(&|text| *text = directory::with_checksum(body)), expected);
    }
    let none = |text: &mut String| *text = directory::with_checksum("\"sites\": []}");
    assert_format("no version", text(&none), "expected format version 1 to 4 in meswitch.json, found none");
    let missing = |text: &mut String| *text = directory::with_checksum("\"format_version\": 4}");
    assert_format("nothing else", text(&missing), "found missing field");
    let twice = |text: &mut String| *text = directory::with_checksum("\"format_version\": 4, \"format_version\": 4}");
    assert_format("twice", text(&twice), "duplicate field");
    let settings = "expected settings of at most 1048576 bytes, 64 levels deep";
    assert_manifest("/settings", json!("x".repeat(2 << 20)), settings);
    let deep = format!("{}{}", "[".repeat(100), "]".repeat(100));
    assert_manifest("/settings", serde_json::from_str(&deep).unwrap(), "found 200 bytes, 100 levels deep");
}

#[test]
fn headers_that_do_not_fit_the_file_are_refused() {
    let header = |change: Box<dyn Fn(&mut Value)>| {
        let mut directory = Directory::sound();
        directory.change_header(change);
        refusal(&directory)
    };
    let broken = "expected a safetensors header in delta.safetensors, found";
    let last = "whole.weight/whole";
    let field = |field: &'static str, value: Value| {
        header(Box::new(move |header: &mut Value| header[last][field] = value.clone()))
    };
    let offsets = |from: u64, to: u64| field("data_offsets", json!([from, to]));
    let place = "whole.weight/whole in bytes 896 to 904 in delta.safetensors, found it in";
    assert_format("overlap", offsets(0, 8), place);
    assert_format("beyond the end", offsets(896, 1 << 40), place);
    assert_format("backwards", offsets(8, 0), place);
    assert_format("overflow", offsets(u64::MAX - 8, u64::MAX), place);
    assert_format("no dtype", field("dtype", json!("NOT_A_DTYPE")), broken);
    let described = "whole.weight/whole of F32 [2] in delta.safetensors, found";
    assert_format("wrong dtype", field("dtype", json!("F64")), &format!("{described} F64 [2]"));
    assert_format("other dtype", field("dtype", json!("I32")), &format!("{described} I32 [2]"));
    assert_format("wrong count", field("shape", json!([3])), &format!("{described} F32 [3]"));
    assert_format("huge count", field("shape", json!([u64::MAX, u64::MAX])), described);
    assert_format("other shape", field("shape", json!([1, 2])), &format!("{described} F32 [1, 2]"));
    for (what, change) in [("shorter", -1i64), ("longer", 1)] {
        let mut directory = Directory::sound();
        directory.change_file(move |file| file.resize((file.len() as i64 + change) as usize, 0));
        assert_format(what, refusal(&directory), "bytes in delta.safetensors, found");
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
    let mut directory = Directory::sound();
    directory.change_file(|file| {
        // The first name of the header twice.
        let text = String::from_utf8_lossy(&file[8..]).replacen("sparse_gaps", "sparse_gapt", 1);
        let text = text.replacen("sparse_values", "sparse_gapt", 1);
        file.splice(8.., text.bytes());
    });
    assert_format("twice", refusal(&directory), broken);
}

#[test]
fn misaligned_tensors_are_refused() {
    let mut directory = Directory::sound();
    directory.alignment = 1;
    assert_format("tensors without padding", refusal(&directory), "coded.weight/codes.1 in bytes");
    let mut directory = Directory::sound();
    directory.change_file(|file| {
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) + 1;
        file[..8].copy_from_slice(&length.to_le_bytes());
        file.insert(length as usize + 7, b' ');
    });
    assert_format(
        "header",
        refusal(&directory),
        "tensors from a multiple of 64 on in delta.safetensors, found them from",
    );
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
    let (tensors, site) = (delta.tensors().unwrap(), name.split('/').next().unwrap());
    let found = tensors.matrix(site).err();
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
    assert_format("header", refusal(&directory), "a header padded with spaces in delta.safetensors, found other bytes");
    let mut directory = Directory::sound();
    directory.padding = 1;
    assert_checksum("padding", refusal(&directory), "expected zeros in bytes");
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| manifest["files"]["config.json"]["checksum"] = json!("0".repeat(32)));
    assert_checksum("file", refusal(&directory), "of config.json, found");
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| manifest["sites"][1]["tensors"]["sparse_gaps"] = json!("0".repeat(32)));
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
            if let Ok(tensors) = delta.tensors() {
                for site in &delta.manifest().sites {
                    let _ = tensors.matrix(&site.name);
                }
            }
        }
    }
}

#[test]
fn two_sites_of_one_name_are_refused() {
    let mut directory = Directory::sound();
    directory.change_manifest(|manifest| {
        let mut other = manifest["sites"][3].clone();
        other["shape"] = json!([1]);
        manifest["sites"].as_array_mut().unwrap().push(other);
    });
    let message = "expected one site of each name in meswitch.json, found two of same.weight";
    assert_format("two sites", refusal(&directory), message);
}

#[test]
fn sizes_that_overflow_are_refused() {
    for shape in [json!([u64::MAX, 0]), json!([0, u64::MAX]), json!([1u64 << 40, 1u64 << 40, 0])] {
        assert_manifest(
            "/sites/0/shape",
            shape,
            "expected a shape that can be in meswitch.json, found otherwise at site coded.weight",
        );
    }
    // Nothing is allocated for rows that take no bytes.
    let mut directory = Directory::sound();
    directory.tensors.clear();
    let empty =
        |role: &str, dtype, shape: &[usize]| directory::tensor(&format!("coded.weight/{role}"), dtype, shape, &[]);
    directory.tensors.extend([
        empty("codes.0", "I32", &[0]),
        empty("scales.0", "F16", &[1, 0]),
        empty("rows.0", "I32", &[0]),
        directory::tensor("whole.weight/whole", "F32", &[2], &[0; 8]),
    ]);
    directory.change_manifest(|manifest| {
        let sites = manifest["sites"].as_array_mut().unwrap();
        sites.remove(1);
        let site = sites[0].as_object_mut().unwrap();
        for field in ["column_scales", "salient", "rank"] {
            site.remove(field);
        }
        site["shape"] = json!([i32::MAX, 1]);
        site["parts"] = json!([{"bits": 2, "zero": 1.5, "rows": 0}]);
        site["bpw"] = json!(0.0);
    });
    assert!(refusal(&directory).is_none());
}

#[test]
fn numbers_that_cannot_be_are_refused() {
    assert_manifest("/sites/0/relative_error", json!(-5.0), "a relative_error that is not negative");
    assert_manifest("/sites/0/bytes", json!(1), "expected bytes of 114");
    assert_manifest("/sites/0/bpw", json!(1e9), "expected bpw of 38 in");
    assert_manifest("/sites/3/dtype", json!("NOT_A_DTYPE"), "NOT_A_DTYPE");
    for hash in ["zz".to_owned(), "F".repeat(64), "0".repeat(32)] {
        assert_manifest("/base/fingerprint", json!(hash), "a fingerprint of 64 lower-case hexadecimal digits");
        assert_manifest("/base/sample", json!(hash), "a sample of 64 lower-case hexadecimal digits");
    }
}

#[test]
fn bits_that_no_code_has_are_refused() {
    let mut directory = Directory::sound();
    directory.tensor_mut("coded.weight/codes.1").bytes[1] = 1;
    let message =
        "expected zeros after the last column and the last row in coded.weight/codes.1, found others in row 1";
    assert_format("padding row", refusal(&directory), message);
}

#[test]
fn bits_that_no_code_has_are_refused_in_old_directories() {
    let message = |row: usize| {
        format!(
            "expected zeros after the last column and the last row in coded.weight/codes.0, found others in row {row}"
        )
    };
    // Of version 2: eight columns of two bits are the low four bits of each of a row's four bytes.
    let of_version_2 = |codes: [u8; 8]| {
        let mut directory = Directory::sound();
        directory.make_old(2);
        directory.replace("coded.weight/codes.0", &[2, 1], &codes);
        directory.replace("coded.weight/codes.1", &[1, 1], &[3, 3, 3, 3]);
        refusal(&directory)
    };
    assert!(of_version_2([15; 8]).is_none());
    for byte in 0..8 {
        let mut codes = [15; 8];
        codes[byte] = 0x1f;
        assert_format("version 2", of_version_2(codes), &message(byte / 4));
    }
    // Of version 3: two bytes of eight rows each, of which two are there.
    let of_version_3 = |codes: [u8; 16]| {
        let mut directory = Directory::sound();
        directory.make_old(3);
        directory.replace("coded.weight/codes.0", &[4], &codes);
        directory.replace("coded.weight/codes.1", &[2], &[0xa5, 0, 0, 0, 0, 0, 0, 0]);
        refusal(&directory)
    };
    let mut codes = [0; 16];
    codes[..2].fill(0xff);
    assert!(of_version_3(codes).is_none());
    codes[8 + 7] = 1;
    assert_format("version 3", of_version_3(codes), &message(7));
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

#[test]
fn a_manifest_that_is_too_large_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    Directory::sound().write(folder.path());
    let file = std::fs::File::options().write(true).open(folder.path().join("meswitch.json")).unwrap();
    file.set_len(1 << 40).unwrap();
    assert_format("large", Delta::open(folder.path()).err(), "expected meswitch.json of at most 67108864 bytes");
}
