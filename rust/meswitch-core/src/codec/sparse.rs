//! A delta that is mostly zeros, kept entry by entry: what a fine-tune at a small rate saved in 16 bits leaves, where
//! most changes round away.

use rayon::prelude::*;

use super::Pair;
use crate::error::Result;
use crate::kernels::sparse::value;

/// Entries that one change may take: four hold 12 bits of it, more than most changes of 16-bit weights have.
const DEPTHS: [usize; 2] = [4, 1];

/// The power of two that the largest value lies at: 8-bit floats reach from there thirty octaves down.
const LARGEST: i32 = 14;

/// The entries of a site, as `kernels::sparse::Sparse` reads them.
#[derive(Debug)]
pub struct Sparse {
    /// `[rows + 1]`.
    pub starts: Vec<u32>,
    /// Columns between entries.
    pub gaps: Vec<u8>,
    /// 8-bit floats in units of `2^exponent`.
    pub values: Vec<u8>,
    /// Weights that changed.
    pub changed: u64,
}

impl Sparse {
    /// The changes of a site in less than `limit` bytes, as near as that allows, with their exponent and the squared
    /// error left. None where there are too many; `changed` and `largest` are their number and largest magnitude.
    ///
    /// # Errors
    /// [`crate::Error::NonFinite`].
    pub(super) fn fit(pair: &Pair<'_>, changed: u64, largest: f32, limit: usize) -> Result<Option<(Self, i32, f64)>> {
        let starts = 4 * (pair.rows + 1);
        if starts as u64 + 2 * changed >= limit as u64 || changed > i32::MAX as u64 / 8 {
            return Ok(None);
        }
        let exponent = (largest.log2().floor() as i32 - LARGEST).clamp(-100, 100);
        for depth in DEPTHS {
            let (found, missed) = Self::at(pair, exponent, depth)?;
            if starts + 2 * found.gaps.len() < limit && found.gaps.len() <= i32::MAX as usize {
                return Ok(Some((Self { changed, ..found }, exponent, missed)));
            }
        }
        Ok(None)
    }

    fn at(pair: &Pair<'_>, exponent: i32, depth: usize) -> Result<(Self, f64)> {
        let rows: Vec<usize> = (0..pair.rows).collect();
        let inverse = (-exponent as f32).exp2();
        let bands: Vec<Band> = rows
            .par_chunks(pair.band_rows())
            .map_init(<(Vec<f32>, Vec<f32>)>::default, |(spare, tile), band| {
                let mut found = Band::default();
                for rows in band.chunks(pair.tile_rows()) {
                    pair.read(rows, spare, tile)?;
                    tile.chunks(pair.columns.max(1)).for_each(|row| found.add(row, inverse, depth));
                }
                Ok(found)
            })
            .collect::<Result<_>>()?;
        let mut all = Self { starts: vec![0], gaps: Vec::new(), values: Vec::new(), changed: 0 };
        let mut missed = 0.0;
        for band in bands {
            let before = all.gaps.len();
            all.starts.extend(band.ends.iter().map(|end| (before + end) as u32));
            all.gaps.extend(band.gaps);
            all.values.extend(band.values);
            missed += band.missed;
        }
        let unit = f64::from(exponent).exp2();
        Ok((all, missed * unit * unit))
    }
}

#[derive(Default)]
struct Band {
    ends: Vec<usize>,
    gaps: Vec<u8>,
    values: Vec<u8>,
    missed: f64,
}

impl Band {
    /// One row: of every change the nearest value, then the nearest to what is left, `depth` at the most.
    fn add(&mut self, row: &[f32], inverse: f32, depth: usize) {
        let mut last = 0;
        for (column, delta) in row.iter().enumerate().filter(|(_, delta)| **delta != 0.0) {
            let mut left = delta * inverse;
            for _ in 0..depth {
                let byte = nearest(left);
                if value(byte) == 0.0 {
                    break;
                }
                while column - last > 255 {
                    self.push(255, 0);
                    last += 255;
                }
                self.push((column - last) as u8, byte);
                last = column;
                left -= value(byte);
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

/// The nearest 8-bit float of something below its largest.
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
        for byte in (0..=255u8).filter(|byte| value(*byte).is_finite() && *byte != 0x80) {
            assert_eq!(value(nearest(value(byte))), value(byte));
        }
        assert_eq!(value(nearest(9.0)), 8.0);
        assert_eq!(value(nearest(-28671.0)), -28672.0);
    }

    proptest! {
        #[test]
        fn changes_of_nine_bits_are_kept_whole(
            row in prop::collection::vec((0usize..700, -511i32..512), 0..40)
        ) {
            let mut dense = vec![0f32; 700];
            row.iter().for_each(|(column, change)| dense[*column] = *change as f32);
            let mut band = Band::default();
            band.add(&dense, 1.0, DEPTHS[0]);
            prop_assert_eq!(band.missed, 0.0);
            let starts = [0, band.gaps.len() as u32];
            let read = sparse::Sparse { starts: &starts, gaps: &band.gaps, values: &band.values };
            read.check(1).unwrap();
            let mut back = vec![0f32; 700];
            read.each(0, 700, &mut |column, value| back[column] += value);
            prop_assert_eq!(back, dense);
        }
    }
}
