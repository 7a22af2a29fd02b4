//! The delta of one weight as kernels read it: borrowed memory whose lengths and indices were checked once.

use std::ops::Range;

use half::f16;

use super::sparse::SparseEntries;
use super::tables::TableKey;
use crate::error::{Error, Result};
use crate::layout::{self, BITS, BLOCK_ROWS, LINE_ROWS, padded_rows, part_bytes, row_bytes};

/// The rows of a matrix that share a bit width.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// Bits per code: one of [`BITS`].
    pub bits: u32,
    /// The code value that means 0; may be half-integer.
    pub zero: f32,
    /// Consecutive input channels that share a scale.
    pub group: usize,
    /// The rows, rising; `None` for all rows of the matrix.
    pub rows: Option<&'a [u32]>,
    /// The packed codes, in the layout of format version 4.
    pub codes: &'a [u8],
    /// `[groups, rows]`, in units of `2^exponent`.
    pub scales: &'a [f16],
}

/// The terms that add up to a delta; any may be absent.
#[derive(Clone, Debug, Default)]
pub struct Terms<'a> {
    /// Codes and their scales. A row that is in no part has no codes.
    pub parts: Vec<Part<'a>>,
    /// One scale per input channel, applied to codes.
    pub column_scales: Option<&'a [f16]>,
    /// The salient channels, rising, and what the other terms miss there, `[rows, salient]`.
    pub salient: Option<(&'a [u32], &'a [f16])>,
    /// `u [rows, rank]` and `v [rank, columns]`.
    pub low_rank: Option<(&'a [f16], &'a [f16])>,
}

/// The delta of one weight: `[rows, columns]`, output channels by input channels.
///
/// Every length and index was checked by [`Matrix::new`] or [`Matrix::from_sparse`]; kernels rely on it.
#[derive(Clone, Debug)]
pub struct Matrix<'a> {
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// `2^exponent`, the unit of scales, salient values, `u` and sparse values.
    pub(super) unit: f32,
    pub(super) parts: Vec<Part<'a>>,
    pub(super) column_scales: Option<&'a [f16]>,
    pub(super) salient: Option<(&'a [u32], &'a [f16])>,
    pub(super) low_rank: Option<(&'a [f16], &'a [f16])>,
    pub(super) sparse: Option<SparseEntries<'a>>,
}

impl Part<'_> {
    /// Whether products may use lookup tables: scales change only between whole bytes of a row.
    pub(super) fn allows_tables(&self, columns: usize) -> bool {
        self.group >= columns || self.group.is_multiple_of(8)
    }

    /// What decides the contents of its lookup tables.
    pub(super) fn table_key(&self, columns: usize) -> TableKey {
        TableKey { bits: self.bits, zero: self.zero, group: self.group.min(columns.max(1)) }
    }

    /// The number of its rows, in a matrix of `rows`.
    pub(super) fn row_count(&self, rows: usize) -> usize {
        self.rows.map_or(rows, <[u32]>::len)
    }

    /// The scales of a group, in a matrix of `rows` rows: one for each row of the part.
    pub(super) fn scales_of(&self, group: usize, rows: usize) -> &[f16] {
        let count = self.row_count(rows);
        &self.scales[group * count..(group + 1) * count]
    }

    /// The codes from the block that holds a position of the part on.
    pub(super) fn codes_from(&self, position: usize, columns: usize) -> &[u8] {
        self.codes.get(position / BLOCK_ROWS * BLOCK_ROWS * row_bytes(self.bits, columns)..).unwrap_or_default()
    }

    /// The positions within the part of the matrix's rows `start .. end`.
    pub(super) fn positions(&self, start: usize, end: usize) -> Range<usize> {
        match self.rows {
            None => start..end,
            Some(rows) => {
                rows.partition_point(|row| (*row as usize) < start)..rows.partition_point(|row| (*row as usize) < end)
            }
        }
    }

    /// Adds values of the part's rows from position `first` on to `sums`, whose element 0 is the matrix's row `start`.
    pub(super) fn scatter_add(
        &self,
        first: usize,
        values: impl ExactSizeIterator<Item = f32>,
        sums: &mut [f32],
        start: usize,
    ) {
        match self.rows {
            None => sums[first - start..].iter_mut().zip(values).for_each(|(sum, value)| *sum += value),
            Some(rows) => {
                rows[first..].iter().zip(values).for_each(|(row, value)| sums[*row as usize - start] += value);
            }
        }
    }

    /// The matrix's row at a position of the part.
    pub(super) fn row(&self, position: usize) -> usize {
        self.rows.map_or(position, |rows| rows[position] as usize)
    }
}

impl<'a> Matrix<'a> {
    /// Makes a matrix of codes, column scales, salient channels and a low-rank part.
    ///
    /// # Errors
    /// [`Error::Format`] naming the length or index that does not fit.
    pub fn new(rows: usize, columns: usize, exponent: i32, terms: Terms<'a>) -> Result<Self> {
        let matrix = Self::unchecked(rows, columns, exponent, terms, None);
        matrix.check_parts()?;
        matrix.check_other_terms()?;
        Ok(matrix)
    }

    /// Makes a matrix of sparse entries alone.
    ///
    /// # Errors
    /// [`Error::Format`] where the entries are not those of `rows` rows.
    pub fn from_sparse(rows: usize, columns: usize, exponent: i32, entries: SparseEntries<'a>) -> Result<Self> {
        entries.check(rows)?;
        Ok(Self::unchecked(rows, columns, exponent, Terms::default(), Some(entries)))
    }

    fn unchecked(
        rows: usize,
        columns: usize,
        exponent: i32,
        terms: Terms<'a>,
        sparse: Option<SparseEntries<'a>>,
    ) -> Self {
        let Terms { parts, column_scales, salient, low_rank } = terms;
        Self { rows, columns, unit: (exponent as f32).exp2(), parts, column_scales, salient, low_rank, sparse }
    }

    /// The number of output channels.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The number of input channels.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The rank of the low-rank part; 0 without one.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.low_rank.map_or(0, |(_, v)| v.len() / self.columns.max(1))
    }

    /// The lines of a part that hold the positions `span`, block by block: the positions of those lines, the offset of
    /// their first byte in the codes, and the distance from one byte of a row to the next.
    pub(super) fn lines(
        &self,
        part: &Part<'_>,
        span: &Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, usize, usize)> + use<> {
        let (rows, row_size) = (part.row_count(self.rows), row_bytes(part.bits, self.columns));
        let first = span.start / LINE_ROWS * LINE_ROWS;
        let end = span.end.next_multiple_of(LINE_ROWS).min(padded_rows(rows));
        let blocks = if span.is_empty() { 0..0 } else { first / BLOCK_ROWS..end.div_ceil(BLOCK_ROWS) };
        blocks.map(move |block| {
            let positions = first.max(block * BLOCK_ROWS)..end.min((block + 1) * BLOCK_ROWS);
            let (start, width) = layout::line_start(positions.start, rows, row_size);
            (positions, start, width)
        })
    }

    /// Bytes that a product reads of the rows before `row`.
    pub(super) fn bytes_before(&self, row: usize) -> usize {
        let halves = self.rank() + self.salient.map_or(0, |(index, _)| index.len());
        let codes = |part: &Part<'_>| part.positions(0, row).len() * row_bytes(part.bits, self.columns);
        let entries = self.sparse.as_ref().map_or(0, |sparse| sparse.starts[row] as usize);
        self.parts.iter().map(codes).sum::<usize>() + row * halves * 2 + entries * 2
    }

    /// The cost of a product with one token, in multiplications.
    pub(super) fn work_per_token(&self) -> usize {
        // A sparse entry costs about as much as eight packed codes.
        self.sparse.as_ref().map_or(self.rows * self.columns, |sparse| 8 * sparse.gaps.len())
    }

    fn mismatch(&self, what: &str, expected: usize, found: usize) -> Error {
        Error::Format(format!(
            "expected {expected} {what} in a site of {} x {}, found {found}",
            self.rows, self.columns
        ))
    }

    fn check_parts(&self) -> Result<()> {
        for part in &self.parts {
            if !BITS.contains(&part.bits) || part.group == 0 {
                return Err(self.mismatch("known bits and a positive group", 1, part.bits as usize));
            }
            let rows = part.row_count(self.rows);
            let codes = part_bytes(part.bits, rows, self.columns);
            let scales = rows.checked_mul(self.columns.div_ceil(part.group).max(1));
            if codes != Some(part.codes.len()) {
                return Err(self.mismatch("bytes of codes", codes.unwrap_or(usize::MAX), part.codes.len()));
            }
            if scales != Some(part.scales.len()) {
                return Err(self.mismatch("scales", scales.unwrap_or(usize::MAX), part.scales.len()));
            }
            check_rising(part.rows.unwrap_or_default(), self.rows)?;
        }
        let rows_of = |part: &Part<'a>| part.rows.map(|rows| rows.iter().copied());
        match layout::row_in_two_parts(self.rows, self.parts.iter().map(rows_of)) {
            Some(row) => Err(Error::Format(format!("expected every row in one part, found row {row} in two"))),
            None => Ok(()),
        }
    }

    fn check_other_terms(&self) -> Result<()> {
        if let Some(scales) = self.column_scales.filter(|scales| scales.len() != self.columns) {
            return Err(self.mismatch("column scales", self.columns, scales.len()));
        }
        if let Some((index, values)) = self.salient {
            check_rising(index, self.columns)?;
            let expected = index.len().saturating_mul(self.rows);
            if values.len() != expected {
                return Err(self.mismatch("salient values", expected, values.len()));
            }
        }
        if let Some((u, v)) = self.low_rank {
            let rank = self.rank();
            let expected = rank.saturating_mul(self.rows);
            if rank == 0 || v.len() != rank * self.columns || u.len() != expected {
                return Err(self.mismatch("values of u", expected, u.len()));
            }
        }
        Ok(())
    }
}

fn check_rising(indices: &[u32], limit: usize) -> Result<()> {
    let rising = indices.windows(2).all(|pair| pair[0] < pair[1]);
    if rising && indices.last().is_none_or(|last| (*last as usize) < limit) {
        return Ok(());
    }
    Err(Error::Format(format!("expected rising indices below {limit}, found others")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        const CODES: [u8; 80] = [0; 80];
        let part = |bits, codes: usize, scales: &'static [f16]| Part {
            bits,
            zero: 1.5,
            group: 8,
            rows: None,
            codes: &CODES[..codes],
            scales,
        };
        const ONES: [f16; 8] = [f16::ONE; 8];
        let message = |parts| {
            let terms = Terms { parts, ..Terms::default() };
            Matrix::new(8, 8, 0, terms).err().map_or_else(|| "none".to_owned(), |error| error.to_string())
        };
        assert_eq!(message(vec![part(2, 32, &ONES)]), "none");
        assert_eq!(message(vec![part(2, 16, &ONES)]), "expected 32 bytes of codes in a site of 8 x 8, found 16");
        assert_eq!(message(vec![part(2, 32, &ONES[1..])]), "expected 8 scales in a site of 8 x 8, found 7");
        assert!(message(vec![part(5, 80, &ONES)]).starts_with("expected 1 known bits"));
        let twice = vec![part(2, 32, &ONES), part(2, 32, &ONES)];
        assert_eq!(message(twice), "expected every row in one part, found row 0 in two");
        let low_rank = Terms { low_rank: Some((&ONES, &ONES[1..])), ..Terms::default() };
        assert!(Matrix::new(8, 8, 0, low_rank).is_err());
        let salient = Terms { salient: Some((&[8], &ONES)), ..Terms::default() };
        let error = Matrix::new(8, 8, 0, salient).unwrap_err().to_string();
        assert_eq!(error, "expected rising indices below 8, found others");
    }
}
