//! Quantizing one site.

use half::f16;

use super::compensate::Factor;
use super::fitter::{Fitted, Fitter, PartDraft};
use super::low_rank::LowRank;
use super::statistics::{Statistics, importance, measure};
use super::{Pair, Settings, SparseDelta, salient};
use crate::error::{Error, Result};
use crate::layout::{part_bytes, row_bytes};

/// The rows of a site that share a bit width.
#[derive(Debug)]
pub struct QuantizedPart {
    /// Bits per code.
    pub bits: u32,
    /// The code value that means 0.
    pub zero: f32,
    /// Input channels that share a scale; `None` for the whole row.
    pub group_size: Option<usize>,
    /// The rows, rising; `None` for all.
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
    pub parts: Vec<QuantizedPart>,
    /// One scale per input channel.
    pub column_scales: Option<Vec<f16>>,
    /// Salient channels, rising.
    pub salient_index: Vec<u32>,
    /// What the codes miss there, `[rows, salient]`.
    pub salient: Vec<f16>,
    /// The low-rank part: `u [rows, rank]` and `v [rank, columns]`.
    pub low_rank: Option<(Vec<f16>, Vec<f16>)>,
    /// Sparse entries, in place of all other terms.
    pub sparse: Option<SparseDelta>,
    /// Scales, salient values, `u` and sparse values are in units of `2^exponent`.
    pub exponent: i32,
    /// `‖Δ − Δ̂‖ / ‖Δ‖`.
    pub relative_error: f64,
}

/// Quantizes one site, on rayon's pool. Returns `None` where the rows that base and fine-tune share are equal.
///
/// `moments` are E\[x²\] of the input channels. `factor` is called if the site gets codes; see
/// [`crate::compress::FactorFn`].
///
/// # Errors
/// [`crate::Error::NonFinite`] where a weight is NaN or infinite; [`crate::Error::Argument`] where the factor is not
/// one; those of `factor`.
pub fn quantize(
    pair: &Pair<'_>,
    moments: Option<&[f32]>,
    settings: &Settings,
    factor: &mut dyn FnMut() -> Result<Option<Vec<f32>>>,
) -> Result<Option<Quantized>> {
    let rows: Vec<usize> = (0..pair.rows).collect();
    let statistics = measure(pair, &rows)?;
    if statistics.changed == 0 {
        return Ok(None);
    }
    match pair.rescaled(statistics.largest) {
        None => quantize_changed(pair, moments, settings, &statistics, factor),
        Some(pair) => quantize_changed(&pair, moments, settings, &measure(&pair, &rows)?, factor),
    }
    .map(Some)
}

/// Quantizes a site that has changes, which the pair gives in units that squares of them fit in.
fn quantize_changed(
    pair: &Pair<'_>,
    moments: Option<&[f32]>,
    settings: &Settings,
    statistics: &Statistics,
    factor: &mut dyn FnMut() -> Result<Option<Vec<f32>>>,
) -> Result<Quantized> {
    let energy: f64 = statistics.row_energy.iter().map(|e| f64::from(*e)).sum();
    let (drafts, uncoded) = drafts(pair, settings, statistics);
    if settings.sparse {
        let limit = planned_bytes(pair, settings, &drafts);
        if let Some((sparse, exponent, missed)) = SparseDelta::fit(pair, statistics.changed, statistics.largest, limit)?
        {
            return Ok(Quantized::from_sparse(sparse, pair.exponent + exponent, (missed / energy).sqrt()));
        }
    }
    let importance = importance(moments, pair.columns);
    let low_rank = LowRank::fit(pair, &importance, settings.rank)?;
    let fitter = Fitter { pair, low_rank: low_rank.as_ref(), importance: &importance };
    let uncoded_energy = fitter.energy(&uncoded)?;
    let mut fitted = fitter.fit_all(drafts, statistics, settings)?;
    let chosen = salient::choose(&fitted.sums.error, &importance, settings.salient);
    if let Some(values) = factor()? {
        fitter.compensate(&mut fitted, settings, &chosen, Factor::new(&values, pair.columns)?)?;
    }
    let residual = fitter.residual(&fitted, settings, &chosen)?;
    let missed: f64 =
        fitted.sums.error.iter().enumerate().filter(|(i, _)| !chosen.contains(&(*i as u32))).map(|(_, e)| e).sum();
    let relative_error = ((missed + uncoded_energy) / energy).sqrt();
    if !relative_error.is_finite() {
        let name = pair.name;
        return Err(Error::NonFinite(format!("expected a finite error of {name}, found {relative_error}")));
    }
    Ok(finish(pair, fitted, settings, chosen, &residual, low_rank, relative_error))
}

/// Groups rows by bit width. Also returns the changed rows that get no codes.
fn drafts(pair: &Pair<'_>, settings: &Settings, statistics: &Statistics) -> (Vec<PartDraft>, Vec<usize>) {
    let mut bits_of = settings.row_bits(pair.rows);
    let unchanged = statistics.row_energy.iter().filter(|energy| **energy == 0.0).count();
    // Listing the other rows costs four bytes each.
    let saved = unchanged * (row_bytes(settings.bits, pair.columns) + 2);
    if settings.skip_unchanged_rows && saved > 4 * (pair.rows - unchanged) {
        for (bits, energy) in bits_of.iter_mut().zip(&statistics.row_energy) {
            if *energy == 0.0 {
                *bits = None;
            }
        }
    }
    let uncoded = (0..pair.rows).filter(|row| bits_of[*row].is_none() && statistics.row_energy[*row] > 0.0).collect();
    let mut widths: Vec<u32> = bits_of.iter().flatten().copied().collect();
    widths.sort_unstable();
    widths.dedup();
    let rows_at = |bits| (0..pair.rows).filter(|row| bits_of[*row] == Some(bits)).collect();
    (widths.into_iter().map(|bits| PartDraft::new(pair, settings, bits, rows_at(bits))).collect(), uncoded)
}

/// The size of all tensors of the site, if it gets codes.
fn planned_bytes(pair: &Pair<'_>, settings: &Settings, drafts: &[PartDraft]) -> usize {
    let rank = settings.rank.min(pair.rows).min(pair.columns);
    let salient = settings.salient.min(pair.columns);
    let parts = drafts.iter().map(|draft| {
        let rows = if draft.all { 0 } else { 4 * draft.rows.len() };
        let codes = part_bytes(draft.bits, draft.rows.len(), pair.columns);
        codes.expect("a matrix in memory has a size") + 2 * draft.scales.len() + rows
    });
    let columns = if settings.column_scales { 2 * pair.columns } else { 0 };
    parts.sum::<usize>() + columns + salient * (4 + 2 * pair.rows) + 2 * rank * (pair.rows + pair.columns)
}

/// Rounds everything to half precision, in units of a common exponent.
fn finish(
    pair: &Pair<'_>,
    fitted: Fitted,
    settings: &Settings,
    salient_index: Vec<u32>,
    residual: &[f32],
    low_rank: Option<LowRank>,
    relative_error: f64,
) -> Quantized {
    let Fitted { drafts, columns, .. } = fitted;
    let largest = drafts
        .iter()
        .flat_map(|draft| &draft.scales)
        .chain(residual)
        .fold(0f32, |largest, value| largest.max(value.abs()));
    let largest = low_rank.as_ref().map_or(largest, |part| part.largest().max(largest));
    // The scales of real deltas are far below 1, where half precision has few bits.
    let exponent = if largest > 0.0 { pair.nearest_exponent(largest.log2().floor() as i32) } else { 0 };
    let unit = (-exponent as f32).exp2();
    let halves = |values: &[f32]| values.iter().map(|value| f16::from_f32(value * unit)).collect::<Vec<_>>();
    let parts = drafts
        .into_iter()
        .map(|draft| QuantizedPart {
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
        exponent: pair.exponent + exponent,
        relative_error,
    }
}

impl Quantized {
    fn from_sparse(sparse: SparseDelta, exponent: i32, relative_error: f64) -> Self {
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

#[cfg(test)]
mod tests {
    use safetensors::Dtype;

    use super::*;
    use crate::checkpoint::{Content, View};
    use crate::kernels::sparse::decode;

    const ROWS: usize = 12;
    const COLUMNS: usize = 40;

    /// Quantizes the difference of float32 weights and zeros.
    fn quantized(weights: &[f32], settings: &Settings) -> Option<Quantized> {
        let data: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
        let view = |data| View { dtype: Dtype::F32, shape: vec![ROWS, COLUMNS], data: Content::Borrowed(data) };
        let base = vec![0; data.len()];
        let pair = Pair::new("drawn", view(&base), view(&data), false).unwrap();
        quantize(&pair, None, settings, &mut || Ok(None)).unwrap()
    }

    fn weights() -> Vec<f32> {
        (0..ROWS * COLUMNS).map(|i| ((i * 37 % 101) as f32 - 50.0) / 16.0).collect()
    }

    #[test]
    #[cfg_attr(miri, ignore)] // too slow
    fn weights_of_any_size_are_quantized_alike() {
        let terms = Settings { salient: 1, rank: 1, column_scales: true, unbiased: true, ..Settings::default() };
        for settings in [Settings::default(), terms] {
            let expected = quantized(&weights(), &settings).unwrap();
            assert!(expected.relative_error > 0.01 && expected.relative_error < 0.5);
            for octave in [-120, -83, -41, -22, -21, -20, 18, 19, 41, 83, 120] {
                let scaled: Vec<f32> = weights().iter().map(|weight| weight * (octave as f32).exp2()).collect();
                let found = quantized(&scaled, &settings).unwrap();
                assert_eq!(found.exponent, expected.exponent + octave, "2^{octave}");
                assert_eq!(found.relative_error, expected.relative_error, "2^{octave}");
                assert_eq!(format!("{:?}", found.parts), format!("{:?}", expected.parts), "2^{octave}");
                assert_eq!(found.salient, expected.salient, "2^{octave}");
                assert_eq!(found.low_rank, expected.low_rank, "2^{octave}");
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore)] // too slow
    fn one_changed_weight_of_any_size_is_a_change() {
        for change in [f32::MIN_POSITIVE / 8.0, 1e-35, 1e-25, 1e-12, 1.0, 1e12, 1e25, 3e38] {
            let mut weights = vec![0.0; ROWS * COLUMNS];
            weights[77] = change;
            let found = quantized(&weights, &Settings::default()).unwrap();
            let sparse = found.sparse.unwrap();
            let value: f32 = sparse.values.iter().map(|value| decode(*value)).sum::<f32>();
            let value = f64::from(value) * f64::from(found.exponent).exp2();
            assert!((value / f64::from(change) - 1.0).abs() < 1e-3, "{change}: {value}");
            assert!(found.relative_error < 1e-3, "{change}: {}", found.relative_error);
        }
        assert!(quantized(&vec![0.0; ROWS * COLUMNS], &Settings::default()).is_none());
    }
}
