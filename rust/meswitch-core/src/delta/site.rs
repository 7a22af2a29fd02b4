//! Sites: what the manifest says of each parameter of the fine-tune.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::manifest::MANIFEST;
use super::tensor::{Role, TensorSpec};
use crate::error::{Error, Result};
use crate::layout::{BITS, legacy, part_bytes};

/// One parameter of the fine-tune.
#[derive(Clone, Debug, Serialize)]
#[serde(into = "SiteFields")]
pub struct SiteEntry {
    /// The parameter's name in the checkpoint.
    pub name: String,
    /// The fine-tune's shape.
    pub shape: Vec<usize>,
    /// The fine-tune's dtype, as safetensors names it.
    pub dtype: String,
    /// How the parameter is stored.
    pub kind: SiteKind,
    /// Whether the delta's matrix is the transposed parameter.
    pub transposed: bool,
    /// The size of its tensors in bytes.
    pub bytes: u64,
    /// Bits per weight.
    pub bpw: f64,
    /// `‖Δ − Δ̂‖ / ‖Δ‖`.
    pub relative_error: f64,
    /// The checksum of each tensor, by role.
    pub checksums: BTreeMap<String, String>,
}

/// How a parameter is stored.
#[derive(Clone, Debug, PartialEq)]
pub enum SiteKind {
    /// Bit-equal to the base's; no tensors.
    Shared,
    /// Stored whole, in its own dtype.
    Replaced,
    /// Codes, and possibly other terms.
    Quantized {
        /// The rows by bit width.
        parts: Vec<PartEntry>,
        /// The other terms.
        terms: TermsEntry,
    },
    /// A low-rank part without codes; its rank is not 0.
    LowRank {
        /// The terms.
        terms: TermsEntry,
    },
    /// Sparse entries without any other term. Since format version 2.
    Sparse {
        /// Values are in units of `2^exponent`.
        exponent: i32,
        /// How many entries.
        counts: SparseCounts,
        /// Rows at the end that the base does not have, stored whole.
        added: usize,
    },
}

/// The terms of a delta beside its codes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TermsEntry {
    /// Scales, salient values and `u` are in units of `2^exponent`.
    pub exponent: i32,
    /// Whether there are column scales.
    pub column_scales: bool,
    /// The number of salient channels.
    pub salient: usize,
    /// The rank of the low-rank part; 0 without one.
    pub rank: usize,
    /// Rows at the end that the base does not have, stored whole.
    pub added: usize,
}

/// The rows of a site that share a bit width.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartEntry {
    /// Bits per code.
    pub bits: u32,
    /// The code value that means 0.
    pub zero: f32,
    /// Input channels that share a scale; `None` for the whole row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_size: Option<usize>,
    /// The number of rows; `None` for all rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<usize>,
    /// Whether codes are in today's layout. Since format version 3.
    #[serde(default, skip_serializing_if = "is_default")]
    pub tiled: bool,
}

/// The size of a sparse delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SparseCounts {
    /// The number of entries.
    pub entries: usize,
    /// The number of weights that they change; informative only.
    pub changed: u64,
}

/// The kinds as the manifest names them.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum KindName {
    Shared,
    Replaced,
    Quantized,
    LowRank,
}

/// A site as the manifest's JSON has it: the fields of all kinds side by side, in the order of the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SiteFields {
    name: String,
    kind: KindName,
    shape: Vec<usize>,
    dtype: String,
    bytes: u64,
    bpw: f64,
    relative_error: f64,
    #[serde(default, skip_serializing_if = "is_default")]
    transposed: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    exponent: i32,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(super) parts: Vec<PartEntry>,
    #[serde(default, skip_serializing_if = "is_default")]
    column_scales: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    salient: usize,
    #[serde(default, skip_serializing_if = "is_default")]
    rank: usize,
    #[serde(default, skip_serializing_if = "is_default")]
    pub(super) sparse: Option<SparseCounts>,
    #[serde(default, skip_serializing_if = "is_default")]
    added: usize,
    #[serde(default, skip_serializing_if = "is_default")]
    tensors: BTreeMap<String, String>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn contradiction(expected: &str, site: &str) -> Error {
    Error::Format(format!("expected {expected} in {MANIFEST}, found otherwise at site {site}"))
}

impl SiteFields {
    fn kind(&mut self) -> Result<SiteKind> {
        let Self { exponent, column_scales, salient, rank, sparse, added, .. } = *self;
        let parts = std::mem::take(&mut self.parts);
        let terms = TermsEntry { exponent, column_scales, salient, rank, added };
        let has_terms = !parts.is_empty() || column_scales || salient > 0 || rank > 0;
        match (self.kind, sparse) {
            (KindName::Shared | KindName::Replaced, _) if has_terms || sparse.is_some() || added > 0 => {
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

impl TryFrom<SiteFields> for SiteEntry {
    type Error = Error;

    fn try_from(mut fields: SiteFields) -> Result<Self> {
        let kind = fields.kind()?;
        let SiteFields { name, shape, dtype, bytes, bpw, relative_error, transposed, tensors, .. } = fields;
        Ok(Self { name, shape, dtype, kind, transposed, bytes, bpw, relative_error, checksums: tensors })
    }
}

impl From<SiteEntry> for SiteFields {
    fn from(entry: SiteEntry) -> Self {
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
        let SiteEntry { name, shape, dtype, bytes, bpw, relative_error, transposed, checksums: tensors, .. } = entry;
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
            tensors,
        }
    }
}

impl SiteEntry {
    /// Reads an entry in the manifest's JSON.
    ///
    /// # Errors
    /// [`Error::Argument`] for other JSON, [`Error::Format`] where fields contradict each other.
    pub fn from_json(text: &str) -> Result<Self> {
        let fields: SiteFields = serde_json::from_str(text).map_err(|error| Error::Argument(error.to_string()))?;
        fields.try_into()
    }

    /// Output and input channels of the delta's matrix, without added rows; `None` where the numbers overflow or do not
    /// fit together.
    #[must_use]
    pub fn matrix_shape(&self) -> Option<(usize, usize)> {
        let (rows, columns) = match self.shape.as_slice() {
            [] => (1, 1),
            [columns] => (1, *columns),
            [outer @ .., last] => (outer.iter().try_fold(1usize, |product, size| product.checked_mul(*size))?, *last),
        };
        let (rows, columns) = if self.transposed { (columns, rows) } else { (rows, columns) };
        rows.checked_mul(columns)?;
        Some((rows.checked_sub(self.added())?, columns))
    }

    /// The number of weights; `None` where it overflows.
    #[must_use]
    pub fn parameters(&self) -> Option<u64> {
        self.shape.iter().try_fold(1u64, |product, size| product.checked_mul(*size as u64))
    }

    /// The rows by bit width; empty for a site without codes.
    #[must_use]
    pub fn parts(&self) -> &[PartEntry] {
        if let SiteKind::Quantized { parts, .. } = &self.kind { parts } else { &[] }
    }

    /// The number of rows at the end that the base does not have.
    #[must_use]
    pub fn added(&self) -> usize {
        match &self.kind {
            SiteKind::Shared | SiteKind::Replaced => 0,
            SiteKind::Quantized { terms, .. } | SiteKind::LowRank { terms } => terms.added,
            SiteKind::Sparse { added, .. } => *added,
        }
    }

    /// The tensors that the site has, in file order.
    ///
    /// # Errors
    /// [`Error::Format`] where a number is out of range.
    pub fn tensor_specs(&self) -> Result<Vec<TensorSpec>> {
        let broken = |expected: &str| contradiction(expected, &self.name);
        let (rows, columns) = self.matrix_shape().ok_or_else(|| broken("a shape that can be"))?;
        let mut specs = Vec::new();
        let mut add = |role: Role, shape: &[usize]| specs.push(role.spec(&self.dtype, shape));
        let add_terms = |terms: &TermsEntry, add: &mut dyn FnMut(Role, &[usize])| {
            if terms.column_scales {
                add(Role::ColumnScales, &[columns]);
            }
            if terms.salient > 0 {
                add(Role::SalientIndex, &[terms.salient]);
                add(Role::Salient, &[rows, terms.salient]);
            }
            if terms.rank > 0 {
                add(Role::U, &[rows, terms.rank]);
                add(Role::V, &[terms.rank, columns]);
            }
        };
        match &self.kind {
            SiteKind::Shared => {}
            SiteKind::Replaced => add(Role::Whole, &self.shape),
            SiteKind::Quantized { parts, terms } => {
                for (index, part) in parts.iter().enumerate() {
                    part.add_tensors(index, rows, columns, &mut add).ok_or_else(|| {
                        broken("bits of 1, 2, 3, 4 or 8, a positive group size and no more rows than there are")
                    })?;
                }
                add_terms(terms, &mut add);
            }
            SiteKind::LowRank { terms } => add_terms(terms, &mut add),
            SiteKind::Sparse { counts: SparseCounts { entries, .. }, .. } => {
                let starts = rows.checked_add(1).filter(|_| i32::try_from(*entries).is_ok());
                add(Role::SparseStarts, &[starts.ok_or_else(|| broken("sparse entries below 2^31"))?]);
                add(Role::SparseGaps, &[*entries]);
                add(Role::SparseValues, &[*entries]);
            }
        }
        if self.added() > 0 {
            add(Role::Added, &[self.added(), columns]);
        }
        Ok(specs)
    }
}

impl PartEntry {
    /// Adds the tensors of the part of that index; `None` where a number is out of range.
    fn add_tensors(
        &self,
        index: usize,
        rows: usize,
        columns: usize,
        add: &mut dyn FnMut(Role, &[usize]),
    ) -> Option<()> {
        let in_range = BITS.contains(&self.bits) && self.group_size != Some(0) && (0.0..=255.0).contains(&self.zero);
        let part_rows = self.rows.unwrap_or(rows);
        if !in_range || part_rows > rows {
            return None;
        }
        let groups = self.group_size.map_or(1, |size| columns.div_ceil(size));
        if self.tiled {
            add(Role::Codes(index), &[part_bytes(self.bits, part_rows, columns) / 4]);
        } else {
            add(Role::Codes(index), &[part_rows, legacy::row_bytes(self.bits, columns) / 4]);
        }
        add(Role::Scales(index), &[part_rows, groups]);
        if self.rows.is_some() {
            add(Role::Rows(index), &[part_rows]);
        }
        Some(())
    }
}
