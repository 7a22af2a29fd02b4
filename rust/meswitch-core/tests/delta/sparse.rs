//! Deltas that are mostly zero.

use std::collections::HashMap;

use half::bf16;
use meswitch_core::Error;
use meswitch_core::delta::{Delta, SiteKind, rewrite};
use meswitch_core::kernels;
use serde_json::json;

use crate::family::{Family, IN, OUT, bytes};

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
