//! Whole delta directories: written, read, damaged.
#![cfg(not(miri))] // maps files

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use half::bf16;
use meswitch_core::Error;
use meswitch_core::checkpoint::Checkpoint;
use meswitch_core::codec::{Class, Settings};
use meswitch_core::compress::{Job, Plan};
use meswitch_core::delta::{Delta, MANIFEST, Progress, SiteKind, TENSORS, checksum, rewrite};
use meswitch_core::kernels;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use serde_json::{Value, json};
use tempfile::TempDir;

const OUT: usize = 150;
const IN: usize = 40;

/// Fixed values, spread evenly.
fn values(count: usize, seed: u64, size: f32) -> Vec<f32> {
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

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect()
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn save(folder: &Path, tensors: &Tensors) {
    fs::create_dir_all(folder).unwrap();
    let data: Vec<_> = tensors.iter().map(|(name, (shape, values))| (name, shape, bytes(values))).collect();
    let views = data
        .iter()
        .map(|(name, shape, bytes)| (name.as_str(), TensorView::new(Dtype::BF16, shape.to_vec(), bytes).unwrap()));
    serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
    fs::write(folder.join("config.json"), "{\"tie_word_embeddings\": false}").unwrap();
}

struct Family {
    root: TempDir,
    base: Tensors,
    finetune: Tensors,
}

impl Family {
    fn new() -> Self {
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

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn compress(&self) -> meswitch_core::Result<Delta> {
        save(&self.path("base"), &self.base);
        save(&self.path("finetune"), &self.finetune);
        let (base, finetune) = (
            Checkpoint::open(&self.path("base"), &["model.safetensors".to_owned()])?,
            Checkpoint::open(&self.path("finetune"), &["model.safetensors".to_owned()])?,
        );
        Job {
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

fn settings(bits: u32) -> Settings {
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

fn plans() -> Vec<Plan> {
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

#[test]
fn every_parameter_is_accounted_for() {
    let family = Family::new();
    let delta = family.compress().unwrap();
    let kinds: Vec<&SiteKind> = delta.manifest().sites.iter().map(|site| &site.kind).collect();
    let quantized = |kind: &SiteKind| matches!(kind, SiteKind::Quantized { .. });
    assert!(quantized(kinds[0]) && quantized(kinds[1]));
    assert_eq!(kinds[2..], [&SiteKind::Replaced, &SiteKind::Shared]);
    assert_eq!(delta.manifest().parameters() as usize, 3 * OUT * IN + IN + 2 * IN);
    assert_eq!(delta.manifest().sites[0].added(), 2);
    let weighed = [MANIFEST, TENSORS]
        .iter()
        .map(|name| fs::metadata(family.path("delta").join(name)).unwrap().len())
        .sum::<u64>();
    assert_eq!(delta.bytes(), weighed);
    delta.verify().unwrap();
    for site in &delta.manifest().sites {
        for spec in site.tensor_specs().unwrap() {
            assert_eq!(delta.extent(&site.name, &spec.name).unwrap().start % 64, 0, "{}", spec.name);
        }
    }
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let family = Family::new();
    family.compress().unwrap();
    let first = fs::read(family.path("delta").join(TENSORS)).unwrap();
    let manifest = fs::read(family.path("delta").join(MANIFEST)).unwrap();
    family.compress().unwrap();
    assert_eq!(first, fs::read(family.path("delta").join(TENSORS)).unwrap());
    assert_eq!(manifest, fs::read(family.path("delta").join(MANIFEST)).unwrap());
}

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

/// Changes the manifest's JSON, corrects its checksum, and opens the directory.
fn forge(folder: &Path, change: impl FnOnce(&mut Value)) -> meswitch_core::Result<Delta> {
    let mut manifest: Value = serde_json::from_slice(&fs::read(folder.join(MANIFEST)).unwrap()).unwrap();
    manifest.as_object_mut().unwrap().remove("checksum");
    change(&mut manifest);
    let body = manifest.to_string()[1..].to_owned();
    let text = format!("{{\"checksum\": \"{}\",\n{body}", checksum(body.as_bytes()));
    fs::write(folder.join(MANIFEST), text).unwrap();
    Delta::open(folder)
}

#[test]
fn newer_formats_are_named() {
    let family = Family::new();
    family.compress().unwrap();
    let opened = forge(&family.path("delta"), |manifest| manifest["format_version"] = json!(99));
    let Err(Error::Format(message)) = opened else { panic!("accepted") };
    assert!(message.contains("format version 1 to 4 in meswitch.json, found 99"), "{message}");
}

/// A family whose `layer.weight` changes in four places, `[3, 5]`, `[3, 39]`, `[9, 0]` and `[23, 39]`.
fn sparse_family() -> Family {
    let mut family = Family::new();
    let mut layer = family.base["layer.weight"].1.clone();
    for at in [3 * IN + 5, 3 * IN + 39, 9 * IN, 23 * IN + 39] {
        layer[at] = bf16::from_bits(bf16::from_f32(layer[at]).to_bits() + 9).to_f32();
    }
    family.finetune.get_mut("layer.weight").unwrap().1 = layer;
    family
}

#[test]
fn what_is_mostly_zero_is_kept_entry_by_entry() {
    let family = sparse_family();
    let delta = family.compress().unwrap();
    delta.verify().unwrap();
    let site = &delta.manifest().sites[1];
    let SiteKind::Sparse { counts, .. } = site.kind else { panic!("{:?}", site.kind) };
    assert_eq!(counts.changed, 4);
    assert_eq!(site.bytes as usize, 4 * (OUT + 1) + 2 * counts.entries);
    assert!(site.relative_error.abs() < 1e-9);
    let mut rebuilt = vec![0f32; OUT * IN];
    let tensors = delta.tensors().unwrap();
    kernels::dense_rows(&tensors.matrix("layer.weight").unwrap(), 0, &mut rebuilt);
    let base = family.base["layer.weight"].1.iter().map(|value| bf16::from_f32(*value).to_f32());
    rebuilt.iter_mut().zip(base).for_each(|(value, base)| *value += base);
    assert_eq!(bytes(&rebuilt), bytes(&family.finetune["layer.weight"].1));
}

#[test]
fn sparse_entries_that_cannot_be_are_found() {
    let family = sparse_family();
    let delta = family.compress().unwrap();
    let name = |role: &str| format!("layer.weight/{role}");
    let tensors = delta.tensors().unwrap();
    let starts = tensors.tensor("layer.weight", "sparse_starts").unwrap().to_vec();
    let gaps = tensors.tensor("layer.weight", "sparse_gaps").unwrap().to_vec();
    let changed = |role: &str, at: usize, value: u8| {
        let mut tensor = if role == "sparse_gaps" { gaps.clone() } else { starts.clone() };
        tensor[at] = value;
        HashMap::from([(name(role), tensor)])
    };
    let broken = [
        changed("sparse_gaps", 0, 40),
        changed("sparse_starts", 0, 1),
        changed("sparse_starts", 4 * 4, 200),
        changed("sparse_starts", 4 * 4 + 3, 0xff),
        changed("sparse_starts", 4 * 12, 0),
        changed("sparse_starts", 4 * OUT, 5),
    ];
    for tensors in broken {
        rewrite(&delta, &family.path("forged"), &tensors, &HashMap::new(), &json!({})).unwrap();
        let found = Delta::open(&family.path("forged")).unwrap().verify();
        assert!(matches!(found, Err(Error::Format(_))), "{tensors:?} was accepted");
    }
}

#[test]
fn bytes_go_with_what_changed() {
    let mut family = Family::new();
    family.finetune = family.base.clone();
    let bare = family.compress().unwrap();
    assert!(bare.manifest().sites.iter().all(|site| site.bytes == 0));
    family.finetune.get_mut("layer.weight").unwrap().1[7] += 0.5;
    let one = family.compress().unwrap();
    assert_eq!(one.manifest().sites.iter().filter(|site| site.bytes > 0).count(), 1);
    assert!(one.manifest().sites[1].bytes <= 4 * (OUT as u64 + 1) + 8);
}

#[test]
fn another_base_is_refused() {
    let mut family = Family::new();
    let delta = family.compress().unwrap();
    let base = Checkpoint::open(&family.path("base"), &["model.safetensors".to_owned()]).unwrap();
    delta.check_base(&base, false).unwrap();
    delta.check_base(&base, true).unwrap();
    family.base.get_mut("same.weight").unwrap().1[700] += 1.0;
    save(&family.path("other"), &family.base);
    let other = Checkpoint::open(&family.path("other"), &["model.safetensors".to_owned()]).unwrap();
    assert!(matches!(delta.check_base(&other, true), Err(Error::BaseMismatch(_))));
}

#[test]
fn what_cannot_be_is_refused_before_any_work() {
    let refuse = |change: fn(&mut Family)| {
        let mut family = Family::new();
        change(&mut family);
        let error = family.compress().map(|_| ()).unwrap_err();
        assert!(!family.path("delta").exists());
        assert!(!family.path(".delta.incomplete").exists());
        error
    };
    let columns =
        refuse(|f| drop(f.finetune.insert("layer.weight".into(), (vec![OUT, IN + 1], values(OUT * (IN + 1), 1, 1.0)))));
    assert!(matches!(columns, Error::Architecture(_)));
    let missing = refuse(|f| drop(f.finetune.remove("same.weight")));
    assert!(matches!(missing, Error::Architecture(_)));
    let nan = refuse(|f| f.finetune.get_mut("layer.weight").unwrap().1[77] = f32::NAN);
    assert!(matches!(&nan, Error::NonFinite(text) if text.contains("layer.weight at element 77")), "{nan}");
    let infinite = refuse(|f| f.base.get_mut("embed.weight").unwrap().1[3] = f32::INFINITY);
    assert!(matches!(&infinite, Error::NonFinite(text) if text.contains("the base's embed.weight")), "{infinite}");
    let norm = refuse(|f| f.finetune.get_mut("norm.weight").unwrap().1[0] = f32::NEG_INFINITY);
    assert!(matches!(norm, Error::NonFinite(_)));
}

/// Compresses what is saved to the end.
fn job(family: &Family, settings: Value) -> meswitch_core::Result<Delta> {
    run(family, settings, &mut |_| true)
}

/// Compresses what is saved, with a callback for progress.
fn run(
    family: &Family,
    settings: Value,
    progress: &mut dyn FnMut(Progress<'_>) -> bool,
) -> meswitch_core::Result<Delta> {
    let open = |name: &str| Checkpoint::open(&family.path(name), &["model.safetensors".to_owned()]).unwrap();
    let (base, finetune) = (open("base"), open("finetune"));
    let job = Job {
        base: &base,
        finetune: &finetune,
        plans: &plans(),
        out: &family.path("delta"),
        files: &[family.path("finetune").join("config.json")],
        settings,
        base_name: "test base",
    };
    job.run(progress, &mut |_| Ok(None))
}

/// Compresses, but stops before the site of that index. Returns the weights that were done at the first step.
fn stopped_at(family: &Family, index: usize, settings: Value) -> (u64, meswitch_core::Result<Delta>) {
    let mut first = None;
    let outcome = run(family, settings, &mut |step| {
        first.get_or_insert(step.done);
        step.site != plans().get(index).map_or("none", |plan| &plan.name)
    });
    (first.unwrap(), outcome)
}

/// Every file of a folder.
fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap());
    files.map(|file| (file.file_name().into_string().unwrap(), fs::read(file.path()).unwrap())).collect()
}

const WHOLE: usize = usize::MAX;
const EMBEDDING: u64 = ((OUT + 2) * IN) as u64;
const LAYER: u64 = (OUT * IN) as u64;

#[test]
fn an_interrupted_job_goes_on_after_its_last_site() {
    let family = Family::new();
    family.compress().unwrap();
    let (settings, whole) = (json!({"preset": "test"}), content(&family.path("delta")));
    let done = [0, EMBEDDING, EMBEDDING + LAYER, EMBEDDING + LAYER + IN as u64];
    for (index, done) in done.into_iter().enumerate() {
        let (found, stopped) = stopped_at(&family, index, settings.clone());
        assert!(found == 0 && matches!(stopped, Err(Error::Interrupted)));
        assert_eq!(family.path(".delta.incomplete").exists(), index > 0);
        let (found, finished) = stopped_at(&family, WHOLE, settings.clone());
        assert_eq!(found, done);
        finished.unwrap().verify().unwrap();
        assert_eq!(content(&family.path("delta")), whole);
        assert!(!family.path(".delta.incomplete").exists());
    }
    let mut steps = 0;
    while stopped_at(&family, steps + 1, settings.clone()).1.is_err() {
        steps += 1;
    }
    assert_eq!(steps, 3);
    assert_eq!(content(&family.path("delta")), whole);
}

#[test]
fn another_job_starts_anew() {
    let (mut family, settings) = (Family::new(), json!({"preset": "test"}));
    family.compress().unwrap();
    let (whole, config) = (content(&family.path("delta")), family.path("finetune").join("config.json"));
    let interrupt = || stopped_at(&family, 3, settings.clone()).1.err().unwrap();
    interrupt();
    let (found, other) = stopped_at(&family, WHOLE, json!({"preset": "other"}));
    assert_eq!(found, 0);
    other.unwrap().verify().unwrap();
    interrupt();
    fs::write(&config, "{\"tie_word_embeddings\": false }").unwrap();
    assert_eq!(stopped_at(&family, WHOLE, settings.clone()).0, 0);
    fs::write(&config, "{\"tie_word_embeddings\": false}").unwrap();
    interrupt();
    family.compress().unwrap();
    assert_eq!(content(&family.path("delta")), whole, "the same checkpoints, written again");
    interrupt();
    family.finetune.get_mut("same.weight").unwrap().1[OUT * IN / 2] += 1.0;
    save(&family.path("finetune"), &family.finetune);
    assert_eq!(stopped_at(&family, WHOLE, settings.clone()).0, 0);
    stopped_at(&family, 3, settings).1.err().unwrap();
    rewrite(
        &Delta::open(&family.path("delta")).unwrap(),
        &family.path("delta"),
        &HashMap::new(),
        &HashMap::new(),
        &json!({}),
    )
    .unwrap();
    assert_eq!(Delta::open(&family.path("delta")).unwrap().manifest().settings.get(), "{}");
    assert!(!family.path(".delta.incomplete").exists());
}

#[test]
fn a_job_goes_on_from_what_holds() {
    let (family, settings) = (Family::new(), json!({"preset": "test"}));
    family.compress().unwrap();
    let (partial, whole) = (family.path(".delta.incomplete"), content(&family.path("delta")));
    let tensors = |partial: &Path| {
        let whole = Delta::open(&family.path("delta")).unwrap().tensors().unwrap();
        whole.tensor("embed.weight", "u").map(|u| {
            let data = fs::read(partial.join(TENSORS)).unwrap();
            (data.windows(u.len()).position(|window| window == u).unwrap(), data)
        })
    };
    let truncate = |name: &str, less: u64| {
        let file = fs::File::options().write(true).open(partial.join(name)).unwrap();
        file.set_len(file.metadata().unwrap().len() - less).unwrap();
    };
    let damages: [(&dyn Fn(), u64); 8] = [
        (&|| drop(fs::write(partial.join("config.json"), "torn")), EMBEDDING + LAYER),
        (&|| truncate(".journal", 1), EMBEDDING),
        (&|| truncate(".journal", 300), EMBEDDING),
        (&|| truncate(TENSORS, 1), EMBEDDING),
        (&|| fs::remove_file(partial.join(TENSORS)).unwrap(), 0),
        (&|| fs::write(partial.join(".journal"), b"\xff\n").unwrap(), 0),
        (
            &|| {
                let (at, mut data) = tensors(&partial).unwrap();
                data[at] ^= 1;
                fs::write(partial.join(TENSORS), data).unwrap();
            },
            0,
        ),
        (
            &|| {
                let journal = fs::read(partial.join(".journal")).unwrap();
                fs::write(partial.join(".journal"), [&journal[..], b"torn"].concat()).unwrap();
                let data = fs::read(partial.join(TENSORS)).unwrap();
                fs::write(partial.join(TENSORS), [&[1; 64], &data[64..], &[1; 5000]].concat()).unwrap();
                fs::write(partial.join(MANIFEST), "torn").unwrap();
                fs::write(partial.join(".delta.safetensors"), [1; 100_000]).unwrap();
            },
            EMBEDDING + LAYER,
        ),
    ];
    for (number, (damage, expected)) in damages.into_iter().enumerate() {
        stopped_at(&family, 2, settings.clone()).1.err().unwrap();
        damage();
        let (found, stopped) = stopped_at(&family, 3, settings.clone());
        assert!(matches!(stopped, Err(Error::Interrupted)));
        assert_eq!(found, expected, "damage {number}");
        let (found, finished) = stopped_at(&family, WHOLE, settings.clone());
        assert_eq!(found, EMBEDDING + LAYER + IN as u64);
        finished.unwrap().verify().unwrap();
        assert_eq!(content(&family.path("delta")), whole, "damage {number}");
    }
}

#[test]
fn a_job_goes_on_from_its_very_end() {
    let (family, settings) = (Family::new(), json!({"preset": "test"}));
    family.compress().unwrap();
    let (partial, whole) = (family.path(".delta.incomplete"), content(&family.path("delta")));
    stopped_at(&family, 3, settings.clone()).1.err().unwrap();
    let journal = fs::read(partial.join(".journal")).unwrap();
    fs::remove_dir_all(&partial).unwrap();
    fs::rename(family.path("delta"), &partial).unwrap();
    fs::write(partial.join(".journal"), journal).unwrap();
    let (found, finished) = stopped_at(&family, WHOLE, settings);
    assert_eq!(found, EMBEDDING + LAYER + IN as u64);
    finished.unwrap().verify().unwrap();
    assert_eq!(content(&family.path("delta")), whole);
}

#[test]
fn a_job_that_cannot_go_on_leaves_nothing() {
    let mut family = Family::new();
    family.compress().unwrap();
    let before = content(&family.path("delta"));
    family.finetune.get_mut("norm.weight").unwrap().1[0] = f32::NAN;
    save(&family.path("finetune"), &family.finetune);
    stopped_at(&family, 2, json!({})).1.err().unwrap();
    assert!(family.path(".delta.incomplete").exists());
    let (found, refused) = stopped_at(&family, WHOLE, json!({}));
    assert!(found > 0 && matches!(refused, Err(Error::NonFinite(_))));
    assert!(!family.path(".delta.incomplete").exists());
    assert_eq!(content(&family.path("delta")), before);
}

#[test]
fn what_is_written_rebuilds_the_fine_tune() {
    let family = Family::new();
    let delta = family.compress().unwrap();
    let site = &delta.manifest().sites[1];
    assert_eq!(site.name, "layer.weight");
    let tensors = delta.site_tensors(&site.name).unwrap();
    let matrix = tensors.matrix(&site.name).unwrap();
    assert_eq!((matrix.rows(), matrix.columns(), matrix.rank()), (OUT, IN, 1));
    let mut dense = vec![0f32; OUT * IN];
    kernels::dense_rows(&matrix, 0, &mut dense);
    let wide = |tensors: &Tensors| -> Vec<f32> {
        tensors["layer.weight"].1.iter().map(|value| bf16::from_f32(*value).to_f32()).collect()
    };
    let (mut missed, mut energy) = (0f64, 0f64);
    for ((finetune, base), found) in wide(&family.finetune).iter().zip(wide(&family.base)).zip(&dense) {
        missed += f64::from(finetune - base - found).powi(2);
        energy += f64::from(finetune - base).powi(2);
    }
    let relative = (missed / energy).sqrt();
    assert!((relative - site.relative_error).abs() < 2e-3, "{relative} is not the manifest's {}", site.relative_error);
    assert!(relative < 0.4);
}

#[test]
fn a_rewrite_changes_what_it_is_told_and_nothing_else() {
    let family = Family::new();
    let delta = family.compress().unwrap();
    let tensors = delta.tensors().unwrap();
    let scales = tensors.tensor("layer.weight", "scales.0").unwrap();
    let name = "layer.weight/scales.0".to_owned();
    let changed = HashMap::from([(name.clone(), vec![0x3c; scales.len()])]);
    let errors = HashMap::from([("layer.weight".to_owned(), 0.5)]);
    rewrite(&delta, &family.path("again"), &changed, &errors, &json!({"preset": "other"})).unwrap();
    let again = Delta::open(&family.path("again")).unwrap();
    again.verify().unwrap();
    let rewritten = again.tensors().unwrap();
    assert_eq!(rewritten.tensor("layer.weight", "scales.0").unwrap(), changed[&name]);
    assert_eq!(rewritten.tensor("layer.weight", "codes.0"), tensors.tensor("layer.weight", "codes.0"));
    assert!((again.manifest().sites[1].relative_error - 0.5).abs() < 1e-9);
    assert_eq!(
        again.bytes(),
        fs::metadata(family.path("again").join(TENSORS)).unwrap().len()
            + fs::metadata(family.path("again").join(MANIFEST)).unwrap().len()
    );
    let short = HashMap::from([(name.clone(), vec![0; 2])]);
    let infinite = HashMap::from([(name, [0x00, 0x7c].repeat(scales.len() / 2))]);
    let error = |site: &str, error: f64| HashMap::from([(site.to_owned(), error)]);
    let refused = |tensors: &HashMap<String, Vec<u8>>, errors: &HashMap<String, f64>| {
        let refused = rewrite(&delta, &family.path("no"), tensors, errors, &json!({})).unwrap_err();
        assert!(!family.path("no").exists());
        refused
    };
    assert!(matches!(refused(&short, &errors), Error::Argument(_)));
    assert!(matches!(refused(&infinite, &errors), Error::NonFinite(_)));
    for errors in [error("layer.weight", f64::NAN), error("layer.weight", -1.0), error("other.weight", 0.5)] {
        assert!(matches!(refused(&changed, &errors), Error::Argument(_)));
    }
}

#[test]
fn a_rewrite_gives_no_damaged_byte_a_new_checksum() {
    let family = Family::new();
    let start = family.compress().unwrap().extent("layer.weight", "codes.0").unwrap().start as usize;
    let folder = family.path("delta");
    for (file, at) in [(TENSORS, start), ("config.json", 0)] {
        let sound = fs::read(folder.join(file)).unwrap();
        let mut damaged = sound.clone();
        damaged[at] ^= 1;
        fs::write(folder.join(file), damaged).unwrap();
        let before = content(&folder);
        let delta = Delta::open(&folder).unwrap();
        for out in [&folder, &family.path("again")] {
            let found = rewrite(&delta, out, &HashMap::new(), &HashMap::new(), &json!({}));
            assert!(matches!(found, Err(Error::Checksum(_))), "{file}: {found:?}");
        }
        assert_eq!(content(&folder), before);
        assert!(!family.path("again").exists());
        fs::write(folder.join(file), sound).unwrap();
    }
}

#[test]
fn names_that_a_reader_refuses_are_refused_before_any_work() {
    let family = Family::new();
    family.compress().unwrap();
    let before = content(&family.path("delta"));
    let (base, finetune) = (family.path("base"), family.path("finetune"));
    let open = |folder: &Path| Checkpoint::open(folder, &["model.safetensors".to_owned()]).unwrap();
    let compress = |files: &[PathBuf], name: &str| {
        let (base, finetune) = (open(&base), open(&finetune));
        let mut plans = plans();
        plans.last_mut().unwrap().name = name.into();
        let (out, settings) = (family.path("delta"), json!({}));
        let job =
            Job { base: &base, finetune: &finetune, plans: &plans, out: &out, files, settings, base_name: "test base" };
        job.run(&mut |_| panic!("worked"), &mut |_| Ok(None)).err().unwrap()
    };
    for name in [".hidden", "new\nline", MANIFEST, TENSORS] {
        let error = compress(&[finetune.join(name)], "same.weight");
        assert!(matches!(error, Error::Argument(_)), "{name:?}: {error:?}");
    }
    let twice = [finetune.join("config.json"), base.join("config.json")];
    assert!(matches!(compress(&twice, "same.weight"), Error::Argument(_)));
    for folder in [&base, &finetune] {
        let mut tensors = if folder == &base { family.base.clone() } else { family.finetune.clone() };
        let same = tensors.remove("same.weight").unwrap();
        tensors.insert("_pad.weight".into(), same);
        save(folder, &tensors);
    }
    assert!(matches!(compress(&[], "_pad.weight"), Error::Architecture(_)));
    assert_eq!(content(&family.path("delta")), before);
}

#[test]
fn names_full_of_what_json_escapes_have_room_in_the_header() {
    let mut family = Family::new();
    let long = format!("{}.weight", "\u{1}".repeat(3000));
    for tensors in [&mut family.base, &mut family.finetune] {
        let norm = tensors.remove("norm.weight").unwrap();
        tensors.insert(long.clone(), norm);
    }
    save(&family.path("base"), &family.base);
    save(&family.path("finetune"), &family.finetune);
    let open = |name: &str| Checkpoint::open(&family.path(name), &["model.safetensors".to_owned()]).unwrap();
    let mut plans = plans();
    plans[2].name = long.clone();
    let delta = Job {
        base: &open("base"),
        finetune: &open("finetune"),
        plans: &plans,
        out: &family.path("delta"),
        files: &[],
        settings: json!({}),
        base_name: "test base",
    }
    .run(&mut |_| true, &mut |_| Ok(None))
    .unwrap();
    delta.verify().unwrap();
    assert!(delta.extent(&long, "whole").is_some());
}

#[test]
fn what_came_to_the_place_meanwhile_costs_no_work() {
    let (family, settings) = (Family::new(), json!({"preset": "test"}));
    family.compress().unwrap();
    fs::remove_dir_all(family.path("delta")).unwrap();
    let outcome = run(&family, settings.clone(), &mut |_| {
        fs::write(family.path("delta"), "a user's file").unwrap();
        true
    });
    assert!(matches!(outcome, Err(Error::Output(_))));
    assert_eq!(fs::read_to_string(family.path("delta")).unwrap(), "a user's file");
    fs::remove_file(family.path("delta")).unwrap();
    assert_eq!(stopped_at(&family, WHOLE, settings).0, EMBEDDING + 2 * LAYER + IN as u64);
}

#[test]
fn a_journal_that_cannot_be_read_loses_no_work() {
    let (family, settings) = (Family::new(), json!({"preset": "test"}));
    family.compress().unwrap();
    stopped_at(&family, 2, settings.clone()).1.err().unwrap();
    let (partial, aside) = (family.path(".delta.incomplete"), family.path("journal"));
    fs::rename(partial.join(".journal"), &aside).unwrap();
    let before = content(&partial);
    // Whoever runs this may read any file, so a folder and a link stand for one that cannot be read.
    fs::create_dir(partial.join(".journal")).unwrap();
    assert!(job(&family, settings.clone()).is_err());
    fs::remove_dir(partial.join(".journal")).unwrap();
    std::os::unix::fs::symlink(&aside, partial.join(".journal")).unwrap();
    assert!(job(&family, settings.clone()).is_err());
    fs::remove_file(partial.join(".journal")).unwrap();
    assert_eq!(content(&partial), before);
    fs::rename(&aside, partial.join(".journal")).unwrap();
    assert_eq!(stopped_at(&family, WHOLE, settings).0, EMBEDDING + LAYER);
}

#[test]
fn a_load_that_is_stopped_gives_everything_back() {
    let delta = Family::new().compress().unwrap();
    let (stop, token) = (AtomicBool::new(true), Arc::new(()));
    let stopped = delta.load(Some(Box::new(token.clone())), &stop);
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert_eq!(Arc::strong_count(&token), 1);

    stop.store(false, Ordering::Relaxed);
    let tensors = delta.load(Some(Box::new(token.clone())), &stop).unwrap();
    let region = tensors.region().clone();
    assert_eq!(region[..], delta.tensors().unwrap().region()[..]);
    drop(tensors);
    assert_eq!(Arc::strong_count(&token), 2, "dropped while the memory had a user");
    drop(region);
    assert_eq!(Arc::strong_count(&token), 1);
}

#[test]
fn threads_share_a_delta_and_its_tensors() {
    fn shared<T: Send + Sync>() {}
    shared::<Delta>();
    shared::<meswitch_core::delta::Tensors>();
}
