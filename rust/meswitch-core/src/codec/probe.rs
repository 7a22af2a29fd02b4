//! What a site would lose at other settings, measured on some of its rows with the code that really fits them.

use rayon::prelude::*;

use super::low_rank::LowRank;
use super::source::{Draft, Source};
use super::statistics::{importance, measure};
use super::{Pair, Settings, salient, sweep};
use crate::error::Result;

/// A site of no more rows than these is looked at whole for its low-rank part; of a larger one, about half as many.
const SEEN: usize = 2048;

/// `Σ importance · Δ²` of every row, where a channel's importance is E[x²] in units of its mean over the channels.
///
/// # Errors
/// [`crate::Error::NonFinite`] where a weight is NaN or infinite.
pub fn energies(pair: &Pair<'_>, moments: Option<&[f32]>) -> Result<Vec<f32>> {
    let root: Vec<f32> = importance(moments, pair.columns).iter().map(|weight| weight.sqrt()).collect();
    let rows: Vec<usize> = (0..pair.rows).collect();
    let bands: Vec<Vec<f32>> = rows
        .par_chunks(pair.band_rows())
        .map_init(<(Vec<f32>, Vec<f32>, Vec<f32>)>::default, |(spare, tile, sums), band| {
            sums.resize(pair.columns, 0.0);
            let mut energies = Vec::with_capacity(band.len());
            for rows in band.chunks(pair.tile_rows()) {
                pair.read(rows, spare, tile)?;
                for row in tile.chunks_mut(pair.columns.max(1)) {
                    sweep::scale(row, &root);
                    energies.push(sweep::energies(row, sums).0);
                }
            }
            Ok(energies)
        })
        .collect::<Result<_>>()?;
    Ok(bands.concat())
}

/// What each candidate leaves in each of some rows: `Σ importance · (Δ − Δ̂)²`, a list a candidate. All rows have the
/// candidate's own bits: classes say nothing here.
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
    let sketch = LowRank::sketch(pair, &importance, rank, &seen(pair, rows), rows)?;
    candidates
        .par_iter()
        .map(|candidate| {
            let low_rank = (candidate.rank > 0).then(|| sketch.truncated(candidate.rank));
            let source = Source { pair, low_rank: low_rank.as_ref(), importance: &importance };
            let draft = Draft::new(pair, candidate, candidate.bits, rows.to_vec());
            let fitted = source.fit_all(vec![draft], &statistics, candidate)?;
            let mut weight = importance.clone();
            for channel in salient::choose(&fitted.outcome.error, &importance, candidate.salient) {
                weight[channel as usize] = 0.0;
            }
            let cost = |missed: &[f32]| missed.iter().zip(&weight).map(|(d, weight)| weight * d * d).sum();
            source.missed(&fitted.drafts[0], &fitted.columns, candidate, cost)
        })
        .collect()
}

/// The rows that low-rank directions are taken from.
fn seen(pair: &Pair<'_>, measured: &[usize]) -> Vec<usize> {
    if pair.rows <= SEEN {
        return (0..pair.rows).collect();
    }
    let measured: std::collections::HashSet<usize> = measured.iter().copied().collect();
    (0..pair.rows).step_by(2 * pair.rows / SEEN).filter(|row| !measured.contains(row)).collect()
}
