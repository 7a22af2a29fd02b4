//! Sparse deltas: the nonzero entries of each row.
//!
//! An entry is two bytes: the distance of its column from the previous entry's, and a value. Entries of one column add
//! up. An entry with the value 0 bridges a gap of more than 255 columns.

use half::f16;

use super::by_backend;
use crate::error::{Error, Result};

/// The most tokens that one pass over the entries multiplies with; also the partial sums of a dot product.
const LANES: usize = 16;

/// Borrowed sparse entries.
#[derive(Clone, Copy, Debug)]
pub struct SparseEntries<'a> {
    /// The index of each row's first entry, then the number of entries: `[rows + 1]`.
    pub starts: &'a [u32],
    /// Columns from the previous entry of the row to this one; the first counts from column 0.
    pub gaps: &'a [u8],
    /// Values: the upper byte of a half precision float, which safetensors calls `F8_E5M2`.
    pub values: &'a [u8],
}

/// The number that a value byte stands for.
pub(crate) fn decode(byte: u8) -> f32 {
    VALUES[byte as usize]
}

static VALUES: [f32; 256] = {
    let (mut values, mut byte) = ([0f32; 256], 0);
    while byte < 256 {
        values[byte] = f16::from_bits((byte as u16) << 8).to_f32_const();
        byte += 1;
    }
    values
};

impl<'a> SparseEntries<'a> {
    /// Checks that the rows' ranges are rising and cover all entries. Columns are not checked: kernels stop at the
    /// first that is out of range.
    ///
    /// # Errors
    /// [`Error::Format`].
    pub(crate) fn check(&self, rows: usize) -> Result<()> {
        let bounds = (self.starts.first(), self.starts.last().map(|end| *end as usize));
        let whole = self.gaps.len() == self.values.len() && bounds == (Some(&0), Some(self.gaps.len()));
        if self.starts.len() == rows + 1 && whole && self.starts.is_sorted() {
            return Ok(());
        }
        Err(Error::Format(format!(
            "expected {rows} rows of sparse entries from 0 to {}, found others",
            self.gaps.len().min(self.values.len())
        )))
    }

    /// Gaps and values of a row's entries.
    fn row(&self, row: usize) -> (&'a [u8], &'a [u8]) {
        let entries = self.starts[row] as usize..self.starts[row + 1] as usize;
        (&self.gaps[entries.clone()], &self.values[entries])
    }

    /// Calls `add(column, value)` for each entry of a row, in order, until a column is not below `columns`.
    pub(crate) fn for_each_in_row(&self, row: usize, columns: usize, add: &mut dyn FnMut(usize, f32)) {
        let (gaps, values) = self.row(row);
        let mut column = 0;
        for (gap, byte) in gaps.iter().zip(values) {
            column += usize::from(*gap);
            if column >= columns {
                return;
            }
            add(column, decode(*byte));
        }
    }

    /// `sums[token, row − start] += unit · entries · x` for the rows `start .. end`.
    pub(super) fn multiply(&self, x: &TokenColumns, unit: f32, start: usize, end: usize, sums: &mut [f32]) {
        let count = end - start;
        for (group, sums) in x.groups.iter().zip(sums.chunks_mut(LANES * count)) {
            for row in start..end {
                let (gaps, values) = self.row(row);
                let mut lanes = [0f32; LANES];
                match group.width {
                    1 => lanes[0] = product_of_token(gaps, values, &group.by_column),
                    width => product_of_tokens(gaps, values, &group.by_column, width, &mut lanes),
                }
                for (sums, lane) in sums.chunks_mut(count).zip(lanes) {
                    sums[row - start] += unit * lane;
                }
            }
        }
    }
}

/// Activations transposed: the tokens of one column side by side, up to sixteen per group.
pub(super) struct TokenColumns {
    groups: Vec<TokenGroup>,
}

struct TokenGroup {
    width: usize,
    /// `[columns, width]`, zeros where there are fewer tokens.
    by_column: Vec<f32>,
}

impl TokenColumns {
    /// Transposes `x [tokens, columns]`.
    pub(super) fn new(x: &[f32], columns: usize) -> Self {
        let groups = x.chunks((LANES * columns).max(1)).map(|x| {
            let width = match x.len() / columns {
                0 | 1 => 1,
                2..=4 => 4,
                5..=8 => 8,
                _ => LANES,
            };
            let mut by_column = vec![0f32; columns * width];
            for (token, x) in x.chunks(columns).enumerate() {
                by_column.iter_mut().skip(token).step_by(width).zip(x).for_each(|(lane, value)| *lane = *value);
            }
            TokenGroup { width, by_column }
        });
        Self { groups: groups.collect() }
    }
}

by_backend! {
    /// The product of one row's entries with each of `width` tokens (4, 8 or 16): `x [columns, width]`.
    fn product_of_tokens(gaps: &[u8], values: &[u8], x: &[f32], width: usize, lanes: &mut [f32; LANES]) = product_of_tokens_body
}

#[inline(always)]
fn product_of_tokens_body(gaps: &[u8], values: &[u8], x: &[f32], width: usize, lanes: &mut [f32; LANES]) {
    match width {
        4 => sum_tokens::<4>(gaps, values, x, lanes),
        8 => sum_tokens::<8>(gaps, values, x, lanes),
        _ => sum_tokens::<LANES>(gaps, values, x, lanes),
    }
}

#[inline(always)]
fn sum_tokens<const WIDTH: usize>(gaps: &[u8], values: &[u8], x: &[f32], lanes: &mut [f32; LANES]) {
    let (x, _) = x.as_chunks::<WIDTH>();
    let (mut sums, mut column) = ([0f32; WIDTH], 0);
    for (gap, byte) in gaps.iter().zip(values) {
        column += usize::from(*gap);
        let Some(x) = x.get(column) else { break };
        let value = decode(*byte);
        for lane in 0..WIDTH {
            sums[lane] += value * x[lane];
        }
    }
    lanes[..WIDTH].copy_from_slice(&sums);
}

by_backend! {
    /// The product of one row's entries with one token, in sixteen partial sums.
    fn product_of_token_portable(gaps: &[u8], values: &[u8], x: &[f32]) -> f32 = product_of_token_body
}

#[inline(always)]
fn product_of_token_body(gaps: &[u8], values: &[u8], x: &[f32]) -> f32 {
    let (mut sums, mut column) = ([0f32; LANES], 0);
    for (gaps, bytes) in gaps.chunks(LANES).zip(values.chunks(LANES)) {
        for ((sum, gap), byte) in sums.iter_mut().zip(gaps).zip(bytes) {
            column += usize::from(*gap);
            *sum += decode(*byte) * x.get(column).copied().unwrap_or(0.0);
        }
    }
    sums.iter().sum()
}

/// [`product_of_token_portable`]; with AVX-512, sixteen entries at a time.
fn product_of_token(gaps: &[u8], values: &[u8], x: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if super::backend() >= super::Backend::Avx512 && i32::try_from(x.len()).is_ok() {
        // SAFETY: `backend` is available on this processor, and `x` is short enough.
        return unsafe { x86::product_of_token(gaps, values, x) };
    }
    product_of_token_portable(gaps, values, x)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::LANES;

    /// # Safety
    /// The processor must have AVX-512 F, BW and VL; `x` has fewer than 2^31 elements.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub(super) unsafe fn product_of_token(gaps: &[u8], values: &[u8], x: &[f32]) -> f32 {
        let (mut sums, mut last) = (_mm512_setzero_ps(), _mm512_setzero_si512());
        let (limit, end) = (_mm512_set1_epi32(x.len() as i32), _mm512_set1_epi32(15));
        let count = gaps.len().min(values.len());
        for first in (0..count).step_by(LANES) {
            let valid = ((1u32 << (count - first).min(LANES)) - 1) as u16;
            // SAFETY: masked loads read only existing entries; masked gathers only columns below `x`'s length.
            unsafe {
                let gaps = _mm_maskz_loadu_epi8(valid, gaps.as_ptr().add(first).cast());
                let columns = _mm512_add_epi32(last, prefix_sums(_mm512_cvtepu8_epi32(gaps)));
                last = _mm512_permutexvar_epi32(end, columns);
                let bytes = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(valid, values.as_ptr().add(first).cast()));
                let values = _mm512_cvtph_ps(_mm256_slli_epi16::<8>(bytes));
                let known = _mm512_mask_cmplt_epu32_mask(valid, columns, limit);
                let x = _mm512_mask_i32gather_ps::<4>(_mm512_setzero_ps(), known, columns, x.as_ptr());
                sums = _mm512_mask_add_ps(sums, valid, sums, _mm512_mul_ps(values, x));
            }
        }
        let mut lanes = [0f32; LANES];
        // SAFETY: sixteen lanes.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), sums) };
        lanes.iter().sum()
    }

    /// For each lane, the sum of the lanes up to and with it.
    #[target_feature(enable = "avx512f")]
    fn prefix_sums(lanes: __m512i) -> __m512i {
        let zero = _mm512_setzero_si512();
        let lanes = _mm512_add_epi32(lanes, _mm512_alignr_epi32::<15>(lanes, zero));
        let lanes = _mm512_add_epi32(lanes, _mm512_alignr_epi32::<14>(lanes, zero));
        let lanes = _mm512_add_epi32(lanes, _mm512_alignr_epi32::<12>(lanes, zero));
        _mm512_add_epi32(lanes, _mm512_alignr_epi32::<8>(lanes, zero))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_the_upper_half_of_a_16_bit_float() {
        assert_eq!([decode(0), decode(0x3c), decode(0xbe), decode(0x77)], [0.0, 1.0, -1.5, 28672.0]);
        assert_eq!(decode(1), 2f32.powi(-16));
    }

    #[test]
    fn columns_out_of_range_add_nothing() {
        let sparse = SparseEntries { starts: &[0, 3], gaps: &[1, 1, 255], values: &[0x3c, 0x40, 0x3c] };
        sparse.check(1).unwrap();
        for tokens in [1, 3, 7, 20] {
            let x = [1.0, 10.0, 100.0].repeat(tokens);
            let mut sums = vec![0.0; tokens];
            sparse.multiply(&TokenColumns::new(&x, 3), 0.5, 0, 1, &mut sums);
            assert_eq!(sums, vec![105.0; tokens]);
        }
        let mut seen = Vec::new();
        sparse.for_each_in_row(0, 3, &mut |column, value| seen.push((column, value)));
        assert_eq!(seen, [(1, 1.0), (2, 2.0)]);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let numbers = |count: usize| (0..count).map(|index| (index * 37 % 11) as u8);
        for entries in [0, 1, 15, 16, 17, 100] {
            let (gaps, values): (Vec<u8>, Vec<u8>) =
                (numbers(entries).collect(), numbers(entries).map(|v| v * 11).collect());
            for columns in [1, 40, 501] {
                let x: Vec<f32> = (0..columns).map(|i| (i as f32).sin()).collect();
                assert_eq!(
                    product_of_token(&gaps, &values, &x).to_bits(),
                    product_of_token_body(&gaps, &values, &x).to_bits()
                );
            }
        }
    }

    #[test]
    fn rows_without_their_entries_are_refused() {
        for starts in [&[0u32, 1][..], &[0, 2, 1], &[1, 1, 2], &[0, 1, 3], &[]] {
            let sparse = SparseEntries { starts, gaps: &[0, 0], values: &[0, 0] };
            assert!(matches!(sparse.check(2), Err(Error::Format(_))), "{starts:?}");
        }
        let uneven = SparseEntries { starts: &[0, 1], gaps: &[0], values: &[] };
        assert!(uneven.check(1).is_err());
    }
}
