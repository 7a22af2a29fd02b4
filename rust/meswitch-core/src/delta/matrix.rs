//! Sites as matrices that kernels multiply with.

use bytemuck::Pod;

use super::manifest::MANIFEST;
use super::site::{PartEntry, SiteEntry, SiteKind, TermsEntry};
use super::tensor::Role;
use super::tensors::Tensors;
use crate::error::{Error, Result};
use crate::kernels::{Matrix, Part, SparseEntries, Terms};

impl Tensors {
    /// The delta of a site as a matrix.
    ///
    /// It borrows the tensors. Indices are read and checked, codes and scales are not read. Rows that only the fine-tune
    /// has are not part of the matrix; see [`SiteEntry::added`].
    ///
    /// # Errors
    /// [`Error::Argument`] where there is no such site, or where it has no matrix because it is shared or replaced;
    /// [`Error::Format`] where its tensors do not fit together.
    pub fn matrix(&self, site: &str) -> Result<Matrix<'_>> {
        let entry =
            self.site(site).ok_or_else(|| Error::Argument(format!("expected a site of the delta, found {site}")))?;
        let (rows, columns) = entry.matrix_shape().unwrap_or_default();
        let without_matrix = |kind| {
            Err(Error::Argument(format!(
                "expected a site with codes, a low-rank part or entries, found {site}, {kind}"
            )))
        };
        match &entry.kind {
            SiteKind::Shared => without_matrix("which is shared"),
            SiteKind::Replaced => without_matrix("which is replaced"),
            SiteKind::Quantized { parts, terms } => {
                Matrix::new(rows, columns, terms.exponent, self.terms(entry, parts, terms, columns)?)
            }
            SiteKind::LowRank { terms } => {
                Matrix::new(rows, columns, terms.exponent, self.terms(entry, &[], terms, columns)?)
            }
            SiteKind::Sparse { exponent, .. } => {
                let entries = SparseEntries {
                    starts: self.elements(entry, Role::SparseStarts)?,
                    gaps: self.elements(entry, Role::SparseGaps)?,
                    values: self.elements(entry, Role::SparseValues)?,
                };
                Matrix::from_sparse(rows, columns, *exponent, entries)
            }
        }
    }

    fn terms(&self, site: &SiteEntry, parts: &[PartEntry], terms: &TermsEntry, columns: usize) -> Result<Terms<'_>> {
        let column_scales = terms.column_scales.then(|| self.elements(site, Role::ColumnScales));
        let salient = (terms.salient > 0)
            .then(|| Ok((self.elements(site, Role::SalientIndex)?, self.elements(site, Role::Salient)?)));
        let low_rank = (terms.rank > 0).then(|| Ok((self.elements(site, Role::U)?, self.elements(site, Role::V)?)));
        let parts = parts.iter().enumerate().map(|(index, part)| self.part(site, index, part, columns));
        Ok(Terms {
            parts: parts.collect::<Result<_>>()?,
            column_scales: column_scales.transpose()?,
            salient: salient.transpose()?,
            low_rank: low_rank.transpose()?,
        })
    }

    fn part(&self, site: &SiteEntry, index: usize, part: &PartEntry, columns: usize) -> Result<Part<'_>> {
        let codes = self.elements(site, Role::Codes(index))?;
        let rows = part.rows.map(|_| self.elements(site, Role::Rows(index))).transpose()?;
        let group = part.group_size.unwrap_or(columns).max(1);
        let scales = self.elements(site, Role::Scales(index))?;
        Ok(Part { bits: part.bits, zero: part.zero, group, rows, codes, scales })
    }

    /// A tensor's elements. Tensors start at multiples of [`super::ALIGNMENT`].
    fn elements<T: Pod>(&self, site: &SiteEntry, role: Role) -> Result<&[T]> {
        let bytes = self.tensor(&site.name, &role.to_string());
        bytes
            .and_then(|bytes| bytemuck::try_cast_slice(bytes).ok())
            .ok_or_else(|| Error::Format(format!("expected the tensors of {MANIFEST}, found no {}/{role}", site.name)))
    }
}
