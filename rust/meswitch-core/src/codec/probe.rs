//! The errors that settings would leave, measured on some rows of a site by quantizing them.

use rayon::prelude::*;

use super::fitter::{Fitter, PartDraft};
use super::low_rank::LowRank;
use super::statistics::{importance, measure};
use super::{Pair, Settings, salient, sweep};
use crate::error::Result;

/// Low-rank directions come from all rows of a site with at most this many, else from about half as many.
const SKETCH_ROWS: usize = 2048;

/// `Σ importance · Δ²` of every row. A channel's importance is E\[x²\] in units of its mean over the channels; 1
/// without moments.
///
/// # Errors
/// [`crate::Error::NonFinite`] where a weight is NaN or infinite.
pub fn row_energies(pair: &Pair<'_>, moments: Option<&[f32]>) -> Result<Vec<f32>> {
    let root: Vec<f32> = importance(moments, pair.columns).iter().map(|weight| weight.sqrt()).collect();
    let rows: Vec<usize> = (0..pair.rows).collect();
    let bands: Vec<Vec<f32>> = rows
        .par_chunks(pair.band_rows())
        .map_init(<(Vec<f32>, Vec<f32>, Vec<f32>)>::default, |(scratch, tile, sums), band| {
            sums.resize(pair.columns, 0.0);
            let mut energies = Vec::with_capacity(band.len());
            for rows in band.chunks(pair.tile_rows()) {
                pair.read(rows, scratch, tile)?;
                for row in tile.chunks_mut(pair.columns.max(1)) {
                    sweep::scale(row, &root);
                    energies.push(sweep::add_squares(row, sums).0);
                }
            }
            Ok(energies)
        })
        .collect::<Result<_>>()?;
    Ok(bands.concat())
}

/// `Σ importance · (Δ − Δ̂)²` of each of the given rows, for each candidate. All rows get the candidate's `bits`; its
/// classes are ignored.
///
/// # Errors
/// [`crate::Error::NonFinite`] where a weight is NaN or infinite.
pub fn probe(
    pair: &Pair<'_>,
    moments: Option<&[f32]>,
    rows: &[usize],
    candidates: &[Settings],
) -> Result<Vec<Vec<f32>>> {
    let importance = importance(moments, pair.columns);
    let statistics = measure(pair, rows)?;
    let rank = candidates.iter().map(|candidate| candidate.rank).max().unwrap_or(0);
    let sketch = LowRank::sketch(pair, &importance, rank, &sketch_rows(pair, rows), rows)?;
    candidates
        .par_iter()
        .map(|candidate| {
            let low_rank = (candidate.rank > 0).then(|| sketch.truncated(candidate.rank));
            let fitter = Fitter { pair, low_rank: low_rank.as_ref(), importance: &importance };
            let draft = PartDraft::new(pair, candidate, candidate.bits, rows.to_vec());
            let fitted = fitter.fit_all(vec![draft], &statistics, candidate)?;
            let mut weight = importance.clone();
            for channel in salient::choose(&fitted.sums.error, &importance, candidate.salient) {
                weight[channel as usize] = 0.0;
            }
            let cost = |missed: &[f32]| missed.iter().zip(&weight).map(|(d, weight)| weight * d * d).sum();
            fitter.map_residuals(&fitted.drafts[0], &fitted.columns, candidate, cost)
        })
        .collect()
}

/// The rows that low-rank directions are computed from: none of `measured` in a large site.
fn sketch_rows(pair: &Pair<'_>, measured: &[usize]) -> Vec<usize> {
    if pair.rows <= SKETCH_ROWS {
        return (0..pair.rows).collect();
    }
    let measured: std::collections::HashSet<usize> = measured.iter().copied().collect();
    (0..pair.rows).step_by(2 * pair.rows / SKETCH_ROWS).filter(|row| !measured.contains(row)).collect()
}
