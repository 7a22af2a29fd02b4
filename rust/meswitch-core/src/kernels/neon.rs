//! Lookup tables read with NEON: `tbl` looks up sixteen bytes at once in a table of sixteen. The low and the high bytes
//! of the sums are looked up separately.

#![allow(clippy::needless_range_loop)] // lines and vectors index several arrays at once

use std::arch::aarch64::*;
use std::mem::MaybeUninit;

use super::lookup::{CodeLines, Table, TokenTables};
use super::tables::{HALF_VALUES, HalfLevels, ROUND, Sums};
use crate::layout::LINE_ROWS;

/// Bytes of a vector.
const VECTOR_BYTES: usize = 16;
/// Vectors of a line.
const LINE_VECTORS: usize = LINE_ROWS / VECTOR_BYTES;

/// See [`super::lookup::add`].
///
/// # Safety
/// The processor must have NEON; lengths must be as `lookup::add` checks them.
#[target_feature(enable = "neon")]
pub(super) unsafe fn add(lines: &CodeLines<'_>, tokens: TokenTables<'_>, stride: usize, out: &mut [f32]) {
    for (token, Table { sums, step }) in tokens.iter().enumerate() {
        for line in 0..lines.count {
            // SAFETY: the caller guarantees the instructions and lengths.
            unsafe { segment(lines, line, sums, step, out.as_mut_ptr().add(token * stride + line * LINE_ROWS)) };
        }
    }
}

/// Adds one token's sums to one line. Of each vector of codes, the first eight rows are summed apart from the last
/// eight.
///
/// # Safety
/// As [`add`]; `out` must have room for 64 elements.
#[target_feature(enable = "neon")]
unsafe fn segment(lines: &CodeLines<'_>, line: usize, sums: &[Sums], step: f32, out: *mut f32) {
    let mut rows = [[vdupq_n_s16(0); 2]; LINE_VECTORS];
    let mut from = lines.codes.as_ptr().wrapping_add(line * LINE_ROWS);
    let mask = vdupq_n_u8(15);
    for sums in sums {
        // SAFETY: four tables of sixteen bytes per byte of the segment; the codes have that byte of the line.
        unsafe {
            let tables = std::ptr::from_ref(sums).cast::<u8>();
            let low = [vld1q_u8(tables), vld1q_u8(tables.add(VECTOR_BYTES))];
            let high = [vld1q_u8(tables.add(2 * VECTOR_BYTES)), vld1q_u8(tables.add(3 * VECTOR_BYTES))];
            for vector in 0..LINE_VECTORS {
                let codes = vld1q_u8(from.add(vector * VECTOR_BYTES));
                let (a, b) = (vandq_u8(codes, mask), vshrq_n_u8::<4>(codes));
                let a = [vqtbl1q_u8(low[0], a), vqtbl1q_u8(low[1], a)];
                let b = [vqtbl1q_u8(high[0], b), vqtbl1q_u8(high[1], b)];
                let first = vaddq_s16(words(vzip1q_u8(a[0], a[1])), words(vzip1q_u8(b[0], b[1])));
                let last = vaddq_s16(words(vzip2q_u8(a[0], a[1])), words(vzip2q_u8(b[0], b[1])));
                rows[vector][0] = vaddq_s16(rows[vector][0], first);
                rows[vector][1] = vaddq_s16(rows[vector][1], last);
            }
        }
        from = from.wrapping_add(lines.width);
    }
    for vector in 0..LINE_VECTORS {
        for half in 0..2 {
            let eight = rows[vector][half];
            let fours = [vmovl_s16(vget_low_s16(eight)), vmovl_s16(vget_high_s16(eight))];
            for (index, four) in fours.into_iter().enumerate() {
                // SAFETY: four of the 64 rows.
                unsafe {
                    let out = out.add(vector * VECTOR_BYTES + half * 8 + index * 4);
                    let sums = vmulq_n_f32(vcvtq_f32_s32(four), step);
                    vst1q_f32(out, vaddq_f32(vld1q_f32(out), sums));
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "neon")]
fn words(bytes: uint8x16_t) -> int16x8_t {
    vreinterpretq_s16_u8(bytes)
}

/// Writes the tables of each byte, low and high bytes apart: of `COLUMNS` activations, `TERMS` of which belong to each
/// half.
///
/// # Safety
/// The processor must have NEON.
#[target_feature(enable = "neon")]
pub(super) unsafe fn fill<const COLUMNS: usize, const TERMS: usize>(
    x: &[[f32; COLUMNS]],
    halves: &HalfLevels,
    sums: &mut [MaybeUninit<Sums>],
) {
    for (x, sums) in x.iter().zip(sums) {
        for half in 0..2 {
            let mut fours = [vdupq_n_f32(0.0); HALF_VALUES / 4];
            for term in 0..TERMS {
                let x = vdupq_n_f32(x[(half * TERMS + term) % COLUMNS]);
                for (index, values) in fours.iter_mut().enumerate() {
                    // SAFETY: four of the sixteen levels.
                    let levels = unsafe { vld1q_f32(halves[half][term].as_ptr().add(index * 4)) };
                    *values = vaddq_f32(*values, vmulq_f32(x, levels));
                }
            }
            let narrow = |four| vmovn_s32(vreinterpretq_s32_f32(vaddq_f32(four, vdupq_n_f32(ROUND))));
            let first = vreinterpretq_u8_s16(vcombine_s16(narrow(fours[0]), narrow(fours[1])));
            let last = vreinterpretq_u8_s16(vcombine_s16(narrow(fours[2]), narrow(fours[3])));
            // SAFETY: half of a table.
            unsafe {
                let bytes = sums.as_mut_ptr().cast::<i16>().add(half * HALF_VALUES).cast::<u8>();
                vst1q_u8(bytes, vuzp1q_u8(first, last));
                vst1q_u8(bytes.add(VECTOR_BYTES), vuzp2q_u8(first, last));
            }
        }
    }
}
