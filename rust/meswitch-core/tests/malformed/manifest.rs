//! What the manifest says: its text, its fields, and numbers that contradict each other.

use meswitch_core::Delta;
use serde_json::{Value, json};

use crate::directory::{self, Directory};
use crate::{assert_checksum, assert_format, assert_manifest, refusal};

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
    assert_format("kind", refusal(&directory), "expected no kind in meswitch.json, found one");
}

#[test]
fn manifest_and_tensors_of_two_directories_are_refused() {
    assert_manifest("/kind", json!("other"), "unknown variant `other`, expected `delta` or `base`");
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
fn a_manifest_that_is_too_large_is_not_read() {
    let folder = tempfile::tempdir().unwrap();
    Directory::sound().write(folder.path());
    let file = std::fs::File::options().write(true).open(folder.path().join("meswitch.json")).unwrap();
    file.set_len(1 << 40).unwrap();
    assert_format("large", Delta::open(folder.path()).err(), "expected meswitch.json of at most 67108864 bytes");
}
