//! Statistics of a site's difference, and the importance of its input channels.

use rayon::prelude::*;

use super::{Pair, sweep};
use crate::error::Result;

/// Statistics of some rows of a site's difference Δ.
pub(super) struct Statistics {
    /// `Σ Δ²` of each row.
    pub(super) row_energy: Vec<f32>,
    /// `Σ Δ²` of each column.
    pub(super) column_energy: Vec<f64>,
    /// `Σ |Δ|`.
    pub(super) magnitude: f64,
    /// The number of elements that are not 0.
    pub(super) changed: u64,
    /// The largest magnitude.
    pub(super) largest: f32,
}

/// E\[x²\] in units of its mean, plus 0.01 so that channels without activations still count; all 1 without moments.
pub(super) fn importance(moments: Option<&[f32]>, columns: usize) -> Vec<f32> {
    let Some(moments) = moments else { return vec![1.0; columns] };
    let mean = moments.iter().map(|m| f64::from(*m)).sum::<f64>() / columns.max(1) as f64;
    if mean <= 0.0 {
        return vec![1.0; columns];
    }
    moments.iter().map(|m| (f64::from(*m) / mean + 0.01) as f32).collect()
}

/// Measures the given rows.
///
/// # Errors
/// [`crate::Error::NonFinite`].
pub(super) fn measure(pair: &Pair<'_>, rows: &[usize]) -> Result<Statistics> {
    let bands: Vec<_> = rows
        .par_chunks(pair.band_rows())
        .map_init(<(Vec<f32>, Vec<f32>)>::default, |(scratch, tile), band| {
            let (mut row_energy, mut column_energy) = (Vec::with_capacity(band.len()), vec![0f32; pair.columns]);
            let (mut magnitude, mut changed, mut largest) = (0.0, 0, 0f32);
            for rows in band.chunks(pair.tile_rows()) {
                pair.read(rows, scratch, tile)?;
                for row in tile.chunks(pair.columns.max(1)) {
                    let (energy, absolute) = sweep::add_squares(row, &mut column_energy);
                    row_energy.push(energy);
                    magnitude += f64::from(absolute);
                    let (count, peak) = sweep::count_changes(row);
                    changed += u64::from(count);
                    largest = largest.max(peak);
                }
            }
            Ok((row_energy, column_energy, magnitude, changed, largest))
        })
        .collect::<Result<_>>()?;
    let mut total = Statistics {
        row_energy: Vec::new(),
        column_energy: vec![0.0; pair.columns],
        magnitude: 0.0,
        changed: 0,
        largest: 0.0,
    };
    for (row_energy, column_energy, magnitude, changed, largest) in bands {
        total.row_energy.extend(row_energy);
        total.column_energy.iter_mut().zip(column_energy).for_each(|(sum, value)| *sum += f64::from(value));
        total.magnitude += magnitude;
        total.changed += changed;
        total.largest = total.largest.max(largest);
    }
    Ok(total)
}
