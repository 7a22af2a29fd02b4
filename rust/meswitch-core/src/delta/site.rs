//! Sites: what the manifest says of each parameter of the fine-tune.

mod fields;

use safetensors::Dtype;
use serde::{Deserialize, Serialize};

use super::checksum::Checksum;
use super::manifest::{MANIFEST, VERSION};
use super::tensor::{Role, TensorSpec};
use crate::error::{Error, Result};
use crate::layout::legacy::{self, Order};
use crate::layout::{BITS, part_bytes, row_bytes};

pub(super) use fields::SiteFields;

/// Rows and columns of a matrix, and sparse entries, are numbered with 31 bits.
const MAX_INDEX: usize = i32::MAX as usize;

/// One parameter of the fine-tune.
#[derive(Clone, Debug, Serialize)]
#[serde(into = "SiteFields")]
pub struct SiteEntry {
    /// The parameter's name in the checkpoint.
    pub name: String,
    /// The fine-tune's shape.
    pub shape: Vec<usize>,
    /// The fine-tune's dtype.
    pub dtype: Dtype,
    /// How the parameter is stored.
    pub kind: SiteKind,
    /// Whether the delta's matrix is the transposed parameter.
    pub transposed: bool,
    /// The part of the model that it belongs to, where the writer knows one. Since format version 4.
    pub owner: Option<Owner>,
    /// The size of its tensors in bytes.
    pub bytes: u64,
    /// Bits per weight.
    pub bpw: f64,
    /// `‖Δ − Δ̂‖ / ‖Δ‖`.
    pub relative_error: f64,
    /// The checksum of each tensor, in the order of [`SiteEntry::tensor_specs`].
    pub checksums: Vec<Checksum>,
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
#[derive(Clone, Debug, PartialEq)]
pub struct PartEntry {
    /// Bits per code.
    pub bits: u32,
    /// The code value that means 0.
    pub zero: f32,
    /// Input channels that share a scale; `None` for the whole row.
    pub group_size: Option<usize>,
    /// The number of rows; `None` for all rows.
    pub rows: Option<usize>,
    /// How codes and scales lie; the current order in what is written.
    pub order: Order,
}

/// The part of a model that a site belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// The number of the layer.
    pub layer: u32,
    /// The number of the expert within a mixture-of-experts layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moe_expert: Option<u32>,
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

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

fn contradiction(expected: &str, site: &str) -> Error {
    Error::Format(format!("expected {expected} in {MANIFEST}, found otherwise at site {site}"))
}

impl SiteEntry {
    /// Reads an entry in the manifest's JSON.
    ///
    /// # Errors
    /// [`Error::Argument`] for other JSON, [`Error::Format`] where fields contradict each other.
    pub fn from_json(text: &str) -> Result<Self> {
        let fields: SiteFields = serde_json::from_str(text).map_err(|error| Error::Argument(error.to_string()))?;
        fields.entry(VERSION)
    }

    /// Output and input channels of the delta's matrix, without added rows; `None` where either is not below 2^31, or
    /// more rows are added than there are.
    #[must_use]
    pub fn matrix_shape(&self) -> Option<(usize, usize)> {
        let (rows, columns) = match self.shape.as_slice() {
            [] => (1, 1),
            [columns] => (1, *columns),
            [outer @ .., last] => (outer.iter().try_fold(1usize, |product, size| product.checked_mul(*size))?, *last),
        };
        let (rows, columns) = if self.transposed { (columns, rows) } else { (rows, columns) };
        if rows > MAX_INDEX || columns > MAX_INDEX {
            return None;
        }
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

    /// The same site with codes and scales in the order of today's format.
    pub(super) fn into_current(mut self) -> Result<Self> {
        if let SiteKind::Quantized { parts, .. } = &mut self.kind {
            parts.iter_mut().for_each(|part| part.order = Order::Current);
        }
        self.bytes = self.tensor_specs()?.iter().map(|spec| spec.size() as u64).sum();
        self.bpw = self.exact_bpw();
        Ok(self)
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
        let shape = self.matrix_shape().filter(|_| self.parameters().is_some());
        let (rows, columns) = shape.ok_or_else(|| broken("a shape that can be"))?;
        let mut specs = Vec::new();
        let mut add = |role: Role, shape: &[usize]| specs.push(role.spec(self.dtype, shape));
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
                if *entries > MAX_INDEX {
                    return Err(broken("sparse entries below 2^31"));
                }
                add(Role::SparseStarts, &[rows + 1]);
                add(Role::SparseGaps, &[*entries]);
                add(Role::SparseValues, &[*entries]);
            }
        }
        if self.added() > 0 {
            add(Role::Added, &[self.added(), columns]);
        }
        specs.into_iter().collect::<Option<_>>().ok_or_else(|| broken("tensors of a size that can be"))
    }

    /// What `bpw` must be: bits per weight, rounded to four decimals.
    pub(super) fn exact_bpw(&self) -> f64 {
        let bpw = 8.0 * self.bytes as f64 / self.parameters().unwrap_or(1).max(1) as f64;
        (bpw * 1e4).round() / 1e4
    }

    /// Checks what the entry says of its tensors against their shapes.
    ///
    /// # Errors
    /// [`Error::Format`].
    pub(super) fn check(&self) -> Result<()> {
        let broken = |expected: &str| Err(contradiction(expected, &self.name));
        let specs = self.tensor_specs()?;
        if specs.len() != self.checksums.len() {
            return broken("a checksum for each tensor");
        }
        let sizes = specs.iter().try_fold(0u64, |sum, spec| sum.checked_add(spec.size() as u64));
        if sizes != Some(self.bytes) {
            return broken(&format!("bytes of {}", sizes.unwrap_or(u64::MAX)));
        }
        if (self.bpw - self.exact_bpw()).abs() > 1e-4 {
            return broken(&format!("bpw of {}", self.exact_bpw()));
        }
        if !(self.relative_error.is_finite() && self.relative_error >= 0.0) {
            return broken("a relative_error that is not negative");
        }
        Ok(())
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
        let bytes = part_bytes(self.bits, part_rows, columns)?;
        match self.order {
            Order::Rows => add(Role::Codes(index), &[part_rows, legacy::row_bytes(self.bits, columns) / 4]),
            Order::PaddedTo8 => {
                add(Role::Codes(index), &[row_bytes(self.bits, columns) * part_rows.next_multiple_of(8) / 4]);
            }
            Order::Current => add(Role::Codes(index), &[bytes / 4]),
        }
        match self.order {
            Order::Rows | Order::PaddedTo8 => add(Role::Scales(index), &[part_rows, groups]),
            Order::Current => add(Role::Scales(index), &[groups, part_rows]),
        }
        if self.rows.is_some() {
            add(Role::Rows(index), &[part_rows]);
        }
        Some(())
    }
}
