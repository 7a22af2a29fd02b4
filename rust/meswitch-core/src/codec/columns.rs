//! Scales of input channels, and the sums that they are computed from.

use half::f16;

use super::{fit, sweep};

/// One scale per input channel, and its inverse; `None` where there are no column scales.
pub(super) struct ColumnScales(Option<(Vec<f32>, Vec<f32>)>);

impl ColumnScales {
    /// First guesses: each channel's root mean square in units of the mean one; no scales unless `wanted`.
    pub(super) fn guess(wanted: bool, energy: &[f64], rows: usize) -> Self {
        if !wanted {
            return Self(None);
        }
        let mean = (energy.iter().sum::<f64>() / energy.len().max(1) as f64).max(f64::MIN_POSITIVE);
        // With few rows, a channel's mean square is uncertain: move the guess towards 1.
        let trust = rows as f64 / (rows as f64 + 16.0);
        Self::new(energy.iter().map(|e| round_to_half(((e / mean) * trust + 1.0 - trust).sqrt() as f32)).collect())
    }

    fn new(scales: Vec<f32>) -> Self {
        let inverse = scales.iter().map(|scale| 1.0 / scale).collect();
        Self(Some((scales, inverse)))
    }

    /// Changes every scale to the best one for the codes that `sums` were made of: by least squares, or as
    /// [`fit::unbiased`] does. Returns the old scales.
    pub(super) fn refit(&mut self, sums: &ColumnSums, unbiased: bool) -> Vec<f32> {
        let Some((mut scales, _)) = self.0.take() else { return Vec::new() };
        let before = scales.clone();
        for (i, scale) in scales.iter_mut().enumerate() {
            let (cross, level) = (sums.cross[i], sums.level[i]);
            if level > 0.0 && cross > 0.0 {
                let best = cross / level;
                let energy = sums.error[i] / f64::from(*scale).powi(2) + 2.0 * cross - level;
                let step = if unbiased { (energy / cross).clamp(best, f64::from(fit::MAX_SCALE_GROWTH)) } else { best };
                *scale = round_to_half(*scale * step as f32);
            }
        }
        *self = Self::new(scales);
        before
    }

    /// One channel's scale; 1 without column scales.
    pub(super) fn scale(&self, column: usize) -> f32 {
        self.0.as_ref().map_or(1.0, |(scales, _)| scales[column])
    }

    /// Divides a row by the scales.
    pub(super) fn divide(&self, row: &mut [f32]) {
        if let Some((_, inverse)) = &self.0 {
            sweep::scale(row, inverse);
        }
    }

    /// The cost of a squared error in a divided row, per channel.
    pub(super) fn weight(&self, importance: &[f32]) -> Vec<f32> {
        importance.iter().enumerate().map(|(i, weight)| weight * self.scale(i).powi(2)).collect()
    }

    /// The scales in half precision.
    pub(super) fn halves(&self) -> Option<Vec<f16>> {
        self.0.as_ref().map(|(scales, _)| scales.iter().map(|scale| f16::from_f32(*scale)).collect())
    }
}

/// A scale as the file will hold it, in a range that excludes 0.
fn round_to_half(scale: f32) -> f32 {
    f16::from_f32(scale.clamp(1.0 / 64.0, 64.0)).to_f32()
}

/// Sums over the rows of each column, where a row d, divided by the column scales, is coded as `r · l` with the row's
/// scale r and levels l.
pub(super) struct ColumnSums {
    /// The squared error that the codes leave, in units of the undivided rows.
    pub(super) error: Vec<f64>,
    /// `Σ d·r·l`.
    pub(super) cross: Vec<f64>,
    /// `Σ (r·l)²`.
    pub(super) level: Vec<f64>,
}

impl ColumnSums {
    /// Zeros for `width` columns.
    pub(super) fn new(width: usize) -> Self {
        Self { error: vec![0.0; width], cross: vec![0.0; width], level: vec![0.0; width] }
    }

    /// Adds the sums of other rows.
    pub(super) fn add(&mut self, other: &Self) {
        for (sum, more) in
            [(&mut self.error, &other.error), (&mut self.cross, &other.cross), (&mut self.level, &other.level)]
        {
            sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        }
    }

    /// Updates the errors after a refit from the scales `before`.
    pub(super) fn correct(&mut self, before: &[f32], columns: &ColumnScales) {
        for (i, unit) in before.iter().enumerate() {
            let step = f64::from(columns.scale(i) / unit);
            let gain = 2.0 * (step - 1.0) * self.cross[i] - (step * step - 1.0) * self.level[i];
            self.error[i] = (self.error[i] - f64::from(*unit).powi(2) * gain).max(0.0);
        }
    }
}
