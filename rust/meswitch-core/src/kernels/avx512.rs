//! Sums looked up with AVX-512: `vpermw` takes 32 words at once from a table of 32, which is one half's sixteen sums twice,
//! so that the bit above an index does not matter and nothing needs a mask.

#![allow(clippy::needless_range_loop)] // lines and tokens index several arrays at once

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::lookup::{Lines, Table, Tokens, fetch};
use super::tables::{Halves, ROUND, Sums};
use crate::layout::LINE;

/// # Safety
/// The processor must have AVX-512 F and BW; lines, tables and `out` must belong together.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn add(lines: &Lines<'_>, tokens: Tokens<'_>, room: usize, out: &mut [f32]) {
    let count = tokens.steps.len();
    for first in (0..count).step_by(2) {
        let (a, out) = (tokens.of(first), out.as_mut_ptr().wrapping_add(first * room));
        // SAFETY: the caller's promise.
        unsafe {
            match (first + 1 < count, first) {
                (true, 0) => some_lines::<true, 2>(lines, [a, tokens.of(1)], room, out),
                (true, _) => some_lines::<false, 2>(lines, [a, tokens.of(first + 1)], room, out),
                (_, 0) => some_lines::<true, 1>(lines, [a], room, out),
                _ => some_lines::<false, 1>(lines, [a], room, out),
            }
        }
    }
}

/// `LEAD` says that nobody has read the next lines yet.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn some_lines<const LEAD: bool, const N: usize>(
    lines: &Lines<'_>,
    tables: [Table<'_>; N],
    room: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match lines.count {
            1 => segment::<LEAD, 1, N>(lines, tables, room, out),
            2 => segment::<LEAD, 2, N>(lines, tables, room, out),
            3 => segment::<LEAD, 3, N>(lines, tables, room, out),
            _ => segment::<LEAD, 4, N>(lines, tables, room, out),
        }
    }
}

/// `L` lines of 64 rows and `N` tokens: sums of even rows and of odd ones.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn segment<const LEAD: bool, const L: usize, const N: usize>(
    lines: &Lines<'_>,
    tables: [Table<'_>; N],
    room: usize,
    out: *mut f32,
) {
    let mut rows = [[[_mm512_setzero_si512(); 2]; N]; L];
    let mut from = lines.codes.as_ptr();
    for at in 0..tables[0].sums.len() {
        let mut halves = [[_mm512_setzero_si512(); 2]; N];
        // SAFETY: sixteen sums each, and a line of codes at every place.
        unsafe {
            for n in 0..N {
                let sums = tables[n].sums.as_ptr().add(at).cast::<__m256i>();
                halves[n] = [_mm512_broadcast_i64x4(*sums), _mm512_broadcast_i64x4(*sums.add(1))];
            }
            for line in 0..L {
                if LEAD {
                    fetch(from.wrapping_add(line * LINE));
                }
                let codes = _mm512_loadu_si512(from.add(line * LINE).cast());
                let even = [codes, _mm512_srli_epi16::<4>(codes)];
                let odd = [_mm512_srli_epi16::<8>(codes), _mm512_srli_epi16::<12>(codes)];
                for n in 0..N {
                    rows[line][n][0] = _mm512_add_epi16(rows[line][n][0], looked_up(even, halves[n]));
                    rows[line][n][1] = _mm512_add_epi16(rows[line][n][1], looked_up(odd, halves[n]));
                }
            }
        }
        from = from.wrapping_add(lines.width);
    }
    for line in 0..L {
        for n in 0..N {
            // SAFETY: 64 rows of `out` a line.
            unsafe { flush(rows[line][n], _mm512_set1_ps(tables[n].step), out.add(n * room + line * LINE)) };
        }
    }
}

/// What two half bytes of 32 rows add.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn looked_up(codes: [__m512i; 2], halves: [__m512i; 2]) -> __m512i {
    _mm512_add_epi16(_mm512_permutexvar_epi16(codes[0], halves[0]), _mm512_permutexvar_epi16(codes[1], halves[1]))
}

/// Adds a line's sums times their step.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn flush([even, odd]: [__m512i; 2], step: __m512, out: *mut f32) {
    // Neighbouring rows, eight of every lane.
    let (first, last) = (_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd));
    macro_rules! lane {
        ($($lane:literal),*) => { $({
            let eights = _mm256_set_m128i(_mm512_extracti32x4_epi32::<$lane>(last), _mm512_extracti32x4_epi32::<$lane>(first));
            let sums = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(eights)), step);
            // SAFETY: sixteen rows a lane.
            unsafe {
                let out = out.add($lane * 16);
                _mm512_storeu_ps(out, _mm512_add_ps(_mm512_loadu_ps(out), sums));
            }
        })* };
    }
    lane!(0, 1, 2, 3);
}

/// The sums of every byte: `COLUMNS` activations, `TERMS` of them in half of it.
///
/// # Safety
/// The processor must have AVX-512 F and BW.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn fill<const COLUMNS: usize, const TERMS: usize>(
    x: &[[f32; COLUMNS]],
    halves: &Halves,
    sums: &mut [MaybeUninit<Sums>],
) {
    let mut levels = [[_mm512_setzero_ps(); TERMS]; 2];
    for (half, levels) in levels.iter_mut().enumerate() {
        for (term, levels) in levels.iter_mut().enumerate() {
            // SAFETY: sixteen values.
            *levels = unsafe { _mm512_loadu_ps(halves[half][term].as_ptr()) };
        }
    }
    // The low words of two registers' sums.
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
        // SAFETY: 32 sums, aligned to their size.
        unsafe { _mm512_store_si512(sums.as_mut_ptr().cast(), both) };
    }
}
