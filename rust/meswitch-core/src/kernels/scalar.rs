//! Sums looked up half byte by half byte: the truth of the others.

use std::mem::MaybeUninit;

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
pub fn fill<const COLUMNS: usize, const TERMS: usize>(
    x: &[[f32; COLUMNS]],
    halves: &Halves,
    sums: &mut [MaybeUninit<Sums>],
) {
    for (x, sums) in x.iter().zip(sums) {
        sums.write(Sums(std::array::from_fn(|at| {
            let (half, at) = (at / HALF, at % HALF);
            let value = |term: usize| x[(half * TERMS + term) % COLUMNS] * halves[half][term][at];
            ((0..TERMS).map(value).sum::<f32>() + ROUND).to_bits() as i16
        })));
    }
}
