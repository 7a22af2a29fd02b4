//! Products with AVX-512, in 32-bit floats or in the processor's own pairs of bfloat16.
//!
//! bfloat16 is the upper half of a 32-bit float, so a word of two weights becomes two floats by a shift and a mask.
//! `vdpbf16ps` does both products of a word at once, and where it runs at the rate of other products that is twice as
//! quick; where it is a slow one, half as quick. So the two are timed against each other, once.

#![allow(clippy::needless_range_loop)] // rows and tokens index several arrays at once

use std::arch::x86_64::*;
use std::hint::black_box;
use std::ops::Range;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::{BLOCK, Base, Split};

/// Tokens of a tile.
const TOGETHER: usize = 8;
/// Up to so many tokens memory takes the time, and is best read in order.
const FEW: usize = 4;
/// Bytes of a token that more of them take at a time: the nearest cache holds their activations.
const CHUNK: usize = 4096;
/// Rows that go through a chunk before the next: as many pages as the processor finds quickly.
const ROWS: usize = 128;

/// How a block of weights is multiplied.
trait Block {
    /// An activation as it lies ready.
    type X: Copy;

    /// Adds the products of a block of `R` rows with a block each of `N` tokens to sums in lanes.
    ///
    /// # Safety
    /// The processor must have the instructions, and `x` whole blocks.
    unsafe fn add<const R: usize, const N: usize>(
        weight: &[__m512i; R],
        x: &[*const Self::X; N],
        lanes: &mut [[__m512; R]; N],
    );
}

struct Floats;

impl Block for Floats {
    type X = f32;

    #[inline(always)]
    unsafe fn add<const R: usize, const N: usize>(
        weight: &[__m512i; R],
        x: &[*const f32; N],
        lanes: &mut [[__m512; R]; N],
    ) {
        // SAFETY: the caller's promise.
        unsafe {
            let (mut even, mut odd) = ([_mm512_setzero_ps(); R], [_mm512_setzero_ps(); R]);
            for r in 0..R {
                even[r] = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(weight[r]));
                odd[r] = _mm512_castsi512_ps(_mm512_and_si512(weight[r], _mm512_set1_epi32(0xffff_0000_u32 as i32)));
            }
            for n in 0..N {
                let (x, next) = (_mm512_loadu_ps(x[n]), _mm512_loadu_ps(x[n].add(BLOCK / 2)));
                for r in 0..R {
                    lanes[n][r] = _mm512_fmadd_ps(even[r], x, lanes[n][r]);
                    lanes[n][r] = _mm512_fmadd_ps(odd[r], next, lanes[n][r]);
                }
            }
        }
    }
}

struct Pairs;

impl Block for Pairs {
    type X = u16;

    #[inline(always)]
    unsafe fn add<const R: usize, const N: usize>(
        weight: &[__m512i; R],
        x: &[*const u16; N],
        lanes: &mut [[__m512; R]; N],
    ) {
        for n in 0..N {
            // SAFETY: the caller's promise; the types are of one size, and any bits are a value.
            unsafe {
                let x: __m512bh = std::mem::transmute(_mm512_loadu_si512(x[n].cast()));
                for r in 0..R {
                    let weight: __m512bh = std::mem::transmute(weight[r]);
                    lanes[n][r] = _mm512_dpbf16_ps(lanes[n][r], weight, x);
                }
            }
        }
    }
}

/// Whether pairs are there and the quicker.
pub fn has_pairs() -> bool {
    static QUICKER: OnceLock<bool> = OnceLock::new();
    *QUICKER.get_or_init(|| {
        // SAFETY: the processor was asked, for `floats` by `is_available`.
        is_x86_feature_detected!("avx512bf16")
            && super::is_available()
            && unsafe { race(|x| pair_race(x)) < race(|x| float_race(x)) }
    })
}

/// The least time of a few.
fn race(run: impl Fn(__m512i) -> f32) -> Duration {
    let once = |_| {
        let start = Instant::now();
        // SAFETY: only asked where AVX-512 F is.
        black_box(run(black_box(unsafe { _mm512_setzero_si512() })));
        start.elapsed()
    };
    (0..5).map(once).min().unwrap_or_default()
}

macro_rules! race {
    ($name:ident, $block:ty, $features:literal) => {
        /// As many products as the other, from registers and the nearest cache.
        #[target_feature(enable = $features)]
        fn $name(weight: __m512i) -> f32 {
            let (x, mut lanes) = ([Default::default(); BLOCK], [[_mm512_setzero_ps(); 4]; 2]);
            for _ in 0..512 {
                // SAFETY: the features are those of the block, and `x` is one.
                unsafe { <$block>::add(&[weight; 4], &[black_box(x.as_ptr()); 2], &mut lanes) };
            }
            reduce(lanes[0])[0] + reduce(lanes[1])[0]
        }
    };
}
race!(float_race, Floats, "avx512f,avx512bw");
race!(pair_race, Pairs, "avx512f,avx512bw,avx512bf16");

/// The operands: `weight [rows, columns]`, `x [tokens, stride]`.
struct Operands<'a, X> {
    weight: &'a [u16],
    rows: usize,
    columns: usize,
    x: &'a [X],
    stride: usize,
}

/// `out [tokens, rows]` of some rows of the base. The processor must have AVX-512 BW, and pairs where they are given.
pub fn products(base: &Base<'_>, split: &Split, of: &Range<usize>, out: &mut [f32]) {
    let weight = &base.weight[of.start * base.columns..of.end * base.columns];
    let (rows, columns, stride) = (of.len(), base.columns, base.stride());
    match split {
        // SAFETY: the caller's promise.
        Split::Floats(x) => unsafe { floats(&Operands { weight, rows, columns, x, stride }, out) },
        // SAFETY: as above.
        Split::Pairs(x) => unsafe { pairs(&Operands { weight, rows, columns, x, stride }, out) },
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
fn floats(of: &Operands<'_, f32>, out: &mut [f32]) {
    strips::<Floats>(of, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn pairs(of: &Operands<'_, u16>, out: &mut [f32]) {
    strips::<Pairs>(of, out);
}

#[inline(always)]
fn strips<B: Block>(of: &Operands<'_, B::X>, out: &mut [f32]) {
    let tokens = of.x.len() / of.stride.max(1);
    for row in (0..of.rows).step_by(ROWS) {
        let rows = row..(row + ROWS).min(of.rows);
        for token in (0..tokens).step_by(TOGETHER) {
            let rows = rows.clone();
            match tokens - token {
                1 => strip::<B, 1, 1>(of, rows, token, out),
                2 => strip::<B, 1, 2>(of, rows, token, out),
                3 => strip::<B, 4, 3>(of, rows, token, out),
                4 => strip::<B, 4, 4>(of, rows, token, out),
                5 => strip::<B, 3, 5>(of, rows, token, out),
                6 => strip::<B, 3, 6>(of, rows, token, out),
                7 => strip::<B, 3, 7>(of, rows, token, out),
                _ => strip::<B, 3, TOGETHER>(of, rows, token, out),
            }
        }
    }
}

/// Some rows of `N` tokens, `R` rows at a time. Sums stay in lanes from one chunk of columns to the next: a token
/// gives the same bits alone and among others.
#[inline(always)]
fn strip<B: Block, const R: usize, const N: usize>(
    of: &Operands<'_, B::X>,
    rows: Range<usize>,
    token: usize,
    out: &mut [f32],
) {
    let near = CHUNK / size_of::<B::X>();
    let (chunk, ahead) =
        if N > FEW { (near, [R * of.columns, 4 * R * of.columns]) } else { (of.columns, [2048, 8192]) };
    let ahead = if token == 0 { ahead } else { [0; 2] };
    // SAFETY: callers have AVX-512 F.
    let none = unsafe { _mm512_setzero_ps() };
    let mut tiles = vec![[[none; R]; N]; rows.len().div_ceil(R)];
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
            tile::<B, R, N>(&weight, &x, ahead, sums);
        }
    }
    for (row, sums) in rows.clone().step_by(R).zip(&tiles) {
        let there = R.min(rows.end - row);
        for n in 0..N {
            let mut four = [none; 4];
            four[..R].copy_from_slice(&sums[n]);
            // SAFETY: as above.
            let found = unsafe { reduce(four) };
            out[(token + n) * of.rows + row..][..there].copy_from_slice(&found[..there]);
        }
    }
}

/// Adds `R` rows of `N` tokens to sums in lanes. Weights are fetched so far `ahead` of where they are read, if at all.
#[inline(always)]
fn tile<B: Block, const R: usize, const N: usize>(
    weight: &[&[u16]; R],
    x: &[&[B::X]; N],
    ahead: [usize; 2],
    sums: &mut [[__m512; R]; N],
) {
    let width = weight[0].len();
    assert!(weight.iter().all(|row| row.len() == width) && x.iter().all(|x| x.len() >= width.next_multiple_of(BLOCK)));
    let mut lanes = *sums;
    for column in (0..width).step_by(BLOCK) {
        let there = u32::MAX >> (BLOCK - (width - column).min(BLOCK));
        // SAFETY: callers have the instructions; masked loads touch the columns that there are; activations are whole
        // blocks.
        unsafe {
            let mut block = [_mm512_setzero_si512(); R];
            for r in 0..R {
                let from = weight[r].as_ptr().add(column);
                if ahead[0] > 0 {
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(ahead[0]).cast());
                    _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(ahead[1]).cast());
                }
                block[r] = _mm512_maskz_loadu_epi16(there, from.cast());
            }
            let x: [*const B::X; N] = std::array::from_fn(|n| x[n].as_ptr().add(column));
            B::add(&block, &x, &mut lanes);
        }
    }
    *sums = lanes;
}

/// The sums of four vectors' lanes; each the same bits wherever it stands.
#[target_feature(enable = "avx512f")]
fn reduce([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
    let pair = |a, b| _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    let (ab, cd) = (_mm512_castps_pd(pair(a, b)), _mm512_castps_pd(pair(c, d)));
    let fours =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    let halves = _mm256_add_ps(
        _mm512_castps512_ps256(fours),
        _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(fours))),
    );
    let mut sums = [0f32; 4];
    // SAFETY: room for four.
    unsafe {
        _mm_storeu_ps(
            sums.as_mut_ptr(),
            _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves)),
        );
    }
    sums
}
