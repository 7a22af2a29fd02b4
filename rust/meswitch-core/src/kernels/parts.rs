//! What the parts of a delta add to the sums of some rows.

use std::ops::Range;

use half::f16;

use super::backend::backend;
use super::floats::{dot, narrow};
use super::input::Input;
use super::lookup::{self, Lines};
use super::matrix::{Matrix, Part};
use super::rows::widen_f16;
use super::tables::{Segment, Tables};
use super::unpack::{Strip, scaled_row};
use crate::layout::{BLOCK, LINE};

/// Bytes that the nearest cache holds beside activations.
const NEAR: usize = 1 << 15;

/// Adds the products of rows `of` to `sums [tokens, rows]`.
pub(super) fn add(matrix: &Matrix<'_>, input: &mut Input<'_>, of: &Range<usize>, sums: &mut [f32]) {
    if of.is_empty() {
        return;
    }
    for part in &matrix.parts {
        let form = part.form(matrix.columns);
        match input.tables.iter_mut().find(|tables| tables.form == form) {
            Some(tables) => look_up(matrix, part, &input.scaled, tables, of, sums),
            None => floats(matrix, part, input, of, sums),
        }
    }
    if let (Some(sparse), Some(x)) = (&matrix.sparse, &input.packed) {
        sparse.multiply(x, matrix.unit, of.start, of.end, sums);
    }
    side(matrix.salient.map(|(index, values)| (values, index.len())), &input.salient, of, sums);
    side(matrix.low_rank.map(|(u, _)| (u, matrix.rank())), &input.inner, of, sums);
}

/// Rows whose sums are looked up, some lines of a block at a time.
fn look_up(matrix: &Matrix<'_>, part: &Part<'_>, x: &[f32], tables: &mut Tables, of: &Range<usize>, sums: &mut [f32]) {
    let span = part.span(of.start, of.end);
    let groups = matrix.columns.div_ceil(part.group).max(1);
    let mut scales = vec![0f32; groups * BLOCK];
    let (mut found, mut rest) = (vec![0f32; tables.tokens * BLOCK], Rest::default());
    for (rows, start, width) in matrix.lines(part, &span) {
        let (count, known) = (rows.len(), rows.start.max(span.start)..rows.end.min(span.end));
        scales_of(part, &known, groups, matrix.unit, &mut scales);
        let (whole, room) = (count / LINE * LINE, count.next_multiple_of(LINE));
        let found = &mut found[..tables.tokens * room];
        for at in 0..tables.groups.len() {
            let (group, segments) = tables.groups[at].clone();
            found.fill(0.0);
            // A segment's codes stay in the nearest cache from one token to the next.
            for at in segments {
                let segment = tables.segments[at];
                let lines = Lines { codes: &part.codes[start + segment.start * width..], width, count: whole / LINE };
                let tokens = tables.at(at, x, backend());
                lookup::add(&lines, tokens, room, found);
                lookup::add(&rest.of(&lines, count - whole, segment), tokens, room, &mut found[whole..]);
            }
            let scales = &scales[group * known.len()..][..known.len()];
            for (found, sums) in found.chunks_exact(room).zip(sums.chunks_exact_mut(of.len())) {
                let values = found[known.start - rows.start..].iter().zip(scales).map(|(sum, scale)| sum * scale);
                part.scatter(known.start, values, sums, of.start);
            }
        }
    }
}

/// A segment's last rows, fewer than a line, as a line of their own.
#[derive(Default)]
struct Rest(Vec<u8>);

impl Rest {
    /// The rows after whole lines.
    fn of(&mut self, lines: &Lines<'_>, rows: usize, segment: Segment) -> Lines<'_> {
        if rows > 0 {
            let (after, bytes) = (lines.count * LINE, segment.end - segment.start);
            self.0.resize(bytes * LINE, 0);
            for (at, line) in self.0.chunks_exact_mut(LINE).enumerate() {
                line[..rows].copy_from_slice(&lines.codes[at * lines.width + after..][..rows]);
            }
        }
        Lines { codes: &self.0, width: LINE, count: rows.div_ceil(LINE) }
    }
}

/// The scales of some rows in units of one, a group's after another's.
fn scales_of(part: &Part<'_>, rows: &Range<usize>, groups: usize, unit: f32, scales: &mut [f32]) {
    let halves = &part.scales[rows.start * groups..rows.end * groups];
    if groups == 1 {
        widen_f16(halves, &mut scales[..halves.len()]);
    } else {
        let mut wide = vec![0f32; halves.len()];
        widen_f16(halves, &mut wide);
        for (row, wide) in wide.chunks_exact(groups).enumerate() {
            wide.iter().zip(scales[row..].iter_mut().step_by(rows.len())).for_each(|(from, to)| *to = *from);
        }
    }
    scales[..halves.len()].iter_mut().for_each(|scale| *scale *= unit);
}

fn floats(matrix: &Matrix<'_>, part: &Part<'_>, input: &Input<'_>, of: &Range<usize>, sums: &mut [f32]) {
    let columns = matrix.columns;
    let (mut strip, mut codes, mut level) = (Strip::default(), vec![0u8; columns], vec![0f32; columns]);
    for at in part.span(of.start, of.end) {
        scaled_row(matrix, part, strip.row(matrix, part, at), at, &[], &mut codes, &mut level);
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
