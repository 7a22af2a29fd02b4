//! Sparse entries of a difference that is mostly 0, as fine-tuning with a small learning rate in 16 bits leaves it:
//! most changes are rounded away.

use rayon::prelude::*;

use super::Pair;
use crate::error::Result;
use crate::kernels::sparse::decode;

/// The most entries per change, in order of preference. Four entries hold 12 bits, more than most changes of 16-bit
/// weights have.
const MAX_ENTRIES: [usize; 2] = [4, 1];

/// The exponent of the largest stored value. 8-bit floats reach thirty octaves down from there.
const TOP_EXPONENT: i32 = 14;

/// Sparse entries of a site, as [`crate::kernels::SparseEntries`] reads them.
#[derive(Debug)]
pub struct SparseDelta {
    /// The index of each row's first entry, then the number of entries.
    pub starts: Vec<u32>,
    /// Columns from the previous entry of the row to this one.
    pub gaps: Vec<u8>,
    /// 8-bit floats in units of `2^exponent` of the site.
    pub values: Vec<u8>,
    /// The number of weights that differ.
    pub changed: u64,
}

impl SparseDelta {
    /// The entries of a site with the smallest error that fit in less than `limit` bytes, their exponent, and the
    /// squared error. `None` where none fit. `changed` and `largest` are the number and the largest magnitude of the
    /// changes.
    ///
    /// # Errors
    /// [`crate::Error::NonFinite`].
    pub(super) fn fit(pair: &Pair<'_>, changed: u64, largest: f32, limit: usize) -> Result<Option<(Self, i32, f64)>> {
        let starts = 4 * (pair.rows + 1);
        if starts as u64 + 2 * changed >= limit as u64 || changed > i32::MAX as u64 / 8 {
            return Ok(None);
        }
        let exponent = pair.nearest_exponent(largest.log2().floor() as i32 - TOP_EXPONENT);
        for depth in MAX_ENTRIES {
            let (entries, missed) = Self::encode(pair, exponent, depth)?;
            if starts + 2 * entries.gaps.len() < limit && entries.gaps.len() <= i32::MAX as usize {
                return Ok(Some((Self { changed, ..entries }, exponent, missed)));
            }
        }
        Ok(None)
    }

    /// Encodes all rows, with at most `depth` entries per change. Returns the squared error too.
    fn encode(pair: &Pair<'_>, exponent: i32, depth: usize) -> Result<(Self, f64)> {
        let rows: Vec<usize> = (0..pair.rows).collect();
        let inverse = (-exponent as f32).exp2();
        let bands: Vec<Band> = rows
            .par_chunks(pair.band_rows())
            .map_init(<(Vec<f32>, Vec<f32>)>::default, |(scratch, tile), band| {
                let mut entries = Band::default();
                for rows in band.chunks(pair.tile_rows()) {
                    pair.read(rows, scratch, tile)?;
                    tile.chunks(pair.columns.max(1)).for_each(|row| entries.add_row(row, inverse, depth));
                }
                Ok(entries)
            })
            .collect::<Result<_>>()?;
        let mut total = Self { starts: vec![0], gaps: Vec::new(), values: Vec::new(), changed: 0 };
        let mut missed = 0.0;
        for band in bands {
            let before = total.gaps.len();
            total.starts.extend(band.ends.iter().map(|end| (before + end) as u32));
            total.gaps.extend(band.gaps);
            total.values.extend(band.values);
            missed += band.missed;
        }
        let unit = f64::from(exponent).exp2();
        Ok((total, missed * unit * unit))
    }
}

/// The entries of a band of rows.
#[derive(Default)]
struct Band {
    /// The number of entries up to the end of each row.
    ends: Vec<usize>,
    gaps: Vec<u8>,
    values: Vec<u8>,
    /// The squared error.
    missed: f64,
}

impl Band {
    /// Adds a row. Each change becomes the nearest value, then the value nearest to what is left, at most `depth` in
    /// all.
    fn add_row(&mut self, row: &[f32], inverse: f32, depth: usize) {
        let mut last = 0;
        for (column, delta) in row.iter().enumerate().filter(|(_, delta)| **delta != 0.0) {
            let mut left = delta * inverse;
            for _ in 0..depth {
                let byte = nearest(left);
                if decode(byte) == 0.0 {
                    break;
                }
                while column - last > 255 {
                    self.push(255, 0);
                    last += 255;
                }
                self.push((column - last) as u8, byte);
                last = column;
                left -= decode(byte);
            }
            self.missed += f64::from(left).powi(2);
        }
        self.ends.push(self.gaps.len());
    }

    fn push(&mut self, gap: u8, value: u8) {
        self.gaps.push(gap);
        self.values.push(value);
    }
}

/// The 8-bit float nearest to a number below the largest one, ties to even.
fn nearest(number: f32) -> u8 {
    let half = half::f16::from_f32(number).to_bits();
    ((half + 0x7f + (half >> 8 & 1)) >> 8) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::sparse;
    use proptest::prelude::*;

    #[test]
    fn every_8_bit_float_is_its_own_nearest() {
        for byte in (0..=255u8).filter(|byte| decode(*byte).is_finite() && *byte != 0x80) {
            assert_eq!(decode(nearest(decode(byte))), decode(byte));
        }
        assert_eq!(decode(nearest(9.0)), 8.0);
        assert_eq!(decode(nearest(-28671.0)), -28672.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]

        #[test]
        fn changes_of_nine_bits_are_exact(
            row in prop::collection::vec((0usize..700, -511i32..512), 0..40)
        ) {
            let mut dense = vec![0f32; 700];
            row.iter().for_each(|(column, change)| dense[*column] = *change as f32);
            let mut band = Band::default();
            band.add_row(&dense, 1.0, MAX_ENTRIES[0]);
            prop_assert_eq!(band.missed, 0.0);
            let starts = [0, band.gaps.len() as u32];
            let read = sparse::SparseEntries { starts: &starts, gaps: &band.gaps, values: &band.values };
            read.check(1).unwrap();
            let mut back = vec![0f32; 700];
            read.for_each_in_row(0, 700, &mut |column, value| back[column] += value);
            prop_assert_eq!(back, dense);
        }
    }
}
