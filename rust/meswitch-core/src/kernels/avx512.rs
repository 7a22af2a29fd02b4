//! Integer dot products with AVX-512 VNNI: `vpdpbusd` sums four byte products into a 32-bit lane.
//!
//! A plane's codes are masked where they stand, not shifted down: the step of each lane makes up for it. One token reads
//! a row or two at a time, fetched well ahead, so that memory sets the pace. Several tokens share tiles of four rows.

#![allow(clippy::needless_range_loop)] // rows, planes and tokens index several arrays at once

use std::arch::x86_64::*;
use std::ops::Range;

use super::activations::{Places, SPAN, STEPS, Token};
use super::decode::{Codes, fetch};
use crate::layout::RUN;

/// Tokens of a tile.
const TOGETHER: usize = 4;
/// Spans of a segment.
const SPANS: usize = 8;

macro_rules! features {
    ($($item:item)*) => { $(#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")] $item)* };
}

/// What a plane's codes are multiplied by.
pub fn unit(bits: u32, plane: usize) -> f32 {
    (1u32 << (bits as usize * plane)) as f32
}

/// # Safety
/// The processor must have AVX-512 F, BW, VL and VNNI; tokens must have at least the codes' columns.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub unsafe fn dot(codes: &Codes<'_>, tokens: &[Token<'_>], out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match codes.bits {
            1 => dot_planes::<8>(codes, tokens, out),
            2 => dot_planes::<4>(codes, tokens, out),
            4 => dot_planes::<2>(codes, tokens, out),
            _ => dot_planes::<1>(codes, tokens, out),
        }
    }
}

/// # Safety
/// As `dot`; `scales` has one value for each 64 columns of each row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
pub unsafe fn dot_scaled(codes: &Codes<'_>, scales: &[f32], tokens: &[Token<'_>], out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match codes.bits {
            1 => scaled_planes::<8>(codes, scales, tokens, out),
            2 => scaled_planes::<4>(codes, scales, tokens, out),
            4 => scaled_planes::<2>(codes, scales, tokens, out),
            _ => scaled_planes::<1>(codes, scales, tokens, out),
        }
    }
}

/// Adds the products of the columns that were not rounded, row by row.
///
/// # Safety
/// The processor must have AVX-512 F; places must lie within a row.
#[target_feature(enable = "avx512f")]
pub unsafe fn outliers(codes: &Codes<'_>, places: &Places, out: &mut [f32]) {
    for (row, out) in out.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *out += reduce_one(unsafe { gathered(codes.bits, codes.row(row), places, _mm512_setzero_ps()) });
    }
}

/// The sum of one row's outliers in lanes.
#[target_feature(enable = "avx512f")]
unsafe fn gathered(bits: u32, row: *const u8, places: &Places, mut sum: __m512) -> __m512 {
    let mask = _mm512_set1_epi32((1 << bits) - 1);
    for at in (0..places.values.len()).step_by(16) {
        // SAFETY: sixteen places each, all of them words of the row, which is whole words long.
        unsafe {
            let words = _mm512_loadu_si512(places.words.as_ptr().add(at).cast());
            let shifts = _mm512_loadu_si512(places.shifts.as_ptr().add(at).cast());
            let packed = _mm512_i32gather_epi32::<4>(words, row.cast());
            let part = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(packed, shifts), mask));
            sum = _mm512_fmadd_ps(part, _mm512_loadu_ps(places.values.as_ptr().add(at)), sum);
        }
    }
    sum
}

/// The sums of four vectors' lanes; each the same bits wherever it stands.
#[target_feature(enable = "avx512f")]
pub fn reduce([a, b, c, d]: [__m512; 4]) -> [f32; 4] {
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

/// The sum of one vector's lanes.
#[target_feature(enable = "avx512f")]
fn reduce_one(sum: __m512) -> f32 {
    let none = _mm512_setzero_ps();
    reduce([sum, none, none, none])[0]
}

features! {
    unsafe fn dot_planes<const PLANES: usize>(codes: &Codes<'_>, tokens: &[Token<'_>], out: &mut [f32]) {
        let rows = codes.rows;
        if let [token] = tokens {
            let whole = rows / 4 * 4;
            // SAFETY: rows below `rows`.
            unsafe {
                stream::<PLANES, 4>(codes, 0..whole, token, out);
                stream::<PLANES, 1>(codes, whole..rows, token, out);
            }
            return;
        }
        for (group, tokens) in tokens.chunks(TOGETHER).enumerate() {
            let out = &mut out[group * TOGETHER * rows..];
            // SAFETY: as this function.
            unsafe {
                match (tokens.len(), group) {
                    (1, _) => tiles::<PLANES, false, 8, 1>(codes, tokens, out),
                    (2, 0) => tiles::<PLANES, true, 4, 2>(codes, tokens, out),
                    (2, _) => tiles::<PLANES, false, 4, 2>(codes, tokens, out),
                    (3, 0) => tiles::<PLANES, true, 4, 3>(codes, tokens, out),
                    (3, _) => tiles::<PLANES, false, 4, 3>(codes, tokens, out),
                    (_, 0) => tiles::<PLANES, true, 3, TOGETHER>(codes, tokens, out),
                    _ => tiles::<PLANES, false, 3, TOGETHER>(codes, tokens, out),
                }
            }
        }
    }

    unsafe fn tiles<const PLANES: usize, const LEAD: bool, const R: usize, const N: usize>(
        codes: &Codes<'_>,
        tokens: &[Token<'_>],
        out: &mut [f32],
    ) {
        let whole = codes.rows / R * R;
        // SAFETY: rows below `rows`.
        unsafe {
            strip::<PLANES, LEAD, R, N>(codes, 0..whole, tokens, out);
            strip::<PLANES, LEAD, 1, N>(codes, whole..codes.rows, tokens, out);
        }
    }

    /// Rows of `N` tokens, `R` at a time; a segment of all rows before the next, so that the nearest cache holds the
    /// tokens.
    unsafe fn strip<const PLANES: usize, const LEAD: bool, const R: usize, const N: usize>(
        codes: &Codes<'_>,
        rows: Range<usize>,
        tokens: &[Token<'_>],
        out: &mut [f32],
    ) {
        let spans = codes.columns / SPAN;
        let from = |tile: usize| -> [*const u8; R] { std::array::from_fn(|r| codes.row(rows.start + tile * R + r)) };
        let mut tiles = vec![[[_mm512_setzero_ps(); N]; R]; rows.len() / R];
        for first in (0..spans).step_by(SPANS) {
            for (tile, sums) in tiles.iter_mut().enumerate() {
                // SAFETY: rows below `rows`, spans of their columns.
                unsafe { segment::<PLANES, LEAD, R, N>(&from(tile), first..spans.min(first + SPANS), tokens, sums) };
            }
        }
        for (tile, sums) in tiles.iter().enumerate() {
            let (from, row) = (from(tile), rows.start + tile * R);
            for first in (0..R * N).step_by(4) {
                let mut four = [_mm512_setzero_ps(); 4];
                for at in first..(first + 4).min(R * N) {
                    let (r, n) = (at / N, at % N);
                    // SAFETY: as this function.
                    four[at - first] = unsafe { finish::<PLANES>(codes, from[r], &tokens[n], sums[r][n]) };
                }
                let found = reduce(four);
                for at in first..(first + 4).min(R * N) {
                    out[at % N * codes.rows + row + at / N] = found[at - first];
                }
            }
        }
    }

    /// Rows of one token, `R` of them reduced together and two at a time read.
    unsafe fn stream<const PLANES: usize, const R: usize>(
        codes: &Codes<'_>,
        rows: Range<usize>,
        token: &Token<'_>,
        out: &mut [f32],
    ) {
        let (masks, spans, x) = (masks::<PLANES>(), codes.columns / SPAN, token.rounded.as_ptr());
        for row in rows.step_by(R) {
            let mut four = [_mm512_setzero_ps(); 4];
            for pair in (0..R).step_by(2) {
                // A row alone is read twice.
                let from = [codes.row(row + pair), codes.row(row + (pair + 1).min(R - 1))];
                let mut sums = [_mm512_setzero_ps(); 2];
                for first in (0..spans).step_by(SPANS) {
                    let mut lanes = [[_mm512_setzero_si512(); 8]; 2];
                    for span in first..spans.min(first + SPANS) {
                        // SAFETY: whole runs of codes, and their columns of the token.
                        unsafe { add_span::<PLANES>(from, span, x, &masks, &mut lanes) };
                    }
                    for block in 0..8 {
                        // SAFETY: within the segment's steps.
                        let steps =
                            unsafe { _mm512_loadu_ps(token.steps.as_ptr().add(first / SPANS * STEPS + block * 16)) };
                        for r in 0..2 {
                            let lanes = _mm512_cvtepi32_ps(lanes[r][block]);
                            sums[r] = _mm512_fmadd_ps(lanes, steps, sums[r]);
                        }
                    }
                }
                for r in 0..2.min(R) {
                    // SAFETY: as this function.
                    four[pair + r] = unsafe { finish::<PLANES>(codes, from[r], token, sums[r]) };
                }
            }
            out[row..row + R].copy_from_slice(&reduce(four)[..R]);
        }
    }

    #[inline]
    unsafe fn add_span<const PLANES: usize>(
        from: [*const u8; 2],
        span: usize,
        x: *const i8,
        masks: &[__m512i; PLANES],
        lanes: &mut [[__m512i; 8]; 2],
    ) {
        for run in 0..8 / PLANES {
            // SAFETY: the caller's promise.
            unsafe {
                let at = (span * 8 / PLANES + run) * RUN;
                fetch(from[0].wrapping_add(at));
                fetch(from[1].wrapping_add(at));
                let packed = [_mm512_loadu_si512(from[0].add(at).cast()), _mm512_loadu_si512(from[1].add(at).cast())];
                for plane in 0..PLANES {
                    let block = run * PLANES + plane;
                    let x = _mm512_load_si512(x.add((span * 8 + block) * RUN).cast());
                    for r in 0..2 {
                        let part = _mm512_and_si512(packed[r], masks[plane]);
                        lanes[r][block] = _mm512_dpbusd_epi32(lanes[r][block], part, x);
                    }
                }
            }
        }
    }

    /// Adds the spans of a segment to sums of `R` rows and `N` tokens: as many as registers hold sums and lanes of.
    /// `LEAD` says that nobody has read the next rows yet.
    unsafe fn segment<const PLANES: usize, const LEAD: bool, const R: usize, const N: usize>(
        from: &[*const u8; R],
        spans: Range<usize>,
        tokens: &[Token<'_>],
        sums: &mut [[__m512; N]; R],
    ) {
        let (masks, from) = (masks::<PLANES>(), *from);
        let x: [*const i8; N] = std::array::from_fn(|n| tokens[n].rounded.as_ptr());
        for block in 0..8 {
            let (run, plane) = (block / PLANES, block % PLANES);
            let (mut at, mut column) = ((spans.start * 8 / PLANES + run) * RUN, (spans.start * 8 + block) * RUN);
            let mut lanes = [[_mm512_setzero_si512(); N]; R];
            for _ in spans.clone() {
                // SAFETY: a whole run of codes, and 64 columns of each token.
                unsafe {
                    let mut part = [_mm512_setzero_si512(); R];
                    for r in 0..R {
                        if LEAD && plane == 0 {
                            fetch(from[r].wrapping_add(at));
                        }
                        part[r] = _mm512_and_si512(_mm512_loadu_si512(from[r].add(at).cast()), masks[plane]);
                    }
                    for n in 0..N {
                        let x = _mm512_load_si512(x[n].add(column).cast());
                        for r in 0..R {
                            lanes[r][n] = _mm512_dpbusd_epi32(lanes[r][n], part[r], x);
                        }
                    }
                }
                (at, column) = (at + SPAN / PLANES, column + SPAN);
            }
            for n in 0..N {
                let place = spans.start / SPANS * STEPS + block * 16;
                // SAFETY: within the segment's steps.
                let steps = unsafe { _mm512_loadu_ps(tokens[n].steps.as_ptr().add(place)) };
                for r in 0..R {
                    sums[r][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(lanes[r][n]), steps, sums[r][n]);
                }
            }
        }
    }

    unsafe fn scaled_planes<const PLANES: usize>(
        codes: &Codes<'_>,
        scales: &[f32],
        tokens: &[Token<'_>],
        out: &mut [f32],
    ) {
        let blocks = codes.columns.div_ceil(RUN);
        for row in 0..codes.rows {
            let scales = &scales[row * blocks..(row + 1) * blocks];
            for (at, token) in tokens.iter().enumerate() {
                // SAFETY: a row below `rows`.
                let sum = unsafe { scaled::<PLANES>(codes, row, scales, token) };
                out[at * codes.rows + row] = _mm512_reduce_add_ps(sum);
            }
        }
    }

    /// One row of one token, every 64 columns times a scale; columns after the last whole span are left out.
    unsafe fn scaled<const PLANES: usize>(codes: &Codes<'_>, row: usize, scales: &[f32], token: &Token<'_>) -> __m512 {
        let (mut sums, masks, from) = ([_mm512_setzero_ps(); 4], masks::<PLANES>(), codes.row(row));
        for span in 0..codes.columns / SPAN {
            let mut wide = [_mm512_setzero_ps(); 8];
            for block in 0..8 {
                wide[block] = _mm512_set1_ps(scales[span * 8 + block]);
            }
            for run in 0..8 / PLANES {
                // SAFETY: a whole run of codes, its columns of the token, the steps of its segment.
                unsafe {
                    let at = (span * 8 / PLANES + run) * RUN;
                    fetch(from.wrapping_add(at));
                    let packed = _mm512_loadu_si512(from.add(at).cast());
                    for plane in 0..PLANES {
                        let block = run * PLANES + plane;
                        let x = _mm512_load_si512(token.rounded.as_ptr().add((span * 8 + block) * RUN).cast());
                        let part = _mm512_and_si512(packed, masks[plane]);
                        let lanes = _mm512_dpbusd_epi32(_mm512_setzero_si512(), part, x);
                        let steps = _mm512_loadu_ps(token.steps.as_ptr().add(span / SPANS * STEPS + block * 16));
                        let scaled = _mm512_mul_ps(steps, wide[block]);
                        sums[block % 4] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(lanes), scaled, sums[block % 4]);
                    }
                }
            }
        }
        _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]))
    }

    /// A row's sum in lanes, with its last columns and those that were not rounded.
    unsafe fn finish<const PLANES: usize>(codes: &Codes<'_>, row: *const u8, token: &Token<'_>, sum: __m512) -> __m512 {
        // SAFETY: as this function.
        let sum = if codes.columns.is_multiple_of(SPAN) { sum } else { unsafe { last::<PLANES>(codes, row, token, sum) } };
        if token.outliers.is_empty() {
            return sum;
        }
        // SAFETY: places lie within a row.
        unsafe { gathered(codes.bits, row, token.places, sum) }
    }

    unsafe fn last<const PLANES: usize>(codes: &Codes<'_>, row: *const u8, token: &Token<'_>, sum: __m512) -> __m512 {
        let bits = 8 / PLANES;
        let (main, mask) = (codes.columns / SPAN * SPAN, _mm512_set1_epi8(((1u16 << bits) - 1) as i8));
        let mut lanes = _mm512_setzero_si512();
        let (mut at, mut column) = (main / PLANES, main);
        while at < codes.length {
            let width = (codes.length - at).min(RUN);
            // SAFETY: masked loads touch the run's `width` bytes; padding makes the activations long enough.
            unsafe {
                let packed = _mm512_maskz_loadu_epi8(u64::MAX >> (RUN - width), row.add(at).cast());
                for plane in 0..PLANES {
                    let shift = _mm_cvtsi32_si128((plane * bits) as i32);
                    let part = _mm512_and_si512(_mm512_srl_epi16(packed, shift), mask);
                    let x = _mm512_loadu_si512(token.rounded.as_ptr().add(column + plane * width).cast());
                    lanes = _mm512_dpbusd_epi32(lanes, part, x);
                }
            }
            at += width;
            column += PLANES * width;
        }
        _mm512_fmadd_ps(_mm512_cvtepi32_ps(lanes), _mm512_set1_ps(token.tail), sum)
    }

    fn masks<const PLANES: usize>() -> [__m512i; PLANES] {
        let low = (1u16 << (8 / PLANES)) - 1;
        let mut masks = [_mm512_setzero_si512(); PLANES];
        for plane in 0..PLANES {
            masks[plane] = _mm512_set1_epi8((low << (plane * 8 / PLANES)) as i8);
        }
        masks
    }
}
