//! Scales of input channels, and the sums that they are made of.

use half::f16;

use super::{fit, sweep};

/// One scale an input channel, with its inverse, or none.
pub(super) struct Columns(Option<(Vec<f32>, Vec<f32>)>);

impl Columns {
    /// The first guess: a channel's root mean square against the mean one's.
    pub fn first(wanted: bool, energy: &[f64], rows: usize) -> Self {
        if !wanted {
            return Self(None);
        }
        let mean = (energy.iter().sum::<f64>() / energy.len().max(1) as f64).max(f64::MIN_POSITIVE);
        // A few rows say little of a channel: pull the guess towards one.
        let trust = rows as f64 / (rows as f64 + 16.0);
        Self::of(energy.iter().map(|e| round(((e / mean) * trust + 1.0 - trust).sqrt() as f32)).collect())
    }

    fn of(scales: Vec<f32>) -> Self {
        let inverse = scales.iter().map(|scale| 1.0 / scale).collect();
        Self(Some((scales, inverse)))
    }

    /// Moves every scale to the best one for codes that stay: by least squares, or so that a channel is kept along
    /// itself (see [`fit::unbiased`]). Returns the scales as they were.
    pub fn refit(&mut self, outcome: &Outcome, unbiased: bool) -> Vec<f32> {
        let Some((mut scales, _)) = self.0.take() else { return Vec::new() };
        let before = scales.clone();
        for (i, scale) in scales.iter_mut().enumerate() {
            let (cross, level) = (outcome.cross[i], outcome.level[i]);
            if level > 0.0 && cross > 0.0 {
                let best = cross / level;
                let energy = outcome.error[i] / f64::from(*scale).powi(2) + 2.0 * cross - level;
                let step = if unbiased { (energy / cross).clamp(best, f64::from(fit::MOST)) } else { best };
                *scale = round(*scale * step as f32);
            }
        }
        *self = Self::of(scales);
        before
    }

    pub fn scale(&self, column: usize) -> f32 {
        self.0.as_ref().map_or(1.0, |(scales, _)| scales[column])
    }

    /// Divides a row by the scales, so that one row scale fits all of it.
    pub fn divide(&self, row: &mut [f32]) {
        if let Some((_, inverse)) = &self.0 {
            sweep::scale(row, inverse);
        }
    }

    /// What an error in a divided row costs.
    pub fn weight(&self, importance: &[f32]) -> Vec<f32> {
        importance.iter().enumerate().map(|(i, weight)| weight * self.scale(i).powi(2)).collect()
    }

    pub fn halves(&self) -> Option<Vec<f16>> {
        self.0.as_ref().map(|(scales, _)| scales.iter().map(|scale| f16::from_f32(*scale)).collect())
    }
}

/// As the file will hold it, away from zero.
fn round(scale: f32) -> f32 {
    f16::from_f32(scale.clamp(1.0 / 64.0, 64.0)).to_f32()
}

/// Per column: the squared error that the codes leave, and the sums that a column's best scale is made of.
pub(super) struct Outcome {
    pub error: Vec<f64>,
    pub cross: Vec<f64>,
    pub level: Vec<f64>,
}

impl Outcome {
    pub fn new(width: usize) -> Self {
        Self { error: vec![0.0; width], cross: vec![0.0; width], level: vec![0.0; width] }
    }

    pub fn add(&mut self, other: &Self) {
        for (sum, more) in
            [(&mut self.error, &other.error), (&mut self.cross, &other.cross), (&mut self.level, &other.level)]
        {
            sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
        }
    }

    /// The errors after a refit: moving a column from scale `c` to `c·t` takes `c²·(t − 1)²·Σ(r·l)²` off at its best `t`.
    pub fn correct(&mut self, before: &[f32], columns: &Columns) {
        for (i, unit) in before.iter().enumerate() {
            let step = f64::from(columns.scale(i) / unit);
            let gain = 2.0 * (step - 1.0) * self.cross[i] - (step * step - 1.0) * self.level[i];
            self.error[i] = (self.error[i] - f64::from(*unit).powi(2) * gain).max(0.0);
        }
    }
}
