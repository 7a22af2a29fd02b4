//! Adds a delta's terms to the sums of a block of rows.

use std::ops::Range;

use half::f16;

use super::backend::backend;
use super::floats::{add_narrow_product, dot};
use super::input::Input;
use super::lookup::{self, CodeLines};
use super::matrix::{Matrix, Part};
use super::rows::widen_f16;
use super::tables::{Segment, Tables};
use super::unpack::{PackedRows, scaled_row};
use crate::layout::{BLOCK_ROWS, LINE_ROWS};

/// Elements of a narrow matrix that are widened at a time.
const CHUNK_ELEMENTS: usize = 1 << 15;

/// Adds the products of rows `rows` to `sums [tokens, rows]`.
pub(super) fn add(matrix: &Matrix<'_>, input: &mut Input<'_>, rows: &Range<usize>, sums: &mut [f32]) {
    if rows.is_empty() {
        return;
    }
    for part in &matrix.parts {
        let key = part.table_key(matrix.columns);
        match input.tables.iter_mut().find(|tables| tables.key == key) {
            Some(tables) => add_by_tables(matrix, part, &input.scaled, tables, rows, sums),
            None => add_exact(matrix, part, input, rows, sums),
        }
    }
    if let (Some(sparse), Some(x)) = (&matrix.sparse, &input.by_column) {
        sparse.multiply(x, matrix.unit, rows.start, rows.end, sums);
    }
    if let Some((index, values)) = matrix.salient {
        add_narrow(values, index.len(), &input.salient, rows, sums);
    }
    if let Some((u, _)) = matrix.low_rank {
        add_narrow(u, matrix.rank(), &input.low_rank, rows, sums);
    }
}

/// Adds a part's products from lookup tables, the lines of one block at a time.
fn add_by_tables(
    matrix: &Matrix<'_>,
    part: &Part<'_>,
    x: &[f32],
    tables: &mut Tables,
    rows: &Range<usize>,
    sums: &mut [f32],
) {
    let span = part.positions(rows.start, rows.end);
    let mut scales = [0f32; BLOCK_ROWS];
    let (mut products, mut short) = (vec![0f32; tables.tokens * BLOCK_ROWS], ShortLine::default());
    for (positions, start, width) in matrix.lines(part, &span) {
        let wanted = positions.start.max(span.start)..positions.end.min(span.end);
        let stride = positions.len().next_multiple_of(LINE_ROWS);
        let products = &mut products[..tables.tokens * stride];
        for group in 0..tables.groups.len() {
            let (group, segments) = tables.groups[group].clone();
            products.fill(0.0);
            // A segment's codes stay in the L1 cache from one token to the next.
            for index in segments {
                let segment = tables.segments[index];
                let codes = &part.codes[start + segment.start * width..];
                let lines = match width {
                    ..LINE_ROWS => short.widened(codes, width, segment),
                    _ => CodeLines { codes, width, count: stride / LINE_ROWS },
                };
                lookup::add(&lines, tables.segment(index, x, backend()), stride, products);
            }
            let scales = &mut scales[..wanted.len()];
            widen_f16(&part.scales_of(group, matrix.rows)[wanted.clone()], scales);
            scales.iter_mut().for_each(|scale| *scale *= matrix.unit);
            for (products, sums) in products.chunks_exact(stride).zip(sums.chunks_exact_mut(rows.len())) {
                let values = products[wanted.start - positions.start..].iter().zip(scales.iter());
                part.scatter_add(wanted.start, values.map(|(product, scale)| product * scale), sums, rows.start);
            }
        }
    }
}

/// The rows of a part that has fewer than a line, copied into a line that is padded with other bytes.
#[derive(Default)]
struct ShortLine(Vec<u8>);

impl ShortLine {
    fn widened(&mut self, codes: &[u8], width: usize, segment: Segment) -> CodeLines<'_> {
        self.0.resize((segment.end - segment.start) * LINE_ROWS, 0);
        for (line, bytes) in self.0.chunks_exact_mut(LINE_ROWS).zip(codes.chunks_exact(width)) {
            line[..width].copy_from_slice(bytes);
        }
        CodeLines { codes: &self.0, width: LINE_ROWS, count: 1 }
    }
}

/// Adds a part's products in 32-bit floats, row by row.
fn add_exact(matrix: &Matrix<'_>, part: &Part<'_>, input: &Input<'_>, rows: &Range<usize>, sums: &mut [f32]) {
    let columns = matrix.columns;
    let (mut packed_rows, mut codes) = (PackedRows::default(), vec![0u8; columns]);
    let mut levels = vec![0f32; columns];
    for position in part.positions(rows.start, rows.end) {
        let packed = packed_rows.row(matrix, part, position);
        scaled_row(matrix, part, packed, position, &[], &mut codes, &mut levels);
        for token in 0..input.tokens {
            sums[token * rows.len() + part.row(position) - rows.start] +=
                dot(&levels, &input.scaled[token * columns..(token + 1) * columns]);
        }
    }
}

/// Adds the product of a narrow matrix `values [matrix rows, width]` with `x [tokens, width]`.
fn add_narrow(values: &[f16], width: usize, x: &[f32], rows: &Range<usize>, sums: &mut [f32]) {
    if width == 0 {
        return;
    }
    let chunk = (CHUNK_ELEMENTS / width).clamp(1, rows.len());
    let mut wide = vec![0f32; chunk * width];
    let mut products = vec![0f32; x.len() / width * chunk];
    for first in (0..rows.len()).step_by(chunk) {
        let count = chunk.min(rows.len() - first);
        let values = &values[(rows.start + first) * width..(rows.start + first + count) * width];
        let products = &mut products[..x.len() / width * count];
        products.fill(0.0);
        add_narrow_product(values, width, x, &mut wide[..count * width], products, count);
        for (sums, products) in sums.chunks_mut(rows.len()).zip(products.chunks(count)) {
            sums[first..first + count].iter_mut().zip(products).for_each(|(sum, value)| *sum += value);
        }
    }
}
