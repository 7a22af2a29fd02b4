//! `y += Δ̂ · x` on a team of threads: in 32-bit floats, as the reference, or with activations of 8 bits.

use std::ops::Range;
use std::sync::{Mutex, OnceLock};

use half::f16;

use super::activations::{Activations, Token};
use super::decode::{self, Codes};
use super::matrix::{Matrix, Part};
use super::rows::{Rows, widen_f16};
use super::sparse::Packed;
use super::{by_backend, team};
use crate::layout::{self, RUN, row_bytes};

/// Fewer multiplications than this are not worth waking a team for.
const ALONE: usize = 1 << 18;
/// Rows that kernels take together.
const TILE: usize = 8;
/// Tokens whose activations are rounded together: more would not fit the second cache.
const TOKENS: usize = 64;
/// Bytes that the nearest cache holds beside activations.
const NEAR: usize = 1 << 15;

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

by_backend! {
    /// Widens a block of rows `[count, width]` and adds its products with `x [tokens, width]` to `sums [tokens, count]`.
    pub fn narrow(values: &[f16], width: usize, x: &[f32], wide: &mut [f32], sums: &mut [f32], count: usize)
        = narrow_body
}

#[inline(always)]
fn narrow_body(values: &[f16], width: usize, x: &[f32], wide: &mut [f32], sums: &mut [f32], count: usize) {
    widen_f16(values, wide);
    for (x, sums) in x.chunks_exact(width).zip(sums.chunks_exact_mut(count)) {
        for (sum, row) in sums.iter_mut().zip(wide.chunks_exact(width)) {
            *sum += dot_body(row, x);
        }
    }
}

/// The tokens of one expert, ready for a site: `[tokens, …]` each.
#[derive(Default)]
struct Input {
    tokens: usize,
    /// Activations times column scales, unless all parts take integers.
    scaled: Vec<f32>,
    /// The same in integers, where sums need not be exact.
    integers: Option<Activations>,
    /// Activations of the salient channels.
    salient: Vec<f32>,
    /// `V · x`.
    inner: Vec<f32>,
    /// Activations by column, for sparse entries.
    packed: Option<Packed>,
}

impl Input {
    fn new(matrix: &Matrix<'_>, x: &[f32], exact: bool) -> Self {
        let columns = matrix.columns.max(1);
        let tokens = x.len() / columns;
        let mut input = Self { tokens, ..Self::default() };
        if matrix.sparse.is_some() {
            input.packed = (tokens > 0).then(|| Packed::of(x, matrix.columns));
            return input;
        }
        input.scaled = x.to_vec();
        if let Some(scales) = matrix.column_scales {
            let mut wide = vec![0f32; columns];
            widen_f16(scales, &mut wide);
            for row in input.scaled.chunks_mut(columns) {
                row.iter_mut().zip(&wide).for_each(|(value, scale)| *value *= scale);
            }
        }
        let whole = |part: &Part<'_>| !exact && takes_integers(part, matrix.columns);
        if matrix.parts.iter().any(whole) {
            let mut widths: Vec<u32> =
                matrix.parts.iter().flat_map(|part| decode::widths(part.bits)).map(|w| w.0).collect();
            widths.sort_unstable();
            widths.dedup();
            let mut x =
                if matrix.parts.iter().all(whole) { std::mem::take(&mut input.scaled) } else { input.scaled.clone() };
            input.integers = Some(Activations::of(&mut x, matrix.columns, &widths, decode::unit()));
        }
        if let Some((index, _)) = matrix.salient {
            for row in x.chunks(columns) {
                input.salient.extend(index.iter().map(|i| row[*i as usize] * matrix.unit));
            }
        }
        if let Some((_, v)) = matrix.low_rank {
            input.inner = inner(v, x, matrix);
        }
        input
    }
}

/// Whether a part's rows may be summed in integers: scales change at whole runs of 64 columns, if at all.
fn takes_integers(part: &Part<'_>, columns: usize) -> bool {
    part.group >= columns || part.group.is_multiple_of(RUN)
}

/// `V · x · unit`, `[tokens, rank]`.
fn inner(v: &[f16], x: &[f32], matrix: &Matrix<'_>) -> Vec<f32> {
    let (columns, rank) = (matrix.columns, matrix.rank());
    let tokens = x.len() / columns.max(1);
    let products = |of: Range<usize>| {
        let mut sums = vec![0f32; tokens * of.len()];
        let mut wide = vec![0f32; columns];
        for (at, k) in of.clone().enumerate() {
            let mut one = vec![0f32; tokens];
            narrow(&v[k * columns..(k + 1) * columns], columns, x, &mut wide, &mut one, 1);
            one.iter().enumerate().for_each(|(token, value)| sums[token * of.len() + at] = value * matrix.unit);
        }
        sums
    };
    if rank * columns * tokens < ALONE {
        return products(0..rank);
    }
    let all = Mutex::new(vec![0f32; tokens * rank]);
    team::parallel(&|index, threads| {
        let of = rank * index / threads..rank * (index + 1) / threads;
        let sums = products(of.clone());
        let mut all = all.lock().expect("no thread panics while it holds this");
        for (all, sums) in all.chunks_mut(rank).zip(sums.chunks(of.len().max(1))) {
            all[of.clone()].copy_from_slice(sums);
        }
    });
    all.into_inner().expect("as above")
}

/// Adds `Δ̂ · x` of some tokens: `x [tokens, columns]`; `add(token, first row, values)` takes runs of rows as they come,
/// from many threads, each `(token, row)` exactly once. Unless `exact`, activations are rounded to 8 bits where scales
/// allow it.
pub fn delta_linear(matrix: &Matrix<'_>, x: &[f32], exact: bool, add: &(dyn Fn(usize, usize, &[f32]) + Sync)) {
    let input = Input::new(matrix, x, exact);
    multiply(&[(matrix, input)], &|_, token, first, values| add(token, first, values));
}

/// The delta of one expert, and the rows of activations that are its tokens, rising.
pub struct Product<'a> {
    /// The delta.
    pub matrix: &'a Matrix<'a>,
    /// The rows.
    pub tokens: &'a [u32],
}

/// `y[t] += Δ̂ · x[t]` for the tokens of several experts on one weight. Unless `exact`, activations are rounded to 8 bits
/// where scales allow it.
///
/// # Safety
/// `x` must have the tokens' rows of as many elements as matrices have columns, `y` of as many as they have rows.
pub unsafe fn add_products(products: &[Product<'_>], x: Rows, y: Rows, exact: bool) {
    let mut items: Vec<(&Matrix<'_>, &[u32])> = Vec::new();
    for product in products {
        items.extend(product.tokens.chunks(TOKENS).map(|tokens| (product.matrix, tokens)));
    }
    let input = |(matrix, tokens): &(&Matrix<'_>, &[u32])| {
        let mut wide = vec![0f32; tokens.len() * matrix.columns];
        for (token, wide) in tokens.iter().zip(wide.chunks_mut(matrix.columns.max(1))) {
            // SAFETY: the caller's promise.
            unsafe { x.read(*token as usize, wide) };
        }
        Input::new(matrix, &wide, exact)
    };
    let slots: Vec<OnceLock<Input>> = items.iter().map(|_| OnceLock::new()).collect();
    let fill = |index: usize, threads: usize| {
        for (item, slot) in items.iter().zip(&slots).skip(index).step_by(threads) {
            slot.get_or_init(|| input(item));
        }
    };
    if items.len() < 2 {
        fill(0, 1);
    } else {
        team::parallel(&fill);
    }
    let inputs = slots.into_iter().map(|slot| slot.into_inner().expect("filled"));
    let ready: Vec<(&Matrix<'_>, Input)> = items.iter().map(|item| item.0).zip(inputs).collect();
    multiply(&ready, &|item, token, first, values| {
        // SAFETY: the caller's promise; every (token, row) is handed out once, so no two threads share an element.
        unsafe { y.add(items[item].1[token] as usize, first, values) };
    });
}

type Add<'a> = &'a (dyn Fn(usize, usize, usize, &[f32]) + Sync);

/// Hands out `(item, token, first row, values)`.
fn multiply(items: &[(&Matrix<'_>, Input)], add: Add<'_>) {
    let work = |index: usize, threads: usize| {
        for (item, (matrix, input)) in items.iter().enumerate() {
            let of = matrix.share(TILE, index, threads);
            rows(matrix, input, of, &|token, first, values| add(item, token, first, values));
        }
    };
    let products = |(matrix, input): &(&Matrix<'_>, Input)| matrix.weights() * input.tokens;
    if items.iter().map(products).sum::<usize>() < ALONE { work(0, 1) } else { team::parallel(&work) }
}

fn rows(matrix: &Matrix<'_>, input: &Input, of: Range<usize>, add: &(dyn Fn(usize, usize, &[f32]) + Sync)) {
    let (start, count) = (of.start, of.len());
    if count == 0 {
        return;
    }
    let mut sums = vec![0f32; input.tokens * count];
    for part in &matrix.parts {
        match &input.integers {
            Some(all) if part.group >= matrix.columns => integers(matrix, part, all, &of, &mut sums),
            Some(all) if takes_integers(part, matrix.columns) => grouped(matrix, part, all, &of, &mut sums),
            _ => floats(matrix, part, input, &of, &mut sums),
        }
    }
    if let (Some(sparse), Some(x)) = (&matrix.sparse, &input.packed) {
        sparse.multiply(x, matrix.unit, start, of.end, &mut sums);
    }
    side(matrix.salient.map(|(index, values)| (values, index.len())), &input.salient, start, count, &mut sums);
    side(matrix.low_rank.map(|(u, _)| (u, matrix.rank())), &input.inner, start, count, &mut sums);
    for (token, sums) in sums.chunks(count).enumerate() {
        add(token, start, sums);
    }
}

/// A part's codes as kernels take them: of one width, with its factor and the tokens for it.
struct Plane<'a> {
    codes: Codes<'a>,
    factor: f32,
    tokens: Vec<Token<'a>>,
}

/// The planes of some rows of a part, and how many rows to take together: as many as the nearest cache holds, and few
/// where planes lie in turn within a row, so that memory is read in order.
fn planes<'a>(
    matrix: &Matrix<'a>,
    part: &Part<'a>,
    all: &'a Activations,
    span: &Range<usize>,
) -> (Vec<Plane<'a>>, usize) {
    let stride = row_bytes(part.bits, matrix.columns);
    let bytes = &part.codes[span.start * stride..span.end * stride];
    let plane = |(codes, factor): (Codes<'a>, f32)| Plane { tokens: all.tokens_for(codes.bits), codes, factor };
    let planes: Vec<_> = Codes::of(bytes, part.bits, matrix.columns).into_iter().map(plane).collect();
    let near = (NEAR / stride.max(1)).next_multiple_of(TILE);
    let together = if planes.len() > 1 { TILE } else { near };
    (planes, together)
}

/// Rows with one scale each.
fn integers(matrix: &Matrix<'_>, part: &Part<'_>, all: &Activations, of: &Range<usize>, sums: &mut [f32]) {
    let span = part.span(of.start, of.end);
    let zeros: Vec<f32> = (0..all.tokens()).map(|token| all.sum(token) * part.zero).collect();
    let mut scales = vec![0f32; span.len()];
    widen_f16(&part.scales[span.clone()], &mut scales);
    scales.iter_mut().for_each(|scale| *scale *= matrix.unit);
    let (planes, together) = planes(matrix, part, all, &span);
    let mut dots = vec![0f32; all.tokens() * together];
    for first in (0..span.len()).step_by(together) {
        let rows = first..(first + together).min(span.len());
        for Plane { codes, factor, tokens } in &planes {
            let dots = &mut dots[..tokens.len() * rows.len()];
            decode::dot(&codes.some(rows.clone()), tokens, dots);
            for ((dots, zero), sums) in dots.chunks(rows.len()).zip(&zeros).zip(sums.chunks_mut(of.len())) {
                // What a zero takes away belongs to the first plane.
                let zero = if *factor == 1.0 { *zero } else { 0.0 };
                let values = dots.iter().zip(&scales[rows.clone()]).map(|(dot, scale)| (factor * dot - zero) * scale);
                part.scatter(span.start + first, values, &mut sums[..], of.start);
            }
        }
    }
}

/// Rows whose scales change at whole runs of 64 columns.
fn grouped(matrix: &Matrix<'_>, part: &Part<'_>, all: &Activations, of: &Range<usize>, sums: &mut [f32]) {
    let (groups, blocks) = (matrix.columns.div_ceil(part.group), matrix.columns.div_ceil(RUN));
    let span = part.span(of.start, of.end);
    let zeros = |token| all.sums(token).iter().map(|sum| sum * part.zero).collect();
    let zeros: Vec<Vec<f32>> = (0..all.tokens()).map(zeros).collect();
    let zeros: Vec<&[f32]> = zeros.iter().map(Vec::as_slice).collect();
    let (planes, _) = planes(matrix, part, all, &span);
    let (mut narrow, mut scales) = (vec![0f32; TILE * groups], vec![0f32; TILE * blocks]);
    let mut dots = vec![0f32; all.tokens() * TILE];
    for first in (0..span.len()).step_by(TILE) {
        let rows = first..(first + TILE).min(span.len());
        let at = (span.start + rows.start) * groups..(span.start + rows.end) * groups;
        widen_f16(&part.scales[at.clone()], &mut narrow[..at.len()]);
        for (narrow, scales) in narrow.chunks(groups).zip(scales.chunks_mut(blocks)) {
            for (scales, narrow) in scales.chunks_mut(part.group / RUN).zip(narrow) {
                scales.fill(narrow * matrix.unit);
            }
        }
        for Plane { codes, factor, tokens } in &planes {
            let (zeros, dots) = (if *factor == 1.0 { &zeros[..] } else { &[] }, &mut dots[..tokens.len() * rows.len()]);
            decode::dot_scaled(&codes.some(rows.clone()), &scales[..rows.len() * blocks], tokens, zeros, dots);
            for (dots, sums) in dots.chunks(rows.len()).zip(sums.chunks_mut(of.len())) {
                part.scatter(span.start + first, dots.iter().map(|dot| factor * dot), &mut sums[..], of.start);
            }
        }
    }
}

fn floats(matrix: &Matrix<'_>, part: &Part<'_>, input: &Input, of: &Range<usize>, sums: &mut [f32]) {
    let columns = matrix.columns;
    let (mut unpacked, mut level) = (vec![0u8; columns], vec![0f32; columns]);
    let groups = columns.div_ceil(part.group).max(1);
    for at in part.span(of.start, of.end) {
        levels(part.packed(at, columns), part.bits, part.zero, &mut unpacked, &mut level);
        let scales = &part.scales[at * groups..(at + 1) * groups];
        for (scale, level) in scales.iter().zip(level.chunks_mut(part.group)) {
            let scale = scale.to_f32() * matrix.unit;
            level.iter_mut().for_each(|value| *value *= scale);
        }
        for token in 0..input.tokens {
            sums[token * of.len() + part.row(at) - of.start] +=
                dot(&level, &input.scaled[token * columns..(token + 1) * columns]);
        }
    }
}

/// Adds a narrow product, `[rows, width] · [tokens, width]`.
fn side(values: Option<(&[f16], usize)>, x: &[f32], start: usize, count: usize, sums: &mut [f32]) {
    let Some((values, width)) = values else { return };
    let chunk = (NEAR / width.max(1)).max(1);
    let mut wide = vec![0f32; chunk * width];
    let mut part = vec![0f32; x.len() / width.max(1) * chunk];
    for first in (0..count).step_by(chunk) {
        let some = chunk.min(count - first);
        let values = &values[(start + first) * width..(start + first + some) * width];
        let part = &mut part[..x.len() / width.max(1) * some];
        part.fill(0.0);
        narrow(values, width, x, &mut wide[..some * width], part, some);
        for (sums, part) in sums.chunks_mut(count).zip(part.chunks(some)) {
            sums[first..first + some].iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
        }
    }
}

/// Row `row` of the delta, times `scale`, added to `out [columns]`: what an embedding looks up.
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
        out.iter_mut().zip(&level).for_each(|(out, scale)| *out *= scale);
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

by_backend! {
    /// `out += values · scale`.
    pub fn add_times(out: &mut [f32], values: &[f32], scale: f32) = add_times_body
}

#[inline(always)]
fn add_times_body(out: &mut [f32], values: &[f32], scale: f32) {
    for (out, value) in out.iter_mut().zip(values) {
        *out += value * scale;
    }
}
