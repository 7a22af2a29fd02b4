//! Lookup tables read with AVX-512: `vpermw` looks up 32 words at once in a table of 32, which is one half's sixteen
//! sums twice. So the bit above an index does not matter, and no mask is needed.

#![allow(clippy::needless_range_loop)] // lines and tokens index several arrays at once

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::lookup::{CodeLines, Table, TokenTables, prefetch};
use super::tables::{HalfLevels, ROUND, Sums};
use crate::layout::LINE_ROWS;

/// See [`super::lookup::add`].
///
/// # Safety
/// The processor must have AVX-512 F, BW and VL; lengths must be as `lookup::add` checks them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn add(lines: &CodeLines<'_>, tokens: TokenTables<'_>, stride: usize, out: &mut [f32]) {
    let count = tokens.steps.len();
    for first in (0..count).step_by(2) {
        let (a, out) = (tokens.token(first), out.as_mut_ptr().wrapping_add(first * stride));
        // SAFETY: the caller guarantees the instructions and lengths.
        unsafe {
            match (first + 1 < count, first) {
                (true, 0) => add_tokens::<true, 2>(lines, [a, tokens.token(1)], stride, out),
                (true, _) => add_tokens::<false, 2>(lines, [a, tokens.token(first + 1)], stride, out),
                (_, 0) => add_tokens::<true, 1>(lines, [a], stride, out),
                _ => add_tokens::<false, 1>(lines, [a], stride, out),
            }
        }
    }
}

/// Adds `N` tokens' sums to all lines. `PREFETCH`: no earlier token has read these codes.
///
/// # Safety
/// As [`add`]; `out` must have room for `N` tokens.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn add_tokens<const PREFETCH: bool, const N: usize>(
    lines: &CodeLines<'_>,
    tables: [Table<'_>; N],
    stride: usize,
    out: *mut f32,
) {
    // SAFETY: the caller guarantees the instructions and lengths.
    unsafe {
        match lines.count {
            1 => segment::<PREFETCH, 1, N>(lines, tables, stride, out),
            2 => segment::<PREFETCH, 2, N>(lines, tables, stride, out),
            3 => segment::<PREFETCH, 3, N>(lines, tables, stride, out),
            _ => segment::<PREFETCH, 4, N>(lines, tables, stride, out),
        }
    }
}

/// Adds `N` tokens' sums to `L` lines of 64 rows, even rows apart from odd ones.
///
/// # Safety
/// As [`add_tokens`]; there must be `L` lines.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn segment<const PREFETCH: bool, const L: usize, const N: usize>(
    lines: &CodeLines<'_>,
    tables: [Table<'_>; N],
    stride: usize,
    out: *mut f32,
) {
    let mut rows = [[[_mm512_setzero_si512(); 2]; N]; L];
    let mut from = lines.codes.as_ptr();
    for byte in 0..tables[0].sums.len() {
        let mut halves = [[_mm512_setzero_si512(); 2]; N];
        // SAFETY: two times sixteen sums per byte of the segment; the codes have that byte of every line.
        unsafe {
            for n in 0..N {
                let sums = tables[n].sums.as_ptr().add(byte).cast::<__m256i>();
                halves[n] = [_mm512_broadcast_i64x4(*sums), _mm512_broadcast_i64x4(*sums.add(1))];
            }
            for line in 0..L {
                if PREFETCH {
                    prefetch(from.wrapping_add(line * LINE_ROWS));
                }
                let codes = _mm512_loadu_si512(from.add(line * LINE_ROWS).cast());
                let even = [codes, _mm512_srli_epi16::<4>(codes)];
                let odd = [_mm512_srli_epi16::<8>(codes), _mm512_srli_epi16::<12>(codes)];
                for n in 0..N {
                    rows[line][n][0] = _mm512_add_epi16(rows[line][n][0], look_up(even, halves[n]));
                    rows[line][n][1] = _mm512_add_epi16(rows[line][n][1], look_up(odd, halves[n]));
                }
            }
        }
        from = from.wrapping_add(lines.width);
    }
    for line in 0..L {
        for n in 0..N {
            // SAFETY: `out` has 64 rows for each line.
            unsafe { flush(rows[line][n], _mm512_set1_ps(tables[n].step), out.add(n * stride + line * LINE_ROWS)) };
        }
    }
}

/// The sums of two half bytes of 32 rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn look_up(codes: [__m512i; 2], halves: [__m512i; 2]) -> __m512i {
    _mm512_add_epi16(_mm512_permutexvar_epi16(codes[0], halves[0]), _mm512_permutexvar_epi16(codes[1], halves[1]))
}

/// Adds a line's sums times their step.
///
/// # Safety
/// `out` must have room for 64 elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn flush([even, odd]: [__m512i; 2], step: __m512, out: *mut f32) {
    // Interleaves even and odd rows: eight neighbouring rows of every 128-bit lane.
    let (first, last) = (_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd));
    macro_rules! lane {
        ($($lane:literal),*) => { $({
            let eights = _mm256_set_m128i(_mm512_extracti32x4_epi32::<$lane>(last), _mm512_extracti32x4_epi32::<$lane>(first));
            let sums = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(eights)), step);
            // SAFETY: sixteen of the 64 rows for each lane.
            unsafe {
                let out = out.add($lane * 16);
                _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sums));
            }
        })* };
    }
    lane!(0, 1, 2, 3);
}

/// Writes the tables of each byte: of `COLUMNS` activations, `TERMS` of which belong to each half.
///
/// # Safety
/// The processor must have AVX-512 F, BW and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn fill<const COLUMNS: usize, const TERMS: usize>(
    x: &[[f32; COLUMNS]],
    halves: &HalfLevels,
    sums: &mut [MaybeUninit<Sums>],
) {
    let mut levels = [[_mm512_setzero_ps(); TERMS]; 2];
    for (half, levels) in levels.iter_mut().enumerate() {
        for (term, levels) in levels.iter_mut().enumerate() {
            // SAFETY: sixteen levels.
            *levels = unsafe { _mm512_loadu_ps(halves[half][term].as_ptr()) };
        }
    }
    // Takes the low word of every sum of two registers.
    let words = _mm512_set_epi16(
        62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8,
        6, 4, 2, 0,
    );
    for (x, sums) in x.iter().zip(sums) {
        let half = |half: usize| {
            let times =
                |term: usize| _mm512_mul_ps(_mm512_set1_ps(x[(half * TERMS + term) % COLUMNS]), levels[half][term]);
            let values = (1..TERMS).fold(times(0), |values, term| _mm512_add_ps(values, times(term)));
            _mm512_castps_si512(_mm512_add_ps(values, _mm512_set1_ps(ROUND)))
        };
        let both = _mm512_permutex2var_epi16(half(0), words, half(1));
        // SAFETY: a whole table, which is aligned to its size.
        unsafe { _mm512_store_si512(sums.as_mut_ptr().cast(), both) };
    }
}
