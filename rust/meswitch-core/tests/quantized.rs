//! A model that was quantized, read as a checkpoint.
#![cfg(feature = "compress")]

use std::path::{Path, PathBuf};

use meswitch_core::checkpoint::{Checkpoint, Source};
use meswitch_core::delta::{Kind, SiteKind};
use meswitch_core::kernels::{ElementType, Rows, dense_rows, summed};
use meswitch_core::{Delta, Error};
use safetensors::Dtype;

/// The golden directory; `None` where the repository's tests are out of reach, as in a packaged crate.
fn golden(folder: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden").join(folder);
    path.is_dir().then_some(path)
}

#[test]
#[cfg_attr(miri, ignore)] // reads files
fn its_tensors_are_decoded() {
    let Some(folder) = golden("v4-base/quantized") else { return };
    let (checkpoint, delta) = (Checkpoint::open_quantized(&folder).unwrap(), Delta::open(&folder).unwrap());
    let tensors = delta.tensors().unwrap();
    assert_eq!(delta.manifest().kind, Kind::Base);
    assert_eq!(checkpoint.names().len(), delta.manifest().sites.len());
    for site in &delta.manifest().sites {
        let (view, outline) = (checkpoint.view(&site.name).unwrap(), checkpoint.outline(&site.name).unwrap());
        assert_eq!((&view.shape, view.dtype), (&site.shape, outline.dtype));
        assert_eq!(view.data.len(), outline.nbytes());
        if site.kind == SiteKind::Replaced {
            assert_eq!((view.dtype, Some(&*view.data)), (site.dtype, tensors.tensor(&site.name, "whole")));
            continue;
        }
        let (mut found, mut expected) = (vec![0f32; view.len()], vec![0f32; view.len()]);
        view.read(0, &mut found);
        dense_rows(&tensors.matrix(&site.name).unwrap(), 0, &mut expected);
        assert_eq!((view.dtype, found), (Dtype::F32, expected), "{}", site.name);
    }
}

/// Deltas name the base that they were made against by this hash: it must stay the same in every later version.
#[test]
#[cfg_attr(miri, ignore)] // reads files
fn its_fingerprint_never_changes() {
    let Some(folder) = golden("v4-base/quantized") else { return };
    let checkpoint = Checkpoint::open_quantized(&folder).unwrap();
    assert_eq!(checkpoint.sample().unwrap(), "3f781dcdc17d93b25c2cd10f8c205c0183831cfaffffc38222762e14abeb9f17");
    let made_of = Checkpoint::open(&golden("v4-base/base").unwrap(), &["model.safetensors".to_owned()]).unwrap();
    Delta::open(&folder).unwrap().check_base(&made_of, true, false).unwrap();
    assert!(made_of.quantized_from().is_none());
    assert_ne!(checkpoint.quantized_from().unwrap().fingerprint, checkpoint.sample().unwrap());
}

#[test]
#[cfg_attr(miri, ignore)] // reads files
fn parts_of_a_decoded_tensor_are_parameters() {
    let Some(folder) = golden("v4-base/quantized") else { return };
    let checkpoint = Checkpoint::open_quantized(&folder).unwrap();
    let name = "model.embed_tokens.weight".to_owned();
    let whole = checkpoint.view(&name).unwrap();
    let part = |start, shape| Source { tensor: name.clone(), part: Some((start, shape)) };
    let take = |source| checkpoint.with_parameters([("part".to_owned(), source)].into(), [].into());
    let parts = take(part(40, vec![2, 16])).unwrap();
    let view = parts.view("part").unwrap();
    assert_eq!((&view.shape, &*view.data), (&vec![2, 16], &whole.data[160..288]));
    assert_eq!(parts.outline("part").unwrap().shape, [2, 16]);
    assert!(matches!(take(part(whole.len() - 1, vec![2])), Err(Error::Checkpoint(_))));
    assert!(matches!(checkpoint.view("nothing"), Err(Error::Checkpoint(_))));
    assert!(matches!(checkpoint.outline("nothing"), Err(Error::Checkpoint(_))));
}

#[test]
#[cfg_attr(miri, ignore)] // reads files
fn a_delta_is_none() {
    let Some(folder) = golden("v4/default") else { return };
    let error = Checkpoint::open_quantized(&folder).err().unwrap();
    assert!(matches!(&error, Error::Checkpoint(_)) && error.to_string().contains("found a delta"), "{error}");
}

#[test]
#[cfg_attr(miri, ignore)] // reads files
fn rows_of_two_matrices_are_summed_and_rounded_once() {
    let Some(folder) = golden("v4-base/quantized") else { return };
    let tensors = Delta::open(&folder).unwrap().tensors().unwrap();
    let matrix = tensors.matrix("model.layers.0.mlp.down_proj.weight").unwrap();
    let (first, count, columns) = (3, 5, matrix.columns());
    let mut dense = vec![0f32; count * columns];
    dense_rows(&matrix, first, &mut dense);
    for matrices in [vec![&matrix], vec![&matrix, &matrix]] {
        let mut out = vec![7f32; count * columns];
        // SAFETY: that many rows of as many elements.
        let rows = unsafe { Rows::new(out.as_mut_ptr() as usize, columns, ElementType::F32) };
        // SAFETY: as above.
        unsafe { summed(&matrices, first..first + count, rows) };
        let times = matrices.len() as f32;
        assert!(out.iter().zip(&dense).all(|(found, one)| *found == one * times));
    }
}
