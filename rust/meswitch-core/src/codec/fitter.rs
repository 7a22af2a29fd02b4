//! Fits scales and codes to the rows of a difference, and measures what they leave.

use rayon::prelude::*;

use super::columns::{ColumnScales, ColumnSums};
use super::compensate::{self, Factor, TileCoding};
use super::low_rank::LowRank;
use super::statistics::Statistics;
use super::{Pair, Settings, Zero, fit, sweep};
use crate::error::Result;
use crate::layout::{pack_row, row_bytes, unpack_row};

/// A part that is being fitted.
pub(super) struct PartDraft {
    pub(super) bits: u32,
    pub(super) zero: f32,
    /// Whether it has all rows of the site.
    pub(super) all: bool,
    pub(super) rows: Vec<usize>,
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<f32>,
}

impl PartDraft {
    pub(super) fn new(pair: &Pair<'_>, settings: &Settings, bits: u32, rows: Vec<usize>) -> Self {
        let groups = settings.group_size.map_or(1, |size| pair.columns.div_ceil(size));
        Self {
            bits,
            zero: fit::max_code(bits) / 2.0,
            all: rows.len() == pair.rows,
            codes: vec![0; rows.len() * row_bytes(bits, pair.columns)],
            scales: vec![0.0; rows.len() * groups],
            rows,
        }
    }
}

/// All parts of a site, fitted.
pub(super) struct Fitted {
    pub(super) drafts: Vec<PartDraft>,
    pub(super) columns: ColumnScales,
    /// Sums over all rows.
    pub(super) sums: ColumnSums,
}

/// How scales are chosen.
#[derive(Clone, Copy)]
enum Scales {
    /// By least squares.
    Best,
    /// [`fit::unbiased`].
    Unbiased,
    /// Given, the same for all rows.
    Shared(f32),
}

impl Scales {
    /// Fits scale and codes of one row, or group of a row. `guess` is its scale of an earlier round, or 0.
    fn fit(self, delta: &[f32], weight: &[f32], bits: u32, zero: f32, guess: f32, codes: &mut [u8]) -> f32 {
        if let Self::Shared(scale) = self {
            fit::encode(delta, scale, bits, zero, codes);
            return scale;
        }
        let best = fit::fit_row(delta, weight, bits, zero, guess, codes);
        if let Self::Unbiased = self { fit::unbiased(delta, weight, best, zero, codes) } else { best }
    }
}

/// One thread's buffers: scratch for reading, a tile, codes.
type Buffers = (Vec<f32>, Vec<f32>, Vec<u8>);

/// Fits codes to a site's difference, less its low-rank part.
pub(super) struct Fitter<'a> {
    pub(super) pair: &'a Pair<'a>,
    pub(super) low_rank: Option<&'a LowRank>,
    pub(super) importance: &'a [f32],
}

impl Fitter<'_> {
    /// Fits all parts: chooses zeros, then fits scales and codes, alternating with column scales where there are some.
    pub(super) fn fit_all(
        &self,
        mut drafts: Vec<PartDraft>,
        statistics: &Statistics,
        settings: &Settings,
    ) -> Result<Fitted> {
        let rows = statistics.row_energy.len();
        let mut columns = ColumnScales::guess(settings.column_scales, &statistics.column_energy, rows);
        for draft in &mut drafts {
            draft.zero = self.choose_zero(draft, &columns, settings)?;
        }
        let shared =
            settings.one_scale.then(|| (2.0 * statistics.magnitude / (rows * self.pair.columns) as f64) as f32);
        let rounds = if settings.column_scales { 2 } else { 1 };
        let mut sums = ColumnSums::new(self.pair.columns);
        for round in 1..=rounds {
            sums = ColumnSums::new(self.pair.columns);
            let scales = match shared {
                Some(scale) => Scales::Shared(scale),
                None if settings.unbiased && round == rounds => Scales::Unbiased,
                None => Scales::Best,
            };
            for draft in &mut drafts {
                sums.add(&self.fit(draft, &columns, settings, scales)?);
            }
            // The last refit changes column scales only; the codes stay.
            let before = columns.refit(&sums, matches!(scales, Scales::Unbiased));
            if round == rounds && settings.column_scales {
                sums.correct(&before, &columns);
            }
        }
        Ok(Fitted { drafts, columns, sums })
    }

    /// `Σ d²` of the given rows, less the low-rank part.
    pub(super) fn energy(&self, rows: &[usize]) -> Result<f64> {
        let (mut scratch, mut tile, mut sum) = (Vec::new(), Vec::new(), 0.0);
        for rows in rows.chunks(self.pair.tile_rows()) {
            self.read(rows, &mut scratch, &mut tile)?;
            sum += tile.iter().map(|d| f64::from(*d).powi(2)).sum::<f64>();
        }
        Ok(sum)
    }

    /// Reads rows of the difference, less the low-rank part.
    fn read(&self, rows: &[usize], scratch: &mut Vec<f32>, tile: &mut Vec<f32>) -> Result<()> {
        self.pair.read(rows, scratch, tile)?;
        if let Some(low_rank) = self.low_rank {
            low_rank.subtract(rows, self.pair.columns, tile);
        }
        Ok(())
    }

    /// The zero of a part; with [`Zero::Auto`] the one that explains more of up to 64 of its rows.
    fn choose_zero(&self, draft: &PartDraft, columns: &ColumnScales, settings: &Settings) -> Result<f32> {
        let (symmetric, level) = (fit::max_code(draft.bits) / 2.0, (1u32 << (draft.bits - 1)) as f32);
        match settings.zero {
            Zero::Symmetric => return Ok(symmetric),
            Zero::Level => return Ok(level),
            Zero::Auto if draft.bits == 1 => return Ok(symmetric),
            Zero::Auto => {}
        }
        let sample: Vec<usize> = draft.rows.iter().copied().step_by(draft.rows.len().div_ceil(64).max(1)).collect();
        let (mut scratch, mut tile) = (Vec::new(), Vec::new());
        self.read(&sample, &mut scratch, &mut tile)?;
        let weight = columns.weight(self.importance);
        let (mut gain_symmetric, mut gain_level) = (0.0, 0.0);
        for row in tile.chunks_mut(self.pair.columns.max(1)) {
            columns.divide(row);
            gain_symmetric += f64::from(fit::best_gain(row, &weight, draft.bits, symmetric));
            gain_level += f64::from(fit::best_gain(row, &weight, draft.bits, level));
        }
        Ok(if gain_level > gain_symmetric { level } else { symmetric })
    }

    /// Fits scales and codes of a part's rows; returns its column sums.
    fn fit(
        &self,
        draft: &mut PartDraft,
        columns: &ColumnScales,
        settings: &Settings,
        scales: Scales,
    ) -> Result<ColumnSums> {
        let (width, size) = (self.pair.columns, self.group_size(settings));
        let (bits, zero, stride) = (draft.bits, draft.zero, row_bytes(draft.bits, self.pair.columns));
        let weight = columns.weight(self.importance);
        self.in_bands(draft, columns, settings, |(scratch, tile, codes), band, packed, scales_out, sums| {
            codes.resize(width, 0);
            let mut rows = packed.chunks_mut(stride).zip(scales_out.chunks_mut(width.div_ceil(size).max(1)));
            for tile_rows in band.chunks(self.pair.tile_rows()) {
                self.read(tile_rows, scratch, tile)?;
                for (row, (packed, row_scales)) in tile.chunks_mut(width).zip(&mut rows) {
                    columns.divide(row);
                    let groups =
                        row.chunks(size).zip(weight.chunks(size)).zip(codes.chunks_mut(size)).zip(&mut *row_scales);
                    for (((delta, weight), codes), scale) in groups {
                        *scale = scales.fit(delta, weight, bits, zero, *scale, codes);
                    }
                    sums.add_row(row, codes, row_scales, size, zero);
                    pack_row(codes, bits, packed);
                }
            }
            Ok(())
        })
    }

    /// Codes all parts again with error compensation, which may change the scales of rows.
    pub(super) fn compensate(
        &self,
        fitted: &mut Fitted,
        settings: &Settings,
        exact: &[u32],
        factor: Factor<'_>,
    ) -> Result<()> {
        let (width, size) = (self.pair.columns, self.group_size(settings));
        let (groups, columns) = (width.div_ceil(size).max(1), &fitted.columns);
        let scale_of: Vec<f32> = (0..width).map(|column| columns.scale(column)).collect();
        let mut sums = ColumnSums::new(width);
        for draft in &mut fitted.drafts {
            let (bits, zero, stride) = (draft.bits, draft.zero, row_bytes(draft.bits, width));
            let coding =
                TileCoding { bits, zero, group_size: size, columns: &scale_of, exact, unbiased: settings.unbiased };
            let part_sums =
                self.in_bands(draft, columns, settings, |(scratch, tile, codes), band, packed, scales, sums| {
                    let mut packed = packed.chunks_mut(stride);
                    let tiles = band.chunks(self.pair.tile_rows());
                    for (rows, scales) in tiles.zip(scales.chunks_mut(groups * self.pair.tile_rows())) {
                        self.read(rows, scratch, tile)?;
                        codes.resize(tile.len(), 0);
                        compensate::recode(tile, codes, scales, &coding, factor);
                        self.read(rows, scratch, tile)?;
                        let coded = codes.chunks(width).zip(scales.chunks(groups));
                        for ((row, (codes, scales)), packed) in tile.chunks_mut(width).zip(coded).zip(&mut packed) {
                            columns.divide(row);
                            sums.add_row(row, codes, scales, size, zero);
                            pack_row(codes, bits, packed);
                        }
                    }
                    Ok(())
                })?;
            sums.add(&part_sums);
        }
        fitted.sums = sums;
        Ok(())
    }

    fn group_size(&self, settings: &Settings) -> usize {
        settings.group_size.unwrap_or(self.pair.columns).max(1)
    }

    /// Calls `work(buffers, rows, packed codes, scales, sums)` for each band of a part's rows, on rayon's pool. Returns
    /// the total of the sums.
    fn in_bands(
        &self,
        draft: &mut PartDraft,
        columns: &ColumnScales,
        settings: &Settings,
        work: impl Fn(&mut Buffers, &[usize], &mut [u8], &mut [f32], &mut BandSums) -> Result<()> + Sync,
    ) -> Result<ColumnSums> {
        let (width, band_rows) = (self.pair.columns, self.pair.band_rows());
        let groups = width.div_ceil(self.group_size(settings)).max(1);
        let bands: Vec<ColumnSums> = draft
            .rows
            .par_chunks(band_rows)
            .zip(draft.codes.par_chunks_mut((row_bytes(draft.bits, width) * band_rows).max(1)))
            .zip(draft.scales.par_chunks_mut(groups * band_rows))
            .map_init(Buffers::default, |buffers, ((band, packed), scales)| {
                let mut sums = BandSums::new(width);
                work(buffers, band, packed, scales, &mut sums)?;
                Ok(sums.finish(columns))
            })
            .collect::<Result<_>>()?;
        let mut total = ColumnSums::new(width);
        bands.iter().for_each(|band| total.add(band));
        Ok(total)
    }

    /// The errors of the codes in the chosen channels, `[rows, chosen]`; 0 in rows without codes.
    pub(super) fn residual(&self, fitted: &Fitted, settings: &Settings, chosen: &[u32]) -> Result<Vec<f32>> {
        let mut residual = vec![0f32; self.pair.rows * chosen.len()];
        if chosen.is_empty() {
            return Ok(residual);
        }
        for draft in &fitted.drafts {
            let pick = |missed: &[f32]| chosen.iter().map(|column| missed[*column as usize]).collect();
            let rows: Vec<Vec<f32>> = self.map_residuals(draft, &fitted.columns, settings, pick)?;
            for (row, errors) in draft.rows.iter().zip(rows) {
                residual[row * chosen.len()..(row + 1) * chosen.len()].copy_from_slice(&errors);
            }
        }
        Ok(residual)
    }

    /// Calls `f` with the error of each of a part's rows; returns its results in order.
    pub(super) fn map_residuals<T: Send>(
        &self,
        draft: &PartDraft,
        columns: &ColumnScales,
        settings: &Settings,
        f: impl Fn(&[f32]) -> T + Sync,
    ) -> Result<Vec<T>> {
        let width = self.pair.columns;
        let stride = row_bytes(draft.bits, width);
        let size = settings.group_size.unwrap_or(width).max(1);
        let groups = width.div_ceil(size);
        draft
            .rows
            .par_iter()
            .enumerate()
            .map_init(<(Vec<f32>, Vec<f32>, Vec<u8>)>::default, |(scratch, tile, codes), (position, row)| {
                self.read(&[*row], scratch, tile)?;
                codes.resize(width, 0);
                unpack_row(&draft.codes[position * stride..(position + 1) * stride], draft.bits, codes);
                for (column, (missed, code)) in tile.iter_mut().zip(codes).enumerate() {
                    let scale = draft.scales[position * groups + column / size] * columns.scale(column);
                    *missed -= scale * (f32::from(*code) - draft.zero);
                }
                Ok(f(tile))
            })
            .collect()
    }
}

/// Column sums of one band in 32-bit floats: as [`ColumnSums`], with errors in units of the divided rows.
struct BandSums {
    error: Vec<f32>,
    cross: Vec<f32>,
    level: Vec<f32>,
}

impl BandSums {
    fn new(width: usize) -> Self {
        Self { error: vec![0.0; width], cross: vec![0.0; width], level: vec![0.0; width] }
    }

    fn add_row(&mut self, row: &[f32], codes: &[u8], scales: &[f32], size: usize, zero: f32) {
        for (group, scale) in scales.iter().enumerate() {
            let range = group * size..((group + 1) * size).min(row.len());
            let (error, cross) = (&mut self.error[range.clone()], &mut self.cross[range.clone()]);
            let level = &mut self.level[range.clone()];
            sweep::add_column_sums(&row[range.clone()], &codes[range], *scale, zero, error, cross, level);
        }
    }

    fn finish(self, columns: &ColumnScales) -> ColumnSums {
        let unit = |i: usize| f64::from(columns.scale(i)).powi(2);
        ColumnSums {
            error: self.error.iter().enumerate().map(|(i, error)| unit(i) * f64::from(*error)).collect(),
            cross: self.cross.iter().map(|cross| f64::from(*cross)).collect(),
            level: self.level.iter().map(|level| f64::from(*level)).collect(),
        }
    }
}
