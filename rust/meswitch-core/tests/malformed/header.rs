//! The header of the tensors' file, and whether it is what the manifest describes.

use serde_json::{Value, json};

use crate::directory::{self, Directory};
use crate::{assert_format, refusal};

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
