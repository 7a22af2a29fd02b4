//! A low-rank part under the codes, by subspace iteration on the activation-weighted difference.

use half::f16;
use rayon::prelude::*;

use super::{Pair, sweep};
use crate::error::Result;
use crate::kernels::linear::dot;

/// Iterations; each reads the site twice. Enough for the leading directions of a spectrum that falls.
const ITERATIONS: usize = 3;

/// `U · V` with `U [rows, rank]` and `V [rank, columns]`.
pub(super) struct LowRank {
    rank: usize,
    u: Vec<f32>,
    v: Vec<f32>,
}

impl LowRank {
    /// The best `U · V` for errors weighted by the channels' importance; none for rank 0.
    pub fn fit(pair: &Pair<'_>, importance: &[f32], rank: usize) -> Result<Option<Self>> {
        let rank = rank.min(pair.rows).min(pair.columns);
        if rank == 0 {
            return Ok(None);
        }
        let root: Vec<f32> = importance.iter().map(|weight| weight.sqrt()).collect();
        let mut basis = start(rank, pair.columns);
        for _ in 0..ITERATIONS {
            basis = pass(pair, &root, &basis, rank)?.1;
            orthonormalise(&mut basis, pair.columns);
        }
        let u = pass(pair, &root, &basis, rank)?.0;
        // Both halves are kept in 16 bits: what they cannot hold, the codes see.
        let u = round_to_halves(u);
        let v = basis
            .chunks(pair.columns)
            .flat_map(|row| row.iter().zip(&root).map(|(value, root)| value / root))
            .collect();
        Ok(Some(Self { rank, u, v: round_to_halves(v) }))
    }

    /// Takes the part out of a tile of rows.
    pub fn subtract(&self, rows: &[usize], columns: usize, tile: &mut [f32]) {
        for (row, tile) in rows.iter().zip(tile.chunks_mut(columns)) {
            for (u, v) in self.u[row * self.rank..].iter().take(self.rank).zip(self.v.chunks(columns)) {
                sweep::add_scaled(tile, -u, v);
            }
        }
    }

    pub fn largest(&self) -> f32 {
        self.u.iter().fold(0.0, |most, value| most.max(value.abs()))
    }

    pub fn halves(self, unit: f32) -> (Vec<f16>, Vec<f16>) {
        let u = self.u.iter().map(|value| f16::from_f32(value * unit)).collect();
        (u, self.v.into_iter().map(f16::from_f32).collect())
    }
}

fn round_to_halves(mut values: Vec<f32>) -> Vec<f32> {
    let largest = values.iter().fold(0f32, |most, value| most.max(value.abs()));
    if largest > 0.0 {
        let unit = largest.log2().floor().exp2();
        values.iter_mut().for_each(|value| *value = f16::from_f32(*value / unit).to_f32() * unit);
    }
    values
}

/// A fixed, spread start, so that results do not depend on chance.
fn start(rank: usize, columns: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut basis: Vec<f32> = (0..rank * columns)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        })
        .collect();
    orthonormalise(&mut basis, columns);
    basis
}

/// `Y = Δ·R·basisᵀ` as `[rows, rank]` and `Yᵀ·Δ·R` as `[rank, columns]`, in one reading; `R` are the channels' roots.
fn pass(pair: &Pair<'_>, root: &[f32], basis: &[f32], rank: usize) -> Result<(Vec<f32>, Vec<f32>)> {
    let rows: Vec<usize> = (0..pair.rows).collect();
    let columns = pair.columns;
    let bands: Vec<(Vec<f32>, Vec<f32>)> = rows
        .par_chunks(pair.band_rows())
        .map_init(<(Vec<f32>, Vec<f32>)>::default, |(spare, tile), band| {
            let mut left = Vec::with_capacity(band.len() * rank);
            let mut right = vec![0f32; rank * columns];
            for rows in band.chunks(pair.tile_rows()) {
                pair.read(rows, spare, tile)?;
                for row in tile.chunks_mut(columns) {
                    sweep::scale(row, root);
                    for (basis, right) in basis.chunks(columns).zip(right.chunks_mut(columns)) {
                        let y = dot(row, basis);
                        left.push(y);
                        sweep::add_scaled(right, y, row);
                    }
                }
            }
            Ok((left, right))
        })
        .collect::<Result<_>>()?;
    let (mut left, mut right) = (Vec::with_capacity(pair.rows * rank), vec![0f32; rank * columns]);
    for (more, sums) in bands {
        left.extend(more);
        right.iter_mut().zip(sums).for_each(|(sum, value)| *sum += value);
    }
    Ok((left, right))
}

/// Gram-Schmidt over the rows, twice for accuracy.
fn orthonormalise(basis: &mut [f32], columns: usize) {
    for _ in 0..2 {
        for at in 0..basis.len() / columns {
            let (done, rest) = basis.split_at_mut(at * columns);
            let row = &mut rest[..columns];
            for other in done.chunks(columns) {
                let along = dot(row, other);
                row.iter_mut().zip(other).for_each(|(value, other)| *value -= along * other);
            }
            let length = dot(row, row).sqrt();
            if length > 0.0 {
                row.iter_mut().for_each(|value| *value /= length);
            }
        }
    }
}
