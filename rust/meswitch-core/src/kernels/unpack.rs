//! Rows of a delta as floats: what an embedding looks up, and what a prefill multiplies with.

use std::ops::Range;

use super::floats::{add_times, levels, multiply};
use super::matrix::Matrix;
use super::rows::{Rows, widen_f16};
use super::team::{self, ALONE};

/// Row `row` of the delta, times `scale`, added to `out [columns]`.
pub fn add_row(matrix: &Matrix<'_>, row: usize, scale: f32, out: &mut [f32]) {
    let mut values = vec![0f32; matrix.columns];
    dense_row(matrix, row, &mut values);
    add_times(out, &values, scale);
}

/// Rows `start .. start + out.len() / columns` of the delta, dense.
pub fn dense(matrix: &Matrix<'_>, start: usize, out: &mut [f32]) {
    for (at, out) in out.chunks_mut(matrix.columns.max(1)).enumerate() {
        out.fill(0.0);
        dense_row(matrix, start + at, out);
    }
}

/// Rows `of` of base and delta together, on all threads: `out [rows, columns]`.
///
/// # Safety
/// `base` must have those rows, of as many elements as the matrix has columns.
pub unsafe fn merged(matrix: &Matrix<'_>, base: Rows, of: Range<usize>, out: &mut [f32]) {
    let columns = matrix.columns;
    assert!(of.end <= matrix.rows && out.len() == of.len() * columns);
    let address = out.as_mut_ptr() as usize;
    let work = |index: usize, threads: usize| {
        let mut delta = vec![0f32; columns];
        for at in of.len() * index / threads..of.len() * (index + 1) / threads {
            // SAFETY: no two threads have a row in common, and `out` has that many.
            let out = unsafe { std::slice::from_raw_parts_mut((address as *mut f32).add(at * columns), columns) };
            // SAFETY: the caller's promise.
            unsafe { base.read(of.start + at, out) };
            delta.fill(0.0);
            dense_row(matrix, of.start + at, &mut delta);
            add_times(out, &delta, 1.0);
        }
    };
    if out.len() < ALONE { work(0, 1) } else { team::parallel(&work) }
}

fn dense_row(matrix: &Matrix<'_>, row: usize, out: &mut [f32]) {
    let columns = matrix.columns;
    if let Some(sparse) = &matrix.sparse {
        sparse.each(row, columns, &mut |column, value| out[column] += value * matrix.unit);
        return;
    }
    let (mut unpacked, mut level) = (vec![0u8; columns], vec![0f32; columns]);
    for part in &matrix.parts {
        let groups = columns.div_ceil(part.group).max(1);
        for at in part.span(row, row + 1) {
            levels(part.packed(at, columns), part.bits, part.zero, &mut unpacked, &mut level);
            let scales = &part.scales[at * groups..(at + 1) * groups];
            for ((out, level), scale) in out.chunks_mut(part.group).zip(level.chunks(part.group)).zip(scales) {
                add_times(out, level, scale.to_f32() * matrix.unit);
            }
        }
    }
    if let Some(scales) = matrix.column_scales {
        widen_f16(scales, &mut level);
        multiply(out, &level);
    }
    if let Some((u, v)) = matrix.low_rank {
        let rank = matrix.rank();
        for (u, v) in u[row * rank..(row + 1) * rank].iter().zip(v.chunks(columns)) {
            widen_f16(v, &mut level);
            add_times(out, &level, u.to_f32() * matrix.unit);
        }
    }
    if let Some((index, values)) = matrix.salient {
        for (i, value) in index.iter().zip(&values[row * index.len()..(row + 1) * index.len()]) {
            out[*i as usize] += value.to_f32() * matrix.unit;
        }
    }
}
