//! Lookup tables read with AVX2: `vpshufb` looks up 32 bytes at once in a table of sixteen. The low and the high bytes
//! of the sums are looked up separately.

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::lookup::{CodeLines, Table, TokenTables, prefetch};
use super::tables::{HALF_VALUES, HalfLevels, ROUND, Sums};
use crate::layout::{BLOCK_ROWS, LINE_ROWS};

/// See [`super::lookup::add`].
///
/// # Safety
/// The processor must have AVX2; lengths must be as `lookup::add` checks them.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn add(lines: &CodeLines<'_>, tokens: TokenTables<'_>, stride: usize, out: &mut [f32]) {
    for (token, table) in tokens.iter().enumerate() {
        let out = out.as_mut_ptr().wrapping_add(token * stride);
        // SAFETY: the caller guarantees the instructions and lengths.
        unsafe { if token == 0 { segment::<true>(lines, table, out) } else { segment::<false>(lines, table, out) } }
    }
}

/// Adds one token's sums to all lines. For each vector of codes, the first eight rows of both 128-bit lanes are summed
/// apart from the last eight. `PREFETCH`: no earlier token has read these codes.
///
/// # Safety
/// As [`add`]; `out` must have room for all rows of the lines.
#[target_feature(enable = "avx2")]
unsafe fn segment<const PREFETCH: bool>(lines: &CodeLines<'_>, table: Table<'_>, out: *mut f32) {
    let mut rows = [[[_mm256_setzero_si256(); 2]; 2]; BLOCK_ROWS / LINE_ROWS];
    let rows = &mut rows[..lines.count];
    let mut from = lines.codes.as_ptr();
    let mask = _mm256_set1_epi8(15);
    for sums in table.sums {
        // SAFETY: four tables of sixteen bytes per byte of the segment; the codes have that byte of every line.
        unsafe {
            let table = std::ptr::from_ref(sums).cast::<__m128i>();
            let low = [_mm256_broadcastsi128_si256(*table), _mm256_broadcastsi128_si256(*table.add(1))];
            let high = [_mm256_broadcastsi128_si256(*table.add(2)), _mm256_broadcastsi128_si256(*table.add(3))];
            for (line, halves) in rows.iter_mut().enumerate() {
                let from = from.add(line * LINE_ROWS);
                if PREFETCH {
                    prefetch(from);
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
    for (index, rows) in rows.as_flattened().iter().enumerate() {
        // SAFETY: `out` has 32 rows for each vector of codes.
        unsafe { flush(*rows, step, out.add(index * 32)) };
    }
}

/// Adds the sums of 32 rows times their step.
///
/// # Safety
/// `out` must have room for 32 elements.
#[target_feature(enable = "avx2")]
unsafe fn flush([first, last]: [__m256i; 2], step: __m256, out: *mut f32) {
    let eights = [
        _mm256_castsi256_si128(first),
        _mm256_castsi256_si128(last),
        _mm256_extracti128_si256::<1>(first),
        _mm256_extracti128_si256::<1>(last),
    ];
    for (index, eight) in eights.into_iter().enumerate() {
        let sums = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(eight)), step);
        // SAFETY: four times eight of the 32 rows.
        unsafe {
            let out = out.add(index * 8);
            _mm256_storeu_ps(out, _mm256_add_ps(_mm256_loadu_ps(out), sums));
        }
    }
}

/// Writes the tables of each byte, low and high bytes apart: of `COLUMNS` activations, `TERMS` of which belong to each
/// half.
///
/// # Safety
/// The processor must have AVX2.
#[target_feature(enable = "avx2")]
pub(super) unsafe fn fill<const COLUMNS: usize, const TERMS: usize>(
    x: &[[f32; COLUMNS]],
    halves: &HalfLevels,
    sums: &mut [MaybeUninit<Sums>],
) {
    // Moves the low bytes, then the high bytes, of four 32-bit sums in each 128-bit lane together.
    let first = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, -1, -1, -1, -1, -1, -1, -1, -1));
    let last = _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, 1, 5, 9, 13));
    let order = _mm256_setr_epi32(0, 4, 2, 6, 1, 5, 3, 7);
    for (x, sums) in x.iter().zip(sums) {
        for half in 0..2 {
            let mut eights = [_mm256_setzero_ps(); 2];
            for term in 0..TERMS {
                let x = _mm256_set1_ps(x[(half * TERMS + term) % COLUMNS]);
                for (index, values) in eights.iter_mut().enumerate() {
                    // SAFETY: eight of the sixteen levels.
                    let levels = unsafe { _mm256_loadu_ps(halves[half][term].as_ptr().add(index * 8)) };
                    *values = _mm256_add_ps(*values, _mm256_mul_ps(x, levels));
                }
            }
            let round = _mm256_set1_ps(ROUND);
            let [a, b] = [_mm256_add_ps(eights[0], round), _mm256_add_ps(eights[1], round)];
            let (a, b) = (_mm256_castps_si256(a), _mm256_castps_si256(b));
            let bytes = _mm256_or_si256(_mm256_shuffle_epi8(a, first), _mm256_shuffle_epi8(b, last));
            let split = _mm256_permutevar8x32_epi32(bytes, order);
            // SAFETY: half of a table, which is aligned to 64 bytes.
            unsafe { _mm256_store_si256(sums.as_mut_ptr().cast::<i16>().add(half * HALF_VALUES).cast(), split) };
        }
    }
}
