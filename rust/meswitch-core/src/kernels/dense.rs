//! `y = W · x` for few tokens and a base's own weights in bfloat16: what a decode step reads most of.
//!
//! One instruction of AVX-512 BF16 sums 32 products into 16 lanes of 32 bits. Rows of weights are fetched ahead, as
//! codes are, so that memory sets the pace up to eight tokens and more.

use super::rows::Rows;
use super::team;

/// Tokens that one call takes: beyond, torch's own product is as quick.
pub const TOKENS: usize = 16;
/// Rows that threads' shares are multiples of.
const TILE: usize = 8;

/// Whether this processor has a kernel here.
#[must_use]
pub fn is_available() -> bool {
    #[cfg(target_arch = "x86_64")]
    return super::backend() >= super::Backend::Avx512 && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// `y[t] = W · x[t]` for at most [`TOKENS`] tokens: `weight [rows, columns]` and `x [tokens, columns]` in bfloat16.
///
/// # Safety
/// [`is_available`] must hold, and `y` must have a row of `rows` elements for every token.
pub unsafe fn linear(weight: &[u16], rows: usize, columns: usize, x: &[u16], y: Rows) {
    let tokens = x.len() / columns.max(1);
    assert!(weight.len() == rows * columns && x.len() == tokens * columns && tokens <= TOKENS && is_available());
    let work = |index: usize, threads: usize| {
        let share = rows.div_ceil(threads).next_multiple_of(TILE);
        let of = (index * share).min(rows)..((index + 1) * share).min(rows);
        let mut sums = vec![0f32; tokens * of.len()];
        let weight = &weight[of.start * columns..of.end * columns];
        // SAFETY: the processor was asked above.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            x86::products(weight, columns, x, &mut sums);
        }
        for (token, sums) in sums.chunks(of.len().max(1)).enumerate() {
            // SAFETY: the caller's promise; no two threads have a row of the weight in common.
            unsafe { y.write(token, of.start, sums) };
        }
    };
    team::parallel(&work);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    #![allow(clippy::needless_range_loop)] // rows and tokens index several arrays at once

    use std::arch::x86_64::*;

    use super::super::decode::fetch;

    /// Columns of a vector.
    const BLOCK: usize = 32;
    /// Tokens of a tile: with two rows, as many sums as leave registers for the rest.
    const TOGETHER: usize = 8;

    /// `out [tokens, rows]` of `weight [rows, columns]` and `x [tokens, columns]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub fn products(weight: &[u16], columns: usize, x: &[u16], out: &mut [f32]) {
        let rows = weight.len() / columns.max(1);
        for (pair, weight) in weight.chunks(2 * columns.max(1)).enumerate() {
            for (group, x) in x.chunks(TOGETHER * columns).enumerate() {
                let out = &mut out[group * TOGETHER * rows + 2 * pair..];
                match x.len() / columns {
                    1 => tile::<1>(weight, columns, x, out, rows),
                    2 => tile::<2>(weight, columns, x, out, rows),
                    3 => tile::<3>(weight, columns, x, out, rows),
                    4 => tile::<4>(weight, columns, x, out, rows),
                    5 => tile::<5>(weight, columns, x, out, rows),
                    6 => tile::<6>(weight, columns, x, out, rows),
                    7 => tile::<7>(weight, columns, x, out, rows),
                    _ => tile::<TOGETHER>(weight, columns, x, out, rows),
                }
            }
        }
    }

    /// Two rows of `N` tokens, or the last row alone.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn tile<const N: usize>(weight: &[u16], columns: usize, x: &[u16], out: &mut [f32], rows: usize) {
        assert!(weight.len() >= columns && x.len() == N * columns);
        let pair = weight.len() / columns;
        let from = [weight.as_ptr(), weight[(pair - 1) * columns..].as_ptr()];
        let mut sums = [[_mm512_setzero_ps(); N]; 2];
        for column in (0..columns).step_by(BLOCK) {
            let there = u32::MAX >> (BLOCK - (columns - column).min(BLOCK));
            // SAFETY: masked loads touch the columns that there are.
            unsafe {
                let weights: [__m512i; 2] = std::array::from_fn(|r| {
                    fetch(from[r].add(column).cast());
                    _mm512_maskz_loadu_epi16(there, from[r].add(column).cast())
                });
                for n in 0..N {
                    let x = _mm512_maskz_loadu_epi16(there, x.as_ptr().add(n * columns + column).cast());
                    for r in 0..2 {
                        sums[r][n] = _mm512_dpbf16_ps(sums[r][n], brain(x), brain(weights[r]));
                    }
                }
            }
        }
        for r in 0..pair {
            for n in 0..N {
                out[n * rows + r] = _mm512_reduce_add_ps(sums[r][n]);
            }
        }
    }

    fn brain(bits: __m512i) -> __m512bh {
        // SAFETY: both are 64 bytes of which every value is one.
        unsafe { std::mem::transmute(bits) }
    }
}
