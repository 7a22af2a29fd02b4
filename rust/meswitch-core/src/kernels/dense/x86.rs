//! Products with AVX-512, in 32-bit floats or with the processor's bfloat16 instruction.
//!
//! bfloat16 is the upper half of a 32-bit float, so a 32-bit word of two weights becomes two floats by a shift and a
//! mask. `vdpbf16ps` multiplies both weights of a word at once. On some processors it runs at the rate of other
//! products and is twice as fast, on others it is half as fast. So the two are timed against each other, once per
//! process.

#![allow(clippy::needless_range_loop)] // rows and tokens index several arrays at once

use std::arch::x86_64::*;
use std::hint::black_box;
use std::ops::Range;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::{Activations, BaseWeight, DENSE_COLUMNS};

/// Tokens of one tile of sums in registers.
const TILE_TOKENS: usize = 8;
/// Up to this many tokens, memory limits the speed, and weights are read row by row from start to end.
const STREAMING_TOKENS: usize = 4;
/// Bytes of a token's activations that are used at a time beyond that: the L1 cache holds those of a tile.
const CHUNK_BYTES: usize = 4096;
/// Rows that go through a chunk before the next chunk: as many pages as the TLB holds.
const STRIP_ROWS: usize = 128;

/// How [`DENSE_COLUMNS`] weights are multiplied.
trait VectorProduct {
    /// The element type of activations.
    type X: Copy;

    /// Adds the products of `R` rows' weights with `N` tokens' activations to sums in lanes.
    ///
    /// # Safety
    /// The processor must have the instructions; each of `x` must point to [`DENSE_COLUMNS`] activations.
    unsafe fn add<const R: usize, const N: usize>(
        weight: &[__m512i; R],
        x: &[*const Self::X; N],
        lanes: &mut [[__m512; R]; N],
    );
}

struct FloatProduct;

impl VectorProduct for FloatProduct {
    type X = f32;

    #[inline(always)]
    unsafe fn add<const R: usize, const N: usize>(
        weight: &[__m512i; R],
        x: &[*const f32; N],
        lanes: &mut [[__m512; R]; N],
    ) {
        // SAFETY: the caller guarantees `x` and the instructions.
        unsafe {
            let (mut even, mut odd) = ([_mm512_setzero_ps(); R], [_mm512_setzero_ps(); R]);
            for r in 0..R {
                even[r] = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(weight[r]));
                odd[r] = _mm512_castsi512_ps(_mm512_and_si512(weight[r], _mm512_set1_epi32(0xffff_0000_u32 as i32)));
            }
            for n in 0..N {
                let (x, next) = (_mm512_loadu_ps(x[n]), _mm512_loadu_ps(x[n].add(DENSE_COLUMNS / 2)));
                for r in 0..R {
                    lanes[n][r] = _mm512_fmadd_ps(even[r], x, lanes[n][r]);
                    lanes[n][r] = _mm512_fmadd_ps(odd[r], next, lanes[n][r]);
                }
            }
        }
    }
}

struct Bf16Product;

impl VectorProduct for Bf16Product {
    type X = u16;

    #[inline(always)]
    unsafe fn add<const R: usize, const N: usize>(
        weight: &[__m512i; R],
        x: &[*const u16; N],
        lanes: &mut [[__m512; R]; N],
    ) {
        for n in 0..N {
            // SAFETY: the caller guarantees `x` and the instructions; the types have one size, and every bit pattern is
            // valid.
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

/// Whether the processor has the bfloat16 instruction and it is the faster of the two.
pub(super) fn prefers_bf16() -> bool {
    static FASTER: OnceLock<bool> = OnceLock::new();
    *FASTER.get_or_init(|| {
        // SAFETY: the processor has both: `has_base_kernel` asked for those of the float product.
        is_x86_feature_detected!("avx512bf16")
            && super::has_base_kernel()
            && unsafe { time(|x| time_bf16(x)) < time(|x| time_floats(x)) }
    })
}

/// The shortest time of five runs.
fn time(run: impl Fn(__m512i) -> f32) -> Duration {
    let once = |_| {
        let start = Instant::now();
        // SAFETY: only called where AVX-512 F is available.
        black_box(run(black_box(unsafe { _mm512_setzero_si512() })));
        start.elapsed()
    };
    (0..5).map(once).min().unwrap_or_default()
}

macro_rules! timed_product {
    ($name:ident, $product:ty, $features:literal) => {
        /// A fixed number of products from registers and the L1 cache.
        #[target_feature(enable = $features)]
        fn $name(weight: __m512i) -> f32 {
            let (x, mut lanes) = ([Default::default(); DENSE_COLUMNS], [[_mm512_setzero_ps(); 4]; 2]);
            for _ in 0..512 {
                // SAFETY: the features are those of the product, and `x` has the length it needs.
                unsafe { <$product>::add(&[weight; 4], &[black_box(x.as_ptr()); 2], &mut lanes) };
            }
            reduce(lanes[0])[0] + reduce(lanes[1])[0]
        }
    };
}
timed_product!(time_floats, FloatProduct, "avx512f,avx512bw");
timed_product!(time_bf16, Bf16Product, "avx512f,avx512bw,avx512bf16");

/// The operands: `weight [rows, columns]`, `x [tokens, stride]`.
struct Operands<'a, X> {
    weight: &'a [u16],
    rows: usize,
    columns: usize,
    x: &'a [X],
    stride: usize,
}

/// Writes the products of rows `rows` of the base weight to `out [tokens, rows]`.
///
/// # Safety
/// The processor must have AVX-512 F and BW, and BF16 where `x` is bfloat16. `x` must hold the base's tokens, padded.
pub(super) unsafe fn products(base: &BaseWeight<'_>, x: &Activations, rows: &Range<usize>, out: &mut [f32]) {
    let weight = &base.weight[rows.start * base.columns..rows.end * base.columns];
    let (rows, columns, stride) = (rows.len(), base.columns, base.stride());
    match x {
        // SAFETY: the caller guarantees the instructions.
        Activations::Floats(x) => unsafe { float_products(&Operands { weight, rows, columns, x, stride }, out) },
        // SAFETY: as above.
        Activations::Bf16(x) => unsafe { bf16_products(&Operands { weight, rows, columns, x, stride }, out) },
    }
}

#[target_feature(enable = "avx512f,avx512bw")]
fn float_products(operands: &Operands<'_, f32>, out: &mut [f32]) {
    // SAFETY: this function's own features.
    unsafe { all_products::<FloatProduct>(operands, out) };
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn bf16_products(operands: &Operands<'_, u16>, out: &mut [f32]) {
    // SAFETY: this function's own features.
    unsafe { all_products::<Bf16Product>(operands, out) };
}

/// # Safety
/// The processor must have the instructions of `P`, and AVX-512 F.
#[inline(always)]
unsafe fn all_products<P: VectorProduct>(operands: &Operands<'_, P::X>, out: &mut [f32]) {
    let tokens = operands.x.len() / operands.stride.max(1);
    for row in (0..operands.rows).step_by(STRIP_ROWS) {
        let rows = row..(row + STRIP_ROWS).min(operands.rows);
        for token in (0..tokens).step_by(TILE_TOKENS) {
            let rows = rows.clone();
            // SAFETY: the caller guarantees the instructions.
            unsafe {
                match tokens - token {
                    1 => strip_products::<P, 1, 1>(operands, rows, token, out),
                    2 => strip_products::<P, 1, 2>(operands, rows, token, out),
                    3 => strip_products::<P, 4, 3>(operands, rows, token, out),
                    4 => strip_products::<P, 4, 4>(operands, rows, token, out),
                    5 => strip_products::<P, 3, 5>(operands, rows, token, out),
                    6 => strip_products::<P, 3, 6>(operands, rows, token, out),
                    7 => strip_products::<P, 3, 7>(operands, rows, token, out),
                    _ => strip_products::<P, 3, TILE_TOKENS>(operands, rows, token, out),
                }
            }
        }
    }
}

/// Multiplies rows `rows` with `N` tokens, `R` rows at a time. Sums stay in lanes from one chunk of columns to the
/// next, so a token's result has the same bits alone and among others.
///
/// # Safety
/// The processor must have the instructions of `P`, and AVX-512 F.
#[inline(always)]
unsafe fn strip_products<P: VectorProduct, const R: usize, const N: usize>(
    operands: &Operands<'_, P::X>,
    rows: Range<usize>,
    token: usize,
    out: &mut [f32],
) {
    let columns = operands.columns;
    let (chunk, prefetch) = if N > STREAMING_TOKENS {
        (CHUNK_BYTES / size_of::<P::X>(), [R * columns, 4 * R * columns])
    } else {
        (columns, [2048, 8192])
    };
    // Later tokens find the weights in a cache.
    let prefetch = if token == 0 { prefetch } else { [0; 2] };
    // SAFETY: the caller guarantees AVX-512 F.
    let zero = unsafe { _mm512_setzero_ps() };
    let mut tiles = vec![[[zero; R]; N]; rows.len().div_ceil(R)];
    for column in (0..columns).step_by(chunk.max(1)) {
        let width = (columns - column).min(chunk);
        let (mut x, mut weight) = ([&operands.x[..0]; N], [&operands.weight[..0]; R]);
        for n in 0..N {
            x[n] = &operands.x[(token + n) * operands.stride + column..(token + n + 1) * operands.stride];
        }
        for (row, sums) in rows.clone().step_by(R).zip(&mut tiles) {
            for r in 0..R {
                // Rows beyond the last repeat it; their sums are not written.
                let row = (row + r).min(rows.end - 1);
                weight[r] = &operands.weight[row * columns + column..][..width];
            }
            // SAFETY: the caller guarantees the instructions.
            unsafe { add_tile::<P, R, N>(&weight, &x, prefetch, sums) };
        }
    }
    for (row, sums) in rows.clone().step_by(R).zip(&tiles) {
        let count = R.min(rows.end - row);
        for n in 0..N {
            let mut four = [zero; 4];
            four[..R].copy_from_slice(&sums[n]);
            // SAFETY: the caller guarantees AVX-512 F.
            let reduced = unsafe { reduce(four) };
            out[(token + n) * operands.rows + row..][..count].copy_from_slice(&reduced[..count]);
        }
    }
}

/// Adds the products of `R` rows and `N` tokens to sums in lanes. Weights are prefetched at two distances in bytes; 0
/// means not at all.
///
/// # Safety
/// The processor must have the instructions of `P`, and AVX-512 F and BW.
#[inline(always)]
unsafe fn add_tile<P: VectorProduct, const R: usize, const N: usize>(
    weight: &[&[u16]; R],
    x: &[&[P::X]; N],
    prefetch: [usize; 2],
    sums: &mut [[__m512; R]; N],
) {
    let width = weight[0].len();
    let padded = width.next_multiple_of(DENSE_COLUMNS);
    assert!(weight.iter().all(|row| row.len() == width) && x.iter().all(|x| x.len() >= padded));
    let mut lanes = *sums;
    for column in (0..width).step_by(DENSE_COLUMNS) {
        let valid = u32::MAX >> (DENSE_COLUMNS - (width - column).min(DENSE_COLUMNS));
        // SAFETY: the caller guarantees the instructions; masked loads read existing columns only; activations are
        // padded.
        unsafe {
            let mut vectors = [_mm512_setzero_si512(); R];
            for r in 0..R {
                let from = weight[r].as_ptr().add(column);
                if prefetch[0] > 0 {
                    _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(prefetch[0]).cast());
                    _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(prefetch[1]).cast());
                }
                vectors[r] = _mm512_maskz_loadu_epi16(valid, from.cast());
            }
            let x: [*const P::X; N] = std::array::from_fn(|n| x[n].as_ptr().add(column));
            P::add(&vectors, &x, &mut lanes);
        }
    }
    *sums = lanes;
}

/// The sum of each of four vectors' lanes. The bits do not depend on a vector's position among the four.
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
    // SAFETY: `sums` has room for four.
    unsafe {
        _mm_storeu_ps(
            sums.as_mut_ptr(),
            _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves)),
        );
    }
    sums
}
