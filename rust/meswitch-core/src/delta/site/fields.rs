//! A site as the manifest's JSON has it: the fields of all kinds side by side.

use std::collections::BTreeMap;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::{Owner, PartEntry, SiteEntry, SiteKind, SparseCounts, TermsEntry, contradiction, is_default};
use crate::delta::checksum::Checksum;
use crate::delta::manifest::MANIFEST;
use crate::error::{Error, Result};
use crate::layout::legacy::Order;

/// Exponents whose power of two is a normal 32-bit float.
const EXPONENTS: std::ops::RangeInclusive<i32> = -126..=127;

/// The kinds as the manifest names them.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum KindName {
    Shared,
    Replaced,
    Quantized,
    LowRank,
}

/// A part as the manifest's JSON has it.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PartFields {
    bits: u32,
    zero: f32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group_size: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rows: Option<usize>,
    /// Whether codes lie in blocks: in version 3 alone, since later versions have no other order.
    #[serde(default, skip_serializing_if = "is_default")]
    tiled: bool,
}

/// A site as the manifest's JSON has it: the fields of all kinds side by side, in the order of the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::delta) struct SiteFields {
    name: String,
    kind: KindName,
    shape: Vec<usize>,
    dtype: Dtype,
    bytes: u64,
    bpw: f64,
    relative_error: f64,
    #[serde(default, skip_serializing_if = "is_default")]
    transposed: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    exponent: i32,
    #[serde(default, skip_serializing_if = "is_default")]
    parts: Vec<PartFields>,
    #[serde(default, skip_serializing_if = "is_default")]
    column_scales: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    salient: usize,
    #[serde(default, skip_serializing_if = "is_default")]
    rank: usize,
    #[serde(default, skip_serializing_if = "is_default")]
    sparse: Option<SparseCounts>,
    #[serde(default, skip_serializing_if = "is_default")]
    added: usize,
    #[serde(default, skip_serializing_if = "is_default")]
    owner: Option<Owner>,
    #[serde(default, skip_serializing_if = "is_default")]
    tensors: BTreeMap<String, Checksum>,
}

impl SiteFields {
    /// The entry, in a manifest of that version.
    ///
    /// # Errors
    /// [`Error::Format`] for fields that contradict each other or that the version does not have.
    pub(in crate::delta) fn entry(mut self, version: u32) -> Result<SiteEntry> {
        let foreign = match &self {
            _ if version < 2 && self.sparse.is_some() => Some("sparse"),
            _ if version < 4 && self.owner.is_some() => Some("owner"),
            _ if version != 3 && self.parts.iter().any(|part| part.tiled) => Some("tiled"),
            _ => None,
        };
        if let Some(field) = foreign {
            let found = format!("found {field} at site {}", self.name);
            return Err(Error::Format(format!("expected the fields of version {version} in {MANIFEST}, {found}")));
        }
        let kind = self.kind(version)?;
        let Self { name, shape, dtype, bytes, bpw, relative_error, transposed, owner, mut tensors, .. } = self;
        let checksums = Vec::new();
        let mut site = SiteEntry { name, shape, dtype, kind, transposed, owner, bytes, bpw, relative_error, checksums };
        // A site that is still to be written has no checksums yet.
        if !tensors.is_empty() {
            site.checksums = site.tensor_specs()?.iter().filter_map(|spec| tensors.remove(&spec.name)).collect();
        }
        if !tensors.is_empty() {
            return Err(contradiction("a checksum for each tensor", &site.name));
        }
        Ok(site)
    }

    fn kind(&mut self, version: u32) -> Result<SiteKind> {
        let Self { exponent, column_scales, salient, rank, sparse, added, .. } = *self;
        let part = |fields: PartFields| {
            let PartFields { bits, zero, group_size, rows, tiled } = fields;
            let order = match version {
                4.. => Order::Current,
                _ if tiled => Order::PaddedTo8,
                _ => Order::Rows,
            };
            PartEntry { bits, zero, group_size, rows, order }
        };
        let parts: Vec<_> = std::mem::take(&mut self.parts).into_iter().map(part).collect();
        let terms = TermsEntry { exponent, column_scales, salient, rank, added };
        if !EXPONENTS.contains(&exponent) {
            return Err(contradiction("an exponent from -126 to 127", &self.name));
        }
        let has_terms = !parts.is_empty() || column_scales || salient > 0 || rank > 0;
        match (self.kind, sparse) {
            (KindName::Shared | KindName::Replaced, _)
                if has_terms || sparse.is_some() || added > 0 || exponent != 0 =>
            {
                Err(contradiction("no codec fields", &self.name))
            }
            (KindName::Shared, _) => Ok(SiteKind::Shared),
            (KindName::Replaced, _) => Ok(SiteKind::Replaced),
            (KindName::LowRank, _) if !parts.is_empty() || rank == 0 => {
                Err(contradiction("a rank and no codes", &self.name))
            }
            (_, Some(_)) if has_terms => Err(contradiction("sparse entries alone", &self.name)),
            (KindName::LowRank, _) => Ok(SiteKind::LowRank { terms }),
            (KindName::Quantized, Some(counts)) => Ok(SiteKind::Sparse { exponent, counts, added }),
            (KindName::Quantized, None) => Ok(SiteKind::Quantized { parts, terms }),
        }
    }
}

impl From<SiteEntry> for SiteFields {
    fn from(entry: SiteEntry) -> Self {
        let specs = entry.tensor_specs().unwrap_or_default();
        let tensors = specs.into_iter().map(|spec| spec.name).zip(entry.checksums).collect();
        let part = |part: PartEntry| {
            let PartEntry { bits, zero, group_size, rows, order } = part;
            PartFields { bits, zero, group_size, rows, tiled: order == Order::PaddedTo8 }
        };
        let (kind, parts, terms, sparse) = match entry.kind {
            SiteKind::Shared => (KindName::Shared, Vec::new(), TermsEntry::default(), None),
            SiteKind::Replaced => (KindName::Replaced, Vec::new(), TermsEntry::default(), None),
            SiteKind::Quantized { parts, terms } => (KindName::Quantized, parts, terms, None),
            SiteKind::LowRank { terms } => (KindName::LowRank, Vec::new(), terms, None),
            SiteKind::Sparse { exponent, counts, added } => {
                let terms = TermsEntry { exponent, added, ..TermsEntry::default() };
                (KindName::Quantized, Vec::new(), terms, Some(counts))
            }
        };
        let TermsEntry { exponent, column_scales, salient, rank, added } = terms;
        let SiteEntry { name, shape, dtype, bytes, bpw, relative_error, transposed, owner, .. } = entry;
        let parts = parts.into_iter().map(part).collect();
        Self {
            name,
            kind,
            shape,
            dtype,
            bytes,
            bpw,
            relative_error,
            transposed,
            exponent,
            parts,
            column_scales,
            salient,
            rank,
            sparse,
            added,
            owner,
            tensors,
        }
    }
}
