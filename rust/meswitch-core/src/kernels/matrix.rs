//! A quantized site as kernels see it: borrowed memory, checked once.

use std::ops::Range;

use half::f16;

use super::sparse::Sparse;
use super::tables::Form;
use crate::error::{Error, Result};
use crate::layout::{self, BITS, BLOCK, LINE, padded, part_bytes, row_bytes, shared_row};

/// The rows of a site that share a bit width.
pub struct Part<'a> {
    /// Bits a code.
    pub bits: u32,
    /// The code value that means zero.
    pub zero: f32,
    /// Input channels that share a scale.
    pub group: usize,
    /// The rows, rising, or none for all.
    pub rows: Option<&'a [u32]>,
    /// Packed codes, in blocks.
    pub codes: &'a [u8],
    /// `[rows, groups]`.
    pub scales: &'a [f16],
}

/// The delta of one weight: `[rows, columns]`.
pub struct Matrix<'a> {
    /// Output channels.
    pub rows: usize,
    /// Input channels.
    pub columns: usize,
    /// `2^exponent`, the unit of scales, salient values and `u`.
    pub unit: f32,
    /// The codes.
    pub parts: Vec<Part<'a>>,
    /// One scale an input channel.
    pub column_scales: Option<&'a [f16]>,
    /// Salient channels and what the codes miss there, `[rows, salient]`.
    pub salient: Option<(&'a [u32], &'a [f16])>,
    /// `[rows, rank]` and `[rank, columns]`.
    pub low_rank: Option<(&'a [f16], &'a [f16])>,
    /// What is not zero, in place of all the rest.
    pub sparse: Option<Sparse<'a>>,
}

impl Part<'_> {
    /// Whether sums may be looked up: scales change between whole bytes, if at all.
    #[must_use]
    pub fn is_looked_up(&self, columns: usize) -> bool {
        self.group >= columns || self.group.is_multiple_of(8)
    }

    /// What decides how its rows are looked up.
    pub(super) fn form(&self, columns: usize) -> Form {
        Form { bits: self.bits, zero: self.zero, group: self.group.min(columns.max(1)) }
    }

    /// How many rows.
    #[must_use]
    pub fn count(&self, rows: usize) -> usize {
        self.rows.map_or(rows, <[u32]>::len)
    }

    /// The codes from the block of a position within the part on.
    #[must_use]
    pub fn codes_from(&self, at: usize, columns: usize) -> &[u8] {
        self.codes.get(at / BLOCK * BLOCK * row_bytes(self.bits, columns)..).unwrap_or_default()
    }

    /// The positions within the part of the matrix's rows `start .. end`.
    #[must_use]
    pub fn span(&self, start: usize, end: usize) -> Range<usize> {
        match self.rows {
            None => start..end,
            Some(rows) => {
                rows.partition_point(|row| (*row as usize) < start)..rows.partition_point(|row| (*row as usize) < end)
            }
        }
    }

    /// Adds values of the part's rows from position `first` on to `sums`, whose first is the matrix's row `start`.
    pub(super) fn scatter(
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

    /// The matrix's row at a position within the part.
    #[must_use]
    pub fn row(&self, at: usize) -> usize {
        self.rows.map_or(at, |rows| rows[at] as usize)
    }
}

impl Matrix<'_> {
    /// A part's lines that hold positions `span`, block by block: the positions of the lines, where in the codes the
    /// first byte of the first lies, and how far it is to the next byte.
    pub(super) fn lines(
        &self,
        part: &Part<'_>,
        span: &Range<usize>,
    ) -> impl Iterator<Item = (Range<usize>, usize, usize)> + use<> {
        let (rows, stride) = (part.count(self.rows), row_bytes(part.bits, self.columns));
        let (first, end) = (span.start / LINE * LINE, span.end.next_multiple_of(LINE).min(padded(rows)));
        let blocks = if span.is_empty() { 0..0 } else { first / BLOCK..end.div_ceil(BLOCK) };
        blocks.map(move |block| {
            let of = first.max(block * BLOCK)..end.min((block + 1) * BLOCK);
            let (start, width) = layout::line(of.start, rows, stride);
            (of, start, width)
        })
    }

    /// Checks every length and index, so that kernels need not.
    ///
    /// # Errors
    /// [`Error::Format`] naming what does not fit.
    pub fn check(&self) -> Result<()> {
        let refuse = |what: &str, expected: usize, found: usize| {
            Err(Error::Format(format!(
                "expected {expected} {what} in a site of {} x {}, found {found}",
                self.rows, self.columns
            )))
        };
        if let Some(sparse) = &self.sparse {
            if !self.parts.is_empty() || self.salient.is_some() || self.low_rank.is_some() {
                return refuse("parts beside sparse entries", 0, self.parts.len());
            }
            return sparse.check(self.rows);
        }
        for part in &self.parts {
            if !BITS.contains(&part.bits) || part.group == 0 {
                return refuse("known bits and a positive group", 1, part.bits as usize);
            }
            let rows = part.count(self.rows);
            let (codes, scales) =
                (part_bytes(part.bits, rows, self.columns), rows * self.columns.div_ceil(part.group).max(1));
            if part.codes.len() != codes {
                return refuse("bytes of codes", codes, part.codes.len());
            }
            if part.scales.len() != scales {
                return refuse("scales", scales, part.scales.len());
            }
            rising(part.rows.unwrap_or_default(), self.rows)?;
        }
        if let Some(row) =
            shared_row(self.rows, self.parts.iter().map(|part| part.rows.map(|rows| rows.iter().copied())))
        {
            return Err(Error::Format(format!("expected every row in one part, found row {row} in two")));
        }
        if self.column_scales.is_some_and(|scales| scales.len() != self.columns) {
            return refuse("column scales", self.columns, self.column_scales.map_or(0, <[f16]>::len));
        }
        if let Some((index, values)) = self.salient {
            rising(index, self.columns)?;
            if values.len() != index.len() * self.rows {
                return refuse("salient values", index.len() * self.rows, values.len());
            }
        }
        if let Some((u, v)) = self.low_rank {
            let rank = v.len() / self.columns.max(1);
            if rank == 0 || v.len() != rank * self.columns || u.len() != rank * self.rows {
                return refuse("values of u", rank * self.rows, u.len());
            }
        }
        Ok(())
    }

    /// Bytes that a product reads of the rows before `row`.
    #[must_use]
    pub fn bytes_before(&self, row: usize) -> usize {
        let beside = self.rank() + self.salient.map_or(0, |(index, _)| index.len());
        let of = |part: &Part<'_>| part.span(0, row).len() * row_bytes(part.bits, self.columns);
        let entries = self.sparse.as_ref().map_or(0, |sparse| sparse.starts[row] as usize);
        self.parts.iter().map(of).sum::<usize>() + row * beside * 2 + entries * 2
    }

    /// The weights that a product with one token reads.
    #[must_use]
    pub fn weights(&self) -> usize {
        // An entry costs about what eight packed codes do.
        self.sparse.as_ref().map_or(self.rows * self.columns, |sparse| 8 * sparse.gaps.len())
    }

    /// The rank of the low-rank part.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.low_rank.map_or(0, |(_, v)| v.len() / self.columns.max(1))
    }
}

fn rising(index: &[u32], limit: usize) -> Result<()> {
    let sorted = index.windows(2).all(|pair| pair[0] < pair[1]);
    if sorted && index.last().is_none_or(|last| (*last as usize) < limit) {
        return Ok(());
    }
    Err(Error::Format(format!("expected rising indices below {limit}, found others")))
}
