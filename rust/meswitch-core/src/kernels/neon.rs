//! Integer dot products with NEON: `sdot` sums four byte products into a 32-bit lane, and processors without it keep each
//! column's products in 16 bits, which hold a segment's sums as long as codes are below 16.
//!
//! Both take signed bytes. So planes are masked where they stand within half a byte, and the upper half is shifted down.

#![allow(clippy::needless_range_loop)] // rows and planes index several arrays at once

use std::arch::aarch64::*;
use std::arch::asm;

use super::activations::{SPAN, STEPS, Token};
use super::decode::Codes;
use crate::layout::RUN;

/// Bytes of a vector.
const WIDE: usize = 16;
/// Vectors of a run.
const QUARTERS: usize = RUN / WIDE;
/// Spans of a segment.
const SPANS: usize = 8;

macro_rules! features {
    ($($item:item)*) => { $(#[target_feature(enable = "neon")] $item)* };
}

/// What a plane's codes are multiplied by.
pub fn unit(bits: u32, plane: usize) -> f32 {
    (1u32 << (bits as usize * plane % 4)) as f32
}

/// Sums of the products of 16 columns.
pub trait Lanes: Copy {
    /// # Safety
    /// The processor must have NEON.
    unsafe fn none() -> Self;

    /// Adds products of codes below 16, a segment's at most.
    ///
    /// # Safety
    /// The processor must have what the lanes need.
    unsafe fn add(self, codes: uint8x16_t, x: int8x16_t) -> Self;

    /// The sums of four neighbouring columns.
    ///
    /// # Safety
    /// The processor must have NEON.
    unsafe fn fours(self) -> int32x4_t;
}

/// A lane for four columns; the processor must have `dotprod`.
#[derive(Clone, Copy)]
pub struct Fours(int32x4_t);

impl Lanes for Fours {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn none() -> Self {
        Self(vdupq_n_s32(0))
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add(self, codes: uint8x16_t, x: int8x16_t) -> Self {
        let mut sums = self.0;
        // SAFETY: registers alone, and the caller's promise. (The intrinsic is not stable yet.)
        unsafe {
            asm!(
                ".arch_extension dotprod",
                "sdot {sums:v}.4s, {codes:v}.16b, {x:v}.16b",
                sums = inout(vreg) sums,
                codes = in(vreg) codes,
                x = in(vreg) x,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        Self(sums)
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn fours(self) -> int32x4_t {
        self.0
    }
}

/// A lane for each column.
#[derive(Clone, Copy)]
pub struct Singles([int16x8_t; 2]);

impl Lanes for Singles {
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn none() -> Self {
        Self([vdupq_n_s16(0); 2])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn add(self, codes: uint8x16_t, x: int8x16_t) -> Self {
        let codes = vreinterpretq_s8_u8(codes);
        let low = vmlal_s8(self.0[0], vget_low_s8(codes), vget_low_s8(x));
        Self([low, vmlal_high_s8(self.0[1], codes, x)])
    }

    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn fours(self) -> int32x4_t {
        vpaddlq_s16(vpaddq_s16(self.0[0], self.0[1]))
    }
}

/// # Safety
/// The processor must have NEON and what the lanes need; tokens must have at least the codes' columns.
#[target_feature(enable = "neon")]
pub unsafe fn dot<L: Lanes>(codes: &Codes<'_>, tokens: &[Token<'_>], out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match codes.bits {
            1 => dot_planes::<L, 8, 8, 1>(codes, tokens, out),
            2 => dot_planes::<L, 4, 4, 2>(codes, tokens, out),
            4 => dot_planes::<L, 2, 2, 4>(codes, tokens, out),
            _ => dot_planes::<L, 1, 2, 4>(codes, tokens, out),
        }
    }
}

/// # Safety
/// As `dot`; `scales` has one value for each 64 columns of each row.
#[target_feature(enable = "neon")]
pub unsafe fn dot_scaled<L: Lanes>(codes: &Codes<'_>, scales: &[f32], tokens: &[Token<'_>], out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match codes.bits {
            1 => scaled_planes::<L, 8, 8>(codes, scales, tokens, out),
            2 => scaled_planes::<L, 4, 4>(codes, scales, tokens, out),
            4 => scaled_planes::<L, 2, 2>(codes, scales, tokens, out),
            _ => scaled_planes::<L, 1, 2>(codes, scales, tokens, out),
        }
    }
}

// A byte is `PLANES` codes, and is multiplied in `PARTS`: as many, but for whole bytes, which are two halves.
features! {
    unsafe fn dot_planes<L: Lanes, const PLANES: usize, const PARTS: usize, const R: usize>(
        codes: &Codes<'_>,
        tokens: &[Token<'_>],
        out: &mut [f32],
    ) {
        let rows = codes.rows;
        let whole = rows / R * R;
        for row in (0..whole).step_by(R) {
            for (at, token) in tokens.iter().enumerate() {
                // SAFETY: rows below `rows`.
                let sums = unsafe { stream::<L, PLANES, PARTS, R>(codes, row, token) };
                out[at * rows + row..][..R].copy_from_slice(&sums);
            }
        }
        for row in whole..rows {
            for (at, token) in tokens.iter().enumerate() {
                // SAFETY: as above.
                let sums = unsafe { stream::<L, PLANES, PARTS, 1>(codes, row, token) };
                out[at * rows + row] = sums[0];
            }
        }
    }

    /// `R` rows of one token.
    unsafe fn stream<L: Lanes, const PLANES: usize, const PARTS: usize, const R: usize>(
        codes: &Codes<'_>,
        row: usize,
        token: &Token<'_>,
    ) -> [f32; R] {
        let mut sums = [vdupq_n_f32(0.0); R];
        let spans = codes.columns / SPAN;
        let from: [*const u8; R] = std::array::from_fn(|r| codes.row(row + r));
        for first in (0..spans).step_by(SPANS) {
            for vector in 0..8 / PLANES * QUARTERS {
                let (run, quarter) = (vector / QUARTERS, vector % QUARTERS * WIDE);
                // SAFETY: the caller's promise.
                let mut lanes = [[unsafe { L::none() }; PARTS]; R];
                for span in first..spans.min(first + SPANS) {
                    // SAFETY: a quarter of a run of codes, and its 16·PLANES columns of the token.
                    unsafe {
                        let at = (span * 8 / PLANES + run) * RUN + quarter;
                        let x = token.rounded.as_ptr().add((span * 8 + run * PLANES) * RUN + quarter);
                        for r in 0..R {
                            add::<L, PLANES, PARTS>(vld1q_u8(from[r].add(at)), x, RUN, &mut lanes[r]);
                        }
                    }
                }
                for r in 0..R {
                    // SAFETY: the caller's promise.
                    let fours = unsafe { fours::<L, PLANES, PARTS>(&lanes[r]) };
                    for plane in 0..PLANES {
                        let at = first / SPANS * STEPS + (run * PLANES + plane) * RUN / 4 + quarter / 4;
                        // SAFETY: within the segment's steps.
                        let steps = unsafe { vld1q_f32(token.steps.as_ptr().add(at)) };
                        sums[r] = vfmaq_f32(sums[r], vcvtq_f32_s32(fours[plane]), steps);
                    }
                }
            }
        }
        // SAFETY: as this function.
        std::array::from_fn(|r| unsafe { finish::<L, PLANES, PARTS>(codes, row + r, token, sums[r]) })
    }

    unsafe fn scaled_planes<L: Lanes, const PLANES: usize, const PARTS: usize>(
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
                out[at * codes.rows + row] = unsafe { scaled::<L, PLANES, PARTS>(codes, row, scales, token) };
            }
        }
    }

    /// One row of one token, every 64 columns times a scale; columns after the last whole span are left out.
    unsafe fn scaled<L: Lanes, const PLANES: usize, const PARTS: usize>(
        codes: &Codes<'_>,
        row: usize,
        scales: &[f32],
        token: &Token<'_>,
    ) -> f32 {
        let (mut sum, from) = (vdupq_n_f32(0.0), codes.row(row));
        for span in 0..codes.columns / SPAN {
            for vector in 0..8 / PLANES * QUARTERS {
                let (run, quarter) = (vector / QUARTERS, vector % QUARTERS * WIDE);
                // SAFETY: a quarter of a run of codes, its columns of the token, the steps of its segment.
                unsafe {
                    let packed = vld1q_u8(from.add((span * 8 / PLANES + run) * RUN + quarter));
                    let x = token.rounded.as_ptr().add((span * 8 + run * PLANES) * RUN + quarter);
                    let mut lanes = [L::none(); PARTS];
                    add::<L, PLANES, PARTS>(packed, x, RUN, &mut lanes);
                    for (plane, fours) in fours::<L, PLANES, PARTS>(&lanes).into_iter().enumerate() {
                        let block = run * PLANES + plane;
                        let at = span / SPANS * STEPS + block * RUN / 4 + quarter / 4;
                        let steps = vmulq_n_f32(vld1q_f32(token.steps.as_ptr().add(at)), scales[span * 8 + block]);
                        sum = vfmaq_f32(sum, vcvtq_f32_s32(fours), steps);
                    }
                }
            }
        }
        vaddvq_f32(sum)
    }

    /// A row's sum, after its last columns.
    unsafe fn finish<L: Lanes, const PLANES: usize, const PARTS: usize>(
        codes: &Codes<'_>,
        row: usize,
        token: &Token<'_>,
        sum: float32x4_t,
    ) -> f32 {
        let (mut all, mut column) = (vdupq_n_s32(0), codes.columns / SPAN * SPAN);
        for run in codes.packed(row)[column / PLANES..].chunks(RUN) {
            for (quarter, bytes) in run.chunks(WIDE).enumerate() {
                let mut packed = [0u8; WIDE];
                packed[..bytes.len()].copy_from_slice(bytes);
                // SAFETY: sixteen bytes; padding makes the activations long enough.
                unsafe {
                    let mut lanes = [L::none(); PARTS];
                    let x = token.rounded.as_ptr().add(column + quarter * WIDE);
                    add::<L, PLANES, PARTS>(vld1q_u8(packed.as_ptr()), x, run.len(), &mut lanes);
                    for (plane, fours) in fours::<L, PLANES, PARTS>(&lanes).into_iter().enumerate() {
                        let down = vdupq_n_s32(-((plane * 8 / PLANES % 4) as i32));
                        all = vaddq_s32(all, vshlq_s32(fours, down));
                    }
                }
            }
            column += PLANES * run.len();
        }
        vaddvq_f32(vfmaq_n_f32(sum, vcvtq_f32_s32(all), token.tail))
    }

    /// Adds 16 bytes of codes, times activations whose planes are `width` apart.
    #[inline]
    unsafe fn add<L: Lanes, const PLANES: usize, const PARTS: usize>(
        packed: uint8x16_t,
        x: *const i8,
        width: usize,
        lanes: &mut [L; PARTS],
    ) {
        let upper = vshrq_n_u8::<4>(packed);
        for (part, lanes) in lanes.iter_mut().enumerate() {
            let at = part * 8 / PARTS;
            let mask = ((1u8 << (8 / PARTS)) - 1) << (at % 4);
            let codes = vandq_u8(if at < 4 { packed } else { upper }, vdupq_n_u8(mask));
            // SAFETY: the caller's promise: 16 activations of every plane.
            *lanes = unsafe { lanes.add(codes, vld1q_s8(x.add(part * PLANES / PARTS * width))) };
        }
    }

    /// The sums of every plane; of whole bytes, those of both halves.
    #[inline]
    unsafe fn fours<L: Lanes, const PLANES: usize, const PARTS: usize>(lanes: &[L; PARTS]) -> [int32x4_t; PLANES] {
        let mut fours = [vdupq_n_s32(0); PLANES];
        for plane in 0..PLANES {
            // SAFETY: the caller's promise.
            fours[plane] = unsafe { lanes[plane].fours() };
        }
        if PLANES < PARTS {
            // SAFETY: as above.
            fours[0] = vaddq_s32(fours[0], vshlq_n_s32::<4>(unsafe { lanes[1].fours() }));
        }
        fours
    }
}
