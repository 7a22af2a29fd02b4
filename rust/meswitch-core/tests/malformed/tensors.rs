//! What the tensors hold.

use meswitch_core::Delta;
use serde_json::json;

use crate::directory::Directory;
use crate::{assert_checksum, assert_format, refusal};

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
