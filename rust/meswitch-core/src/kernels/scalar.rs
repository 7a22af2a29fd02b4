//! Lookup tables read half byte by half byte: the reference that every other instruction set must equal.

use std::mem::MaybeUninit;

use super::lookup::{CodeLines, Table, TokenTables};
use super::tables::{HALF_VALUES, HalfLevels, ROUND, Sums};
use crate::layout::LINE_ROWS;

/// See [`super::lookup::add`].
pub(super) fn add(lines: &CodeLines<'_>, tokens: TokenTables<'_>, stride: usize, out: &mut [f32]) {
    for (Table { sums, step }, out) in tokens.iter().zip(out.chunks_mut(stride)) {
        add_token(lines, sums, step, out);
    }
}

fn add_token(lines: &CodeLines<'_>, sums: &[Sums], step: f32, out: &mut [f32]) {
    for (line, out) in out.chunks_exact_mut(LINE_ROWS).take(lines.count).enumerate() {
        let mut rows = [0i16; LINE_ROWS];
        for (index, Sums(sums)) in sums.iter().enumerate() {
            for (row, byte) in rows.iter_mut().zip(lines.line(index, line)) {
                *row += sums[usize::from(byte & 15)] + sums[HALF_VALUES + usize::from(byte >> 4)];
            }
        }
        out.iter_mut().zip(rows).for_each(|(out, row)| *out += step * f32::from(row));
    }
}

/// Writes the tables of each byte: of `COLUMNS` activations, `TERMS` of which belong to each half.
pub(super) fn fill<const COLUMNS: usize, const TERMS: usize>(
    x: &[[f32; COLUMNS]],
    halves: &HalfLevels,
    sums: &mut [MaybeUninit<Sums>],
) {
    for (x, sums) in x.iter().zip(sums) {
        sums.write(Sums(std::array::from_fn(|index| {
            let (half, index) = (index / HALF_VALUES, index % HALF_VALUES);
            let value = |term: usize| x[(half * TERMS + term) % COLUMNS] * halves[half][term][index];
            ((0..TERMS).map(value).sum::<f32>() + ROUND).to_bits() as i16
        })));
    }
}
