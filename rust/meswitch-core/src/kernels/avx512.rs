//! Sums looked up with AVX-512: `vpermw` takes 32 words at once from a table of 32, which is one half's sixteen sums twice,
//! so that the bit above an index does not matter and nothing needs a mask.

#![allow(clippy::needless_range_loop)] // lines and halves index several arrays at once

use std::arch::x86_64::*;

use super::lookup::{Lines, fetch};
use super::tables::{HALF, Halves, ROUND, Sums};
use crate::layout::LINE;

/// # Safety
/// The processor must have AVX-512 F and BW; lines, sums and `out` must belong together.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn add(lines: &Lines<'_>, sums: &[Sums], step: f32, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match lines.count {
            1 => segment::<1>(lines, sums, step, out),
            2 => segment::<2>(lines, sums, step, out),
            3 => segment::<3>(lines, sums, step, out),
            _ => segment::<4>(lines, sums, step, out),
        }
    }
}

/// `L` lines of 64 rows: sums of even rows and of odd ones.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn segment<const L: usize>(lines: &Lines<'_>, sums: &[Sums], step: f32, out: &mut [f32]) {
    let mut rows = [[_mm512_setzero_si512(); 2]; L];
    let mut from = lines.codes.as_ptr();
    for Sums(sums) in sums {
        // SAFETY: sixteen sums each, and a line of codes at every place.
        unsafe {
            let low = _mm512_broadcast_i64x4(_mm256_load_si256(sums.as_ptr().cast()));
            let high = _mm512_broadcast_i64x4(_mm256_load_si256(sums.as_ptr().add(HALF).cast()));
            for line in 0..L {
                if lines.lead {
                    fetch(from.wrapping_add(line * LINE));
                }
                let codes = _mm512_loadu_si512(from.add(line * LINE).cast());
                let even = _mm512_add_epi16(
                    _mm512_permutexvar_epi16(codes, low),
                    _mm512_permutexvar_epi16(_mm512_srli_epi16::<4>(codes), high),
                );
                let odd = _mm512_add_epi16(
                    _mm512_permutexvar_epi16(_mm512_srli_epi16::<8>(codes), low),
                    _mm512_permutexvar_epi16(_mm512_srli_epi16::<12>(codes), high),
                );
                rows[line][0] = _mm512_add_epi16(rows[line][0], even);
                rows[line][1] = _mm512_add_epi16(rows[line][1], odd);
            }
        }
        from = from.wrapping_add(lines.width);
    }
    let step = _mm512_set1_ps(step);
    for line in 0..L {
        // SAFETY: 64 rows of `out` a line.
        unsafe { flush(rows[line], step, out.as_mut_ptr().add(line * LINE)) };
    }
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
/// The processor must have AVX-512 F; there must be `COLUMNS` activations a byte.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub unsafe fn fill<const COLUMNS: usize, const TERMS: usize>(x: &[f32], halves: &Halves, sums: &mut [Sums]) {
    let mut levels = [[_mm512_setzero_ps(); TERMS]; 2];
    for (half, levels) in levels.iter_mut().enumerate() {
        for (term, levels) in levels.iter_mut().enumerate() {
            // SAFETY: sixteen values.
            *levels = unsafe { _mm512_loadu_ps(halves[half][term].as_ptr()) };
        }
    }
    for (x, Sums(sums)) in x.chunks_exact(COLUMNS).zip(sums) {
        for half in 0..2 {
            let mut values = _mm512_setzero_ps();
            for term in 0..TERMS {
                let x = _mm512_set1_ps(x[(half * TERMS + term) % COLUMNS]);
                values = _mm512_add_ps(values, _mm512_mul_ps(x, levels[half][term]));
            }
            let values = _mm512_castps_si512(_mm512_add_ps(values, _mm512_set1_ps(ROUND)));
            // SAFETY: sixteen sums.
            unsafe { _mm256_store_si256(sums.as_mut_ptr().add(half * HALF).cast(), _mm512_cvtepi32_epi16(values)) };
        }
    }
}
