//! Delta directories that were written once and must be read by every later version.

use std::fs;
use std::path::{Path, PathBuf};

use meswitch_core::Delta;
use meswitch_core::delta::{Kind, MANIFEST, SiteKind};
use meswitch_core::kernels::dense_rows;

/// The golden directories with their base; empty where the repository's tests are out of reach, as in a packaged crate.
fn golden() -> Vec<(PathBuf, PathBuf)> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let Ok(versions) = fs::read_dir(golden) else { return Vec::new() };
    let versions = versions.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
    let folders = versions.flat_map(|version| {
        let folders = fs::read_dir(&version).unwrap().map(|entry| entry.unwrap().path());
        folders.map(move |folder| (folder, version.join("base"))).collect::<Vec<_>>()
    });
    folders.filter(|(folder, _)| folder.join(MANIFEST).is_file()).collect()
}

#[test]
#[cfg_attr(miri, ignore)] // maps files
fn golden_directories_are_read() {
    let golden = golden();
    assert!(golden.is_empty() || golden.len() >= 4);
    for (folder, _) in golden {
        let delta = Delta::open(&folder).unwrap();
        delta.verify().unwrap();
        let shared = delta.manifest().sites.iter().filter(|site| site.kind == SiteKind::Shared).count();
        let expected = usize::from(delta.manifest().kind == Kind::Delta);
        assert_eq!(shared, expected, "{}", folder.display());
    }
}

#[test]
#[cfg_attr(miri, ignore)] // maps files
fn golden_sites_are_matrices() {
    for (folder, _) in golden() {
        let delta = Delta::open(&folder).unwrap();
        let tensors = delta.tensors().unwrap();
        for site in &delta.manifest().sites {
            let matrix = tensors.matrix(&site.name);
            if matches!(site.kind, SiteKind::Shared | SiteKind::Replaced) {
                assert!(matches!(matrix, Err(meswitch_core::Error::Argument(_))), "{}", site.name);
                continue;
            }
            let matrix = matrix.unwrap();
            assert_eq!(Some((matrix.rows(), matrix.columns())), site.matrix_shape());
            let mut dense = vec![0f32; matrix.rows() * matrix.columns()];
            dense_rows(&matrix, 0, &mut dense);
            assert!(dense.iter().all(|value| value.is_finite()) && dense.iter().any(|value| *value != 0.0));
        }
    }
}

#[cfg(feature = "compress")]
#[test]
#[cfg_attr(miri, ignore)] // maps files
fn golden_directories_belong_to_their_base() {
    for (folder, base) in golden() {
        let base = meswitch_core::checkpoint::Checkpoint::open(&base, &["model.safetensors".to_owned()]).unwrap();
        Delta::open(&folder).unwrap().check_base(&base, true, false).unwrap();
    }
}

/// Every parameter as the delta restores it, against the one that was stored with the directory. Sums may be rounded in
/// another order, so a few elements may be the next bfloat16 number.
#[cfg(feature = "compress")]
#[test]
#[cfg_attr(miri, ignore)] // maps files
fn golden_directories_restore_their_fine_tune() {
    use half::bf16;
    use safetensors::SafeTensors;

    for (folder, base) in golden() {
        let (delta, base) = (
            Delta::open(&folder).unwrap(),
            meswitch_core::checkpoint::Checkpoint::open(&base, &["model.safetensors".to_owned()]).unwrap(),
        );
        let base = if delta.manifest().kind == Kind::Base { base.zeros().unwrap() } else { base };
        let tensors = delta.tensors().unwrap();
        let stored = fs::read(PathBuf::from(format!("{}.safetensors", folder.display()))).unwrap();
        let stored = SafeTensors::deserialize(&stored).unwrap();
        for site in &delta.manifest().sites {
            let expected = stored.tensor(&site.name).unwrap();
            let base = base.view(&site.name).unwrap();
            if matches!(site.kind, SiteKind::Shared | SiteKind::Replaced) {
                let found = tensors.tensor(&site.name, "whole").unwrap_or(&base.data);
                assert_eq!(found, expected.data(), "{}", site.name);
                continue;
            }
            assert!(!site.transposed);
            let matrix = tensors.matrix(&site.name).unwrap();
            let (mut wide, mut dense) = (vec![0f32; base.len()], vec![0f32; base.len()]);
            base.read(0, &mut wide);
            dense_rows(&matrix, 0, &mut dense);
            let mut inexact = 0;
            for ((wide, dense), bytes) in wide.iter().zip(&dense).zip(expected.data().chunks_exact(2)) {
                let (found, expected) = (bf16::from_f32(wide + dense), bf16::from_le_bytes([bytes[0], bytes[1]]));
                let step = found.to_bits().abs_diff(expected.to_bits());
                assert!(step <= 1, "{}: {found} for {expected}", site.name);
                inexact += usize::from(step);
            }
            assert!(inexact * 1000 <= base.len(), "{}: {inexact} of {}", site.name, base.len());
            let added = tensors.tensor(&site.name, "added").unwrap_or_default();
            assert_eq!(added, &expected.data()[2 * base.len()..]);
        }
    }
}
