//! Sums looked up half byte by half byte: the truth of the others.

use super::lookup::{Lines, Table, Tokens};
use super::tables::{HALF, Halves, ROUND, Sums};
use crate::layout::LINE;

/// Adds `step · Σ sums` of every row to `out [tokens, room]`.
pub fn add(lines: &Lines<'_>, tokens: Tokens<'_>, room: usize, out: &mut [f32]) {
    for (Table { sums, step }, out) in tokens.each().zip(out.chunks_mut(room)) {
        one(lines, sums, step, out);
    }
}

fn one(lines: &Lines<'_>, sums: &[Sums], step: f32, out: &mut [f32]) {
    for (line, out) in out.chunks_exact_mut(LINE).take(lines.count).enumerate() {
        let mut rows = [0i16; LINE];
        for (at, Sums(sums)) in sums.iter().enumerate() {
            for (row, byte) in rows.iter_mut().zip(lines.bytes(at, line)) {
                *row += sums[usize::from(byte & 15)] + sums[HALF + usize::from(byte >> 4)];
            }
        }
        out.iter_mut().zip(rows).for_each(|(out, row)| *out += step * f32::from(row));
    }
}

/// The sums of every byte: `COLUMNS` activations, `TERMS` of them in half of it.
pub fn fill<const COLUMNS: usize, const TERMS: usize>(x: &[f32], halves: &Halves, sums: &mut [Sums]) {
    for (x, Sums(sums)) in x.chunks_exact(COLUMNS).zip(sums) {
        for (half, (sums, levels)) in sums.chunks_exact_mut(HALF).zip(halves).enumerate() {
            for (at, sum) in sums.iter_mut().enumerate() {
                let value = |term: usize| x[(half * TERMS + term) % COLUMNS] * levels[term][at];
                *sum = ((0..TERMS).map(value).sum::<f32>() + ROUND).to_bits() as i16;
            }
        }
    }
}
