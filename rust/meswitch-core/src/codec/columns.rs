//! Scales of input channels.

use half::f16;

use super::quantize::Outcome;
use super::sweep;

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

    /// Moves every scale to the best one for codes that stay. Returns the scales as they were.
    pub fn refit(&mut self, outcome: &Outcome) -> Vec<f32> {
        let Some((mut scales, _)) = self.0.take() else { return Vec::new() };
        let before = scales.clone();
        for ((scale, cross), level) in scales.iter_mut().zip(&outcome.cross).zip(&outcome.level) {
            if *level > 0.0 && *cross > 0.0 {
                *scale = round(*scale * (cross / level) as f32);
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
