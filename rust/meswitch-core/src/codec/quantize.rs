//! One site: statistics, row classes, scales and codes, in tiles of rows over all cores.

use half::f16;
use rayon::prelude::*;

use super::columns::{Columns, Outcome};
use super::compensate::{self, Factor, Levels};
use super::low_rank::LowRank;
use super::{Pair, Sparse, fit, salient, sweep};
use crate::error::Result;
use crate::layout::row_bytes;

/// Where the codes' zero lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zero {
    /// `(2^bits − 1) / 2`: symmetric levels, none of them zero. Right for dense deltas.
    Symmetric,
    /// `2^(bits − 1)`: one level is zero. Right for sparse deltas.
    Level,
    /// Whichever fits the site better.
    Auto,
}

/// Rows that get a bit width of their own.
#[derive(Clone, Debug)]
pub struct Class {
    /// Bits a code; none leave the rows as the base has them, but for the low-rank part.
    pub bits: u32,
    /// The rows, rising.
    pub rows: Vec<u32>,
}

/// How a site is quantized.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bits a code, where no class says otherwise.
    pub bits: u32,
    /// Input channels that share a scale; the whole row where none.
    pub group_size: Option<usize>,
    /// Where the zero lies.
    pub zero: Zero,
    /// One scale for the whole matrix (BitDelta), not one a row.
    pub one_scale: bool,
    /// Whether input channels have scales too.
    pub column_scales: bool,
    /// Whether scales keep a row whole along itself, at a larger error (see [`fit::unbiased`]).
    pub unbiased: bool,
    /// Salient channels to keep.
    pub salient: usize,
    /// Rank of the part under the codes.
    pub rank: usize,
    /// Rows of another bit width.
    pub classes: Vec<Class>,
    /// Whether rows without any change take no space.
    pub skip_unchanged_rows: bool,
    /// Whether changed weights are kept one by one where that takes less than codes.
    pub sparse: bool,
}

impl Settings {
    /// The bits of each row that the settings ask for; none for rows that are left as they are.
    #[must_use]
    pub fn widths(&self, rows: usize) -> Vec<Option<u32>> {
        let mut widths = vec![Some(self.bits); rows];
        for class in &self.classes {
            for row in class.rows.iter().filter(|row| (**row as usize) < rows) {
                widths[*row as usize] = (class.bits > 0).then_some(class.bits);
            }
        }
        widths
    }
}

/// The rows of a site that share a bit width.
#[derive(Debug)]
pub struct Part {
    /// Bits a code.
    pub bits: u32,
    /// The code value that means zero.
    pub zero: f32,
    /// Input channels that share a scale.
    pub group_size: Option<usize>,
    /// The rows, or none for all.
    pub rows: Option<Vec<u32>>,
    /// Packed codes, row by row.
    pub codes: Vec<u8>,
    /// `[rows, groups]`, in units of `2^exponent` of the site.
    pub scales: Vec<f16>,
}

/// A quantized site.
#[derive(Debug)]
pub struct Quantized {
    /// The codes.
    pub parts: Vec<Part>,
    /// One scale an input channel.
    pub column_scales: Option<Vec<f16>>,
    /// Salient channels, rising.
    pub salient_index: Vec<u32>,
    /// What the codes miss there, `[rows, salient]`.
    pub salient: Vec<f16>,
    /// The low-rank part `[rows, rank]` · `[rank, columns]`.
    pub low_rank: Option<(Vec<f16>, Vec<f16>)>,
    /// The changed weights one by one, in place of all the rest.
    pub sparse: Option<Sparse>,
    /// Scales, salient values, the left low-rank factor and sparse values are in units of `2^exponent`.
    pub exponent: i32,
    /// `‖Δ − Δ̂‖ / ‖Δ‖`.
    pub relative_error: f64,
}

/// What one pass over a site says of it.
pub(super) struct Statistics {
    row_energy: Vec<f32>,
    column_energy: Vec<f64>,
    magnitude: f64,
    changed: u64,
    largest: f32,
}

/// The rows of one part while they are being fitted.
pub(super) struct Draft {
    pub bits: u32,
    pub zero: f32,
    pub all: bool,
    pub rows: Vec<usize>,
    pub codes: Vec<u8>,
    pub scales: Vec<f32>,
}

/// Quantizes one site; none where base and fine-tune are equal. `moments` are E[x²] of the input channels; `factor` is
/// asked for their [`Factor`] if the site takes codes.
///
/// # Errors
/// [`crate::Error::NonFinite`] where a weight is NaN or infinite; those of `factor` and of [`Factor::new`].
pub fn quantize(
    pair: &Pair<'_>,
    moments: Option<&[f32]>,
    settings: &Settings,
    factor: &mut dyn FnMut() -> Result<Option<Vec<f32>>>,
) -> Result<Option<Quantized>> {
    let rows: Vec<usize> = (0..pair.rows).collect();
    let statistics = measure(pair, &rows)?;
    let energy: f64 = statistics.row_energy.iter().map(|e| f64::from(*e)).sum();
    if energy == 0.0 {
        return Ok(None);
    }
    let (drafts, left) = drafts(pair, settings, &statistics);
    if settings.sparse {
        let limit = planned_bytes(pair, settings, &drafts);
        if let Some((sparse, exponent, missed)) = Sparse::fit(pair, statistics.changed, statistics.largest, limit)? {
            return Ok(Some(Quantized::of_sparse(sparse, exponent, (missed / energy).sqrt())));
        }
    }
    let importance = importance(moments, pair.columns);
    let low_rank = LowRank::fit(pair, &importance, settings.rank)?;
    let source = Source { pair, low_rank: low_rank.as_ref(), importance: &importance };
    let left = source.energy(&left)?;
    let mut fitted = source.fit_all(drafts, &statistics, settings)?;
    let chosen = salient::choose(&fitted.outcome.error, &importance, settings.salient);
    if let Some(values) = factor()? {
        source.compensate(&mut fitted, settings, &chosen, Factor::new(&values, pair.columns)?)?;
    }
    let residual = source.residual(&fitted, settings, &chosen)?;
    let missed: f64 =
        fitted.outcome.error.iter().enumerate().filter(|(i, _)| !chosen.contains(&(*i as u32))).map(|(_, e)| e).sum();
    let relative_error = ((missed + left) / energy).max(0.0).sqrt();
    Ok(Some(finish(fitted, settings, chosen, &residual, low_rank, relative_error)))
}

/// E[x²] with a floor, so that a channel that calibration never saw still counts; ones without calibration.
pub(super) fn importance(moments: Option<&[f32]>, columns: usize) -> Vec<f32> {
    let Some(moments) = moments else { return vec![1.0; columns] };
    let mean = moments.iter().map(|m| f64::from(*m)).sum::<f64>() / columns.max(1) as f64;
    if mean <= 0.0 {
        return vec![1.0; columns];
    }
    moments.iter().map(|m| (f64::from(*m) / mean + 0.01) as f32).collect()
}

pub(super) fn measure(pair: &Pair<'_>, rows: &[usize]) -> Result<Statistics> {
    let bands: Vec<_> = rows
        .par_chunks(pair.band_rows())
        .map_init(<(Vec<f32>, Vec<f32>)>::default, |(spare, tile), band| {
            let (mut row_energy, mut column_energy) = (Vec::with_capacity(band.len()), vec![0f32; pair.columns]);
            let (mut magnitude, mut changed, mut largest) = (0.0, 0, 0f32);
            for rows in band.chunks(pair.tile_rows()) {
                pair.read(rows, spare, tile)?;
                for row in tile.chunks(pair.columns.max(1)) {
                    let (energy, absolute) = sweep::energies(row, &mut column_energy);
                    row_energy.push(energy);
                    magnitude += f64::from(absolute);
                    let (count, most) = sweep::extent(row);
                    changed += u64::from(count);
                    largest = largest.max(most);
                }
            }
            Ok((row_energy, column_energy, magnitude, changed, largest))
        })
        .collect::<Result<_>>()?;
    let mut all = Statistics {
        row_energy: Vec::new(),
        column_energy: vec![0.0; pair.columns],
        magnitude: 0.0,
        changed: 0,
        largest: 0.0,
    };
    for (row_energy, column_energy, magnitude, changed, largest) in bands {
        all.row_energy.extend(row_energy);
        all.column_energy.iter_mut().zip(column_energy).for_each(|(sum, value)| *sum += f64::from(value));
        all.magnitude += magnitude;
        all.changed += changed;
        all.largest = all.largest.max(largest);
    }
    Ok(all)
}

/// Splits the rows into the parts that the settings ask for, and those that are left as they are though they changed.
fn drafts(pair: &Pair<'_>, settings: &Settings, statistics: &Statistics) -> (Vec<Draft>, Vec<usize>) {
    let mut bits_of = settings.widths(pair.rows);
    let unchanged = statistics.row_energy.iter().filter(|energy| **energy == 0.0).count();
    // Naming the other rows costs four bytes each.
    let saved = unchanged * (row_bytes(settings.bits, pair.columns) + 2);
    if settings.skip_unchanged_rows && saved > 4 * (pair.rows - unchanged) {
        for (bits, energy) in bits_of.iter_mut().zip(&statistics.row_energy) {
            if *energy == 0.0 {
                *bits = None;
            }
        }
    }
    let left = (0..pair.rows).filter(|row| bits_of[*row].is_none() && statistics.row_energy[*row] > 0.0).collect();
    let mut widths: Vec<u32> = bits_of.iter().flatten().copied().collect();
    widths.sort_unstable();
    widths.dedup();
    let rows_at = |bits| (0..pair.rows).filter(|row| bits_of[*row] == Some(bits)).collect();
    (widths.into_iter().map(|bits| Draft::new(pair, settings, bits, rows_at(bits))).collect(), left)
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
    /// The scale and the codes of one row, or group of a row.
    fn fit(self, delta: &[f32], weight: &[f32], bits: u32, zero: f32, codes: &mut [u8]) -> f32 {
        if let Self::Shared(scale) = self {
            fit::encode(delta, scale, bits, zero, codes);
            return scale;
        }
        let best = fit::fit_row(delta, weight, bits, zero, codes);
        if let Self::Unbiased = self { fit::unbiased(delta, weight, best, zero, codes) } else { best }
    }
}

/// Bytes of all tensors that the settings ask for.
fn planned_bytes(pair: &Pair<'_>, settings: &Settings, drafts: &[Draft]) -> usize {
    let rank = settings.rank.min(pair.rows).min(pair.columns);
    let salient = settings.salient.min(pair.columns);
    let parts = drafts.iter().map(|draft| {
        let rows = if draft.all { 0 } else { 4 * draft.rows.len() };
        draft.codes.len() + 2 * draft.scales.len() + rows
    });
    let columns = if settings.column_scales { 2 * pair.columns } else { 0 };
    parts.sum::<usize>() + columns + salient * (4 + 2 * pair.rows) + 2 * rank * (pair.rows + pair.columns)
}

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
    fn energy(&self, rows: &[usize]) -> Result<f64> {
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
        let width = self.pair.columns;
        let size = settings.group_size.unwrap_or(width).max(1);
        let (stride, groups) = (row_bytes(draft.bits, width), width.div_ceil(size).max(1));
        let band_rows = self.pair.band_rows();
        let (bits, zero) = (draft.bits, draft.zero);
        let weight = columns.weight(self.importance);
        let bands: Vec<Outcome> = draft
            .rows
            .par_chunks(band_rows)
            .zip(draft.codes.par_chunks_mut((stride * band_rows).max(1)))
            .zip(draft.scales.par_chunks_mut(groups * band_rows))
            .map_init(<(Vec<f32>, Vec<f32>, Vec<u8>)>::default, |(spare, tile, codes), ((band, packed), found)| {
                codes.resize(width, 0);
                let mut tally = Tally::new(width);
                let mut rows = packed.chunks_mut(stride).zip(found.chunks_mut(groups));
                for tile_rows in band.chunks(self.pair.tile_rows()) {
                    self.read(tile_rows, spare, tile)?;
                    for (row, (packed, found)) in tile.chunks_mut(width).zip(&mut rows) {
                        columns.divide(row);
                        let groups =
                            row.chunks(size).zip(weight.chunks(size)).zip(codes.chunks_mut(size)).zip(&mut *found);
                        for (((delta, weight), codes), scale) in groups {
                            *scale = scales.fit(delta, weight, bits, zero, codes);
                        }
                        tally.add(row, codes, found, size, zero);
                        crate::layout::pack_row(codes, bits, packed);
                    }
                }
                Ok(tally.outcome(columns))
            })
            .collect::<Result<_>>()?;
        let mut all = Outcome::new(width);
        bands.iter().for_each(|band| all.add(band));
        Ok(all)
    }

    /// Codes all drafts anew, each channel's error compensated by the channels after it; scales of rows may move.
    fn compensate(&self, fitted: &mut Fitted, settings: &Settings, exact: &[u32], factor: Factor<'_>) -> Result<()> {
        let width = self.pair.columns;
        let size = settings.group_size.unwrap_or(width).max(1);
        let groups = width.div_ceil(size).max(1);
        let (columns, band_rows) = (&fitted.columns, self.pair.band_rows());
        let scale_of: Vec<f32> = (0..width).map(|column| columns.scale(column)).collect();
        let mut outcome = Outcome::new(width);
        for draft in &mut fitted.drafts {
            let (bits, zero, stride) = (draft.bits, draft.zero, row_bytes(draft.bits, width));
            let levels =
                Levels { bits, zero, group_size: size, columns: &scale_of, exact, unbiased: settings.unbiased };
            let bands: Vec<Outcome> = draft
                .rows
                .par_chunks(band_rows)
                .zip(draft.codes.par_chunks_mut((stride * band_rows).max(1)))
                .zip(draft.scales.par_chunks_mut(groups * band_rows))
                .map_init(<(Vec<f32>, Vec<f32>, Vec<u8>)>::default, |(spare, tile, codes), ((band, packed), scales)| {
                    let mut tally = Tally::new(width);
                    let tiles = band.chunks(self.pair.tile_rows());
                    let mut packed = packed.chunks_mut(stride);
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
                    Ok(tally.outcome(columns))
                })
                .collect::<Result<_>>()?;
            bands.iter().for_each(|band| outcome.add(band));
        }
        fitted.outcome = outcome;
        Ok(())
    }

    /// What the codes miss in the chosen channels, `[rows, chosen]`.
    fn residual(&self, fitted: &Fitted, settings: &Settings, chosen: &[u32]) -> Result<Vec<f32>> {
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

fn finish(
    fitted: Fitted,
    settings: &Settings,
    salient_index: Vec<u32>,
    residual: &[f32],
    low_rank: Option<LowRank>,
    relative_error: f64,
) -> Quantized {
    let Fitted { drafts, columns, .. } = fitted;
    let largest =
        drafts.iter().flat_map(|draft| &draft.scales).chain(residual).fold(0f32, |most, value| most.max(value.abs()));
    let largest = low_rank.as_ref().map_or(largest, |part| part.largest().max(largest));
    // 16-bit floats are finest just below one, and a real delta's scales are far smaller.
    let exponent = if largest > 0.0 { (largest.log2().floor() as i32).clamp(-100, 100) } else { 0 };
    let unit = (-exponent as f32).exp2();
    let halves = |values: &[f32]| values.iter().map(|value| f16::from_f32(value * unit)).collect::<Vec<_>>();
    let parts = drafts
        .into_iter()
        .map(|draft| Part {
            bits: draft.bits,
            zero: draft.zero,
            group_size: settings.group_size,
            scales: halves(&draft.scales),
            rows: (!draft.all).then(|| draft.rows.iter().map(|row| *row as u32).collect()),
            codes: draft.codes,
        })
        .collect();
    Quantized {
        parts,
        column_scales: columns.halves(),
        salient_index,
        salient: halves(residual),
        low_rank: low_rank.map(|part| part.halves(unit)),
        sparse: None,
        exponent,
        relative_error,
    }
}

impl Quantized {
    fn of_sparse(sparse: Sparse, exponent: i32, relative_error: f64) -> Self {
        Self {
            parts: Vec::new(),
            column_scales: None,
            salient_index: Vec::new(),
            salient: Vec::new(),
            low_rank: None,
            sparse: Some(sparse),
            exponent,
            relative_error,
        }
    }
}
