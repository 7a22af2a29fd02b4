//! Rows of a difference under scales and codes: fitted, compensated, and what they leave.

use rayon::prelude::*;

use super::columns::{Columns, Outcome};
use super::compensate::{self, Factor, Levels};
use super::low_rank::LowRank;
use super::statistics::Statistics;
use super::{Pair, Settings, Zero, fit, sweep};
use crate::error::Result;
use crate::layout::row_bytes;

/// The rows of one part while they are being fitted.
pub(super) struct Draft {
    pub bits: u32,
    pub zero: f32,
    pub all: bool,
    pub rows: Vec<usize>,
    pub codes: Vec<u8>,
    pub scales: Vec<f32>,
}

impl Draft {
    pub fn new(pair: &Pair<'_>, settings: &Settings, bits: u32, rows: Vec<usize>) -> Self {
        let groups = settings.group_size.map_or(1, |size| pair.columns.div_ceil(size));
        Self {
            bits,
            zero: fit::top(bits) / 2.0,
            all: rows.len() == pair.rows,
            codes: vec![0; rows.len() * row_bytes(bits, pair.columns)],
            scales: vec![0.0; rows.len() * groups],
            rows,
        }
    }
}

/// Rows under scales and codes.
pub(super) struct Fitted {
    pub drafts: Vec<Draft>,
    pub columns: Columns,
    /// What is left, by column.
    pub outcome: Outcome,
}

/// The scale of a row, given its codes.
#[derive(Clone, Copy)]
enum Scales {
    /// By least squares.
    Best,
    /// [`fit::unbiased`].
    Unbiased,
    /// This one, for all rows.
    Shared(f32),
}

impl Scales {
    /// The scale and the codes of one row, or group of a row, that had a scale `near` before, or none (0).
    fn fit(self, delta: &[f32], weight: &[f32], bits: u32, zero: f32, near: f32, codes: &mut [u8]) -> f32 {
        if let Self::Shared(scale) = self {
            fit::encode(delta, scale, bits, zero, codes);
            return scale;
        }
        let best = fit::fit_row(delta, weight, bits, zero, near, codes);
        if let Self::Unbiased = self { fit::unbiased(delta, weight, best, zero, codes) } else { best }
    }
}

/// A core's working memory: for reading, a tile, codes.
type Spare = (Vec<f32>, Vec<f32>, Vec<u8>);

/// What the codes are fitted to.
pub(super) struct Source<'a> {
    pub pair: &'a Pair<'a>,
    pub low_rank: Option<&'a LowRank>,
    pub importance: &'a [f32],
}

impl Source<'_> {
    /// Fits the rows of all drafts: zeros, then scales and codes in turn with the column scales.
    pub fn fit_all(&self, mut drafts: Vec<Draft>, statistics: &Statistics, settings: &Settings) -> Result<Fitted> {
        let rows = statistics.row_energy.len();
        let mut columns = Columns::first(settings.column_scales, &statistics.column_energy, rows);
        for draft in &mut drafts {
            draft.zero = self.choose_zero(draft, &columns, settings)?;
        }
        let one = settings.one_scale.then(|| (2.0 * statistics.magnitude / (rows * self.pair.columns) as f64) as f32);
        let rounds = if settings.column_scales { 2 } else { 1 };
        let mut outcome = Outcome::new(self.pair.columns);
        for round in 1..=rounds {
            outcome = Outcome::new(self.pair.columns);
            let scales = match one {
                Some(scale) => Scales::Shared(scale),
                None if settings.unbiased && round == rounds => Scales::Unbiased,
                None => Scales::Best,
            };
            for draft in &mut drafts {
                outcome.add(&self.fit(draft, &columns, settings, scales)?);
            }
            // The last refit moves the scales under codes that stay.
            let before = columns.refit(&outcome, matches!(scales, Scales::Unbiased));
            if round == rounds && settings.column_scales {
                outcome.correct(&before, &columns);
            }
        }
        Ok(Fitted { drafts, columns, outcome })
    }

    /// `Σ d²` of some rows.
    pub fn energy(&self, rows: &[usize]) -> Result<f64> {
        let (mut spare, mut tile, mut sum) = (Vec::new(), Vec::new(), 0.0);
        for rows in rows.chunks(self.pair.tile_rows()) {
            self.read(rows, &mut spare, &mut tile)?;
            sum += tile.iter().map(|d| f64::from(*d).powi(2)).sum::<f64>();
        }
        Ok(sum)
    }

    /// Rows of the difference that is left under the low-rank part.
    fn read(&self, rows: &[usize], spare: &mut Vec<f32>, tile: &mut Vec<f32>) -> Result<()> {
        self.pair.read(rows, spare, tile)?;
        if let Some(low_rank) = self.low_rank {
            low_rank.subtract(rows, self.pair.columns, tile);
        }
        Ok(())
    }

    /// The zero that explains more of a few hundred rows.
    fn choose_zero(&self, draft: &Draft, columns: &Columns, settings: &Settings) -> Result<f32> {
        let (symmetric, level) = (fit::top(draft.bits) / 2.0, (1u32 << (draft.bits - 1)) as f32);
        match settings.zero {
            Zero::Symmetric => return Ok(symmetric),
            Zero::Level => return Ok(level),
            Zero::Auto if draft.bits == 1 => return Ok(symmetric),
            Zero::Auto => {}
        }
        let sample: Vec<usize> = draft.rows.iter().copied().step_by(draft.rows.len().div_ceil(64).max(1)).collect();
        let (mut spare, mut tile) = (Vec::new(), Vec::new());
        self.read(&sample, &mut spare, &mut tile)?;
        let weight = columns.weight(self.importance);
        let (mut gain_symmetric, mut gain_level) = (0.0, 0.0);
        for row in tile.chunks_mut(self.pair.columns.max(1)) {
            columns.divide(row);
            gain_symmetric += f64::from(fit::best_gain(row, &weight, draft.bits, symmetric));
            gain_level += f64::from(fit::best_gain(row, &weight, draft.bits, level));
        }
        Ok(if gain_level > gain_symmetric { level } else { symmetric })
    }

    /// Fits scales and codes of a part's rows; says what that leaves per column.
    fn fit(&self, draft: &mut Draft, columns: &Columns, settings: &Settings, scales: Scales) -> Result<Outcome> {
        let (width, size) = (self.pair.columns, self.group_size(settings));
        let (bits, zero, stride) = (draft.bits, draft.zero, row_bytes(draft.bits, self.pair.columns));
        let weight = columns.weight(self.importance);
        self.in_bands(draft, columns, settings, |(spare, tile, codes), band, packed, found, tally| {
            codes.resize(width, 0);
            let mut rows = packed.chunks_mut(stride).zip(found.chunks_mut(width.div_ceil(size).max(1)));
            for tile_rows in band.chunks(self.pair.tile_rows()) {
                self.read(tile_rows, spare, tile)?;
                for (row, (packed, found)) in tile.chunks_mut(width).zip(&mut rows) {
                    columns.divide(row);
                    let groups = row.chunks(size).zip(weight.chunks(size)).zip(codes.chunks_mut(size)).zip(&mut *found);
                    for (((delta, weight), codes), scale) in groups {
                        *scale = scales.fit(delta, weight, bits, zero, *scale, codes);
                    }
                    tally.add(row, codes, found, size, zero);
                    crate::layout::pack_row(codes, bits, packed);
                }
            }
            Ok(())
        })
    }

    /// Codes all drafts anew, each channel's error compensated by the channels after it; scales of rows may move.
    pub fn compensate(
        &self,
        fitted: &mut Fitted,
        settings: &Settings,
        exact: &[u32],
        factor: Factor<'_>,
    ) -> Result<()> {
        let (width, size) = (self.pair.columns, self.group_size(settings));
        let (groups, columns) = (width.div_ceil(size).max(1), &fitted.columns);
        let scale_of: Vec<f32> = (0..width).map(|column| columns.scale(column)).collect();
        let mut outcome = Outcome::new(width);
        for draft in &mut fitted.drafts {
            let (bits, zero, stride) = (draft.bits, draft.zero, row_bytes(draft.bits, width));
            let levels =
                Levels { bits, zero, group_size: size, columns: &scale_of, exact, unbiased: settings.unbiased };
            let left =
                self.in_bands(draft, columns, settings, |(spare, tile, codes), band, packed, scales, tally| {
                    let mut packed = packed.chunks_mut(stride);
                    let tiles = band.chunks(self.pair.tile_rows());
                    for (rows, scales) in tiles.zip(scales.chunks_mut(groups * self.pair.tile_rows())) {
                        self.read(rows, spare, tile)?;
                        codes.resize(tile.len(), 0);
                        compensate::recode(tile, codes, scales, &levels, factor);
                        self.read(rows, spare, tile)?;
                        let coded = codes.chunks(width).zip(scales.chunks(groups));
                        for ((row, (codes, scales)), packed) in tile.chunks_mut(width).zip(coded).zip(&mut packed) {
                            columns.divide(row);
                            tally.add(row, codes, scales, size, zero);
                            crate::layout::pack_row(codes, bits, packed);
                        }
                    }
                    Ok(())
                })?;
            outcome.add(&left);
        }
        fitted.outcome = outcome;
        Ok(())
    }

    fn group_size(&self, settings: &Settings) -> usize {
        settings.group_size.unwrap_or(self.pair.columns).max(1)
    }

    /// Does `work` on bands of a part's rows over all cores, with the packed codes and scales of each; adds up what it
    /// tallies.
    fn in_bands(
        &self,
        draft: &mut Draft,
        columns: &Columns,
        settings: &Settings,
        work: impl Fn(&mut Spare, &[usize], &mut [u8], &mut [f32], &mut Tally) -> Result<()> + Sync,
    ) -> Result<Outcome> {
        let (width, band_rows) = (self.pair.columns, self.pair.band_rows());
        let groups = width.div_ceil(self.group_size(settings)).max(1);
        let bands: Vec<Outcome> = draft
            .rows
            .par_chunks(band_rows)
            .zip(draft.codes.par_chunks_mut((row_bytes(draft.bits, width) * band_rows).max(1)))
            .zip(draft.scales.par_chunks_mut(groups * band_rows))
            .map_init(Spare::default, |spare, ((band, packed), scales)| {
                let mut tally = Tally::new(width);
                work(spare, band, packed, scales, &mut tally)?;
                Ok(tally.outcome(columns))
            })
            .collect::<Result<_>>()?;
        let mut all = Outcome::new(width);
        bands.iter().for_each(|band| all.add(band));
        Ok(all)
    }

    /// What the codes miss in the chosen channels, `[rows, chosen]`.
    pub fn residual(&self, fitted: &Fitted, settings: &Settings, chosen: &[u32]) -> Result<Vec<f32>> {
        let mut residual = vec![0f32; self.pair.rows * chosen.len()];
        if chosen.is_empty() {
            return Ok(residual);
        }
        for draft in &fitted.drafts {
            let pick = |missed: &[f32]| chosen.iter().map(|column| missed[*column as usize]).collect();
            let rows: Vec<Vec<f32>> = self.missed(draft, &fitted.columns, settings, pick)?;
            for (row, left) in draft.rows.iter().zip(rows) {
                residual[row * chosen.len()..(row + 1) * chosen.len()].copy_from_slice(&left);
            }
        }
        Ok(residual)
    }

    /// What `of` makes of each row of the difference under the codes.
    pub fn missed<T: Send>(
        &self,
        draft: &Draft,
        columns: &Columns,
        settings: &Settings,
        of: impl Fn(&[f32]) -> T + Sync,
    ) -> Result<Vec<T>> {
        let width = self.pair.columns;
        let stride = row_bytes(draft.bits, width);
        let size = settings.group_size.unwrap_or(width).max(1);
        let groups = width.div_ceil(size);
        draft
            .rows
            .par_iter()
            .enumerate()
            .map_init(<(Vec<f32>, Vec<f32>, Vec<u8>)>::default, |(spare, tile, codes), (at, row)| {
                self.read(&[*row], spare, tile)?;
                codes.resize(width, 0);
                crate::layout::unpack_row(&draft.codes[at * stride..(at + 1) * stride], draft.bits, codes);
                for (column, (missed, code)) in tile.iter_mut().zip(codes).enumerate() {
                    let scale = draft.scales[at * groups + column / size] * columns.scale(column);
                    *missed -= scale * (f32::from(*code) - draft.zero);
                }
                Ok(of(tile))
            })
            .collect()
    }
}

/// Column sums of one band: `Σ (d − r·l)²`, `Σ d·r·l` and `Σ (r·l)²`, in the units of the divided row.
struct Tally {
    error: Vec<f32>,
    cross: Vec<f32>,
    level: Vec<f32>,
}

impl Tally {
    fn new(width: usize) -> Self {
        Self { error: vec![0.0; width], cross: vec![0.0; width], level: vec![0.0; width] }
    }

    fn add(&mut self, row: &[f32], codes: &[u8], scales: &[f32], size: usize, zero: f32) {
        for (group, scale) in scales.iter().enumerate() {
            let of = group * size..((group + 1) * size).min(row.len());
            let (error, cross, level) =
                (&mut self.error[of.clone()], &mut self.cross[of.clone()], &mut self.level[of.clone()]);
            sweep::tally(&row[of.clone()], &codes[of], *scale, zero, error, cross, level);
        }
    }

    fn outcome(self, columns: &Columns) -> Outcome {
        let unit = |i: usize| f64::from(columns.scale(i)).powi(2);
        Outcome {
            error: self.error.iter().enumerate().map(|(i, error)| unit(i) * f64::from(*error)).collect(),
            cross: self.cross.iter().map(|cross| f64::from(*cross)).collect(),
            level: self.level.iter().map(|level| f64::from(*level)).collect(),
        }
    }
}
