//! The two tensors of one site, read as rows of their difference.

use super::sweep;
use crate::checkpoint::View;
use crate::error::{Error, Result};

/// Elements of a tile: a megabyte of 32-bit floats, which fits in a core's L2 cache.
const TILE_ELEMENTS: usize = 1 << 18;

/// Bands of rows that a site is divided into. Sums within bands and then over bands do not depend on the number of
/// threads.
const BANDS: usize = 64;

/// Differences whose largest magnitude is within this many octaves of 1 are read as they are: sums of their squares,
/// and of the fourth powers that the low-rank part needs, neither overflow nor vanish in 32-bit floats.
const SAFE_OCTAVES: i32 = 20;

/// The exponents that a site may have: 2 to their power is a normal 32-bit float.
const EXPONENTS: std::ops::RangeInclusive<i32> = -126..=127;

/// One site of base and fine-tune as matrices `[rows, columns]`, output by input channels.
#[derive(Clone)]
pub struct Pair<'a> {
    /// The site's name in messages.
    pub(crate) name: &'a str,
    /// The base's tensor.
    pub(crate) base: View<'a>,
    /// The fine-tune's tensor; it may have more rows.
    pub(crate) finetune: View<'a>,
    /// The number of output channels that both have.
    pub rows: usize,
    /// The number of input channels.
    pub columns: usize,
    /// Whether the tensors on disk are `[columns, rows]`.
    pub(crate) transposed: bool,
    /// Differences are read in units of `2^exponent`.
    pub(super) exponent: i32,
}

impl<'a> Pair<'a> {
    /// Pairs two tensors of floats with equal shapes. An untransposed fine-tune's matrix may have more rows.
    ///
    /// # Errors
    /// [`Error::Architecture`] for other shapes or dtypes.
    pub fn new(name: &'a str, base: View<'a>, finetune: View<'a>, transposed: bool) -> Result<Self> {
        let matrix = |shape: &[usize]| match shape {
            [] => (1, 1),
            [n] => (1, *n),
            [outer @ .., last] => (outer.iter().product(), *last),
        };
        let ((base_rows, columns), (rows, finetune_columns)) = (matrix(&base.shape), matrix(&finetune.shape));
        let fits = base.shape == finetune.shape
            || (columns == finetune_columns && rows > base_rows && base.shape.len() == 2 && !transposed);
        if !fits || !base.is_float() || !finetune.is_float() {
            return Err(Error::Architecture(format!(
                "expected {name} of floats in the base's shape {:?}, found {:?} of {:?}",
                base.shape, finetune.shape, finetune.dtype
            )));
        }
        let (rows, columns) = if transposed { (columns, base_rows) } else { (base_rows, columns) };
        Ok(Self { name, base, finetune, rows, columns, transposed, exponent: 0 })
    }

    /// The same pair in units that bring a difference's largest magnitude near 1; `None` where it is near enough.
    pub(super) fn rescaled(&self, largest: f32) -> Option<Self> {
        let octave = f64::from(largest).log2().floor() as i32;
        // No further than units whose inverse is a normal float too.
        let exponent = octave.clamp(-126, 126);
        (largest > 0.0 && octave.abs() > SAFE_OCTAVES).then(|| Self { exponent, ..self.clone() })
    }

    /// The exponent nearest to `exponent`, in this pair's units, that a site may have.
    pub(super) fn nearest_exponent(&self, exponent: i32) -> i32 {
        exponent.clamp(EXPONENTS.start() - self.exponent, EXPONENTS.end() - self.exponent)
    }

    /// The number of rows that only the fine-tune has.
    pub(crate) fn added_rows(&self) -> usize {
        self.finetune.len() / self.columns.max(1) - self.rows
    }

    /// Rows of one tile.
    pub(super) fn tile_rows(&self) -> usize {
        (TILE_ELEMENTS / self.columns.max(1)).clamp(1, self.rows.max(1))
    }

    /// Rows of one band, a whole number of tiles.
    pub(super) fn band_rows(&self) -> usize {
        self.rows.div_ceil(BANDS).next_multiple_of(self.tile_rows())
    }

    /// Writes the given rows of fine-tune minus base, in the pair's units, to `out`, one after another. `scratch` is a buffer of any size.
    ///
    /// # Errors
    /// [`Error::NonFinite`] where a weight or a difference is not finite.
    pub(super) fn read(&self, rows: &[usize], scratch: &mut Vec<f32>, out: &mut Vec<f32>) -> Result<()> {
        out.resize(rows.len() * self.columns, 0.0);
        if self.transposed {
            self.read_transposed(rows, scratch, out);
        } else {
            scratch.resize(self.columns, 0.0);
        }
        let mut finite = true;
        for (row, out) in rows.iter().zip(out.chunks_mut(self.columns.max(1))) {
            if self.transposed {
                // `out` is the difference already: subtracting zeros only checks that it is finite.
                scratch.clear();
                scratch.resize(self.columns, 0.0);
            } else {
                self.finetune.read(row * self.columns, out);
                self.base.read(row * self.columns, scratch);
            }
            finite &= sweep::subtract(out, scratch);
        }
        if self.exponent != 0 {
            let inverse = (-self.exponent as f32).exp2();
            out.iter_mut().for_each(|value| *value *= inverse);
        }
        if finite { Ok(()) } else { Err(self.non_finite_error()) }
    }

    /// Reads rows that are columns on disk: of each stored row, the span from the first to the last of them.
    fn read_transposed(&self, rows: &[usize], scratch: &mut Vec<f32>, out: &mut [f32]) {
        let (Some(first), Some(last)) = (rows.iter().min(), rows.iter().max()) else { return };
        let span = last - first + 1;
        scratch.resize(2 * span, 0.0);
        let (finetune, base) = scratch.split_at_mut(span);
        for column in 0..self.columns {
            self.finetune.read(column * self.rows + first, finetune);
            self.base.read(column * self.rows + first, base);
            for (index, row) in rows.iter().enumerate() {
                out[index * self.columns + column] = finetune[row - first] - base[row - first];
            }
        }
    }

    /// The error that names the first weight that is not finite.
    fn non_finite_error(&self) -> Error {
        let mut values = vec![0.0; 1 << 16];
        for (whose, view) in [("base", &self.base), ("fine-tune", &self.finetune)] {
            let mut start = 0;
            while start < view.len() {
                let count = values.len().min(view.len() - start);
                view.read(start, &mut values[..count]);
                if let Some(index) = values[..count].iter().position(|value| !value.is_finite()) {
                    let (element, value) = (start + index, values[index]);
                    return Error::NonFinite(format!(
                        "expected finite weights, found {value} in the {whose}'s {} at element {element}",
                        self.name
                    ));
                }
                start += count;
            }
        }
        Error::NonFinite(format!("expected a finite difference, found an overflow in {}", self.name))
    }
}
