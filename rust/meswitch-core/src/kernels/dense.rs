//! `y = W · x` for few tokens and a base's own weights in bfloat16: what a decode step reads most of.
//!
//! bfloat16 is the upper half of a 32-bit float, so a word of two weights becomes two floats by a shift and a mask.
//! Activations lie ready in that order, the even columns of a block of 32 before its odd ones. (The processor's own
//! products of bfloat16 are slower than two of 32 bits.) Rows of weights are fetched ahead, as codes are.

use super::rows::Rows;
use super::team;

/// Tokens that one call takes: beyond, torch's own product is as quick.
pub const TOKENS: usize = 16;
/// Rows that threads' shares are multiples of.
const TILE: usize = 8;
/// Columns of a block: a vector of weights.
const BLOCK: usize = 32;

/// Whether this processor has a kernel here.
#[must_use]
pub fn is_available() -> bool {
    super::backend() >= super::Backend::Avx512
}

/// `y[t] = W · x[t]` for at most [`TOKENS`] tokens: `weight [rows, columns]` and `x [tokens, columns]` in bfloat16.
///
/// # Safety
/// [`is_available`] must hold, and `y` must have a row of `rows` elements for every token.
pub unsafe fn linear(weight: &[u16], rows: usize, columns: usize, x: &[u16], y: Rows) {
    let tokens = x.len() / columns.max(1);
    assert!(weight.len() == rows * columns && x.len() == tokens * columns && tokens <= TOKENS && is_available());
    let stride = columns.next_multiple_of(BLOCK);
    let x = split(x, columns, stride);
    let work = |index: usize, threads: usize| {
        let share = rows.div_ceil(threads).next_multiple_of(TILE);
        let of = (index * share).min(rows)..((index + 1) * share).min(rows);
        let mut sums = vec![0f32; tokens * of.len()];
        let weight = &weight[of.start * columns..of.end * columns];
        // SAFETY: the processor was asked above.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            x86::products(weight, columns, &x, stride, &mut sums);
        }
        for (token, sums) in sums.chunks(of.len().max(1)).enumerate() {
            // SAFETY: the caller's promise; no two threads have a row of the weight in common.
            unsafe { y.write(token, of.start, sums) };
        }
    };
    team::parallel(&work);
}

/// Activations as floats, block by block: even columns, then odd, then zeros where a block is not whole.
fn split(x: &[u16], columns: usize, stride: usize) -> Vec<f32> {
    let mut split = vec![0f32; x.len() / columns.max(1) * stride];
    for (x, split) in x.chunks(columns.max(1)).zip(split.chunks_mut(stride.max(1))) {
        for (x, split) in x.chunks(BLOCK).zip(split.chunks_mut(BLOCK)) {
            for (at, half) in x.iter().enumerate() {
                split[at % 2 * (BLOCK / 2) + at / 2] = f32::from_bits(u32::from(*half) << 16);
            }
        }
    }
    split
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    #![allow(clippy::needless_range_loop)] // rows and tokens index several arrays at once

    use std::arch::x86_64::*;

    use super::super::decode::fetch;
    use super::BLOCK;

    /// Rows, and tokens, of a tile: as many sums as leave registers for the rest, and few enough activations for the
    /// nearest cache.
    const ROWS: usize = 4;
    const TOGETHER: usize = 4;

    /// `out [tokens, rows]` of `weight [rows, columns]` and `x [tokens, stride]`.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn products(weight: &[u16], columns: usize, x: &[f32], stride: usize, out: &mut [f32]) {
        let rows = weight.len() / columns.max(1);
        for (at, weight) in weight.chunks(ROWS * columns.max(1)).enumerate() {
            for (group, x) in x.chunks(TOGETHER * stride).enumerate() {
                let out = &mut out[group * TOGETHER * rows + ROWS * at..];
                match x.len() / stride {
                    1 => tile::<1>(weight, columns, x, stride, out, rows),
                    2 => tile::<2>(weight, columns, x, stride, out, rows),
                    3 => tile::<3>(weight, columns, x, stride, out, rows),
                    _ => tile::<TOGETHER>(weight, columns, x, stride, out, rows),
                }
            }
        }
    }

    /// Up to four rows (the last stands in for those that are not there) of `N` tokens.
    #[target_feature(enable = "avx512f,avx512bw")]
    fn tile<const N: usize>(weight: &[u16], columns: usize, x: &[f32], stride: usize, out: &mut [f32], rows: usize) {
        assert!(weight.len() >= columns && x.len() == N * stride && stride >= columns);
        let (whole, upper) = (weight.len() / columns, _mm512_set1_epi32(0xffff_0000_u32 as i32));
        let from: [*const u16; ROWS] = std::array::from_fn(|r| weight[r.min(whole - 1) * columns..].as_ptr());
        let mut sums = [[_mm512_setzero_ps(); N]; ROWS];
        for column in (0..columns).step_by(BLOCK) {
            let there = u32::MAX >> (BLOCK - (columns - column).min(BLOCK));
            // SAFETY: masked loads touch the columns that there are; activations are whole blocks.
            unsafe {
                let weights: [__m512i; ROWS] = std::array::from_fn(|r| {
                    fetch(from[r].add(column).cast());
                    _mm512_maskz_loadu_epi16(there, from[r].add(column).cast())
                });
                let even = weights.map(|pair| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pair)));
                let odd = weights.map(|pair| _mm512_castsi512_ps(_mm512_and_si512(pair, upper)));
                for n in 0..N {
                    let x = x.as_ptr().add(n * stride + column);
                    let (x, next) = (_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(BLOCK / 2)));
                    for r in 0..ROWS {
                        sums[r][n] = _mm512_fmadd_ps(even[r], x, sums[r][n]);
                        sums[r][n] = _mm512_fmadd_ps(odd[r], next, sums[r][n]);
                    }
                }
            }
        }
        for r in 0..whole {
            for n in 0..N {
                out[n * rows + r] = _mm512_reduce_add_ps(sums[r][n]);
            }
        }
    }
}
