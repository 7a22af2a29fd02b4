//! One site: statistics, row classes, scales and codes, in tiles of rows over all cores.

use half::f16;

use super::compensate::Factor;
use super::low_rank::LowRank;
use super::source::{Draft, Fitted, Source};
use super::statistics::{Statistics, importance, measure};
use super::{Pair, Settings, Sparse, salient};
use crate::error::Result;
use crate::layout::{part_bytes, row_bytes};

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

/// Bytes of all tensors that the settings ask for.
fn planned_bytes(pair: &Pair<'_>, settings: &Settings, drafts: &[Draft]) -> usize {
    let rank = settings.rank.min(pair.rows).min(pair.columns);
    let salient = settings.salient.min(pair.columns);
    let parts = drafts.iter().map(|draft| {
        let rows = if draft.all { 0 } else { 4 * draft.rows.len() };
        part_bytes(draft.bits, draft.rows.len(), pair.columns) + 2 * draft.scales.len() + rows
    });
    let columns = if settings.column_scales { 2 * pair.columns } else { 0 };
    parts.sum::<usize>() + columns + salient * (4 + 2 * pair.rows) + 2 * rank * (pair.rows + pair.columns)
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
