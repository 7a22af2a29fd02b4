//! `Σ (code − zero) · x` of packed rows: what a decode step is made of.
//!
//! One arithmetic, one file an instruction set: sixteen sums are looked up for every half byte of 64 rows at once and
//! added in integers of 16 bits, which is exact; a segment's total is multiplied by its step. So all instruction sets
//! give the same bits, and a token the same alone as among others.

use super::backend::{Backend, backend};
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::scalar;
use super::tables::Sums;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::layout::{BLOCK, LINE};

/// Bytes that codes are fetched ahead into the second cache.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 20480;
/// And into the first.
#[cfg(target_arch = "x86_64")]
const NEAR: usize = 2048;

/// A segment of some lines of a block.
#[derive(Clone, Copy)]
pub struct Lines<'a> {
    /// From the segment's first byte of the first line on.
    pub codes: &'a [u8],
    /// Bytes from one byte of a row to the next.
    pub width: usize,
    /// How many lines.
    pub count: usize,
}

impl<'a> Lines<'a> {
    /// The bytes at a place of a line's rows.
    pub(super) fn bytes(&self, at: usize, line: usize) -> &'a [u8; LINE] {
        self.codes[at * self.width + line * LINE..][..LINE].try_into().expect("a line")
    }
}

/// Fetches codes ahead of where they are read, far ahead into the second cache and nearer into the first: what is read
/// in turn is shorter than what the memory takes to answer, and few lines can be on their way to the first.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn fetch(codes: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    // SAFETY: hints, whatever the address.
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(codes.wrapping_add(AHEAD).cast());
        _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(NEAR).cast());
    }
}

/// Fetches what nobody has fetched ahead: the first bytes of what will be read.
pub(super) fn begin(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64).take(AHEAD / 64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

/// A token's sums for a segment, and their step.
#[derive(Clone, Copy)]
pub struct Table<'a> {
    /// One for each byte.
    pub sums: &'a [Sums],
    /// What they are multiples of.
    pub step: f32,
}

/// Every token's sums for a segment.
#[derive(Clone, Copy)]
pub struct Tokens<'a> {
    /// A token's after another's.
    pub sums: &'a [Sums],
    /// What they are multiples of.
    pub steps: &'a [f32],
    /// Bytes of the segment.
    pub bytes: usize,
}

impl<'a> Tokens<'a> {
    /// One token's.
    #[inline(always)]
    pub(super) fn of(&self, token: usize) -> Table<'a> {
        Table { sums: &self.sums[token * self.bytes..][..self.bytes], step: self.steps[token] }
    }

    /// Each token's.
    pub(super) fn each(&self) -> impl Iterator<Item = Table<'a>> {
        (0..self.steps.len()).map(|token| self.of(token))
    }
}

/// Adds `step · Σ sums` of a segment to `out [tokens, room]`, the first `lines · 64` of each.
pub fn add(lines: &Lines<'_>, tokens: Tokens<'_>, room: usize, out: &mut [f32]) {
    add_on(backend(), lines, tokens, room, out);
}

fn add_on(backend: Backend, lines: &Lines<'_>, tokens: Tokens<'_>, room: usize, out: &mut [f32]) {
    let Some(last) = tokens.bytes.checked_sub(1).filter(|_| lines.count > 0) else { return };
    assert!(lines.count * LINE <= lines.width && lines.count <= BLOCK / LINE);
    assert!(last * lines.width + lines.count * LINE <= lines.codes.len());
    assert!(lines.count * LINE <= room && out.len() >= (tokens.steps.len() - 1) * room + lines.count * LINE);
    match backend {
        // SAFETY: a backend is named only after the processor said that it has it; lengths were looked at.
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 => unsafe { avx512::add(lines, tokens, room, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Backend::Avx2 => unsafe { avx2::add(lines, tokens, room, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Backend::Neon => unsafe { neon::add(lines, tokens, room, out) },
        _ => scalar::add(lines, tokens, room, out),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::backend::available;
    use super::super::tables::{Form, Tables};
    use super::*;
    use crate::layout::{self, BITS, pack_row, row_bytes, tile};

    fn noise(at: usize, seed: usize) -> f32 {
        let mixed = (at.wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) as u32;
        (mixed.wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    /// All rows' products with all tokens, `[tokens, rows]`.
    fn products(backend: Backend, codes: &[u8], x: &[f32], rows: usize, columns: usize, form: Form) -> Vec<f32> {
        let mut tables = Tables::new(x.len() / columns, columns, form);
        let (stride, lines) = (row_bytes(form.bits, columns), rows.div_ceil(LINE) * LINE);
        let mut out = vec![0f32; tables.tokens * rows];
        for first in (0..rows).step_by(BLOCK) {
            let (start, width) = layout::line(first, lines, stride);
            let mut sums = vec![0f32; tables.tokens * width];
            for at in 0..tables.segments.len() {
                let codes = &codes[start + tables.segments[at].start * width..];
                let lines = Lines { codes, width, count: width / LINE };
                add_on(backend, &lines, tables.at(at, x, backend), width, &mut sums);
            }
            let some = width.min(rows - first);
            for (out, sums) in out.chunks_mut(rows.max(1)).zip(sums.chunks(width)) {
                out[first..first + some].copy_from_slice(&sums[..some]);
            }
        }
        out
    }

    fn packed(codes: &[u8], bits: u32, columns: usize) -> Vec<u8> {
        let stride = row_bytes(bits, columns);
        let mut rows = vec![0; codes.len() / columns.max(1) * stride];
        for (codes, row) in codes.chunks(columns.max(1)).zip(rows.chunks_mut(stride.max(1))) {
            pack_row(codes, bits, row);
        }
        rows.resize(rows.len().next_multiple_of((LINE * stride).max(1)), 0);
        tile(&rows, stride)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_instruction_set_gives_the_bits_of_the_truth(
            bits in prop::sample::select(&BITS[..]),
            columns in 1usize..900,
            rows in 1usize..600,
            tokens in 1usize..4,
            seed: u16,
        ) {
            let top = (1u16 << bits) - 1;
            let codes: Vec<u8> = (0..rows * columns).map(|at| ((noise(at, 7) + 1.0) * 128.0) as u8 & top as u8).collect();
            let x: Vec<f32> = (0..tokens * columns).map(|at| noise(at, usize::from(seed)).powi(5)).collect();
            let form = Form { bits, zero: f32::from(top) / 2.0, group: columns };
            let all = packed(&codes, bits, columns);
            let truth = products(Backend::Scalar, &all, &x, rows, columns, form);
            for (token, truth) in truth.chunks(rows).enumerate() {
                let x = &x[token * columns..(token + 1) * columns];
                for (row, found) in truth.iter().enumerate() {
                    let codes = &codes[row * columns..(row + 1) * columns];
                    let product = |(code, x): (&u8, &f32)| f64::from((f32::from(*code) - form.zero) * x);
                    let expected: f64 = codes.iter().zip(x).map(product).sum();
                    let size: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                    prop_assert!((f64::from(*found) - expected).abs() <= 0.01 * size * f64::from(form.zero), "{found} {expected}");
                }
            }
            for backend in available() {
                let found = products(backend, &all, &x, rows, columns, form);
                prop_assert!(found == truth, "{}", backend);
            }
        }
    }

    #[test]
    fn the_largest_sums_fit() {
        for bits in BITS {
            let columns = 4096;
            let top = (1u16 << bits) - 1;
            let zero = f32::from(top) / 2.0;
            let codes = packed(&vec![top as u8; columns], bits, columns);
            for x in [1e30, -3e-30, 1.0] {
                for backend in available() {
                    let form = Form { bits, zero, group: columns };
                    let found = products(backend, &codes, &vec![x; columns], 1, columns, form)[0];
                    let expected = (f32::from(top) - zero) * x * columns as f32;
                    assert!((found / expected - 1.0).abs() < 2e-3, "{backend}: {found} {expected}");
                }
            }
        }
    }

    #[test]
    fn rounding_leaves_a_four_hundredth_and_at_worst_a_two_hundred_and_fiftieth() {
        for bits in BITS {
            let (rows, columns) = (256, 1024);
            let top = ((1u16 << bits) - 1) as u8;
            let codes: Vec<u8> = (0..rows * columns).map(|at| ((noise(at, 7) + 1.0) * 128.0) as u8 & top).collect();
            type Activation = fn(usize) -> f32;
            // Even sizes are the worst: nothing is near zero, and all sums may be half a step off.
            let kinds: [(f64, Activation); 4] = [
                (250.0, |at| noise(at, 5).signum()),
                (400.0, |at| noise(at, 5)),
                (400.0, |at| noise(at, 5).powi(9)),
                (400.0, |at| noise(at, 5) + 40.0 * f32::from(at == 77)),
            ];
            for (part, x) in kinds {
                let x: Vec<f32> = (0..columns).map(x).collect();
                let form = Form { bits, zero: f32::from(top) / 2.0, group: columns };
                let found = products(Backend::Scalar, &packed(&codes, bits, columns), &x, rows, columns, form);
                let product = |(code, x): (&u8, &f32)| f64::from((f32::from(*code) - form.zero) * x);
                let truth = codes.chunks(columns).map(|codes| codes.iter().zip(&x).map(product).sum::<f64>());
                let (missed, size) = truth.zip(found).fold((0.0, 0.0), |(missed, size), (truth, found)| {
                    (missed + (truth - f64::from(found)).powi(2), size + truth.powi(2))
                });
                assert!(missed.sqrt() < size.sqrt() / part, "{bits} bits: {}", (missed / size).sqrt());
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none_and_zeros_stay_zeros() {
        let codes = packed(&[1u8; 64], 1, 64);
        for backend in available() {
            let form = Form { bits: 1, zero: 0.5, group: 64 };
            for (x, nothing) in [(f32::NAN, false), (f32::INFINITY, false), (0.0, true), (1e-44, true)] {
                let mut all = vec![0.0; 64];
                all[3] = x;
                let found = products(backend, &codes, &all, 1, 64, form)[0];
                assert!(if nothing { found == 0.0 } else { !found.is_finite() }, "{backend}: {x} {found}");
            }
        }
    }
}
