//! Sums looked up with NEON: `tbl` takes sixteen bytes at once from a table of sixteen, the low bytes of the sums and the
//! high ones apart.

#![allow(clippy::needless_range_loop)] // lines and quarters index several arrays at once

use std::arch::aarch64::*;
use std::mem::MaybeUninit;

use super::lookup::{Lines, Table, Tokens};
use super::tables::{HALF, Halves, ROUND, Sums};
use crate::layout::LINE;

/// Bytes of a vector.
const WIDE: usize = 16;
/// Vectors of a line.
const QUARTERS: usize = LINE / WIDE;

/// # Safety
/// The processor must have NEON; lines, tables (split) and `out` must belong together.
#[target_feature(enable = "neon")]
pub unsafe fn add(lines: &Lines<'_>, tokens: Tokens<'_>, room: usize, out: &mut [f32]) {
    for (token, Table { sums, step }) in tokens.each().enumerate() {
        for line in 0..lines.count {
            // SAFETY: the caller's promise.
            unsafe { segment(lines, line, sums, step, out.as_mut_ptr().add(token * room + line * LINE)) };
        }
    }
}

/// One line: first and last eight rows of each vector of codes.
#[target_feature(enable = "neon")]
unsafe fn segment(lines: &Lines<'_>, line: usize, sums: &[Sums], step: f32, out: *mut f32) {
    let mut rows = [[vdupq_n_s16(0); 2]; QUARTERS];
    let mut from = lines.codes.as_ptr().wrapping_add(line * LINE);
    let mask = vdupq_n_u8(15);
    for sums in sums {
        // SAFETY: four tables of sixteen bytes, and a line of codes at every place.
        unsafe {
            let tables = std::ptr::from_ref(sums).cast::<u8>();
            let low = [vld1q_u8(tables), vld1q_u8(tables.add(WIDE))];
            let high = [vld1q_u8(tables.add(2 * WIDE)), vld1q_u8(tables.add(3 * WIDE))];
            for quarter in 0..QUARTERS {
                let codes = vld1q_u8(from.add(quarter * WIDE));
                let (a, b) = (vandq_u8(codes, mask), vshrq_n_u8::<4>(codes));
                let a = [vqtbl1q_u8(low[0], a), vqtbl1q_u8(low[1], a)];
                let b = [vqtbl1q_u8(high[0], b), vqtbl1q_u8(high[1], b)];
                let first = vaddq_s16(words(vzip1q_u8(a[0], a[1])), words(vzip1q_u8(b[0], b[1])));
                let last = vaddq_s16(words(vzip2q_u8(a[0], a[1])), words(vzip2q_u8(b[0], b[1])));
                rows[quarter][0] = vaddq_s16(rows[quarter][0], first);
                rows[quarter][1] = vaddq_s16(rows[quarter][1], last);
            }
        }
        from = from.wrapping_add(lines.width);
    }
    for quarter in 0..QUARTERS {
        for half in 0..2 {
            let eight = rows[quarter][half];
            let fours = [vmovl_s16(vget_low_s16(eight)), vmovl_s16(vget_high_s16(eight))];
            for (at, four) in fours.into_iter().enumerate() {
                // SAFETY: four rows of `out` each.
                unsafe {
                    let out = out.add(quarter * WIDE + half * 8 + at * 4);
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

/// The sums of every byte, split: `COLUMNS` activations, `TERMS` of them in half of it.
///
/// # Safety
/// The processor must have NEON.
#[target_feature(enable = "neon")]
pub unsafe fn fill<const COLUMNS: usize, const TERMS: usize>(
    x: &[[f32; COLUMNS]],
    halves: &Halves,
    sums: &mut [MaybeUninit<Sums>],
) {
    for (x, sums) in x.iter().zip(sums) {
        for half in 0..2 {
            let mut fours = [vdupq_n_f32(0.0); HALF / 4];
            for term in 0..TERMS {
                let x = vdupq_n_f32(x[(half * TERMS + term) % COLUMNS]);
                for (at, values) in fours.iter_mut().enumerate() {
                    // SAFETY: four of sixteen values.
                    let levels = unsafe { vld1q_f32(halves[half][term].as_ptr().add(at * 4)) };
                    *values = vaddq_f32(*values, vmulq_f32(x, levels));
                }
            }
            let narrow = |four| vmovn_s32(vreinterpretq_s32_f32(vaddq_f32(four, vdupq_n_f32(ROUND))));
            let first = vreinterpretq_u8_s16(vcombine_s16(narrow(fours[0]), narrow(fours[1])));
            let last = vreinterpretq_u8_s16(vcombine_s16(narrow(fours[2]), narrow(fours[3])));
            // SAFETY: sixteen sums.
            unsafe {
                let bytes = sums.as_mut_ptr().cast::<i16>().add(half * HALF).cast::<u8>();
                vst1q_u8(bytes, vuzp1q_u8(first, last));
                vst1q_u8(bytes.add(WIDE), vuzp2q_u8(first, last));
            }
        }
    }
}
