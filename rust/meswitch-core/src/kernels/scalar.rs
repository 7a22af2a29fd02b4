//! Integer dot products of any processor: the truth of the others, and what the compiler makes of it.

use super::activations::{Places, SEGMENT, SPAN, STEPS, Token};
use super::decode::Codes;
use crate::layout::{RUN, unpack_row};

/// What a plane's codes are multiplied by.
pub fn unit(_: u32, _: usize) -> f32 {
    1.0
}

/// `Σ code · x` of every row, for every token: `[tokens, rows]`.
pub fn dot(codes: &Codes<'_>, tokens: &[Token<'_>], out: &mut [f32]) {
    let (main, ones) = (codes.columns / SPAN * SPAN, vec![1.0; codes.columns.div_ceil(RUN)]);
    let mut unpacked = vec![0u8; codes.columns];
    for row in 0..codes.rows {
        unpack_row(codes.packed(row), codes.bits, &mut unpacked);
        let (first, last) = unpacked.split_at(main);
        for (at, token) in tokens.iter().enumerate() {
            let rest = rest(last, &token.rounded[main..], &ones, token.tail);
            out[at * codes.rows + row] = whole(first, &ones, token) + rest;
        }
    }
}

/// The same with a scale for each 64 columns of each row; columns after the last whole span are left out.
pub fn dot_scaled(codes: &Codes<'_>, scales: &[f32], tokens: &[Token<'_>], out: &mut [f32]) {
    let (main, blocks) = (codes.columns / SPAN * SPAN, codes.columns.div_ceil(RUN));
    let mut unpacked = vec![0u8; codes.columns];
    for row in 0..codes.rows {
        unpack_row(codes.packed(row), codes.bits, &mut unpacked);
        let scales = &scales[row * blocks..(row + 1) * blocks];
        for (at, token) in tokens.iter().enumerate() {
            out[at * codes.rows + row] = whole(&unpacked[..main], scales, token);
        }
    }
}

/// Adds the products of the columns that were not rounded, row by row, in sixteen sums.
pub fn outliers(codes: &Codes<'_>, places: &Places, out: &mut [f32]) {
    let mask = (1u32 << codes.bits) - 1;
    for (row, out) in out.iter_mut().enumerate() {
        let packed = codes.packed(row);
        let mut sums = [0f32; 16];
        for (at, (word, shift)) in places.words.iter().zip(&places.shifts).enumerate() {
            let bytes = packed[*word as usize * 4..][..4].try_into().expect("four");
            sums[at % 16] += ((u32::from_le_bytes(bytes) >> shift) & mask) as f32 * places.values[at];
        }
        *out += sums.iter().sum::<f32>();
    }
}

fn whole(codes: &[u8], scales: &[f32], token: &Token<'_>) -> f32 {
    let mut sum = 0f32;
    for (block, codes) in codes.chunks_exact(RUN).enumerate() {
        let column = block * RUN;
        let steps = &token.steps[column / SEGMENT * STEPS + column % SPAN / 4..][..RUN / 4];
        let fours = codes.chunks_exact(4).zip(token.rounded[column..].chunks_exact(4));
        let of_block: f32 = fours.zip(steps).map(|((codes, x), step)| integer(codes, x) as f32 * step).sum();
        sum += of_block * scales[block];
    }
    sum
}

/// `Σ scale · code · x` of columns that share a step.
pub fn rest(codes: &[u8], x: &[i8], scales: &[f32], step: f32) -> f32 {
    let blocks = codes.chunks(RUN).zip(x.chunks(RUN));
    blocks.zip(scales).map(|((codes, x), scale)| integer(codes, x) as f32 * step * scale).sum()
}

fn integer(codes: &[u8], x: &[i8]) -> i32 {
    codes.iter().zip(x).map(|(code, x)| i32::from(*code) * i32::from(*x)).sum()
}
