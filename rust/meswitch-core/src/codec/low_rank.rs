//! The low-rank part of a difference, by subspace iteration, with errors weighted by importance.

use half::f16;
use rayon::prelude::*;

use super::{Pair, sweep};
use crate::error::Result;
use crate::kernels::floats::dot;

/// Iterations of a fit; each reads the site once. Enough for the leading directions of a decaying spectrum.
const ITERATIONS: usize = 3;

/// Iterations of a sketch.
const SKETCH_ITERATIONS: usize = 2;

/// Sweeps of Jacobi's method, which converges quadratically.
const JACOBI_SWEEPS: usize = 8;

/// `U · V` with `U [rows, rank]` and `V [rank, columns]`.
pub(super) struct LowRank {
    rank: usize,
    u: Vec<f32>,
    v: Vec<f32>,
}

impl LowRank {
    /// The `U · V` with about the least error weighted by importance; `None` for rank 0.
    pub(super) fn fit(pair: &Pair<'_>, importance: &[f32], rank: usize) -> Result<Option<Self>> {
        let rank = rank.min(pair.rows).min(pair.columns);
        if rank == 0 {
            return Ok(None);
        }
        let root: Vec<f32> = importance.iter().map(|weight| weight.sqrt()).collect();
        let mut basis = initial_basis(rank, pair.columns);
        let rows: Vec<usize> = (0..pair.rows).collect();
        for _ in 0..ITERATIONS {
            basis = project(pair, &rows, &root, &basis)?.1;
            orthonormalise(&mut basis, pair.columns);
        }
        let u = project(pair, &rows, &root, &basis)?.0;
        // Both factors are stored in half precision: the codes are fitted to what that leaves.
        let u = round_to_halves(u);
        Ok(Some(Self { rank, u, v: round_to_halves(unweighted(&basis, &root)) }))
    }

    /// An estimate of what [`Self::fit`] finds for the given rows, directions by falling energy. Directions are
    /// computed from the rows `seen`; where those are others, the energy captured in `rows` is not overestimated.
    pub(super) fn sketch(
        pair: &Pair<'_>,
        importance: &[f32],
        rank: usize,
        seen: &[usize],
        rows: &[usize],
    ) -> Result<Self> {
        let rank = rank.min(seen.len()).min(pair.columns);
        if rank == 0 {
            return Ok(Self { rank, u: Vec::new(), v: Vec::new() });
        }
        let root: Vec<f32> = importance.iter().map(|weight| weight.sqrt()).collect();
        let mut basis = initial_basis(rank, pair.columns);
        for _ in 0..SKETCH_ITERATIONS {
            basis = project(pair, seen, &root, &basis)?.1;
            orthonormalise(&mut basis, pair.columns);
        }
        let projected = project(pair, rows, &root, &basis)?.0;
        let mut gram = vec![0f64; rank * rank];
        for row in projected.chunks(rank) {
            for (a, left) in row.iter().enumerate() {
                row.iter().enumerate().for_each(|(b, right)| gram[a * rank + b] += f64::from(*left * *right));
            }
        }
        let rotation = eigenvectors(&mut gram, rank);
        let mut u = vec![0f32; pair.rows * rank];
        for (row, projected) in rows.iter().zip(projected.chunks(rank)) {
            for (to, direction) in u[row * rank..].iter_mut().zip(rotation.chunks(rank)) {
                *to = dot(projected, direction);
            }
        }
        let mut rotated = vec![0f32; basis.len()];
        for (to, direction) in rotated.chunks_mut(pair.columns).zip(rotation.chunks(rank)) {
            for (factor, row) in direction.iter().zip(basis.chunks(pair.columns)) {
                sweep::add_scaled(to, *factor, row);
            }
        }
        Ok(Self { rank, u, v: unweighted(&rotated, &root) })
    }

    /// Its first `rank` directions.
    pub(super) fn truncated(&self, rank: usize) -> Self {
        let rank = rank.min(self.rank);
        let u = self.u.chunks(self.rank.max(1)).flat_map(|row| &row[..rank]).copied().collect();
        let columns = self.v.len() / self.rank.max(1);
        Self { rank, u, v: self.v[..rank * columns].to_vec() }
    }

    /// Subtracts the given rows of the product from a tile of rows.
    pub(super) fn subtract(&self, rows: &[usize], columns: usize, tile: &mut [f32]) {
        for (row, tile) in rows.iter().zip(tile.chunks_mut(columns)) {
            for (u, v) in self.u[row * self.rank..].iter().take(self.rank).zip(self.v.chunks(columns)) {
                sweep::add_scaled(tile, -u, v);
            }
        }
    }

    /// The largest magnitude in `U`.
    pub(super) fn largest(&self) -> f32 {
        self.u.iter().fold(0.0, |largest, value| largest.max(value.abs()))
    }

    /// `U · unit` and `V` in half precision.
    pub(super) fn halves(self, unit: f32) -> (Vec<f16>, Vec<f16>) {
        let u = self.u.iter().map(|value| f16::from_f32(value * unit)).collect();
        (u, self.v.into_iter().map(f16::from_f32).collect())
    }
}

/// Divides directions in weighted channels by the weights' roots.
fn unweighted(basis: &[f32], root: &[f32]) -> Vec<f32> {
    basis.chunks(root.len()).flat_map(|row| row.iter().zip(root).map(|(value, root)| value / root)).collect()
}

/// Rounds to half precision, relative to the largest magnitude's power of two.
fn round_to_halves(mut values: Vec<f32>) -> Vec<f32> {
    let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    if largest > 0.0 {
        let unit = largest.log2().floor().exp2();
        values.iter_mut().for_each(|value| *value = f16::from_f32(*value / unit).to_f32() * unit);
    }
    values
}

/// Pseudorandom orthonormal directions, always the same.
fn initial_basis(rank: usize, columns: usize) -> Vec<f32> {
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

/// `Y = Δ·R·basisᵀ` as `[rows, rank]` and `Yᵀ·Δ·R` as `[rank, columns]` in one pass; the diagonal `R` is `root`.
fn project(pair: &Pair<'_>, rows: &[usize], root: &[f32], basis: &[f32]) -> Result<(Vec<f32>, Vec<f32>)> {
    let columns = pair.columns;
    let rank = basis.len() / columns.max(1);
    let bands: Vec<(Vec<f32>, Vec<f32>)> = rows
        .par_chunks(pair.band_rows())
        .map_init(<(Vec<f32>, Vec<f32>)>::default, |(scratch, tile), band| {
            let mut left = Vec::with_capacity(band.len() * rank);
            let mut right = vec![0f32; rank * columns];
            for rows in band.chunks(pair.tile_rows()) {
                pair.read(rows, scratch, tile)?;
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
    let (mut left, mut right) = (Vec::with_capacity(rows.len() * rank), vec![0f32; rank * columns]);
    for (products, sums) in bands {
        left.extend(products);
        right.iter_mut().zip(sums).for_each(|(sum, value)| *sum += value);
    }
    Ok((left, right))
}

/// Orthonormalises the rows by the Gram-Schmidt method, twice for accuracy.
fn orthonormalise(basis: &mut [f32], columns: usize) {
    for _ in 0..2 {
        for index in 0..basis.len() / columns {
            let (done, rest) = basis.split_at_mut(index * columns);
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

/// The eigenvectors of a symmetric matrix `[n, n]` as rows, of the largest eigenvalue first (Jacobi's method).
fn eigenvectors(matrix: &mut [f64], n: usize) -> Vec<f32> {
    let mut vectors = vec![0f64; n * n];
    (0..n).for_each(|i| vectors[i * n + i] = 1.0);
    for _ in 0..JACOBI_SWEEPS {
        for (p, q) in (0..n).flat_map(|p| (p + 1..n).map(move |q| (p, q))) {
            let (pp, qq, pq) = (matrix[p * n + p], matrix[q * n + q], matrix[p * n + q]);
            if pq.abs() <= f64::EPSILON * (pp * qq).abs().sqrt() {
                continue;
            }
            let angle = 0.5 * (2.0 * pq).atan2(qq - pp);
            let (sin, cos) = angle.sin_cos();
            for k in 0..n {
                let (a, b) = (matrix[k * n + p], matrix[k * n + q]);
                (matrix[k * n + p], matrix[k * n + q]) = (cos * a - sin * b, sin * a + cos * b);
            }
            for k in 0..n {
                let (a, b) = (matrix[p * n + k], matrix[q * n + k]);
                (matrix[p * n + k], matrix[q * n + k]) = (cos * a - sin * b, sin * a + cos * b);
                let (a, b) = (vectors[p * n + k], vectors[q * n + k]);
                (vectors[p * n + k], vectors[q * n + k]) = (cos * a - sin * b, sin * a + cos * b);
            }
        }
    }
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| matrix[b * n + b].total_cmp(&matrix[a * n + a]));
    order.into_iter().flat_map(|i| vectors[i * n..(i + 1) * n].iter().map(|value| *value as f32)).collect()
}

#[cfg(test)]
mod tests {
    use super::eigenvectors;

    #[test]
    fn eigenvectors_come_largest_first() {
        // [[2, 1], [1, 2]] beside 9: eigenvalues 9, 3 and 1.
        let found = eigenvectors(&mut [2.0, 1.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.0, 9.0], 3);
        let half = 0.5f32.sqrt();
        let wanted = [[0.0, 0.0, 1.0], [half, half, 0.0], [half, -half, 0.0]];
        for (found, wanted) in found.chunks(3).zip(wanted) {
            let along: f32 = found.iter().zip(wanted).map(|(a, b)| a * b).sum();
            assert!((along.abs() - 1.0).abs() < 1e-6, "{found:?} for {wanted:?}");
        }
    }
}
