//! What compress writes, and that it is what was asked for.

use std::fs;
use std::path::{Path, PathBuf};

use half::bf16;
use meswitch_core::Error;
use meswitch_core::checkpoint::Checkpoint;
use meswitch_core::compress::Job;
use meswitch_core::delta::{Kind, MANIFEST, SiteKind, TENSORS};
use meswitch_core::kernels;
use serde_json::json;

use crate::family::{Family, IN, OUT, Tensors, content, plans, save, values};

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
    delta.check_base(&base, false, false).unwrap();
    delta.check_base(&base, true, false).unwrap();
    family.base.get_mut("same.weight").unwrap().1[700] += 1.0;
    save(&family.path("other"), &family.base);
    let other = Checkpoint::open(&family.path("other"), &["model.safetensors".to_owned()]).unwrap();
    assert!(matches!(delta.check_base(&other, true, false), Err(Error::BaseMismatch(_))));
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
        let job = Job {
            kind: Kind::Delta,
            base: &base,
            finetune: &finetune,
            plans: &plans,
            out: &out,
            files,
            settings,
            base_name: "test base",
        };
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
        kind: Kind::Delta,
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
