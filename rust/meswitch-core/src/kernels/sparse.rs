//! A delta that is mostly zeros: the entries that are not, row by row.
//!
//! An entry is two bytes: how far its column lies beyond the last entry's, and a value. Entries of one column add up;
//! a value of zero bridges a gap of more than 255 columns.

use half::f16;

use super::by_backend;
use crate::error::{Error, Result};

/// Tokens that share one reading of the entries.
const LANES: usize = 16;

/// A sparse matrix, borrowed.
pub struct Sparse<'a> {
    /// Where each row's entries begin, and where the last row's end.
    pub starts: &'a [u32],
    /// Columns between an entry and the one before it in its row; from column 0 to the first.
    pub gaps: &'a [u8],
    /// 8-bit floats, see [`value`].
    pub values: &'a [u8],
}

/// The number that a byte stands for: the upper half of a 16-bit float (safetensors calls it `F8_E5M2`).
#[must_use]
pub fn value(byte: u8) -> f32 {
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

impl Sparse<'_> {
    /// Checks that every row has its entries. Columns are not looked at: kernels stop at one that is not there.
    ///
    /// # Errors
    /// [`Error::Format`].
    pub fn check(&self, rows: usize) -> Result<()> {
        let ends = (self.starts.first(), self.starts.last().map(|end| *end as usize));
        let whole = self.gaps.len() == self.values.len() && ends == (Some(&0), Some(self.gaps.len()));
        if self.starts.len() == rows + 1 && whole && self.starts.is_sorted() {
            return Ok(());
        }
        Err(Error::Format(format!(
            "expected {rows} rows of sparse entries from 0 to {}, found others",
            self.gaps.len().min(self.values.len())
        )))
    }

    /// Bytes of a row's entries: gaps and values.
    fn row(&self, row: usize) -> (&[u8], &[u8]) {
        let of = self.starts[row] as usize..self.starts[row + 1] as usize;
        (&self.gaps[of.clone()], &self.values[of])
    }

    /// Hands over column and value of each entry of a row, in order, up to `columns`.
    pub fn each(&self, row: usize, columns: usize, add: &mut dyn FnMut(usize, f32)) {
        let (gaps, values) = self.row(row);
        let mut column = 0;
        for (gap, byte) in gaps.iter().zip(values) {
            column += usize::from(*gap);
            if column >= columns {
                return;
            }
            add(column, value(*byte));
        }
    }

    /// `sums[token, row − start] += unit · entries · x` for the rows `start .. end`.
    pub(super) fn multiply(&self, x: &Packed, unit: f32, start: usize, end: usize, sums: &mut [f32]) {
        let count = end - start;
        for (group, sums) in x.groups.iter().zip(sums.chunks_mut(LANES * count)) {
            for row in start..end {
                let (gaps, values) = self.row(row);
                let mut lanes = [0f32; LANES];
                match group.width {
                    1 => lanes[0] = dot(gaps, values, &group.by_column),
                    width => product(gaps, values, &group.by_column, width, &mut lanes),
                }
                for (sums, lane) in sums.chunks_mut(count).zip(lanes) {
                    sums[row - start] += unit * lane;
                }
            }
        }
    }
}

/// Activations by column, up to sixteen tokens side by side.
pub(super) struct Packed {
    groups: Vec<Group>,
}

struct Group {
    width: usize,
    /// `[columns, width]`, zeros where there are fewer tokens.
    by_column: Vec<f32>,
}

impl Packed {
    /// Of `x [tokens, columns]`.
    pub fn of(x: &[f32], columns: usize) -> Self {
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
            Group { width, by_column }
        });
        Self { groups: groups.collect() }
    }
}

by_backend! {
    /// The product of one row's entries with each of `width` tokens (4, 8 or 16): `x [columns, width]`.
    pub fn product(gaps: &[u8], values: &[u8], x: &[f32], width: usize, lanes: &mut [f32; LANES]) = product_body
}

#[inline(always)]
fn product_body(gaps: &[u8], values: &[u8], x: &[f32], width: usize, lanes: &mut [f32; LANES]) {
    match width {
        4 => several::<4>(gaps, values, x, lanes),
        8 => several::<8>(gaps, values, x, lanes),
        _ => several::<LANES>(gaps, values, x, lanes),
    }
}

#[inline(always)]
fn several<const WIDTH: usize>(gaps: &[u8], values: &[u8], x: &[f32], lanes: &mut [f32; LANES]) {
    let (x, _) = x.as_chunks::<WIDTH>();
    let (mut sums, mut column) = ([0f32; WIDTH], 0);
    for (gap, byte) in gaps.iter().zip(values) {
        column += usize::from(*gap);
        let Some(x) = x.get(column) else { break };
        let value = value(*byte);
        for lane in 0..WIDTH {
            sums[lane] += value * x[lane];
        }
    }
    lanes[..WIDTH].copy_from_slice(&sums);
}

by_backend! {
    /// The product of one row's entries with one token, in sixteen sums.
    pub fn single(gaps: &[u8], values: &[u8], x: &[f32]) -> f32 = single_body
}

#[inline(always)]
fn single_body(gaps: &[u8], values: &[u8], x: &[f32]) -> f32 {
    let (mut sums, mut column) = ([0f32; LANES], 0);
    for (gaps, bytes) in gaps.chunks(LANES).zip(values.chunks(LANES)) {
        for ((sum, gap), byte) in sums.iter_mut().zip(gaps).zip(bytes) {
            column += usize::from(*gap);
            *sum += value(*byte) * x.get(column).copied().unwrap_or(0.0);
        }
    }
    sums.iter().sum()
}

/// [`single`], sixteen entries at a time where the processor gathers.
fn dot(gaps: &[u8], values: &[u8], x: &[f32]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if super::backend() >= super::Backend::Avx512 && i32::try_from(x.len()).is_ok() {
        // SAFETY: `backend` asked the processor.
        return unsafe { x86::dot(gaps, values, x) };
    }
    single(gaps, values, x)
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::LANES;

    /// # Safety
    /// The processor must have AVX-512 F, BW and VL; `x` has fewer than 2^31 elements.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    pub unsafe fn dot(gaps: &[u8], values: &[u8], x: &[f32]) -> f32 {
        let (mut sums, mut last) = (_mm512_setzero_ps(), _mm512_setzero_si512());
        let (limit, end) = (_mm512_set1_epi32(x.len() as i32), _mm512_set1_epi32(15));
        let count = gaps.len().min(values.len());
        for at in (0..count).step_by(LANES) {
            let there = ((1u32 << (count - at).min(LANES)) - 1) as u16;
            // SAFETY: masked loads touch the entries there are; masked gathers what lies below `x`'s length.
            unsafe {
                let gaps = _mm_maskz_loadu_epi8(there, gaps.as_ptr().add(at).cast());
                let columns = _mm512_add_epi32(last, running(_mm512_cvtepu8_epi32(gaps)));
                last = _mm512_permutexvar_epi32(end, columns);
                let bytes = _mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(there, values.as_ptr().add(at).cast()));
                let values = _mm512_cvtph_ps(_mm256_slli_epi16::<8>(bytes));
                let known = _mm512_mask_cmplt_epu32_mask(there, columns, limit);
                let x = _mm512_mask_i32gather_ps::<4>(_mm512_setzero_ps(), known, columns, x.as_ptr());
                sums = _mm512_mask_add_ps(sums, there, sums, _mm512_mul_ps(values, x));
            }
        }
        let mut lanes = [0f32; LANES];
        // SAFETY: sixteen lanes.
        unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), sums) };
        lanes.iter().sum()
    }

    /// Of each lane, the sum of the lanes up to it.
    #[target_feature(enable = "avx512f")]
    fn running(lanes: __m512i) -> __m512i {
        let none = _mm512_setzero_si512();
        let lanes = _mm512_add_epi32(lanes, _mm512_alignr_epi32::<15>(lanes, none));
        let lanes = _mm512_add_epi32(lanes, _mm512_alignr_epi32::<14>(lanes, none));
        let lanes = _mm512_add_epi32(lanes, _mm512_alignr_epi32::<12>(lanes, none));
        _mm512_add_epi32(lanes, _mm512_alignr_epi32::<8>(lanes, none))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_the_upper_half_of_a_16_bit_float() {
        assert_eq!([value(0), value(0x3c), value(0xbe), value(0x77)], [0.0, 1.0, -1.5, 28672.0]);
        assert_eq!(value(1), 2f32.powi(-16));
    }

    #[test]
    fn columns_that_are_not_there_add_nothing() {
        let sparse = Sparse { starts: &[0, 3], gaps: &[1, 1, 255], values: &[0x3c, 0x40, 0x3c] };
        sparse.check(1).unwrap();
        for tokens in [1, 3, 7, 20] {
            let x = [1.0, 10.0, 100.0].repeat(tokens);
            let mut sums = vec![0.0; tokens];
            sparse.multiply(&Packed::of(&x, 3), 0.5, 0, 1, &mut sums);
            assert_eq!(sums, vec![105.0; tokens]);
        }
        let mut seen = Vec::new();
        sparse.each(0, 3, &mut |column, value| seen.push((column, value)));
        assert_eq!(seen, [(1, 1.0), (2, 2.0)]);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let count = |of: usize| (0..of).map(|at| (at * 37 % 11) as u8);
        for entries in [0, 1, 15, 16, 17, 100] {
            let (gaps, values): (Vec<u8>, Vec<u8>) =
                (count(entries).collect(), count(entries).map(|v| v * 11).collect());
            for columns in [1, 40, 501] {
                let x: Vec<f32> = (0..columns).map(|i| (i as f32).sin()).collect();
                assert_eq!(dot(&gaps, &values, &x).to_bits(), single_body(&gaps, &values, &x).to_bits());
            }
        }
    }

    #[test]
    fn rows_without_their_entries_are_refused() {
        for starts in [&[0u32, 1][..], &[0, 2, 1], &[1, 1, 2], &[0, 1, 3], &[]] {
            let sparse = Sparse { starts, gaps: &[0, 0], values: &[0, 0] };
            assert!(matches!(sparse.check(2), Err(Error::Format(_))), "{starts:?}");
        }
        let uneven = Sparse { starts: &[0, 1], gaps: &[0], values: &[] };
        assert!(uneven.check(1).is_err());
    }
}
