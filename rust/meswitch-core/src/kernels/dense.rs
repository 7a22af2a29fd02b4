//! `W · x` for few tokens and a base's own weights in bfloat16: what a decode step reads most of.
//!
//! bfloat16 is the upper half of a 32-bit float, so a word of two weights becomes two floats by a shift and a mask.
//! Activations lie ready in that order, the even columns of a block of 32 before its odd ones. (The processor's own
//! products of bfloat16 run at a quarter of the rate of 32 bits.)

use std::ops::Range;

/// Tokens that one call takes: beyond, torch's own product is as quick.
pub const TOKENS: usize = 16;
/// Columns of a block: a vector of weights.
const BLOCK: usize = 32;

/// A base's weight, and how many tokens it is multiplied with: `weight [rows, columns]`.
pub struct Base<'a> {
    /// bfloat16, row by row.
    pub weight: &'a [u16],
    /// Output channels.
    pub rows: usize,
    /// Input channels.
    pub columns: usize,
    /// At most [`TOKENS`].
    pub tokens: usize,
}

/// Whether this processor has a kernel here.
#[must_use]
pub fn is_available() -> bool {
    super::backend() >= super::Backend::Avx512
}

impl Base<'_> {
    fn stride(&self) -> usize {
        self.columns.next_multiple_of(BLOCK)
    }

    /// The tokens' activations, block by block: even columns, then odd, then zeros where a block is not whole.
    pub(super) fn split(&self, read: &dyn Fn(u32, &mut [f32])) -> Vec<f32> {
        let stride = self.stride();
        let (mut split, mut wide) = (vec![0f32; self.tokens * stride], vec![0f32; stride]);
        for (token, split) in split.chunks_mut(stride.max(1)).enumerate() {
            read(token as u32, &mut wide[..self.columns]);
            apart(&wide, split);
        }
        split
    }
}

super::by_backend! {
    /// Even columns of each block before its odd ones.
    pub fn apart(x: &[f32], out: &mut [f32]) = apart_body
}

#[inline(always)]
fn apart_body(x: &[f32], out: &mut [f32]) {
    for (x, out) in x.chunks_exact(BLOCK).zip(out.chunks_exact_mut(BLOCK)) {
        for at in 0..BLOCK / 2 {
            out[at] = x[2 * at];
            out[at + BLOCK / 2] = x[2 * at + 1];
        }
    }
}

/// The base's product of some rows: `out [tokens, rows]`, of what `split` gave.
pub(super) fn products(base: &Base<'_>, x: &[f32], of: &Range<usize>, out: &mut [f32]) {
    let weight = &base.weight[of.start * base.columns..of.end * base.columns];
    assert!(is_available() && x.len() == base.tokens * base.stride() && out.len() == base.tokens * of.len());
    // SAFETY: the processor was asked.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        x86::products(weight, base.columns, x, base.stride(), out);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    #![allow(clippy::needless_range_loop)] // rows and tokens index several arrays at once

    use std::arch::x86_64::*;

    use std::ops::Range;

    use super::super::avx512::reduce;
    use super::BLOCK;

    /// Tokens of a tile.
    const TOGETHER: usize = 8;
    /// Up to so many tokens memory takes the time, and is best read in order.
    const FEW: usize = 4;
    /// Columns that more tokens take at a time: the nearest cache holds their activations.
    const CHUNK: usize = 1024;
    /// Rows that go through a chunk before the next: as many pages as the processor finds quickly.
    const ROWS: usize = 128;

    /// The operands: `weight [rows, columns]`, `x [tokens, stride]`.
    struct Operands<'a> {
        weight: &'a [u16],
        rows: usize,
        columns: usize,
        x: &'a [f32],
        stride: usize,
    }

    /// `out [tokens, rows]` of `weight [rows, columns]` and `x [tokens, stride]`.
    #[target_feature(enable = "avx512f,avx512bw")]
    pub fn products(weight: &[u16], columns: usize, x: &[f32], stride: usize, out: &mut [f32]) {
        let (rows, tokens) = (weight.len() / columns.max(1), x.len() / stride.max(1));
        let of = Operands { weight, rows, columns, x, stride };
        for row in (0..rows).step_by(ROWS) {
            let rows = row..(row + ROWS).min(rows);
            for token in (0..tokens).step_by(TOGETHER) {
                let rows = rows.clone();
                match tokens - token {
                    1 => strip::<1, 1>(&of, rows, token, out),
                    2 => strip::<1, 2>(&of, rows, token, out),
                    3 => strip::<4, 3>(&of, rows, token, out),
                    4 => strip::<4, 4>(&of, rows, token, out),
                    5 => strip::<3, 5>(&of, rows, token, out),
                    6 => strip::<3, 6>(&of, rows, token, out),
                    7 => strip::<3, 7>(&of, rows, token, out),
                    _ => strip::<3, TOGETHER>(&of, rows, token, out),
                }
            }
        }
    }

    /// Some rows of `N` tokens, `R` rows at a time. Sums stay in lanes from one chunk of columns to the next: a token
    /// gives the same bits alone and among others.
    #[target_feature(enable = "avx512f,avx512bw")]
    fn strip<const R: usize, const N: usize>(of: &Operands<'_>, rows: Range<usize>, token: usize, out: &mut [f32]) {
        let (chunk, ahead) =
            if N > FEW { (CHUNK, [R * of.columns, 4 * R * of.columns]) } else { (of.columns, [2048, 8192]) };
        let ahead = if token == 0 { ahead } else { [0; 2] };
        let mut tiles = vec![[[_mm512_setzero_ps(); R]; N]; rows.len().div_ceil(R)];
        for column in (0..of.columns).step_by(chunk.max(1)) {
            let width = (of.columns - column).min(chunk);
            let (mut x, mut weight) = ([&of.x[..0]; N], [&of.weight[..0]; R]);
            for n in 0..N {
                x[n] = &of.x[(token + n) * of.stride + column..(token + n + 1) * of.stride];
            }
            for (row, sums) in rows.clone().step_by(R).zip(&mut tiles) {
                for r in 0..R {
                    // The last row stands in for those that are not there.
                    let row = (row + r).min(rows.end - 1);
                    weight[r] = &of.weight[row * of.columns + column..][..width];
                }
                tile::<R, N>(&weight, &x, ahead, sums);
            }
        }
        for (row, sums) in rows.clone().step_by(R).zip(&tiles) {
            let there = R.min(rows.end - row);
            for n in 0..N {
                let mut four = [_mm512_setzero_ps(); 4];
                four[..R].copy_from_slice(&sums[n]);
                out[(token + n) * of.rows + row..][..there].copy_from_slice(&reduce(four)[..there]);
            }
        }
    }

    /// Adds `R` rows of `N` tokens to sums in lanes. Weights are fetched so far `ahead` of where they are read, if at all.
    #[target_feature(enable = "avx512f,avx512bw")]
    fn tile<const R: usize, const N: usize>(
        weight: &[&[u16]; R],
        x: &[&[f32]; N],
        ahead: [usize; 2],
        sums: &mut [[__m512; R]; N],
    ) {
        let (width, upper) = (weight[0].len(), _mm512_set1_epi32(0xffff_0000_u32 as i32));
        assert!(
            weight.iter().all(|row| row.len() == width) && x.iter().all(|x| x.len() >= width.next_multiple_of(BLOCK))
        );
        let mut lanes = *sums;
        for column in (0..width).step_by(BLOCK) {
            let there = u32::MAX >> (BLOCK - (width - column).min(BLOCK));
            // SAFETY: masked loads touch the columns that there are; activations are whole blocks.
            unsafe {
                let (mut even, mut odd) = ([_mm512_setzero_ps(); R], [_mm512_setzero_ps(); R]);
                for r in 0..R {
                    let from = weight[r].as_ptr().add(column);
                    if ahead[0] > 0 {
                        _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(ahead[0]).cast());
                        _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(ahead[1]).cast());
                    }
                    let pair = _mm512_maskz_loadu_epi16(there, from.cast());
                    even[r] = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pair));
                    odd[r] = _mm512_castsi512_ps(_mm512_and_si512(pair, upper));
                }
                for n in 0..N {
                    let x = x[n].as_ptr().add(column);
                    let (x, next) = (_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(BLOCK / 2)));
                    for r in 0..R {
                        lanes[n][r] = _mm512_fmadd_ps(even[r], x, lanes[n][r]);
                        lanes[n][r] = _mm512_fmadd_ps(odd[r], next, lanes[n][r]);
                    }
                }
            }
        }
        *sums = lanes;
    }
}
