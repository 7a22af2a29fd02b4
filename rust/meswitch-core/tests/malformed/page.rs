//! Every sentence of docs/format.md that `verify` promises to check, with a directory of which it does not hold.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use meswitch_core::Delta;
use serde_json::json;

use crate::directory::{Directory, tensor};

/// Makes a sentence untrue of a sound directory.
enum Change {
    Manifest(&'static str, serde_json::Value),
    Directory(fn(&mut Directory)),
    Folder(fn(&Path)),
}

use Change::{Directory as In, Folder as Around, Manifest as Field};

#[rustfmt::skip]
fn cases() -> Vec<(&'static str, Change, &'static str)> {
    let digits = || json!("A".repeat(32));
    vec![
        ("There are no other files than the manifest and those that it names.",
            Around(|folder| fs::write(folder.join("README.md"), "").unwrap()), "found README.md"),
        ("The manifest has at most 64 MiB.",
            Around(|folder| fs::File::options().write(true).open(folder.join("meswitch.json")).unwrap().set_len(65 << 20).unwrap()), "at most 67108864 bytes"),
        ("What a link leads to must be a regular file",
            Around(|folder| { fs::remove_file(folder.join("config.json")).unwrap(); symlink("/dev/null", folder.join("config.json")).unwrap(); }), "a pipe or a device"),
        ("cut to its first 16 bytes, in 32 lower-case hexadecimal digits",
            Field("/files/config.json/checksum", digits()), "32 lower-case hexadecimal digits"),
        ("a whole BLAKE3 hash in 64 lower-case hexadecimal digits",
            Field("/base/fingerprint", digits()), "a fingerprint of 64 lower-case hexadecimal digits"),
        ("The first line is exactly",
            In(|directory| directory.manifest = Some(directory.manifest_text().replacen("{\"", "{ \"", 1))), "a first line with its checksum"),
        ("so a reader checks the hash before it parses",
            In(|directory| directory.manifest = Some(directory.manifest_text() + "]")), "expected checksum"),
        ("A reader refuses versions it does not know", Field("/format_version", json!(9)), "version 1 to 4 in meswitch.json, found 9"),
        ("`delta`: what a fine-tune changes of a base", Field("/kind", json!("house")), "unknown variant `house`"),
        ("no site has added rows",
            In(|directory| {
                directory.change_manifest(|manifest| {
                    manifest["kind"] = json!("base");
                    let site = &mut manifest["sites"][0];
                    (site["added"], site["tensors"]["added"]) = (json!(1), json!("0".repeat(32)));
                });
            }), "no added rows in a base"),
        ("the checksum of the text of `sites`, from its `[` to its `]`", Field("/binding", json!("0".repeat(32))), "expected binding"),
        ("The header of `delta.safetensors` repeats it",
            In(|directory| directory.change_header(|header| header["__metadata__"]["binding"] = json!("0".repeat(32)))), "bound by"),
        ("At most 1 MiB of text, at most 64 levels deep", Field("/settings", json!("x".repeat(2 << 20))), "at most 1048576 bytes"),
        ("`bytes` and `checksum`", Field("/files/config.json/bytes", json!(3)), "config.json of 3 bytes, found 2"),
        ("The checksum of `delta.safetensors` covers its header alone",
            Field("/files/delta.safetensors/checksum", json!("0".repeat(32))), "of delta.safetensors, found"),
        ("No two have the same name", Field("/sites/3/name", json!("whole.weight")), "one site of each name"),
        ("File names are not empty, hold no folder, do not start with a dot, and have no control characters.",
            Field("/files/", json!({"bytes": 0, "checksum": "0".repeat(32)})), "plain names of other files"),
        ("An object has only the fields that are listed here.", Field("/sites/0/note", json!(1)), "unknown field"),
        ("`shared`, `replaced`, `quantized` or `low_rank`", Field("/sites/0/kind", json!("other")), "unknown variant"),
        ("dtype as safetensors names it", Field("/sites/3/dtype", json!("NONE")), "unknown variant"),
        ("bytes of its tensors;", Field("/sites/0/bytes", json!(7)), "expected bytes of 114"),
        ("8 · bytes / number of weights, rounded to four decimals", Field("/sites/0/bpw", json!(1.0)), "expected bpw of 38"),
        ("over the rows that base and fine-tune share; not negative", Field("/sites/0/relative_error", json!(-1.0)), "not negative"),
        ("from −126 to 127", Field("/sites/0/exponent", json!(200)), "an exponent from -126 to 127"),
        ("`bits` (1, 2, 3, 4 or 8)", Field("/sites/0/parts/0/bits", json!(7)), "bits of 1, 2, 3, 4 or 8"),
        ("`zero` (from 0 to 255)", Field("/sites/0/parts/0/zero", json!(-1.0)), "bits of 1, 2, 3, 4 or 8"),
        ("In place of parts, column scales, salient channels and rank", Field("/sites/1/rank", json!(1)), "sparse entries alone"),
        ("checksum of each tensor, by role", Field("/sites/0/tensors/u", json!("0".repeat(32))), "of coded.weight/u in delta.safetensors"),
        ("Both are below 2^31, and so is the number of entries.", Field("/sites/3/shape", json!([1u64 << 31, 0])), "a shape that can be"),
        ("or only saved in another float type. No tensors.", Field("/sites/3/tensors/whole", json!("0".repeat(32))), "a checksum for each tensor"),
        ("the same with no `parts`", Field("/sites/0/kind", json!("low_rank")), "a rank and no codes"),
        ("Rows of different parts never overlap.",
            In(|directory| directory.tensor_mut("coded.weight/rows.1").bytes = 2u32.to_le_bytes().to_vec()), "found row 2 in two"),
        ("[rows of part P], rising;",
            In(|directory| directory.tensor_mut("coded.weight/rows.0").bytes = [2u32, 0].map(u32::to_le_bytes).concat()), "rising indices below 3"),
        ("[salient], rising",
            In(|directory| directory.tensor_mut("coded.weight/salient_index").bytes = 8u32.to_le_bytes().to_vec()), "rising indices below 8"),
        ("[out + 1], not falling, from 0 to entries",
            In(|directory| directory.tensor_mut("sparse.weight/sparse_starts").bytes = [0u32, 2, 2].map(u32::to_le_bytes).concat()), "3 entries in its rows, found 2"),
        ("columns never fall, and the last must be below `in`",
            In(|directory| directory.tensor_mut("sparse.weight/sparse_gaps").bytes = vec![1, 2, 0]), "columns below 3, found 3"),
        ("bits after the last column are zero",
            In(|directory| {
                directory.change_manifest(|manifest| {
                    let site = &mut manifest["sites"][1];
                    (site["sparse"], site["parts"]) = (json!(null), json!([{"bits": 2, "zero": 1.5}]));
                    (site["bytes"], site["bpw"]) = (json!(36), json!(48.0));
                });
                directory.tensors.retain(|tensor| !tensor.name.starts_with("sparse."));
                let codes = [vec![0xff, 0x3f], vec![0; 30]].concat(); // three columns are six bits
                directory.tensors.insert(11, tensor("sparse.weight/codes.0", "I32", &[8], &codes));
                directory.tensors.insert(12, tensor("sparse.weight/scales.0", "F16", &[1, 2], &[0; 4]));
            }), "zeros after the last column and the last row in sparse.weight/codes.0, found others in row 0"),
        ("Rows that are not there are zero.",
            In(|directory| directory.tensor_mut("coded.weight/codes.1").bytes[15] = 1), "zeros after the last column and the last row"),
        ("Its metadata are `format`, which is `meswitch`",
            In(|directory| directory.change_header(|header| header["__metadata__"]["format"] = json!("pt"))), "bound by"),
        ("A tensor is named `SITE/ROLE`.",
            In(|directory| directory.tensor_mut("coded.weight/u").name = "coded.weight/w".to_owned()), "a checksum for each tensor"),
        ("Tensors lie in the order of `sites`", In(|directory| directory.tensors.swap(13, 14)), "in bytes"),
        ("Every tensor starts at a multiple of 64 bytes in the file", In(|directory| directory.alignment = 8), "in bytes"),
        ("the header is padded with spaces",
            In(|directory| directory.change_file(|file| {
                let end = 7 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
                file[end] = b'\t';
            })), "padded with spaces"),
        ("a tensor `_pad.N` of zero bytes (U8) fills the gap", In(|directory| directory.padding = 1), "expected zeros in bytes"),
        ("with N = 0, 1, … in the order of the file",
            In(|directory| directory.change_header(|header| {
                let pad = header.as_object_mut().unwrap().remove("_pad.0").unwrap();
                header["_pad.99"] = pad;
            })), "a tensor _pad.0 in delta.safetensors, found none"),
        ("There are no other tensors.", In(|directory| directory.tensors.push(tensor("other", "U8", &[1], &[0]))), "only tensors that meswitch.json names"),
    ]
}

#[test]
fn verify_checks_every_sentence_of_the_page() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/format.md");
    // Out of reach in a packaged crate.
    let page = fs::read_to_string(path).ok().map(|page| page.split_whitespace().collect::<Vec<_>>().join(" "));
    for (sentence, change, expected) in cases() {
        assert!(page.as_ref().is_none_or(|page| page.contains(sentence)), "{sentence}");
        let mut directory = Directory::sound();
        let folder = tempfile::tempdir().unwrap();
        match &change {
            Field(pointer, value) => directory.set(pointer, value.clone()),
            In(change) => change(&mut directory),
            Around(_) => {}
        }
        directory.write(folder.path());
        if let Around(change) = change {
            change(folder.path());
        }
        let error = Delta::open(folder.path()).and_then(|delta| delta.verify()).err();
        let message = error.unwrap_or_else(|| panic!("accepted: {sentence}")).to_string();
        assert!(message.contains(expected), "{sentence}: {message}");
    }
}
