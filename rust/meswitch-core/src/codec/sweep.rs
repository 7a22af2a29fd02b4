//! Loops over one row, compiled for every instruction set.

use crate::kernels::by_backend;

/// Partial sums of a sum.
const LANES: usize = 16;

by_backend! {
    /// `values -= base`. Returns whether all results are finite.
    pub(crate) fn subtract(values: &mut [f32], base: &[f32]) -> bool = subtract_body
}

by_backend! {
    /// `values *= factors`, element by element.
    pub(crate) fn scale(values: &mut [f32], factors: &[f32]) = scale_body
}

by_backend! {
    /// `sums += factor · values`.
    pub(crate) fn add_scaled(sums: &mut [f32], factor: f32, values: &[f32]) = add_scaled_body
}

by_backend! {
    /// Adds the squares of a row to its columns; returns `Σ d²` and `Σ |d|`.
    pub(crate) fn add_squares(row: &[f32], columns: &mut [f32]) -> (f32, f32) = add_squares_body
}

by_backend! {
    /// `Σ weight · d²`, in 64-bit floats: squares of 32-bit ones neither overflow nor vanish there.
    pub(crate) fn weighed_energy(row: &[f32], weight: &[f32]) -> f64 = weighed_energy_body
}

by_backend! {
    /// The number of values that are not 0, and the largest magnitude.
    pub(crate) fn count_changes(row: &[f32]) -> (u32, f32) = count_changes_body
}

by_backend! {
    /// With `value = scale · (code − zero)`: adds `(d − value)²`, `d · value` and `value²` to their columns.
    pub(crate) fn add_column_sums(row: &[f32], codes: &[u8], scale: f32, zero: f32, error: &mut [f32], cross: &mut [f32], level: &mut [f32]) = add_column_sums_body
}

#[inline(always)]
fn subtract_body(values: &mut [f32], base: &[f32]) -> bool {
    // 0 · x is NaN where x is not finite, and so is every later sum.
    let mut lanes = [0f32; LANES];
    for (values, base) in values.chunks_mut(LANES).zip(base.chunks(LANES)) {
        for ((value, base), lane) in values.iter_mut().zip(base).zip(&mut lanes) {
            *value -= base;
            *lane += *value * 0.0;
        }
    }
    lanes.iter().sum::<f32>() == 0.0
}

#[inline(always)]
fn scale_body(values: &mut [f32], factors: &[f32]) {
    values.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
}

#[inline(always)]
fn add_scaled_body(sums: &mut [f32], factor: f32, values: &[f32]) {
    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += factor * value);
}

#[inline(always)]
fn add_squares_body(row: &[f32], columns: &mut [f32]) -> (f32, f32) {
    let (mut energy, mut absolute) = ([0f32; LANES], [0f32; LANES]);
    let whole = row.len() / LANES * LANES;
    for (row, columns) in row[..whole].chunks_exact(LANES).zip(columns.chunks_exact_mut(LANES)) {
        for lane in 0..LANES {
            let square = row[lane] * row[lane];
            columns[lane] += square;
            energy[lane] += square;
            absolute[lane] += row[lane].abs();
        }
    }
    for (lane, (d, column)) in row[whole..].iter().zip(&mut columns[whole..]).enumerate() {
        *column += d * d;
        energy[lane] += d * d;
        absolute[lane] += d.abs();
    }
    (energy.iter().sum(), absolute.iter().sum())
}

#[inline(always)]
fn weighed_energy_body(row: &[f32], weight: &[f32]) -> f64 {
    let mut lanes = [0f64; LANES];
    for (row, weight) in row.chunks(LANES).zip(weight.chunks(LANES)) {
        for ((d, weight), lane) in row.iter().zip(weight).zip(&mut lanes) {
            let d = f64::from(*d);
            *lane += f64::from(*weight) * d * d;
        }
    }
    lanes.iter().sum()
}

#[inline(always)]
fn count_changes_body(row: &[f32]) -> (u32, f32) {
    let (mut count, mut largest) = ([0u32; LANES], [0f32; LANES]);
    for row in row.chunks(LANES) {
        for ((count, largest), d) in count.iter_mut().zip(&mut largest).zip(row) {
            *count += u32::from(*d != 0.0);
            *largest = if d.abs() > *largest { d.abs() } else { *largest };
        }
    }
    (count.iter().sum(), largest.into_iter().fold(0.0, f32::max))
}

#[inline(always)]
fn add_column_sums_body(
    row: &[f32],
    codes: &[u8],
    scale: f32,
    zero: f32,
    error: &mut [f32],
    cross: &mut [f32],
    level: &mut [f32],
) {
    let count = row.len();
    let (codes, error, cross, level) = (&codes[..count], &mut error[..count], &mut cross[..count], &mut level[..count]);
    for i in 0..count {
        let value = scale * (f32::from(codes[i]) - zero);
        let missed = row[i] - value;
        error[i] += missed * missed;
        cross[i] += row[i] * value;
        level[i] += value * value;
    }
}
