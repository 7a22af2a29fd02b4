//! What a first pass over a site says of it, and what its channels count for.

use rayon::prelude::*;

use super::{Pair, sweep};
use crate::error::Result;

/// What one pass over a site says of it.
pub(super) struct Statistics {
    pub row_energy: Vec<f32>,
    pub column_energy: Vec<f64>,
    pub magnitude: f64,
    pub changed: u64,
    pub largest: f32,
}

/// E[x²] with a floor, so that a channel that calibration never saw still counts; ones without calibration.
pub(super) fn importance(moments: Option<&[f32]>, columns: usize) -> Vec<f32> {
    let Some(moments) = moments else { return vec![1.0; columns] };
    let mean = moments.iter().map(|m| f64::from(*m)).sum::<f64>() / columns.max(1) as f64;
    if mean <= 0.0 {
        return vec![1.0; columns];
    }
    moments.iter().map(|m| (f64::from(*m) / mean + 0.01) as f32).collect()
}

pub(super) fn measure(pair: &Pair<'_>, rows: &[usize]) -> Result<Statistics> {
    let bands: Vec<_> = rows
        .par_chunks(pair.band_rows())
        .map_init(<(Vec<f32>, Vec<f32>)>::default, |(spare, tile), band| {
            let (mut row_energy, mut column_energy) = (Vec::with_capacity(band.len()), vec![0f32; pair.columns]);
            let (mut magnitude, mut changed, mut largest) = (0.0, 0, 0f32);
            for rows in band.chunks(pair.tile_rows()) {
                pair.read(rows, spare, tile)?;
                for row in tile.chunks(pair.columns.max(1)) {
                    let (energy, absolute) = sweep::energies(row, &mut column_energy);
                    row_energy.push(energy);
                    magnitude += f64::from(absolute);
                    let (count, most) = sweep::extent(row);
                    changed += u64::from(count);
                    largest = largest.max(most);
                }
            }
            Ok((row_energy, column_energy, magnitude, changed, largest))
        })
        .collect::<Result<_>>()?;
    let mut all = Statistics {
        row_energy: Vec::new(),
        column_energy: vec![0.0; pair.columns],
        magnitude: 0.0,
        changed: 0,
        largest: 0.0,
    };
    for (row_energy, column_energy, magnitude, changed, largest) in bands {
        all.row_energy.extend(row_energy);
        all.column_energy.iter_mut().zip(column_energy).for_each(|(sum, value)| *sum += f64::from(value));
        all.magnitude += magnitude;
        all.changed += changed;
        all.largest = all.largest.max(largest);
    }
    Ok(all)
}
