//! A base and a fine-tune that are compressed, and what the tests do with the delta.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::bf16;
use meswitch_core::checkpoint::Checkpoint;
use meswitch_core::codec::{Class, Settings};
use meswitch_core::compress::{Job, Plan};
use meswitch_core::delta::{Delta, Kind, MANIFEST, checksum};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const OUT: usize = 150;
pub const IN: usize = 40;

/// Fixed values, spread evenly.
pub fn values(count: usize, seed: u64, size: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * size
        })
        .collect()
}

pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect()
}

pub type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

pub fn save(folder: &Path, tensors: &Tensors) {
    fs::create_dir_all(folder).unwrap();
    let data: Vec<_> = tensors.iter().map(|(name, (shape, values))| (name, shape, bytes(values))).collect();
    let views = data
        .iter()
        .map(|(name, shape, bytes)| (name.as_str(), TensorView::new(Dtype::BF16, shape.to_vec(), bytes).unwrap()));
    serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    fs::write(folder.join("config.json"), "{\"tie_word_embeddings\": false}").unwrap();
}

pub struct Family {
    pub root: TempDir,
    pub base: Tensors,
    pub finetune: Tensors,
}

impl Family {
    pub fn new() -> Self {
        let base = Tensors::from([
            ("embed.weight".into(), (vec![OUT, IN], values(OUT * IN, 1, 1.0))),
            ("layer.weight".into(), (vec![OUT, IN], values(OUT * IN, 2, 1.0))),
            ("norm.weight".into(), (vec![IN], values(IN, 3, 1.0))),
            ("same.weight".into(), (vec![OUT, IN], values(OUT * IN, 4, 1.0))),
        ]);
        let mut finetune = base.clone();
        for (seed, name) in [(5, "embed.weight"), (6, "layer.weight"), (7, "norm.weight")] {
            let tensor = &mut finetune.get_mut(name).unwrap().1;
            let change = values(tensor.len(), seed, 0.2);
            tensor.iter_mut().zip(change).for_each(|(value, change)| *value += change);
        }
        let embed = &mut finetune.get_mut("embed.weight").unwrap();
        embed.0[0] += 2;
        embed.1.extend(values(2 * IN, 8, 1.0));
        Self { root: TempDir::new().unwrap(), base, finetune }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn compress(&self) -> meswitch_core::Result<Delta> {
        save(&self.path("base"), &self.base);
        save(&self.path("finetune"), &self.finetune);
        let (base, finetune) = (
            Checkpoint::open(&self.path("base"), &["model.safetensors".to_owned()])?,
            Checkpoint::open(&self.path("finetune"), &["model.safetensors".to_owned()])?,
        );
        Job {
            kind: Kind::Delta,
            base: &base,
            finetune: &finetune,
            plans: &plans(),
            out: &self.path("delta"),
            files: &[self.path("finetune").join("config.json")],
            settings: json!({"preset": "test"}),
            base_name: "test base",
        }
        .run(&mut |_| true, &mut |_| Ok(None))
    }
}

pub fn settings(bits: u32) -> Settings {
    Settings {
        bits,
        column_scales: true,
        salient: 2,
        rank: 1,
        classes: vec![Class { bits: 4, rows: vec![1, 5] }],
        skip_unchanged_rows: true,
        ..Settings::default()
    }
}

pub fn plans() -> Vec<Plan> {
    ["embed.weight", "layer.weight", "norm.weight", "same.weight"]
        .into_iter()
        .map(|name| Plan {
            name: name.into(),
            transposed: false,
            owner: None,
            quantize: (name != "norm.weight").then(|| settings(2)),
            moments: None,
        })
        .collect()
}

/// Changes the manifest's JSON, corrects its checksum, and opens the directory.
pub fn forge(folder: &Path, change: impl FnOnce(&mut Value)) -> meswitch_core::Result<Delta> {
    let mut manifest: Value = serde_json::from_slice(&fs::read(folder.join(MANIFEST)).unwrap()).unwrap();
    manifest.as_object_mut().unwrap().remove("checksum");
    change(&mut manifest);
    let body = manifest.to_string()[1..].to_owned();
    let text = format!("{{\"checksum\": \"{}\",\n{body}", checksum(body.as_bytes()));
    fs::write(folder.join(MANIFEST), text).unwrap();
    Delta::open(folder)
}

/// Every file of a folder.
pub fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap());
    files.map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap())).collect()
}
