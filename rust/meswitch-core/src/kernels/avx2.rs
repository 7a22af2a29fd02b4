//! Integer dot products with AVX2: `vpmaddubsw` sums two byte products into 16 bits, which hold a segment's sums as long
//! as codes are below 16. So planes are masked where they stand within half a byte, and the upper half is shifted down.

#![allow(clippy::needless_range_loop)] // rows, planes and tokens index several arrays at once

use std::arch::x86_64::*;
use std::ops::Range;

use super::activations::{SPAN, STEPS, Token};
use super::decode::{Codes, fetch};
use crate::layout::RUN;

/// Bytes of a vector.
const WIDE: usize = 32;
/// Spans of a segment.
const SPANS: usize = 8;

macro_rules! features {
    ($($item:item)*) => { $(#[target_feature(enable = "avx2,fma")] $item)* };
}

/// What a plane's codes are multiplied by.
pub fn unit(bits: u32, plane: usize) -> f32 {
    (1u32 << (bits as usize * plane % 4)) as f32
}

/// # Safety
/// The processor must have AVX2 and FMA; tokens must have at least the codes' columns.
#[target_feature(enable = "avx2,fma")]
pub unsafe fn dot(codes: &Codes<'_>, tokens: &[Token<'_>], out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match codes.bits {
            1 => dot_planes::<8, 2>(codes, tokens, out),
            2 => dot_planes::<4, 4>(codes, tokens, out),
            4 => dot_planes::<2, 4>(codes, tokens, out),
            _ => dot_planes::<1, 4>(codes, tokens, out),
        }
    }
}

/// # Safety
/// As `dot`; `scales` has one value for each 64 columns of each row.
#[target_feature(enable = "avx2,fma")]
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

features! {
    unsafe fn dot_planes<const PLANES: usize, const R: usize>(
        codes: &Codes<'_>,
        tokens: &[Token<'_>],
        out: &mut [f32],
    ) {
        let rows = codes.rows;
        let whole = rows / R * R;
        for row in (0..whole).step_by(R) {
            for (at, token) in tokens.iter().enumerate() {
                // SAFETY: rows below `rows`.
                let sums = unsafe { stream::<PLANES, R>(codes, row, token, at == 0) };
                out[at * rows + row..][..R].copy_from_slice(&sums);
            }
        }
        for row in whole..rows {
            for (at, token) in tokens.iter().enumerate() {
                // SAFETY: as above.
                let sums = unsafe { stream::<PLANES, 1>(codes, row, token, at == 0) };
                out[at * rows + row..][..1].copy_from_slice(&sums);
            }
        }
    }

    /// `R` rows of one token; `lead` says that nobody has read what follows yet.
    unsafe fn stream<const PLANES: usize, const R: usize>(
        codes: &Codes<'_>,
        row: usize,
        token: &Token<'_>,
        lead: bool,
    ) -> [f32; R] {
        let mut sums = [_mm256_setzero_ps(); R];
        let spans = codes.columns / SPAN;
        let from: [*const u8; R] = std::array::from_fn(|r| codes.row(row + r));
        for first in (0..spans).step_by(SPANS) {
            let spans = first..spans.min(first + SPANS);
            for part in 0..16 / PLANES {
                // SAFETY: as this function.
                unsafe {
                    add_half::<PLANES, R, 0>(&from, spans.clone(), part, token, lead, &mut sums);
                    add_half::<PLANES, R, 1>(&from, spans.clone(), part, token, false, &mut sums);
                }
            }
        }
        // SAFETY: as this function.
        std::array::from_fn(|r| unsafe { finish::<PLANES>(codes, from[r], token, sums[r]) })
    }

    /// Adds the planes of the lower or the upper half of each byte, 32 bytes of every span: as many masks and sums as
    /// there are registers for.
    unsafe fn add_half<const PLANES: usize, const R: usize, const UPPER: usize>(
        from: &[*const u8; R],
        spans: Range<usize>,
        part: usize,
        token: &Token<'_>,
        lead: bool,
        sums: &mut [__m256; R],
    ) {
        let (run, half, count) = (part / 2, part % 2 * WIDE, (PLANES / 2).max(1));
        // Whole bytes are two halves of one plane, the upper worth sixteen times as much.
        let (upper, worth) = if PLANES == 1 { (0, 15 * UPPER + 1) } else { (UPPER * count, 1) };
        let bits = (8 / PLANES).min(4);
        let mask = |plane: usize| _mm256_set1_epi8((((1u32 << bits) - 1) << (plane * bits)) as i8);
        let (masks, mut pairs) = ([mask(0), mask(1), mask(2), mask(3)], [[_mm256_setzero_si256(); 4]; R]);
        for span in spans.clone() {
            let at = (span * 8 / PLANES + run) * RUN + half;
            // SAFETY: half a run of codes, and 32 columns of each of its planes.
            unsafe {
                let x = token.rounded.as_ptr().add((span * 8 + run * PLANES + upper) * RUN + half);
                let mut packed = [_mm256_setzero_si256(); R];
                for r in 0..R {
                    if lead && half == 0 {
                        fetch(from[r].wrapping_add(at));
                    }
                    packed[r] = _mm256_loadu_si256(from[r].add(at).cast());
                    if UPPER == 1 {
                        packed[r] = _mm256_srli_epi16::<4>(packed[r]);
                    }
                }
                for plane in 0..count {
                    let x = _mm256_loadu_si256(x.add(plane * RUN).cast());
                    for r in 0..R {
                        let products = _mm256_maddubs_epi16(_mm256_and_si256(packed[r], masks[plane]), x);
                        pairs[r][plane] = _mm256_add_epi16(pairs[r][plane], products);
                    }
                }
            }
        }
        for plane in 0..count {
            let place = spans.start / SPANS * STEPS + (run * PLANES + upper + plane) * 16 + half / 4;
            // SAFETY: within the segment's steps.
            let steps = unsafe { _mm256_loadu_ps(token.steps.as_ptr().add(place)) };
            for r in 0..R {
                let fours = _mm256_madd_epi16(pairs[r][plane], _mm256_set1_epi16(worth as i16));
                sums[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(fours), steps, sums[r]);
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
                out[at * codes.rows + row] = unsafe { scaled::<PLANES>(codes, row, scales, token) };
            }
        }
    }

    /// One row of one token, every 64 columns times a scale; columns after the last whole span are left out.
    unsafe fn scaled<const PLANES: usize>(codes: &Codes<'_>, row: usize, scales: &[f32], token: &Token<'_>) -> f32 {
        let (mut sum, from) = (_mm256_setzero_ps(), codes.row(row));
        for span in 0..codes.columns / SPAN {
            for part in 0..16 / PLANES {
                let (run, half) = (part / 2, part % 2 * WIDE);
                // SAFETY: half a run of codes, its columns of the token, the steps of its segment.
                unsafe {
                    let at = (span * 8 / PLANES + run) * RUN + half;
                    fetch(from.wrapping_add(at));
                    let packed = _mm256_loadu_si256(from.add(at).cast());
                    let mut pairs = [[_mm256_setzero_si256(); 2]; PLANES];
                    let x = token.rounded.as_ptr().add((span * 8 + run * PLANES) * RUN + half);
                    add_pairs::<PLANES>(packed, x, RUN, &mut pairs);
                    for plane in 0..PLANES {
                        let block = run * PLANES + plane;
                        let steps = token.steps.as_ptr().add(span / SPANS * STEPS + block * 16 + half / 4);
                        let scale = _mm256_set1_ps(scales[span * 8 + block]);
                        let scaled = _mm256_mul_ps(_mm256_loadu_ps(steps), scale);
                        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(fours::<PLANES>(pairs[plane])), scaled, sum);
                    }
                }
            }
        }
        reduce(sum)
    }

    /// A row's sum, after its last columns.
    unsafe fn finish<const PLANES: usize>(codes: &Codes<'_>, row: *const u8, token: &Token<'_>, sum: __m256) -> f32 {
        let (mut at, mut column) = (codes.columns / SPAN * SPAN / PLANES, codes.columns / SPAN * SPAN);
        let mut lanes = _mm256_setzero_si256();
        while at < codes.length {
            let width = (codes.length - at).min(RUN);
            for half in (0..width).step_by(WIDE) {
                let words = _mm256_set1_epi32(((width - half) / 4) as i32);
                let there = _mm256_cmpgt_epi32(words, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
                // SAFETY: masked loads touch the run's `width` bytes; padding makes the activations long enough.
                unsafe {
                    let packed = _mm256_maskload_epi32(row.add(at + half).cast(), there);
                    let mut pairs = [[_mm256_setzero_si256(); 2]; PLANES];
                    add_pairs::<PLANES>(packed, token.rounded.as_ptr().add(column + half), width, &mut pairs);
                    for (plane, pairs) in pairs.into_iter().enumerate() {
                        let shift = _mm_cvtsi32_si128((plane * 8 / PLANES % 4) as i32);
                        lanes = _mm256_add_epi32(lanes, _mm256_sra_epi32(fours::<PLANES>(pairs), shift));
                    }
                }
            }
            at += width;
            column += PLANES * width;
        }
        reduce(_mm256_fmadd_ps(_mm256_cvtepi32_ps(lanes), _mm256_set1_ps(token.tail), sum))
    }

    /// Adds 32 bytes of codes, times activations whose planes are `width` apart. Whole bytes are two halves.
    unsafe fn add_pairs<const PLANES: usize>(
        packed: __m256i,
        x: *const i8,
        width: usize,
        pairs: &mut [[__m256i; 2]; PLANES],
    ) {
        let nibble = _mm256_set1_epi8(15);
        let upper = _mm256_srli_epi16::<4>(packed);
        for (plane, pairs) in pairs.iter_mut().enumerate() {
            // SAFETY: the caller's promise: 32 activations of every plane.
            let x = unsafe { _mm256_loadu_si256(x.add(plane * width).cast()) };
            if PLANES == 1 {
                let products = _mm256_maddubs_epi16(_mm256_and_si256(upper, nibble), x);
                pairs[1] = _mm256_add_epi16(pairs[1], products);
            }
            let at = plane * 8 / PLANES;
            let mask = if PLANES == 1 { 15 } else { ((1 << (8 / PLANES)) - 1) << (at % 4) };
            let part = _mm256_and_si256(if at < 4 { packed } else { upper }, _mm256_set1_epi8(mask as i8));
            pairs[0] = _mm256_add_epi16(pairs[0], _mm256_maddubs_epi16(part, x));
        }
    }

    /// Sums of two byte products to sums of four.
    fn fours<const PLANES: usize>(pairs: [__m256i; 2]) -> __m256i {
        let low = _mm256_madd_epi16(pairs[0], _mm256_set1_epi16(1));
        if PLANES == 1 { _mm256_add_epi32(low, _mm256_madd_epi16(pairs[1], _mm256_set1_epi16(16))) } else { low }
    }

    fn reduce(sum: __m256) -> f32 {
        let half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps::<1>(sum));
        let half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)))
    }
}
