//! Rows of a delta as floats, for embeddings and for prefill.

use std::ops::Range;

use super::floats::{add_times, scaled_levels, unpack};
use super::matrix::{Matrix, Part};
use super::rows::{ElementType, Rows, widen_f16};
use super::threads::{self, MIN_PARALLEL_WORK};
use crate::layout::{self, LINE_ROWS, row_bytes};

/// Adds row `row` of the delta times `scale` to `out [columns]`. Runs on the calling thread.
///
/// # Panics
/// Where `row` is not below the matrix's rows.
pub fn add_row(matrix: &Matrix<'_>, row: usize, scale: f32, out: &mut [f32]) {
    let mut values = vec![0f32; matrix.columns];
    RowReader::new(matrix).read(row, &mut values);
    add_times(out, &values, scale);
}

/// Writes rows `start .. start + out.len() / columns` of the delta to `out`. Runs on the calling thread.
///
/// # Panics
/// Where those rows are not below the matrix's rows.
pub fn dense_rows(matrix: &Matrix<'_>, start: usize, out: &mut [f32]) {
    let mut reader = RowReader::new(matrix);
    for (index, out) in out.chunks_mut(matrix.columns.max(1)).enumerate() {
        reader.read(start + index, out);
    }
}

/// Writes rows `rows` of `base` plus the delta to the first rows of `out`, on all threads. A 16-bit result is rounded
/// once.
///
/// # Safety
/// `base` must have those rows and `out` as many, each of as many elements as the matrix has columns. Nothing else may
/// write to either meanwhile.
///
/// # Panics
/// Where `rows` ends beyond the matrix.
pub unsafe fn merged(matrix: &Matrix<'_>, base: Rows, rows: Range<usize>, out: Rows) {
    assert!(rows.end <= matrix.rows);
    let work = |index: usize, threads: usize| {
        let (mut reader, mut delta) = (RowReader::new(matrix), vec![0f32; matrix.columns]);
        for row in rows.len() * index / threads..rows.len() * (index + 1) / threads {
            reader.read(rows.start + row, &mut delta);
            // SAFETY: the caller guarantees the rows; no two threads write the same row.
            unsafe { out.write_sum(row, base, rows.start + row, &delta) };
        }
    };
    if rows.len() * matrix.columns < MIN_PARALLEL_WORK { work(0, 1) } else { threads::run_on_all(&work) }
}

/// Writes the sum of rows `rows` of some matrices, of one shape, to the first rows of `out`, on all threads. A 16-bit
/// result is rounded once.
///
/// # Safety
/// `out` must have as many rows, each of as many elements as the matrices have columns. Nothing else may access it
/// meanwhile.
///
/// # Panics
/// Where `rows` ends beyond a matrix.
pub unsafe fn summed(matrices: &[&Matrix<'_>], rows: Range<usize>, out: Rows) {
    let columns = matrices.first().map_or(0, |matrix| matrix.columns);
    assert!(matrices.iter().all(|matrix| rows.end <= matrix.rows && matrix.columns == columns));
    let row_of_zeros = vec![0u16; columns];
    // SAFETY: one row, which outlives the work, of as many elements as any is asked for.
    let zeros = unsafe { Rows::new(row_of_zeros.as_ptr() as usize, 0, ElementType::Bf16) };
    let work = |index: usize, threads: usize| {
        let mut readers: Vec<RowReader<'_>> = matrices.iter().map(|matrix| RowReader::new(matrix)).collect();
        let (mut sum, mut values) = (vec![0f32; columns], vec![0f32; columns]);
        let Some((first, others)) = readers.split_first_mut() else { return };
        for row in rows.len() * index / threads..rows.len() * (index + 1) / threads {
            first.read(rows.start + row, &mut sum);
            for reader in &mut *others {
                reader.read(rows.start + row, &mut values);
                add_times(&mut sum, &values, 1.0);
            }
            // SAFETY: the caller guarantees the rows; no two threads write the same row.
            unsafe { out.write_sum(row, zeros, 0, &sum) };
        }
    };
    let weights = matrices.len() * rows.len() * columns;
    if weights < MIN_PARALLEL_WORK { work(0, 1) } else { threads::run_on_all(&work) }
}

/// Reads packed rows of one part. A whole line is transposed at once where rows are asked for in order, else one row.
#[derive(Default)]
pub(super) struct PackedRows {
    line: Option<usize>,
    next: Option<usize>,
    packed: Vec<u8>,
}

impl PackedRows {
    /// The packed row at a position of the part. Every call must be for the same matrix and part.
    pub(super) fn row(&mut self, matrix: &Matrix<'_>, part: &Part<'_>, position: usize) -> &[u8] {
        let (rows, row_size) = (part.row_count(matrix.rows), row_bytes(part.bits, matrix.columns));
        let line = Some(position / LINE_ROWS);
        let in_order = self.next.replace(position + 1) == Some(position);
        self.packed.resize(LINE_ROWS * row_size, 0);
        if self.line != line && !in_order {
            self.line = None;
            let (start, width) = layout::line_start(position, rows, row_size);
            let bytes = part.codes[start + position % LINE_ROWS..].iter().step_by(width);
            self.packed.iter_mut().take(row_size).zip(bytes).for_each(|(packed, byte)| *packed = *byte);
            return &self.packed[..row_size];
        }
        if self.line != line {
            self.line = line;
            layout::untile_line(part.codes, rows, row_size, position, &mut self.packed);
        }
        &self.packed[position % LINE_ROWS * row_size..][..row_size]
    }
}

/// Reads rows of a delta as floats; holds the buffers that all rows share.
struct RowReader<'a> {
    matrix: &'a Matrix<'a>,
    packed_rows: Vec<PackedRows>,
    column_scales: Vec<f32>,
    codes: Vec<u8>,
    wide: Vec<f32>,
}

impl<'a> RowReader<'a> {
    fn new(matrix: &'a Matrix<'a>) -> Self {
        let mut column_scales = vec![0f32; matrix.column_scales.map_or(0, <[_]>::len)];
        widen_f16(matrix.column_scales.unwrap_or_default(), &mut column_scales);
        let packed_rows = matrix.parts.iter().map(|_| PackedRows::default()).collect();
        let (codes, wide) = (vec![0; matrix.columns], vec![0.0; matrix.columns]);
        Self { matrix, packed_rows, column_scales, codes, wide }
    }

    /// Writes one row of the delta to `out [columns]`.
    fn read(&mut self, row: usize, out: &mut [f32]) {
        let (matrix, columns) = (self.matrix, self.matrix.columns);
        let mut parts = matrix.parts.iter().zip(&mut self.packed_rows);
        let part = parts.find_map(|(part, packed)| Some((part, packed, part.positions(row, row + 1).next()?)));
        match part {
            Some((part, packed, position)) => {
                let packed = packed.row(matrix, part, position);
                scaled_row(matrix, part, packed, position, &self.column_scales, &mut self.codes, out);
            }
            None => out.fill(0.0),
        }
        if let Some(sparse) = &matrix.sparse {
            sparse.for_each_in_row(row, columns, &mut |column, value| out[column] += value * matrix.unit);
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

/// Writes a part's row as floats: its packed codes under its scales and `column_scales` (empty: all 1). `codes` is a
/// buffer of as many elements as the matrix has columns.
pub(super) fn scaled_row(
    matrix: &Matrix<'_>,
    part: &Part<'_>,
    packed: &[u8],
    position: usize,
    column_scales: &[f32],
    codes: &mut [u8],
    out: &mut [f32],
) {
    let columns = matrix.columns;
    unpack(packed, part.bits, codes);
    let groups = columns.div_ceil(part.group).max(1);
    for group in 0..groups {
        let scale = part.scales_of(group, matrix.rows)[position];
        let range = group * part.group..((group + 1) * part.group).min(columns);
        let factors = column_scales.get(range.clone()).unwrap_or_default();
        scaled_levels(&codes[range.clone()], part.zero, scale.to_f32() * matrix.unit, factors, &mut out[range]);
    }
}
