//! What the parts of a delta add to the sums of some rows.

use std::ops::Range;

use half::f16;

use super::activations::{Activations, Token};
use super::decode::{self, Codes};
use super::floats::{dot, narrow};
use super::input::Input;
use super::matrix::{Matrix, Part};
use super::rows::widen_f16;
use super::unpack::scaled_row;
use crate::layout::{RUN, row_bytes};

/// Rows that kernels take together: three, four or eight at a time.
const TILE: usize = 24;
/// Bytes that the nearest cache holds beside activations.
const NEAR: usize = 1 << 15;

/// Adds the products of rows `of` to `sums [tokens, rows]`.
pub(super) fn add(matrix: &Matrix<'_>, input: &Input, of: &Range<usize>, sums: &mut [f32]) {
    if of.is_empty() {
        return;
    }
    for part in &matrix.parts {
        match &input.integers {
            Some(all) if part.group >= matrix.columns => integers(matrix, part, all, of, sums),
            Some(all) if part.takes_integers(matrix.columns) => grouped(matrix, part, all, of, sums),
            _ => floats(matrix, part, input, of, sums),
        }
    }
    if let (Some(sparse), Some(x)) = (&matrix.sparse, &input.packed) {
        sparse.multiply(x, matrix.unit, of.start, of.end, sums);
    }
    side(matrix.salient.map(|(index, values)| (values, index.len())), &input.salient, of, sums);
    side(matrix.low_rank.map(|(u, _)| (u, matrix.rank())), &input.inner, of, sums);
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
    let (mut codes, mut level) = (vec![0u8; columns], vec![0f32; columns]);
    for at in part.span(of.start, of.end) {
        scaled_row(matrix, part, at, &[], &mut codes, &mut level);
        for token in 0..input.tokens {
            sums[token * of.len() + part.row(at) - of.start] +=
                dot(&level, &input.scaled[token * columns..(token + 1) * columns]);
        }
    }
}

/// Adds a narrow product, `[rows, width] · [tokens, width]`.
fn side(values: Option<(&[f16], usize)>, x: &[f32], of: &Range<usize>, sums: &mut [f32]) {
    let Some((values, width)) = values.filter(|(_, width)| *width > 0) else { return };
    let chunk = (NEAR / width).clamp(1, of.len());
    let mut wide = vec![0f32; chunk * width];
    let mut part = vec![0f32; x.len() / width * chunk];
    for first in (0..of.len()).step_by(chunk) {
        let some = chunk.min(of.len() - first);
        let values = &values[(of.start + first) * width..(of.start + first + some) * width];
        let part = &mut part[..x.len() / width * some];
        part.fill(0.0);
        narrow(values, width, x, &mut wide[..some * width], part, some);
        for (sums, part) in sums.chunks_mut(of.len()).zip(part.chunks(some)) {
            sums[first..first + some].iter_mut().zip(part).for_each(|(sum, value)| *sum += value);
        }
    }
}
