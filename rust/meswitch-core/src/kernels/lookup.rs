//! `Σ (code − zero) · x` of packed rows, by lookup tables: the kernel of a decode step.
//!
//! All instruction sets do the same arithmetic: for every half byte of 64 rows, one of sixteen sums is looked up and
//! added in 16-bit integers, which is exact; a segment's total is multiplied by its step. So every instruction set
//! gives the same bits, and a token gives the same bits alone and among others.

use super::backend::{Backend, backend};
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::scalar;
use super::tables::Sums;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::layout::{BLOCK_ROWS, LINE_ROWS};

/// Bytes that codes are prefetched ahead into the L2 cache.
#[cfg(target_arch = "x86_64")]
const PREFETCH_L2: usize = 20480;
/// Bytes that codes are prefetched ahead into the L1 cache.
#[cfg(target_arch = "x86_64")]
const PREFETCH_L1: usize = 2048;

/// One segment of the rows of some neighbouring lines of a block.
#[derive(Clone, Copy)]
pub(super) struct CodeLines<'a> {
    /// From the segment's first byte of the first line on.
    pub(super) codes: &'a [u8],
    /// Distance from one byte of a row to the next.
    pub(super) width: usize,
    /// The number of lines.
    pub(super) count: usize,
}

impl<'a> CodeLines<'a> {
    /// Byte `byte` of the segment, of all rows of a line.
    pub(super) fn line(&self, byte: usize, line: usize) -> &'a [u8; LINE_ROWS] {
        self.codes[byte * self.width + line * LINE_ROWS..][..LINE_ROWS].try_into().expect("a slice of that length")
    }
}

/// Prefetches codes ahead of the address that is read: far ahead into L2 and nearer into L1. One run of sequential
/// reads is shorter than memory's latency, and few cache lines can be in flight to L1.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn prefetch(codes: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    // SAFETY: prefetches are hints and never fault.
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(codes.wrapping_add(PREFETCH_L2).cast());
        _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(PREFETCH_L1).cast());
    }
}

/// Prefetches the first bytes of codes that will be read: [`prefetch`] does not reach them.
pub(super) fn prefetch_start(bytes: &[u8]) {
    #[cfg(target_arch = "x86_64")]
    for line in bytes.chunks(64).take(PREFETCH_L2 / 64) {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch is a hint and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = bytes;
}

/// One token's lookup tables for a segment.
#[derive(Clone, Copy)]
pub(super) struct Table<'a> {
    /// One for each byte of the segment.
    pub(super) sums: &'a [Sums],
    /// The unit of the sums.
    pub(super) step: f32,
}

/// All tokens' lookup tables for a segment.
#[derive(Clone, Copy)]
pub(super) struct TokenTables<'a> {
    /// `[tokens, bytes]`.
    pub(super) sums: &'a [Sums],
    /// The unit of each token's sums.
    pub(super) steps: &'a [f32],
    /// Bytes of the segment.
    pub(super) bytes: usize,
}

impl<'a> TokenTables<'a> {
    /// One token's.
    #[inline(always)]
    pub(super) fn token(&self, token: usize) -> Table<'a> {
        Table { sums: &self.sums[token * self.bytes..][..self.bytes], step: self.steps[token] }
    }

    /// Each token's, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = Table<'a>> {
        (0..self.steps.len()).map(|token| self.token(token))
    }
}

/// Adds `step · Σ sums` of a segment to the first `lines.count · 64` elements of each token's row of
/// `out [tokens, stride]`.
pub(super) fn add(lines: &CodeLines<'_>, tokens: TokenTables<'_>, stride: usize, out: &mut [f32]) {
    add_with(backend(), lines, tokens, stride, out);
}

fn add_with(backend: Backend, lines: &CodeLines<'_>, tokens: TokenTables<'_>, stride: usize, out: &mut [f32]) {
    let Some(last) = tokens.bytes.checked_sub(1).filter(|_| lines.count > 0) else { return };
    let rows = lines.count * LINE_ROWS;
    assert!(rows <= lines.width && lines.count <= BLOCK_ROWS / LINE_ROWS);
    assert!(last * lines.width + rows <= lines.codes.len());
    assert!(rows <= stride && out.len() >= (tokens.steps.len() - 1) * stride + rows);
    match backend {
        // SAFETY: a `Backend` names only instruction sets that the processor has; lengths were checked above.
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 => unsafe { avx512::add(lines, tokens, stride, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Backend::Avx2 => unsafe { avx2::add(lines, tokens, stride, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Backend::Neon => unsafe { neon::add(lines, tokens, stride, out) },
        _ => scalar::add(lines, tokens, stride, out),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::backend::available;
    use super::super::tables::{TableKey, Tables};
    use super::*;
    use crate::layout::{self, BITS, pack_row, row_bytes, tile_rows};

    fn noise(index: usize, seed: usize) -> f32 {
        let mixed = (index.wrapping_mul(2_654_435_761) ^ seed.wrapping_mul(40_503)) as u32;
        (mixed.wrapping_mul(0x9e37_79b9) >> 8) as f32 / (1 << 23) as f32 - 1.0
    }

    /// All rows' products with all tokens, `[tokens, rows]`.
    fn products(backend: Backend, codes: &[u8], x: &[f32], rows: usize, columns: usize, key: TableKey) -> Vec<f32> {
        let mut tables = Tables::new(x.len() / columns, columns, key);
        let (stride, lines) = (row_bytes(key.bits, columns), rows.div_ceil(LINE_ROWS) * LINE_ROWS);
        let mut out = vec![0f32; tables.tokens * rows];
        for first in (0..rows).step_by(BLOCK_ROWS) {
            let (start, width) = layout::line_start(first, lines, stride);
            let mut sums = vec![0f32; tables.tokens * width];
            for index in 0..tables.segments.len() {
                let codes = &codes[start + tables.segments[index].start * width..];
                let lines = CodeLines { codes, width, count: width / LINE_ROWS };
                add_with(backend, &lines, tables.segment(index, x, backend), width, &mut sums);
            }
            let count = width.min(rows - first);
            for (out, sums) in out.chunks_mut(rows.max(1)).zip(sums.chunks(width)) {
                out[first..first + count].copy_from_slice(&sums[..count]);
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
        rows.resize(rows.len().next_multiple_of((LINE_ROWS * stride).max(1)), 0);
        tile_rows(&rows, stride)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 64 }))]
        #[test]
        fn every_instruction_set_gives_the_bits_of_the_scalar_kernel(
            bits in prop::sample::select(&BITS[..]),
            columns in 1usize..if cfg!(miri) { 90 } else { 900 },
            rows in 1usize..if cfg!(miri) { 150 } else { 600 },
            tokens in 1usize..4,
            seed: u16,
        ) {
            let top = (1u16 << bits) - 1;
            let codes: Vec<u8> = (0..rows * columns).map(|index| ((noise(index, 7) + 1.0) * 128.0) as u8 & top as u8).collect();
            let x: Vec<f32> = (0..tokens * columns).map(|index| noise(index, usize::from(seed)).powi(5)).collect();
            let key = TableKey { bits, zero: f32::from(top) / 2.0, group: columns };
            let all = packed(&codes, bits, columns);
            let truth = products(Backend::Scalar, &all, &x, rows, columns, key);
            for (token, truth) in truth.chunks(rows).enumerate() {
                let x = &x[token * columns..(token + 1) * columns];
                for (row, found) in truth.iter().enumerate() {
                    let codes = &codes[row * columns..(row + 1) * columns];
                    let product = |(code, x): (&u8, &f32)| f64::from((f32::from(*code) - key.zero) * x);
                    let expected: f64 = codes.iter().zip(x).map(product).sum();
                    let size: f64 = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
                    prop_assert!((f64::from(*found) - expected).abs() <= 0.01 * size * f64::from(key.zero), "{found} {expected}");
                }
            }
            for backend in available() {
                let found = products(backend, &all, &x, rows, columns, key);
                prop_assert!(found == truth, "{}", backend);
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore)] // too slow
    fn the_largest_sums_fit() {
        for bits in BITS {
            let columns = 4096;
            let top = (1u16 << bits) - 1;
            let zero = f32::from(top) / 2.0;
            let codes = packed(&vec![top as u8; columns], bits, columns);
            for x in [1e30, -3e-30, 1.0] {
                for backend in available() {
                    let key = TableKey { bits, zero, group: columns };
                    let found = products(backend, &codes, &vec![x; columns], 1, columns, key)[0];
                    let expected = (f32::from(top) - zero) * x * columns as f32;
                    assert!((found / expected - 1.0).abs() < 2e-3, "{backend}: {found} {expected}");
                }
            }
        }
    }

    #[test]
    #[cfg_attr(miri, ignore)] // too slow
    fn rounding_errors_are_below_a_four_hundredth_and_at_worst_a_two_hundred_and_fiftieth() {
        for bits in BITS {
            let (rows, columns) = (256, 1024);
            let top = ((1u16 << bits) - 1) as u8;
            let codes: Vec<u8> =
                (0..rows * columns).map(|index| ((noise(index, 7) + 1.0) * 128.0) as u8 & top).collect();
            type Activation = fn(usize) -> f32;
            // Activations of one size are the worst case: none is near zero, and all sums may be half a step off.
            let kinds: [(f64, Activation); 4] = [
                (250.0, |index| noise(index, 5).signum()),
                (400.0, |index| noise(index, 5)),
                (400.0, |index| noise(index, 5).powi(9)),
                (400.0, |index| noise(index, 5) + 40.0 * f32::from(index == 77)),
            ];
            for (part, x) in kinds {
                let x: Vec<f32> = (0..columns).map(x).collect();
                let key = TableKey { bits, zero: f32::from(top) / 2.0, group: columns };
                let found = products(Backend::Scalar, &packed(&codes, bits, columns), &x, rows, columns, key);
                let product = |(code, x): (&u8, &f32)| f64::from((f32::from(*code) - key.zero) * x);
                let truth = codes.chunks(columns).map(|codes| codes.iter().zip(&x).map(product).sum::<f64>());
                let (missed, size) = truth.zip(found).fold((0.0, 0.0), |(missed, size), (truth, found)| {
                    (missed + (truth - f64::from(found)).powi(2), size + truth.powi(2))
                });
                assert!(missed.sqrt() < size.sqrt() / part, "{bits} bits: {}", (missed / size).sqrt());
            }
        }
    }

    #[test]
    fn non_finite_activations_give_non_finite_products_and_zeros_give_zeros() {
        let codes = packed(&[1u8; 64], 1, 64);
        for backend in available() {
            let key = TableKey { bits: 1, zero: 0.5, group: 64 };
            for (x, nothing) in [(f32::NAN, false), (f32::INFINITY, false), (0.0, true), (1e-44, true)] {
                let mut all = vec![0.0; 64];
                all[3] = x;
                let found = products(backend, &codes, &all, 1, 64, key)[0];
                assert!(if nothing { found == 0.0 } else { !found.is_finite() }, "{backend}: {x} {found}");
            }
        }
    }
}
