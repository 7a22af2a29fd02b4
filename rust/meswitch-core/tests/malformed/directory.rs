//! A small delta directory, built in memory, that can be changed before it is written.

use std::fs;
use std::path::Path;

use meswitch_core::delta::checksum;
use serde_json::{Map, Value, json};

/// A tensor of `delta.safetensors`.
pub struct Tensor {
    pub name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

pub fn tensor(name: &str, dtype: &'static str, shape: &[usize], bytes: &[u8]) -> Tensor {
    Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes: bytes.to_vec() }
}

type Change<T> = Box<dyn Fn(&mut T)>;

/// A directory of four sites: one with codes and all other terms, one sparse, one replaced, one shared.
pub struct Directory {
    pub tensors: Vec<Tensor>,
    /// What tensors are aligned to.
    pub alignment: usize,
    /// The byte that padding consists of.
    pub padding: u8,
    /// The manifest's text, where it is not made from the rest.
    pub manifest: Option<String>,
    header_changes: Vec<Change<Value>>,
    file_changes: Vec<Change<Vec<u8>>>,
    written_changes: Vec<Change<Vec<u8>>>,
    manifest_changes: Vec<Change<Value>>,
}

impl Directory {
    pub fn sound() -> Self {
        let half = 0x3c00u16.to_le_bytes();
        let halves = |count: usize| half.repeat(count);
        let numbers = |numbers: &[u32]| numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>();
        let tensors = vec![
            tensor("coded.weight/codes.0", "I32", &[8], &padded(&[[0x1b; 2]; 2])),
            tensor("coded.weight/scales.0", "F16", &[1, 2], &halves(2)),
            tensor("coded.weight/rows.0", "I32", &[2], &numbers(&[0, 2])),
            tensor("coded.weight/codes.1", "I32", &[4], &padded(&[[0xa5]])),
            tensor("coded.weight/scales.1", "F16", &[1, 1], &halves(1)),
            tensor("coded.weight/rows.1", "I32", &[1], &numbers(&[1])),
            tensor("coded.weight/column_scales", "F16", &[8], &halves(8)),
            tensor("coded.weight/salient_index", "I32", &[1], &numbers(&[3])),
            tensor("coded.weight/salient", "F16", &[3, 1], &halves(3)),
            tensor("coded.weight/u", "F16", &[3, 1], &halves(3)),
            tensor("coded.weight/v", "F16", &[1, 8], &halves(8)),
            tensor("sparse.weight/sparse_starts", "I32", &[3], &numbers(&[0, 2, 3])),
            tensor("sparse.weight/sparse_gaps", "U8", &[3], &[1, 1, 0]),
            tensor("sparse.weight/sparse_values", "F8_E5M2", &[3], &[0x38, 0x40, 0xb8]),
            tensor("whole.weight/whole", "F32", &[2], &[0; 8]),
        ];
        Self {
            tensors,
            alignment: 64,
            padding: 0,
            manifest: None,
            header_changes: Vec::new(),
            file_changes: Vec::new(),
            written_changes: Vec::new(),
            manifest_changes: Vec::new(),
        }
    }

    pub fn tensor_mut(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }

    /// Changes the manifest; its checksum and its binding to the tensors are then corrected.
    pub fn change_manifest(&mut self, change: impl Fn(&mut Value) + 'static) {
        self.manifest_changes.push(Box::new(change));
    }

    /// Gives a tensor another shape and other bytes.
    pub fn replace(&mut self, name: &str, shape: &[usize], bytes: &[u8]) {
        let tensor = self.tensor_mut(name);
        (tensor.shape, tensor.bytes) = (shape.to_vec(), bytes.to_vec());
    }

    /// Makes manifest and header those of version 2 or 3, and turns the scales; codes stay as they are.
    pub fn make_old(&mut self, version: u32) {
        self.change_manifest(move |manifest| {
            let fields = manifest.as_object_mut().unwrap();
            fields.insert("format_version".to_owned(), json!(version));
            fields.retain(|name, _| name != "kind" && name != "binding");
            for part in manifest["sites"][0]["parts"].as_array_mut().unwrap() {
                if version == 3 {
                    part["tiled"] = json!(true);
                }
            }
        });
        self.change_header(|header| drop(header["__metadata__"].as_object_mut().unwrap().remove("binding")));
        for scales in ["coded.weight/scales.0", "coded.weight/scales.1"] {
            self.tensor_mut(scales).shape.reverse();
        }
    }

    /// Changes one field of the manifest, or adds it.
    pub fn set(&mut self, pointer: &str, value: Value) {
        let pointer = pointer.to_owned();
        self.change_manifest(move |manifest| match manifest.pointer_mut(&pointer) {
            Some(field) => *field = value.clone(),
            None => {
                let (parent, key) = pointer.rsplit_once('/').unwrap();
                manifest.pointer_mut(parent).unwrap()[key] = value.clone();
            }
        });
    }

    /// Changes the header's JSON; checksum and size in the manifest are then corrected.
    pub fn change_header(&mut self, change: impl Fn(&mut Value) + 'static) {
        self.header_changes.push(Box::new(change));
    }

    /// Changes the bytes of `delta.safetensors`; checksum and size in the manifest are then corrected.
    pub fn change_file(&mut self, change: impl Fn(&mut Vec<u8>) + 'static) {
        self.file_changes.push(Box::new(change));
    }

    /// Changes the bytes of `delta.safetensors` and leaves the manifest as it is.
    pub fn change_written_file(&mut self, change: impl Fn(&mut Vec<u8>) + 'static) {
        self.written_changes.push(Box::new(change));
    }

    /// Each tensor with its gap before it.
    fn gaps(&self) -> Vec<(usize, &Tensor)> {
        let mut end = 0usize;
        let gap = |tensor| {
            let start = end.next_multiple_of(self.alignment);
            let gap = start - end;
            let tensor: &Tensor = tensor;
            end = start + tensor.bytes.len();
            (gap, tensor)
        };
        self.tensors.iter().map(gap).collect()
    }

    /// What ties the tensors to the manifest.
    fn binding(&self) -> String {
        let nothing = json!({"bytes": 0, "checksum": checksum(b"")});
        let files = json!({"delta.safetensors": nothing, "config.json": nothing});
        let mut manifest = self.sound_manifest(&files, "");
        self.manifest_changes.iter().for_each(|change| change(&mut manifest));
        checksum(manifest["sites"].to_string().as_bytes()).to_string()
    }

    fn header(&self) -> Value {
        let (mut header, mut end, mut paddings) = (Map::new(), 0, 0);
        header.insert("__metadata__".to_owned(), json!({"format": "meswitch", "binding": self.binding()}));
        for (gap, tensor) in self.gaps() {
            if gap > 0 {
                let entry = json!({"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]});
                header.insert(format!("_pad.{paddings}"), entry);
                (paddings, end) = (paddings + 1, end + gap);
            }
            let offsets = [end, end + tensor.bytes.len()];
            end = offsets[1];
            let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets});
            header.insert(tensor.name.clone(), entry);
        }
        let mut header = Value::Object(header);
        self.header_changes.iter().for_each(|change| change(&mut header));
        header
    }

    /// The bytes of `delta.safetensors`.
    pub fn file(&self) -> Vec<u8> {
        let header = self.header().to_string();
        let length = (header.len() + 8).next_multiple_of(64) - 8;
        let mut file = (length as u64).to_le_bytes().to_vec();
        file.extend(format!("{header:length$}").as_bytes());
        for (gap, tensor) in self.gaps() {
            file.extend(vec![self.padding; gap]);
            file.extend(&tensor.bytes);
        }
        self.file_changes.iter().for_each(|change| change(&mut file));
        file
    }

    fn checksums(&self, site: &str) -> Value {
        let of_site = self.tensors.iter().filter_map(|tensor| {
            let role = tensor.name.strip_prefix(site)?.strip_prefix('/')?;
            Some((role.to_owned(), json!(checksum(&tensor.bytes))))
        });
        Value::Object(of_site.collect())
    }

    fn manifest_json(&self) -> Value {
        let file = self.file();
        let length = file.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
        let header = usize::try_from(length).map_or(file.len(), |length| length.saturating_add(8).min(file.len()));
        let files = json!({
            "delta.safetensors": {"bytes": file.len(), "checksum": checksum(&file[..header])},
            "config.json": {"bytes": 2, "checksum": checksum(b"{}")},
        });
        let mut manifest = self.sound_manifest(&files, &self.binding());
        self.manifest_changes.iter().for_each(|change| change(&mut manifest));
        manifest
    }

    /// The manifest before it is changed.
    fn sound_manifest(&self, files: &Value, binding: &str) -> Value {
        let site = |name: &str, kind: &str, shape: &[usize], dtype: &str| {
            let own =
                self.tensors.iter().filter(|tensor| tensor.name.rsplit_once('/').is_some_and(|(site, _)| site == name));
            let bytes: usize = own.map(|tensor| tensor.bytes.len()).sum();
            let bpw = (8e4 * bytes as f64 / shape.iter().product::<usize>() as f64).round() / 1e4;
            json!({"name": name, "kind": kind, "shape": shape, "dtype": dtype, "bytes": bytes, "bpw": bpw,
                "relative_error": 0.0, "tensors": self.checksums(name)})
        };
        let mut coded = site("coded.weight", "quantized", &[3, 8], "BF16");
        coded["parts"] = json!([{"bits": 2, "zero": 1.5, "rows": 2}, {"bits": 1, "zero": 0.5, "rows": 1}]);
        (coded["column_scales"], coded["salient"], coded["rank"]) = (json!(true), json!(1), json!(1));
        let mut sparse = site("sparse.weight", "quantized", &[2, 3], "BF16");
        sparse["sparse"] = json!({"entries": 3, "changed": 3});
        json!({
            "format_version": 4,
            "kind": "delta",
            "binding": binding,
            "writer": "test",
            "base": {"fingerprint": "0".repeat(64), "sample": "0".repeat(64), "name": "test"},
            "settings": {},
            "files": files,
            "sites": [
                coded,
                sparse,
                site("whole.weight", "replaced", &[2], "F32"),
                site("same.weight", "shared", &[4], "BF16"),
            ],
        })
    }

    pub fn manifest_text(&self) -> String {
        with_checksum(&self.manifest_json().to_string()[1..])
    }

    pub fn write(&self, folder: &Path) {
        let mut file = self.file();
        self.written_changes.iter().for_each(|change| change(&mut file));
        fs::write(folder.join("delta.safetensors"), file).unwrap();
        fs::write(folder.join("config.json"), "{}").unwrap();
        fs::write(folder.join("meswitch.json"), self.manifest.clone().unwrap_or_else(|| self.manifest_text())).unwrap();
    }
}

/// The codes of some rows: byte after byte, each of 16 rows, of which all others are zero.
fn padded<const BYTES: usize>(rows: &[[u8; BYTES]]) -> Vec<u8> {
    let line = |byte| (0..16).map(move |row| rows.get(row).map_or(0, |row| row[byte]));
    (0..BYTES).flat_map(line).collect()
}

/// A manifest's text: its first line before the rest.
pub fn with_checksum(body: &str) -> String {
    format!("{{\"checksum\": \"{}\",\n{body}", checksum(body.as_bytes()))
}
