//! A site's manifest entry and tensors, from what the codec returns.

use std::collections::BTreeMap;

use half::f16;

use super::Plan;
use crate::checkpoint::View;
use crate::codec::{Pair, Quantized, QuantizedPart, Settings};
use crate::delta::{PartEntry, SiteEntry, SiteKind, SparseCounts, TermsEntry};
use crate::layout::legacy::Order;
use crate::layout::{row_bytes, tile_rows, turned};

/// The entry of a parameter that is the base's, cast to the fine-tune's dtype.
pub(super) fn shared_entry(plan: &Plan, finetune: &View<'_>) -> SiteEntry {
    SiteEntry {
        name: plan.name.clone(),
        shape: finetune.shape.clone(),
        dtype: finetune.dtype,
        kind: SiteKind::Shared,
        transposed: plan.transposed,
        owner: plan.owner,
        bytes: 0,
        bpw: 0.0,
        relative_error: 0.0,
        checksums: Vec::new(),
    }
}

/// A part without rows, for a quantized site that has neither codes nor a low-rank part.
const EMPTY_PART: PartEntry = PartEntry { bits: 1, zero: 0.5, group_size: None, rows: Some(0), order: Order::Current };

/// The kind of a site with these parts and terms.
fn kind_of(parts: Vec<PartEntry>, terms: TermsEntry) -> SiteKind {
    match (parts.is_empty(), terms.rank) {
        (true, 0) => SiteKind::Quantized { parts: vec![EMPTY_PART], terms },
        (true, _) => SiteKind::LowRank { terms },
        (false, _) => SiteKind::Quantized { parts, terms },
    }
}

/// The entry of a site quantized with these settings, without what depends on its weights.
pub(super) fn quantized_entry(plan: &Plan, settings: &Settings, pair: &Pair<'_>) -> SiteEntry {
    let widths = settings.row_bits(pair.rows);
    let mut counts = BTreeMap::new();
    for bits in widths.iter().copied().flatten() {
        *counts.entry(bits).or_insert(0) += 1;
    }
    let part = |(bits, count): (u32, usize)| PartEntry {
        bits,
        zero: 127.5,
        group_size: settings.group_size,
        rows: (count < pair.rows).then_some(count),
        order: Order::Current,
    };
    let terms = TermsEntry {
        exponent: 0,
        column_scales: settings.column_scales && !counts.is_empty(),
        salient: settings.salient.min(pair.columns),
        rank: settings.rank.min(pair.rows).min(pair.columns),
        added: pair.added_rows(),
    };
    let kind = kind_of(counts.into_iter().map(part).collect(), terms);
    SiteEntry { kind, ..shared_entry(plan, &pair.finetune) }
}

/// The tensors of a quantized site as their bytes in the file, in the order of [`SiteEntry::tensor_specs`].
pub(super) struct SiteTensors<'a> {
    owned: Vec<Vec<u8>>,
    added: Option<&'a [u8]>,
}

impl SiteTensors<'_> {
    pub(super) fn slices(&self) -> Vec<&[u8]> {
        self.owned.iter().map(Vec::as_slice).chain(self.added).collect()
    }

    pub(super) fn size(&self) -> usize {
        self.slices().iter().map(|bytes| bytes.len()).sum()
    }
}

/// Entry and tensors of a site that was quantized. `None` stands for a site whose rows in the base are unchanged.
pub(super) fn quantized_site<'a>(
    shared: &SiteEntry,
    pair: &'a Pair<'_>,
    quantized: Option<Quantized>,
) -> (SiteEntry, SiteTensors<'a>) {
    let added = pair.added_rows();
    let relative_error = quantized.as_ref().map_or(0.0, |quantized| quantized.relative_error);
    let (kind, mut owned) = match quantized {
        None => (kind_of(Vec::new(), TermsEntry { added, ..TermsEntry::default() }), Vec::new()),
        Some(Quantized { sparse: Some(sparse), exponent, .. }) => {
            let counts = SparseCounts { entries: sparse.gaps.len(), changed: sparse.changed };
            let kind = SiteKind::Sparse { exponent, counts, added };
            (kind, vec![index_bytes(&sparse.starts), sparse.gaps, sparse.values])
        }
        Some(quantized) => quantized_terms(pair, quantized),
    };
    if matches!(&kind, SiteKind::Quantized { parts, .. } if *parts == [EMPTY_PART]) {
        owned.splice(0..0, [Vec::new(), Vec::new(), Vec::new()]);
    }
    let entry = SiteEntry { kind, relative_error, ..shared.clone() };
    let added = (added > 0).then(|| pair.finetune.row_bytes(pair.rows, pair.rows + added));
    (entry, SiteTensors { owned, added })
}

/// Kind and tensors of a site with codes or a low-rank part; without the added rows.
fn quantized_terms(pair: &Pair<'_>, quantized: Quantized) -> (SiteKind, Vec<Vec<u8>>) {
    let entry = |part: &QuantizedPart| PartEntry {
        bits: part.bits,
        zero: part.zero,
        group_size: part.group_size,
        rows: part.rows.as_ref().map(Vec::len),
        order: Order::Current,
    };
    let parts: Vec<PartEntry> = quantized.parts.iter().map(entry).collect();
    let column_scales = quantized.column_scales.filter(|_| !parts.is_empty());
    let terms = TermsEntry {
        exponent: quantized.exponent,
        column_scales: column_scales.is_some(),
        salient: quantized.salient_index.len(),
        rank: quantized.low_rank.as_ref().map_or(0, |(_, v)| v.len() / pair.columns.max(1)),
        added: pair.added_rows(),
    };
    let mut tensors = Vec::new();
    for part in quantized.parts {
        let row_size = row_bytes(part.bits, pair.columns);
        debug_assert_eq!(part.codes.len(), part.rows.as_ref().map_or(pair.rows, Vec::len) * row_size);
        tensors.push(tile_rows(&part.codes, row_size));
        tensors.push(half_bytes(&turned(&part.scales, part.rows.as_ref().map_or(pair.rows, Vec::len))));
        tensors.extend(part.rows.as_deref().map(index_bytes));
    }
    tensors.extend(column_scales.as_deref().map(half_bytes));
    if terms.salient > 0 {
        tensors.push(index_bytes(&quantized.salient_index));
        tensors.push(half_bytes(&quantized.salient));
    }
    if let Some((u, v)) = quantized.low_rank {
        tensors.push(half_bytes(&u));
        tensors.push(half_bytes(&v));
    }
    (kind_of(parts, terms), tensors)
}

fn half_bytes(values: &[f16]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn index_bytes(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
