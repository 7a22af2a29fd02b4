//! Rows of a delta as floats: what an embedding looks up, and what a prefill multiplies with.

use std::ops::Range;

use super::floats::{add_times, scaled_levels, unpack};
use super::matrix::{Matrix, Part};
use super::rows::{Rows, widen_f16};
use super::team::{self, ALONE};
use crate::layout::{self, LINE, row_bytes};

/// Row `row` of the delta, times `scale`, added to `out [columns]`.
pub fn add_row(matrix: &Matrix<'_>, row: usize, scale: f32, out: &mut [f32]) {
    let mut values = vec![0f32; matrix.columns];
    Spare::of(matrix).dense(row, &mut values);
    add_times(out, &values, scale);
}

/// Rows `start .. start + out.len() / columns` of the delta, dense.
pub fn dense(matrix: &Matrix<'_>, start: usize, out: &mut [f32]) {
    let mut spare = Spare::of(matrix);
    for (at, out) in out.chunks_mut(matrix.columns.max(1)).enumerate() {
        spare.dense(start + at, out);
    }
}

/// Rows `of` of base and delta together, on all threads, to the first rows of `out`: rounded once where that has 16
/// bits.
///
/// # Safety
/// `base` must have those rows and `out` as many, of as many elements as the matrix has columns; nobody else writes.
pub unsafe fn merged(matrix: &Matrix<'_>, base: Rows, of: Range<usize>, out: Rows) {
    assert!(of.end <= matrix.rows);
    let work = |index: usize, threads: usize| {
        let (mut spare, mut delta) = (Spare::of(matrix), vec![0f32; matrix.columns]);
        for at in of.len() * index / threads..of.len() * (index + 1) / threads {
            spare.dense(of.start + at, &mut delta);
            // SAFETY: the caller's promise; no two threads have a row in common.
            unsafe { out.sum(at, base, of.start + at, &delta) };
        }
    };
    if of.len() * matrix.columns < ALONE { work(0, 1) } else { team::parallel(&work) }
}

/// A part's rows as they are asked for: one by itself, or a whole line where they follow each other.
#[derive(Default)]
pub(super) struct Strip {
    line: Option<usize>,
    next: Option<usize>,
    packed: Vec<u8>,
}

impl Strip {
    /// The packed row at a position within the part, which is always the same.
    pub fn row(&mut self, matrix: &Matrix<'_>, part: &Part<'_>, at: usize) -> &[u8] {
        let (rows, stride) = (part.count(matrix.rows), row_bytes(part.bits, matrix.columns));
        let (line, follows) = (Some(at / LINE), self.next.replace(at + 1) == Some(at));
        self.packed.resize(LINE * stride, 0);
        if self.line != line && !follows {
            self.line = None;
            let (start, width) = layout::line(at, rows, stride);
            let bytes = part.codes[start + at % LINE..].iter().step_by(width);
            self.packed.iter_mut().take(stride).zip(bytes).for_each(|(packed, byte)| *packed = *byte);
            return &self.packed[..stride];
        }
        if self.line != line {
            self.line = line;
            layout::untile(part.codes, rows, stride, at, &mut self.packed);
        }
        &self.packed[at % LINE * stride..][..stride]
    }
}

/// Working memory, and what all rows of a matrix share.
struct Spare<'a> {
    matrix: &'a Matrix<'a>,
    strips: Vec<Strip>,
    columns: Vec<f32>,
    codes: Vec<u8>,
    wide: Vec<f32>,
}

impl<'a> Spare<'a> {
    fn of(matrix: &'a Matrix<'a>) -> Self {
        let mut columns = vec![0f32; matrix.column_scales.map_or(0, <[_]>::len)];
        widen_f16(matrix.column_scales.unwrap_or_default(), &mut columns);
        let strips = matrix.parts.iter().map(|_| Strip::default()).collect();
        Self { matrix, strips, columns, codes: vec![0; matrix.columns], wide: vec![0.0; matrix.columns] }
    }

    /// One row of the delta.
    fn dense(&mut self, row: usize, out: &mut [f32]) {
        let (matrix, columns) = (self.matrix, self.matrix.columns);
        let mut parts = matrix.parts.iter().zip(&mut self.strips);
        match parts.find_map(|(part, strip)| Some((part, strip, part.span(row, row + 1).next()?))) {
            Some((part, strip, at)) => {
                scaled_row(matrix, part, strip.row(matrix, part, at), at, &self.columns, &mut self.codes, out);
            }
            None => out.fill(0.0),
        }
        if let Some(sparse) = &matrix.sparse {
            sparse.each(row, columns, &mut |column, value| out[column] += value * matrix.unit);
        }
        if let Some((u, v)) = matrix.low_rank {
            let rank = matrix.rank();
            for (u, v) in u[row * rank..(row + 1) * rank].iter().zip(v.chunks(columns)) {
                widen_f16(v, &mut self.wide);
                add_times(out, &self.wide, u.to_f32() * matrix.unit);
            }
        }
        if let Some((index, values)) = matrix.salient {
            for (i, value) in index.iter().zip(&values[row * index.len()..(row + 1) * index.len()]) {
                out[*i as usize] += value.to_f32() * matrix.unit;
            }
        }
    }
}

/// A row of a part, its packed codes under their scales and `factors` (none count as one). `codes` is working memory.
pub(super) fn scaled_row(
    matrix: &Matrix<'_>,
    part: &Part<'_>,
    packed: &[u8],
    at: usize,
    factors: &[f32],
    codes: &mut [u8],
    out: &mut [f32],
) {
    let columns = matrix.columns;
    unpack(packed, part.bits, codes);
    let groups = columns.div_ceil(part.group).max(1);
    for (group, scale) in part.scales[at * groups..(at + 1) * groups].iter().enumerate() {
        let of = group * part.group..((group + 1) * part.group).min(columns);
        let factors = factors.get(of.clone()).unwrap_or_default();
        scaled_levels(&codes[of.clone()], part.zero, scale.to_f32() * matrix.unit, factors, &mut out[of]);
    }
}
