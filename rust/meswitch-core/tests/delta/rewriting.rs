//! Directories that are written anew with other tensors.

use std::collections::HashMap;
use std::fs;

use meswitch_core::Error;
use meswitch_core::delta::{Delta, MANIFEST, TENSORS, rewrite};
use serde_json::json;

use crate::family::{Family, content};

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
