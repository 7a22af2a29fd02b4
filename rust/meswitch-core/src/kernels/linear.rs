//! `y += Δ̂ · x` on a team of threads: in 32-bit floats, as the reference, or with activations of 15 bits.

use half::f16;

use super::decode::{Steps, dot_row};
use super::matrix::{Matrix, Part};
use super::sparse::Packed;
use super::{by_backend, team};
use crate::layout;

/// Fewer multiplications than this are not worth waking a team for.
const ALONE: usize = 1 << 18;

by_backend! {
    /// Unpacks one row into floats, `code − zero`.
    pub fn levels(packed: &[u8], bits: u32, zero: f32, codes: &mut [u8], out: &mut [f32]) = levels_body
}

#[inline(always)]
fn levels_body(packed: &[u8], bits: u32, zero: f32, codes: &mut [u8], out: &mut [f32]) {
    layout::unpack_row(packed, bits, codes);
    for (level, code) in out.iter_mut().zip(codes.iter()) {
        *level = f32::from(*code) - zero;
    }
}

by_backend! {
    /// `Σ a·b` in sixteen lanes.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 = dot_body
}

#[inline(always)]
fn dot_body(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (whole_a, whole_b) = (a.chunks_exact(16), b.chunks_exact(16));
    for ((lane, a), b) in lanes.iter_mut().zip(whole_a.remainder()).zip(whole_b.remainder()) {
        *lane = a * b;
    }
    for (a, b) in whole_a.zip(whole_b) {
        for i in 0..16 {
            lanes[i] += a[i] * b[i];
        }
    }
    lanes.iter().sum()
}

/// The tokens of one expert, ready for a site: `[tokens, …]` each.
struct Input {
    tokens: usize,
    /// Activations times column scales.
    scaled: Vec<f32>,
    /// The same in integers, where sums need not be exact.
    steps: Option<Steps>,
    /// Activations of the salient channels.
    salient: Vec<f32>,
    /// `V · x`.
    inner: Vec<f32>,
    /// Activations by column, for sparse entries.
    packed: Option<Packed>,
}

impl Input {
    fn new(matrix: &Matrix<'_>, x: &[f32], exact: bool) -> Self {
        let tokens = x.len() / matrix.columns.max(1);
        let mut input =
            Self { tokens, scaled: Vec::new(), steps: None, salient: Vec::new(), inner: Vec::new(), packed: None };
        if matrix.sparse.is_some() {
            input.packed = (tokens > 0).then(|| Packed::of(x, matrix.columns));
            return input;
        }
        input.scaled = x.to_vec();
        for row in input.scaled.chunks_mut(matrix.columns.max(1)) {
            for (value, scale) in row.iter_mut().zip(matrix.column_scales.unwrap_or_default()) {
                *value *= scale.to_f32();
            }
        }
        if !exact && matrix.parts.iter().any(|part| part.group >= matrix.columns) {
            input.steps = Some(Steps::of(&input.scaled, matrix.columns));
        }
        for row in x.chunks(matrix.columns.max(1)) {
            if let Some((index, _)) = matrix.salient {
                input.salient.extend(index.iter().map(|i| row[*i as usize] * matrix.unit));
            }
            if let Some((_, v)) = matrix.low_rank {
                let mut wide = vec![0f32; matrix.columns];
                for v in v.chunks(matrix.columns) {
                    widen(v, &mut wide);
                    input.inner.push(dot(&wide, row) * matrix.unit);
                }
            }
        }
        input
    }
}

fn widen(halves: &[f16], out: &mut [f32]) {
    use half::slice::HalfFloatSliceExt;
    halves.convert_to_f32_slice(out);
}

/// Adds `Δ̂ · x` of some tokens: `x [tokens, columns]`; `add(token, first row, values)` takes runs of rows as they come,
/// from many threads, each `(token, row)` exactly once. Unless `exact`, activations of rows with one scale are rounded
/// to 15 bits.
pub fn delta_linear(matrix: &Matrix<'_>, x: &[f32], exact: bool, add: &(dyn Fn(usize, usize, &[f32]) + Sync)) {
    let input = Input::new(matrix, x, exact);
    let work = |index: usize, threads: usize| {
        let share = matrix.rows.div_ceil(threads);
        let (start, end) = ((index * share).min(matrix.rows), ((index + 1) * share).min(matrix.rows));
        rows(matrix, &input, start, end, add);
    };
    if matrix.weights() * input.tokens < ALONE {
        work(0, 1);
    } else {
        team::parallel(&work);
    }
}

fn rows(matrix: &Matrix<'_>, input: &Input, start: usize, end: usize, add: &(dyn Fn(usize, usize, &[f32]) + Sync)) {
    let count = end - start;
    if count == 0 {
        return;
    }
    let mut sums = vec![0f32; input.tokens * count];
    for part in &matrix.parts {
        match &input.steps {
            Some(steps) if part.group >= matrix.columns => integers(matrix, part, steps, start, end, &mut sums),
            _ => floats(matrix, part, input, start, end, &mut sums),
        }
    }
    if let (Some(sparse), Some(x)) = (&matrix.sparse, &input.packed) {
        sparse.multiply(x, matrix.unit, start, end, &mut sums);
    }
    side(matrix.salient.map(|(index, values)| (values, index.len())), &input.salient, start, count, &mut sums);
    side(matrix.low_rank.map(|(u, _)| (u, matrix.rank())), &input.inner, start, count, &mut sums);
    for (token, sums) in sums.chunks(count).enumerate() {
        add(token, start, sums);
    }
}

fn integers(matrix: &Matrix<'_>, part: &Part<'_>, steps: &Steps, start: usize, end: usize, sums: &mut [f32]) {
    let mut dots = vec![0i64; steps.tokens()];
    for at in part.span(start, end) {
        dot_row(part.packed(at, matrix.columns), part.bits, steps, &mut dots);
        let scale = part.scales[at].to_f32() * matrix.unit;
        for (token, dot) in dots.iter().enumerate() {
            // Exact in 64 bits: the zero takes most of the sum away.
            let level = *dot as f64 - f64::from(part.zero) * steps.sum[token] as f64;
            sums[token * (end - start) + part.row(at) - start] += level as f32 * steps.step[token] * scale;
        }
    }
}

fn floats(matrix: &Matrix<'_>, part: &Part<'_>, input: &Input, start: usize, end: usize, sums: &mut [f32]) {
    let columns = matrix.columns;
    let (mut unpacked, mut level) = (vec![0u8; columns], vec![0f32; columns]);
    let groups = columns.div_ceil(part.group).max(1);
    for at in part.span(start, end) {
        levels(part.packed(at, columns), part.bits, part.zero, &mut unpacked, &mut level);
        let scales = &part.scales[at * groups..(at + 1) * groups];
        for (scale, level) in scales.iter().zip(level.chunks_mut(part.group)) {
            let scale = scale.to_f32() * matrix.unit;
            level.iter_mut().for_each(|value| *value *= scale);
        }
        for token in 0..input.tokens {
            sums[token * (end - start) + part.row(at) - start] +=
                dot(&level, &input.scaled[token * columns..(token + 1) * columns]);
        }
    }
}

/// Adds a narrow product, `[rows, width] · [tokens, width]`.
fn side(values: Option<(&[f16], usize)>, x: &[f32], start: usize, count: usize, sums: &mut [f32]) {
    let Some((values, width)) = values else { return };
    let mut row = vec![0f32; width];
    for at in 0..count {
        widen(&values[(start + at) * width..(start + at + 1) * width], &mut row);
        for (token, x) in x.chunks(width).enumerate() {
            sums[token * count + at] += row.iter().zip(x).map(|(a, b)| a * b).sum::<f32>();
        }
    }
}

/// Row `row` of the delta, times `scale`, added to `out [columns]`: what an embedding looks up.
pub fn add_row(matrix: &Matrix<'_>, row: usize, scale: f32, out: &mut [f32]) {
    dense_row(matrix, row, &mut |at, value| out[at] += value * scale);
}

/// Rows `start .. start + out.len() / columns` of the delta, dense.
pub fn dense(matrix: &Matrix<'_>, start: usize, out: &mut [f32]) {
    for (at, out) in out.chunks_mut(matrix.columns.max(1)).enumerate() {
        out.fill(0.0);
        dense_row(matrix, start + at, &mut |column, value| out[column] += value);
    }
}

fn dense_row(matrix: &Matrix<'_>, row: usize, add: &mut dyn FnMut(usize, f32)) {
    let columns = matrix.columns;
    if let Some(sparse) = &matrix.sparse {
        sparse.each(row, columns, &mut |column, value| add(column, value * matrix.unit));
        return;
    }
    let (mut unpacked, mut level) = (vec![0u8; columns], vec![0f32; columns]);
    for part in &matrix.parts {
        let groups = columns.div_ceil(part.group).max(1);
        for at in part.span(row, row + 1) {
            levels(part.packed(at, columns), part.bits, part.zero, &mut unpacked, &mut level);
            for (i, value) in level.iter().enumerate() {
                let scale = part.scales[at * groups + i / part.group].to_f32() * matrix.unit;
                add(i, value * scale * matrix.column_scales.map_or(1.0, |scales| scales[i].to_f32()));
            }
        }
    }
    if let Some((u, v)) = matrix.low_rank {
        let rank = matrix.rank();
        for (u, v) in u[row * rank..(row + 1) * rank].iter().zip(v.chunks(columns)) {
            let u = u.to_f32() * matrix.unit;
            v.iter().enumerate().for_each(|(i, v)| add(i, u * v.to_f32()));
        }
    }
    if let Some((index, values)) = matrix.salient {
        for (i, value) in index.iter().zip(&values[row * index.len()..(row + 1) * index.len()]) {
            add(*i as usize, value.to_f32() * matrix.unit);
        }
    }
}
