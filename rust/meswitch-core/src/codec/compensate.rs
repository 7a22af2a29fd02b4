//! Error compensation: what the code of one input channel misses moves into the channels after it (GPTQ,
//! arXiv 2210.17323, applied to a delta).
//!
//! With H = E[x xᵀ], H⁻¹ = UᵀU and R = Δ − Δ̂, the recursion finds R = E·U, so that R·H·Rᵀ = E·Eᵀ: the errors E are those
//! of the output, in units of their own. The same recursion without codes gives Y = Δ·U⁻¹, hence Δ·H·Δ̂ᵀ = Y·(Y − E)ᵀ.

use super::{fit, sweep};
use crate::error::{Error, Result};

/// Columns that are finished before the rest of the row hears of their errors.
const BLOCK: usize = 64;

/// Columns that hear of them at a time: a block of the factor that a core's cache holds for all rows of a tile.
const SPAN: usize = 512;

/// The upper triangular U `[columns, columns]`, row by row, of H⁻¹ = UᵀU, where H = E[x xᵀ] of the input channels.
#[derive(Clone, Copy)]
pub struct Factor<'a> {
    values: &'a [f32],
    columns: usize,
}

impl<'a> Factor<'a> {
    /// Takes the values, whose lower triangle is not looked at.
    ///
    /// # Errors
    /// [`Error::Argument`] where they are not square, not finite or without a positive diagonal.
    pub fn new(values: &'a [f32], columns: usize) -> Result<Self> {
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

    fn row(&self, i: usize, from: usize, to: usize) -> &[f32] {
        &self.values[i * self.columns + from..i * self.columns + to]
    }
}

/// How a tile is coded.
pub(super) struct Levels<'a> {
    pub bits: u32,
    pub zero: f32,
    pub group_size: usize,
    /// One an input channel.
    pub columns: &'a [f32],
    /// Channels whose errors are stored beside the codes, rising.
    pub exact: &'a [u32],
    /// Whether scales are to keep each row whole along itself, as its outputs see it (see [`fit::unbiased`]).
    pub unbiased: bool,
}

/// Replaces the codes `[rows, columns]` of a tile of differences, which is used up, and moves the scales
/// `[rows, groups]`.
pub(super) fn recode(tile: &mut [f32], codes: &mut [u8], scales: &mut [f32], levels: &Levels<'_>, factor: Factor<'_>) {
    let width = factor.columns;
    let (groups, rows) = (width.div_ceil(levels.group_size), tile.len() / width.max(1));
    let kept: Vec<f32> = tile.chunks(width).flat_map(|row| levels.exact.iter().map(|i| row[*i as usize])).collect();
    let mut plain = if levels.unbiased { tile.to_vec() } else { Vec::new() };
    let mut sums = vec![(0f64, 0f64); rows];
    let (mut missed, mut whole) = (vec![0f32; rows * BLOCK], vec![0f32; rows * BLOCK]);
    for start in (0..width).step_by(BLOCK) {
        let end = (start + BLOCK).min(width);
        for (at, (row, codes)) in tile.chunks_mut(width).zip(codes.chunks_mut(width)).enumerate() {
            let scales = &scales[at * groups..(at + 1) * groups];
            let kept = &kept[at * levels.exact.len()..(at + 1) * levels.exact.len()];
            for i in start..end {
                let scale = scales[i / levels.group_size] * levels.columns[i];
                fit::encode(&row[i..=i], scale, levels.bits, levels.zero, &mut codes[i..=i]);
                let value = match levels.exact.binary_search(&(i as u32)) {
                    Ok(exact) => kept[exact],
                    Err(_) => scale * (f32::from(codes[i]) - levels.zero),
                };
                missed[at * BLOCK + i - start] = settle(row, i, end, value, factor);
            }
        }
        spread(tile, &missed, start, end, factor);
        if levels.unbiased {
            for (at, row) in plain.chunks_mut(width).enumerate() {
                for i in start..end {
                    let (one, error) = (settle(row, i, end, 0.0, factor), missed[at * BLOCK + i - start]);
                    whole[at * BLOCK + i - start] = one;
                    sums[at].0 += f64::from(one) * f64::from(one);
                    sums[at].1 += f64::from(one) * f64::from(one - error);
                }
            }
            spread(&mut plain, &whole, start, end, factor);
        }
    }
    for ((all, along), scales) in sums.into_iter().zip(scales.chunks_mut(groups)) {
        if along > 0.0 {
            let grow = (all / along).min(f64::from(fit::MOST)) as f32;
            scales.iter_mut().for_each(|scale| *scale *= grow);
        }
    }
}

/// Takes `value` for channel `i`: its error, in units of its own, moves into the channels up to `end`.
fn settle(row: &mut [f32], i: usize, end: usize, value: f32, factor: Factor<'_>) -> f32 {
    let own = factor.row(i, i, end);
    let error = (row[i] - value) / own[0];
    sweep::add_scaled(&mut row[i + 1..end], -error, &own[1..]);
    error
}

/// Moves the errors of the channels `start..end` into those after them.
fn spread(tile: &mut [f32], errors: &[f32], start: usize, end: usize, factor: Factor<'_>) {
    let width = factor.columns;
    for from in (end..width).step_by(SPAN) {
        let to = (from + SPAN).min(width);
        for (row, errors) in tile.chunks_mut(width).zip(errors.chunks(BLOCK)) {
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

    fn levels<'a>(columns: &'a [f32], exact: &'a [u32], unbiased: bool) -> Levels<'a> {
        Levels { bits: 2, zero: 1.5, group_size: columns.len(), columns, exact, unbiased }
    }

    #[test]
    fn an_error_moves_to_the_channel_that_can_make_up_for_it() {
        let factor = two(1.0, 0.9, 1.0);
        let factor = Factor::new(&factor, 2).unwrap();
        let (mut tile, mut codes, mut scales) = ([0.9, 0.6], [0; 2], [1.0]);
        // Alone, both take 0.5; but 0.4 too little of the first is 0.36 too little of the second.
        recode(&mut tile, &mut codes, &mut scales, &levels(&[1.0; 2], &[], false), factor);
        assert_eq!((codes, scales), ([2, 2], [1.0]));
        let (mut tile, mut codes) = ([0.9, 0.7], [0; 2]);
        recode(&mut tile, &mut codes, &mut scales, &levels(&[1.0; 2], &[], false), factor);
        assert_eq!(codes, [2, 3]);
        // An exact first channel leaves the second to itself.
        let (mut tile, mut codes) = ([0.9, 0.7], [0; 2]);
        recode(&mut tile, &mut codes, &mut scales, &levels(&[1.0; 2], &[0], false), factor);
        assert_eq!(codes[1], 2);
    }

    #[test]
    fn outputs_are_kept_along_themselves() {
        let (a, b, c) = (1.0, 0.5, 2.0);
        let factor = two(a, b, c);
        let (delta, mut codes, mut scales) = ([0.8f32, -1.9], [0; 2], [0.9]);
        recode(
            &mut delta.clone(),
            &mut codes,
            &mut scales,
            &levels(&[1.0, 1.1], &[], true),
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
