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
pub fn row_energies(pair: &Pair<'_>, moments: Option<&[f32]>) -> Result<Vec<f64>> {
    let importance = importance(moments, pair.columns);
    let rows: Vec<usize> = (0..pair.rows).collect();
    let bands: Vec<Vec<f64>> = rows
        .par_chunks(pair.band_rows())
        .map_init(<(Vec<f32>, Vec<f32>)>::default, |(scratch, tile), band| {
            let mut energies = Vec::with_capacity(band.len());
            for rows in band.chunks(pair.tile_rows()) {
                pair.read(rows, scratch, tile)?;
                energies.extend(tile.chunks(pair.columns.max(1)).map(|row| sweep::weighed_energy(row, &importance)));
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
) -> Result<Vec<Vec<f64>>> {
    let importance = importance(moments, pair.columns);
    let rank = candidates.iter().map(|candidate| candidate.rank).max().unwrap_or(0);
    let sketched = if rank > 0 { sketch_rows(pair, rows) } else { Vec::new() };
    let statistics = measure(pair, rows)?;
    let largest = statistics.largest.max(measure(pair, &sketched)?.largest);
    let (pair, statistics) = match pair.rescaled(largest) {
        None => (pair.clone(), statistics),
        Some(pair) => {
            let statistics = measure(&pair, rows)?;
            (pair, statistics)
        }
    };
    let sketch = LowRank::sketch(&pair, &importance, rank, &sketched, rows)?;
    let unit = f64::from(pair.exponent).exp2();
    candidates
        .par_iter()
        .map(|candidate| {
            let low_rank = (candidate.rank > 0).then(|| sketch.truncated(candidate.rank));
            let fitter = Fitter { pair: &pair, low_rank: low_rank.as_ref(), importance: &importance };
            let draft = PartDraft::new(&pair, candidate, candidate.bits, rows.to_vec());
            let fitted = fitter.fit_all(vec![draft], &statistics, candidate)?;
            let mut weight = importance.clone();
            for channel in salient::choose(&fitted.sums.error, &importance, candidate.salient) {
                weight[channel as usize] = 0.0;
            }
            let cost = |missed: &[f32]| sweep::weighed_energy(missed, &weight) * unit * unit;
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
