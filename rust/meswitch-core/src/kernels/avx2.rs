//! Sums looked up with AVX2: `vpshufb` takes 32 bytes at once from a table of sixteen, the low bytes of the sums and the
//! high ones apart.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::lookup::{Lines, Table, Tokens, fetch};
use super::tables::{HALF, Halves, ROUND, Sums};
use crate::layout::{BLOCK, LINE};

/// # Safety
/// The processor must have AVX2; lines, tables (split) and `out` must belong together.
#[target_feature(enable = "avx2")]
pub unsafe fn add(lines: &Lines<'_>, tokens: Tokens<'_>, room: usize, out: &mut [f32]) {
    for (token, table) in tokens.each().enumerate() {
        let out = out.as_mut_ptr().wrapping_add(token * room);
        // SAFETY: the caller's promise.
        unsafe { if token == 0 { segment::<true>(lines, table, out) } else { segment::<false>(lines, table, out) } }
    }
}

/// All lines of one token: for each vector of codes, the sums of first rows of both lanes, and of last rows. `LEAD` says
/// that nobody has read the next lines yet.
#[target_feature(enable = "avx2")]
unsafe fn segment<const LEAD: bool>(lines: &Lines<'_>, table: Table<'_>, out: *mut f32) {
    let mut rows = [[[_mm256_setzero_si256(); 2]; 2]; BLOCK / LINE];
    let rows = &mut rows[..lines.count];
    let mut from = lines.codes.as_ptr();
    let mask = _mm256_set1_epi8(15);
    for sums in table.sums {
        // SAFETY: four tables of sixteen bytes, and a line of codes at every place.
        unsafe {
            let table = std::ptr::from_ref(sums).cast::<__m128i>();
            let low = [_mm256_broadcastsi128_si256(*table), _mm256_broadcastsi128_si256(*table.add(1))];
            let high = [_mm256_broadcastsi128_si256(*table.add(2)), _mm256_broadcastsi128_si256(*table.add(3))];
            for (line, halves) in rows.iter_mut().enumerate() {
                let from = from.add(line * LINE);
                if LEAD {
                    fetch(from);
                }
                for (half, rows) in halves.iter_mut().enumerate() {
                    let codes = _mm256_loadu_si256(from.add(half * 32).cast());
                    let (a, b) = (_mm256_and_si256(codes, mask), _mm256_and_si256(_mm256_srli_epi16::<4>(codes), mask));
                    let a = [_mm256_shuffle_epi8(low[0], a), _mm256_shuffle_epi8(low[1], a)];
                    let b = [_mm256_shuffle_epi8(high[0], b), _mm256_shuffle_epi8(high[1], b)];
                    let first = _mm256_add_epi16(_mm256_unpacklo_epi8(a[0], a[1]), _mm256_unpacklo_epi8(b[0], b[1]));
                    let last = _mm256_add_epi16(_mm256_unpackhi_epi8(a[0], a[1]), _mm256_unpackhi_epi8(b[0], b[1]));
                    rows[0] = _mm256_add_epi16(rows[0], first);
                    rows[1] = _mm256_add_epi16(rows[1], last);
                }
            }
        }
        from = from.wrapping_add(lines.width);
    }
    let step = _mm256_set1_ps(table.step);
    for (at, rows) in rows.as_flattened().iter().enumerate() {
        // SAFETY: 32 rows of `out` a vector of codes.
        unsafe { flush(*rows, step, out.add(at * 32)) };
    }
}

/// Adds the sums of 32 rows times their step.
#[target_feature(enable = "avx2")]
unsafe fn flush([first, last]: [__m256i; 2], step: __m256, out: *mut f32) {
    let eights = [
        _mm256_castsi256_si128(first),
        _mm256_castsi256_si128(last),
        _mm256_extracti128_si256::<1>(first),
        _mm256_extracti128_si256::<1>(last),
    ];
    for (at, eight) in eights.into_iter().enumerate() {
        let sums = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(eight)), step);
        // SAFETY: eight rows each.
        unsafe {
            let out = out.add(at * 8);
            _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), sums));
        }
    }
}

/// The sums of every byte, split: `COLUMNS` activations, `TERMS` of them in half of it.
///
/// # Safety
/// The processor must have AVX2.
#[target_feature(enable = "avx2")]
pub unsafe fn fill<const COLUMNS: usize, const TERMS: usize>(
    x: &[[f32; COLUMNS]],
    halves: &Halves,
    sums: &mut [MaybeUninit<Sums>],
) {
    // Of eight 32-bit sums, the low bytes of four and their high bytes, beside those of another eight.
    let first = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, -1, -1, -1, -1, -1, -1, -1, -1));
    let last = _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, 1, 5, 9, 13));
    let order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
    for (x, sums) in x.iter().zip(sums) {
        for half in 0..2 {
            let mut eights = [_mm256_setzero_ps(); 2];
            for term in 0..TERMS {
                let x = _mm256_set1_ps(x[(half * TERMS + term) % COLUMNS]);
                for (at, values) in eights.iter_mut().enumerate() {
                    // SAFETY: eight of sixteen values.
                    let levels = unsafe { _mm256_loadu_ps(halves[half][term].as_ptr().add(at * 8)) };
                    *values = _mm256_add_ps(*values, _mm256_mul_ps(x, levels));
                }
            }
            let round = _mm256_set1_ps(ROUND);
            let [a, b] = [_mm256_add_ps(eights[0], round), _mm256_add_ps(eights[1], round)];
            let (a, b) = (_mm256_castps_si256(a), _mm256_castps_si256(b));
            let bytes = _mm256_or_si256(_mm256_shuffle_epi8(a, first), _mm256_shuffle_epi8(b, last));
            let split = _mm256_permutevar8x32_epi32(bytes, order);
            // SAFETY: sixteen sums.
            unsafe { _mm256_store_si256(sums.as_mut_ptr().cast::<i16>().add(half * HALF).cast(), split) };
        }
    }
}
