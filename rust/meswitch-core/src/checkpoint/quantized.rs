//! A model that was quantized, read as a checkpoint: each of its tensors is decoded when it is asked for.

use std::path::{Path, PathBuf};

use rayon::prelude::*;
use safetensors::Dtype;

use super::view::{Content, View};
use crate::delta::{BaseEntry, Delta, Kind, MANIFEST, SiteEntry, SiteKind, TENSORS};
use crate::error::{Error, Result};
use crate::fingerprint::Digest;
use crate::kernels::dense_rows;

/// Elements that a thread decodes at a time.
const TILE_ELEMENTS: usize = 1 << 18;

/// An open directory of kind base.
pub(super) struct Quantized(Delta);

impl Quantized {
    /// # Errors
    /// Those of [`Delta::open`], and [`Error::Checkpoint`] for a directory of another kind.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let delta = Delta::open(folder)?;
        match delta.manifest().kind {
            Kind::Base => Ok(Self(delta)),
            Kind::Delta => Err(Error::Checkpoint(format!(
                "expected a checkpoint or a quantized model, found a delta: {}",
                folder.display()
            ))),
        }
    }

    /// The files that decide what it is.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        vec![self.0.path().join(TENSORS), self.0.path().join(MANIFEST)]
    }

    /// The checkpoint that it was made of.
    pub(super) fn base(&self) -> &BaseEntry {
        &self.0.manifest().base
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.manifest().sites.iter().map(|site| site.name.as_str())
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.site(name).is_some()
    }

    /// A tensor without its elements.
    pub(super) fn outline(&self, name: &str) -> Option<View<'static>> {
        let site = self.0.site(name)?;
        let dtype = if matches!(site.kind, SiteKind::Replaced | SiteKind::Shared) { site.dtype } else { Dtype::F32 };
        Some(View { dtype, shape: site.shape.clone(), data: Content::Borrowed(&[]) })
    }

    /// A tensor. What is quantized becomes 32-bit floats, everything else is as it was stored.
    ///
    /// # Errors
    /// Those of [`Delta::site_tensors`].
    pub(super) fn view(&self, name: &str) -> Result<View<'static>> {
        let missing =
            || Error::Checkpoint(format!("expected a tensor {name}, found none in {}", self.0.path().display()));
        let (site, outline) = self.0.site(name).zip(self.outline(name)).ok_or_else(missing)?;
        let data = match site.kind {
            SiteKind::Shared => vec![0u8; outline.nbytes()].into(), // as a model of zeros has it
            SiteKind::Replaced => self.0.site_tensors(name)?.tensor(name, "whole").unwrap_or_default().to_vec().into(),
            _ => self.decode(site)?.into(),
        };
        Ok(View { data, ..outline })
    }

    /// The elements of a tensor that is quantized, in its own order.
    fn decode(&self, site: &SiteEntry) -> Result<Vec<f32>> {
        let tensors = self.0.site_tensors(&site.name)?;
        let matrix = tensors.matrix(&site.name)?;
        let (rows, columns) = (matrix.rows(), matrix.columns().max(1));
        let tile = (TILE_ELEMENTS / columns).max(1) * columns;
        let mut values = vec![0f32; rows * columns];
        values
            .par_chunks_mut(tile)
            .enumerate()
            .for_each(|(index, out)| dense_rows(&matrix, index * tile / columns, out));
        if !site.transposed {
            return Ok(values);
        }
        let mut turned = vec![0f32; values.len()];
        turned.par_chunks_mut(rows.max(1)).enumerate().for_each(|(column, out)| {
            out.iter_mut().enumerate().for_each(|(row, value)| *value = values[row * columns + column]);
        });
        Ok(turned)
    }

    /// A hash of everything that decides what a tensor decodes to. docs/format.md says how it is made.
    pub(super) fn digest(&self, name: &str) -> Option<Digest> {
        let site = self.0.site(name)?;
        let exponent = match &site.kind {
            SiteKind::Quantized { terms, .. } | SiteKind::LowRank { terms } => terms.exponent,
            SiteKind::Sparse { exponent, .. } => *exponent,
            SiteKind::Shared | SiteKind::Replaced => 0,
        };
        let mut text = format!("quantized {} {:?} {} {exponent}", site.dtype, site.shape, site.transposed);
        for part in site.parts() {
            let group = part.group_size.unwrap_or(0);
            text += &format!("\n{} {} {group}", part.bits, part.zero);
        }
        for checksum in &site.checksums {
            text += &format!("\n{checksum}");
        }
        Some(*blake3::hash(text.as_bytes()).as_bytes())
    }
}
