//! Error compensation: the quantization error of one input channel is compensated by the channels after it (GPTQ,
//! arXiv 2210.17323, applied to a delta).
//!
//! With H = E\[x xᵀ\], H⁻¹ = UᵀU and R = Δ − Δ̂, the recursion finds R = E·U, so that R·H·Rᵀ = E·Eᵀ: the errors E are
//! errors of the output, each in a unit of its own. The same recursion without codes gives Y = Δ·U⁻¹, hence Δ·H·Δ̂ᵀ =
//! Y·(Y − E)ᵀ.

use super::{fit, sweep};
use crate::error::{Error, Result};

/// Columns that are coded before their errors are added to the columns after them.
const COMPENSATION_COLUMNS: usize = 64;

/// Columns that those errors are added to at a time: that part of the factor stays in a core's cache for all rows of a
/// tile.
const SPREAD_COLUMNS: usize = 512;

/// The upper triangular U `[columns, columns]`, row by row, with H⁻¹ = UᵀU and H = E\[x xᵀ\] of the input channels.
#[derive(Clone, Copy)]
pub(super) struct Factor<'a> {
    values: &'a [f32],
    columns: usize,
}

impl<'a> Factor<'a> {
    /// Checks the values. The lower triangle is not used.
    ///
    /// # Errors
    /// [`Error::Argument`] where they are not square, not finite or without a positive diagonal.
    pub(super) fn new(values: &'a [f32], columns: usize) -> Result<Self> {
        let sound = values.len() == columns * columns
            && (0..columns).all(|i| values[i * columns + i] > 0.0)
            && values.iter().all(|value| value.is_finite());
        if sound {
            return Ok(Self { values, columns });
        }
        Err(Error::Argument(format!(
            "expected the triangular factor of {columns} channels, finite and positive on its diagonal, found {} values",
            values.len()
        )))
    }

    /// Columns `from .. to` of row `i`.
    fn row(&self, i: usize, from: usize, to: usize) -> &[f32] {
        &self.values[i * self.columns + from..i * self.columns + to]
    }
}

/// How the rows of a tile are coded.
pub(super) struct TileCoding<'a> {
    pub(super) bits: u32,
    pub(super) zero: f32,
    pub(super) group_size: usize,
    /// One scale per input channel.
    pub(super) columns: &'a [f32],
    /// Channels whose errors are stored beside the codes, rising.
    pub(super) exact: &'a [u32],
    /// Whether each row's scales are then enlarged so that the projection of its outputs onto the original
    /// ones is kept.
    pub(super) unbiased: bool,
}

/// Replaces the codes `[rows, columns]` of a tile of differences, and with `unbiased` changes the scales
/// `[rows, groups]`. The tile's contents are overwritten.
pub(super) fn recode(
    tile: &mut [f32],
    codes: &mut [u8],
    scales: &mut [f32],
    coding: &TileCoding<'_>,
    factor: Factor<'_>,
) {
    let width = factor.columns;
    let (groups, rows) = (width.div_ceil(coding.group_size), tile.len() / width.max(1));
    // The differences in exact channels, before errors are added to them.
    let originals: Vec<f32> =
        tile.chunks(width).flat_map(|row| coding.exact.iter().map(|i| row[*i as usize])).collect();
    let mut uncoded = if coding.unbiased { tile.to_vec() } else { Vec::new() };
    // For each row, Y·Yᵀ and Y·(Y − E)ᵀ.
    let mut sums = vec![(0f64, 0f64); rows];
    let (mut errors, mut uncoded_errors) =
        (vec![0f32; rows * COMPENSATION_COLUMNS], vec![0f32; rows * COMPENSATION_COLUMNS]);
    for start in (0..width).step_by(COMPENSATION_COLUMNS) {
        let end = (start + COMPENSATION_COLUMNS).min(width);
        for (index, (row, codes)) in tile.chunks_mut(width).zip(codes.chunks_mut(width)).enumerate() {
            let scales = &scales[index * groups..(index + 1) * groups];
            let originals = &originals[index * coding.exact.len()..(index + 1) * coding.exact.len()];
            for i in start..end {
                let scale = scales[i / coding.group_size] * coding.columns[i];
                fit::encode(&row[i..=i], scale, coding.bits, coding.zero, &mut codes[i..=i]);
                let value = match coding.exact.binary_search(&(i as u32)) {
                    Ok(exact) => originals[exact],
                    Err(_) => scale * (f32::from(codes[i]) - coding.zero),
                };
                errors[index * COMPENSATION_COLUMNS + i - start] = apply_error(row, i, end, value, factor);
            }
        }
        spread_errors(tile, &errors, start, end, factor);
        if coding.unbiased {
            for (index, row) in uncoded.chunks_mut(width).enumerate() {
                for i in start..end {
                    let (uncoded_error, error) =
                        (apply_error(row, i, end, 0.0, factor), errors[index * COMPENSATION_COLUMNS + i - start]);
                    uncoded_errors[index * COMPENSATION_COLUMNS + i - start] = uncoded_error;
                    sums[index].0 += f64::from(uncoded_error) * f64::from(uncoded_error);
                    sums[index].1 += f64::from(uncoded_error) * f64::from(uncoded_error - error);
                }
            }
            spread_errors(&mut uncoded, &uncoded_errors, start, end, factor);
        }
    }
    for ((energy, projection), scales) in sums.into_iter().zip(scales.chunks_mut(groups)) {
        if projection > 0.0 {
            let growth = (energy / projection).min(f64::from(fit::MAX_SCALE_GROWTH)) as f32;
            scales.iter_mut().for_each(|scale| *scale *= growth);
        }
    }
}

/// Codes channel `i` as `value`: returns its error, in the channel's unit, and adds it to the channels up to `end`.
fn apply_error(row: &mut [f32], i: usize, end: usize, value: f32, factor: Factor<'_>) -> f32 {
    let factors = factor.row(i, i, end);
    let error = (row[i] - value) / factors[0];
    sweep::add_scaled(&mut row[i + 1..end], -error, &factors[1..]);
    error
}

/// Adds the errors of channels `start .. end` to all channels after them.
fn spread_errors(tile: &mut [f32], errors: &[f32], start: usize, end: usize, factor: Factor<'_>) {
    let width = factor.columns;
    for from in (end..width).step_by(SPREAD_COLUMNS) {
        let to = (from + SPREAD_COLUMNS).min(width);
        for (row, errors) in tile.chunks_mut(width).zip(errors.chunks(COMPENSATION_COLUMNS)) {
            for (i, error) in (start..end).zip(errors) {
                sweep::add_scaled(&mut row[from..to], -error, factor.row(i, from, to));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// U of H = [[a, b], [b, c]], by hand.
    fn two(a: f32, b: f32, c: f32) -> [f32; 4] {
        let determinant = a * c - b * b;
        let (p, q, r) = (c / determinant, -b / determinant, a / determinant);
        let first = p.sqrt();
        [first, q / first, 0.0, (r - q * q / p).sqrt()]
    }

    fn coding<'a>(columns: &'a [f32], exact: &'a [u32], unbiased: bool) -> TileCoding<'a> {
        TileCoding { bits: 2, zero: 1.5, group_size: columns.len(), columns, exact, unbiased }
    }

    #[test]
    fn an_error_moves_to_the_channel_that_can_make_up_for_it() {
        let factor = two(1.0, 0.9, 1.0);
        let factor = Factor::new(&factor, 2).unwrap();
        let (mut tile, mut codes, mut scales) = ([0.9, 0.6], [0; 2], [1.0]);
        // Alone, both take 0.5; but 0.4 too little of the first is 0.36 too little of the second.
        recode(&mut tile, &mut codes, &mut scales, &coding(&[1.0; 2], &[], false), factor);
        assert_eq!((codes, scales), ([2, 2], [1.0]));
        let (mut tile, mut codes) = ([0.9, 0.7], [0; 2]);
        recode(&mut tile, &mut codes, &mut scales, &coding(&[1.0; 2], &[], false), factor);
        assert_eq!(codes, [2, 3]);
        // An exact first channel leaves the second to itself.
        let (mut tile, mut codes) = ([0.9, 0.7], [0; 2]);
        recode(&mut tile, &mut codes, &mut scales, &coding(&[1.0; 2], &[0], false), factor);
        assert_eq!(codes[1], 2);
    }

    #[test]
    fn the_projection_of_outputs_is_kept() {
        let (a, b, c) = (1.0, 0.5, 2.0);
        let factor = two(a, b, c);
        let (delta, mut codes, mut scales) = ([0.8f32, -1.9], [0; 2], [0.9]);
        recode(
            &mut delta.clone(),
            &mut codes,
            &mut scales,
            &coding(&[1.0, 1.1], &[], true),
            Factor::new(&factor, 2).unwrap(),
        );
        let made = [scales[0] * (f32::from(codes[0]) - 1.5), scales[0] * 1.1 * (f32::from(codes[1]) - 1.5)];
        let product = |x: [f32; 2], y: [f32; 2]| x[0] * (a * y[0] + b * y[1]) + x[1] * (b * y[0] + c * y[1]);
        assert!((product(delta, made) / product(delta, delta) - 1.0).abs() < 1e-5);
    }

    #[test]
    fn what_is_no_factor_is_refused() {
        assert!(Factor::new(&[1.0, 0.0, 0.0], 2).is_err());
        assert!(Factor::new(&[1.0, 0.0, 0.0, 0.0], 2).is_err());
        assert!(Factor::new(&[1.0, f32::NAN, 0.0, 1.0], 2).is_err());
    }
}
