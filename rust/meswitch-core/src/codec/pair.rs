//! The two tensors of one site, read as rows of their difference.

use super::sweep;
use crate::checkpoint::View;
use crate::error::{Error, Result};

/// Elements of a tile: a megabyte of 32-bit floats, which a core's own cache holds.
const TILE: usize = 1 << 18;

/// Bands of a site: what is summed within a band and then over bands does not depend on the number of threads.
const BANDS: usize = 64;

/// One site of base and fine-tune, seen as a matrix `[rows, columns]` of output by input channels.
pub struct Pair<'a> {
    /// The site's name, for messages.
    pub name: &'a str,
    /// The base's tensor.
    pub base: View<'a>,
    /// The fine-tune's tensor; it may have more rows.
    pub finetune: View<'a>,
    /// Output channels that both have.
    pub rows: usize,
    /// Input channels.
    pub columns: usize,
    /// Whether the tensors on disk are `[columns, rows]`.
    pub transposed: bool,
}

impl<'a> Pair<'a> {
    /// Pairs two tensors of equal shape, or of equal columns with rows added to the fine-tune's.
    ///
    /// # Errors
    /// [`Error::Architecture`] where the shapes do not allow it.
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
        Ok(Self { name, base, finetune, rows, columns, transposed })
    }

    /// Rows of the fine-tune that the base does not have.
    #[must_use]
    pub fn added(&self) -> usize {
        self.finetune.len() / self.columns.max(1) - self.rows
    }

    /// Rows of one tile.
    #[must_use]
    pub fn tile_rows(&self) -> usize {
        (TILE / self.columns.max(1)).clamp(1, self.rows.max(1))
    }

    /// Rows of one band, a whole number of tiles.
    #[must_use]
    pub fn band_rows(&self) -> usize {
        self.rows.div_ceil(BANDS).next_multiple_of(self.tile_rows())
    }

    /// The rows named by `rows` of fine-tune minus base, one after another. `spare` is working memory.
    ///
    /// # Errors
    /// [`Error::NonFinite`] where a weight is.
    pub fn read(&self, rows: &[usize], spare: &mut Vec<f32>, out: &mut Vec<f32>) -> Result<()> {
        out.resize(rows.len() * self.columns, 0.0);
        if self.transposed {
            self.read_transposed(rows, spare, out);
        } else {
            spare.resize(self.columns, 0.0);
        }
        let mut finite = true;
        for (row, out) in rows.iter().zip(out.chunks_mut(self.columns.max(1))) {
            if self.transposed {
                // The difference is there already: only its finiteness is asked for.
                spare.clear();
                spare.resize(self.columns, 0.0);
            } else {
                self.finetune.read(row * self.columns, out);
                self.base.read(row * self.columns, spare);
            }
            finite &= sweep::subtract(out, spare);
        }
        if finite { Ok(()) } else { Err(self.not_finite()) }
    }

    /// Rows are columns on disk: of each, only the span that the wanted ones lie in is read.
    fn read_transposed(&self, rows: &[usize], spare: &mut Vec<f32>, out: &mut [f32]) {
        let (Some(first), Some(last)) = (rows.iter().min(), rows.iter().max()) else { return };
        let span = last - first + 1;
        spare.resize(2 * span, 0.0);
        let (finetune, base) = spare.split_at_mut(span);
        for column in 0..self.columns {
            self.finetune.read(column * self.rows + first, finetune);
            self.base.read(column * self.rows + first, base);
            for (at, row) in rows.iter().enumerate() {
                out[at * self.columns + column] = finetune[row - first] - base[row - first];
            }
        }
    }

    fn not_finite(&self) -> Error {
        let mut values = vec![0.0; 1 << 16];
        for (whose, view) in [("base", &self.base), ("fine-tune", &self.finetune)] {
            let mut start = 0;
            while start < view.len() {
                let count = values.len().min(view.len() - start);
                view.read(start, &mut values[..count]);
                if let Some(at) = values[..count].iter().position(|value| !value.is_finite()) {
                    let (index, value) = (start + at, values[at]);
                    return Error::NonFinite(format!(
                        "expected finite weights, found {value} in the {whose}'s {} at element {index}",
                        self.name
                    ));
                }
                start += count;
            }
        }
        Error::NonFinite(format!("expected a finite difference, found an overflow in {}", self.name))
    }
}
