//! `Σ code · x` of packed rows in integers: what a decode step is made of.
//!
//! One arithmetic, one file an instruction set: products of a code and a rounded activation are summed exactly in
//! integers where columns share a step, and in 32-bit floats from there on.

use std::ops::Range;

use super::activations::{SPAN, Token};
use super::backend::{Backend, backend};
use super::floats;
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::scalar;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::layout::{RUN, place, row_bytes, unpack_row};

/// Bytes that codes are fetched ahead into the second cache.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 16384;

/// Fetches codes ahead of where they are read, far ahead into the second cache and nearer into the first: rows are
/// shorter than what the memory takes to answer, and few lines can be on their way to the first.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn fetch(codes: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
    // SAFETY: hints, whatever the address.
    unsafe {
        _mm_prefetch::<_MM_HINT_T1>(codes.wrapping_add(AHEAD).cast());
        _mm_prefetch::<_MM_HINT_T0>(codes.wrapping_add(2048).cast());
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

/// Neighbouring packed rows of one code width below or above 3 bits.
pub struct Codes<'a> {
    /// Bits a code: 1, 2, 4 or 8.
    pub bits: u32,
    /// Codes a row.
    pub columns: usize,
    /// How many rows.
    pub rows: usize,
    /// Bytes from one row to the next.
    pub stride: usize,
    /// Bytes of a row.
    pub length: usize,
    bytes: &'a [u8],
}

impl<'a> Codes<'a> {
    /// Packed rows of any width as the widths that they are made of, each with the factor of its codes.
    #[must_use]
    pub fn of(bytes: &'a [u8], bits: u32, columns: usize) -> Vec<(Self, f32)> {
        let stride = row_bytes(bits, columns);
        let rows = bytes.len() / stride.max(1);
        let codes = |bits, from: usize| Self {
            bits,
            columns,
            rows,
            stride,
            length: row_bytes(bits, columns),
            bytes: bytes.get(from..).unwrap_or_default(),
        };
        widths(bits)
            .iter()
            .map(|(bits, after, factor)| (codes(*bits, after.map_or(0, |b| row_bytes(b, columns))), *factor))
            .collect()
    }

    /// Some of the rows.
    #[must_use]
    pub fn some(&self, rows: Range<usize>) -> Self {
        Self { rows: rows.len(), bytes: self.bytes.get(rows.start * self.stride..).unwrap_or_default(), ..*self }
    }

    /// A packed row.
    #[must_use]
    pub fn packed(&self, row: usize) -> &'a [u8] {
        &self.bytes[row * self.stride..][..self.length]
    }

    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    pub(super) fn row(&self, row: usize) -> *const u8 {
        self.packed(row).as_ptr()
    }

    fn code(&self, row: usize, column: usize) -> u8 {
        let (byte, shift) = place(column, self.bits, self.columns);
        (self.packed(row)[byte] >> shift) & ((1u16 << self.bits) - 1) as u8
    }
}

/// What rows of `bits` are made of: widths, the width that lies before, and the factor of the codes.
#[must_use]
pub fn widths(bits: u32) -> &'static [(u32, Option<u32>, f32)] {
    match bits {
        1 => &[(1, None, 1.0)],
        2 => &[(2, None, 1.0)],
        3 => &[(2, None, 1.0), (1, Some(2), 4.0)],
        4 => &[(4, None, 1.0)],
        _ => &[(8, None, 1.0)],
    }
}

/// What kernels multiply a plane's codes by; the steps of activations make up for it.
#[must_use]
pub fn unit() -> fn(u32, usize) -> f32 {
    unit_of(backend())
}

fn unit_of(backend: Backend) -> fn(u32, usize) -> f32 {
    match backend {
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512Vnni => avx512::unit,
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 | Backend::Avx2 => avx2::unit,
        #[cfg(target_arch = "aarch64")]
        Backend::Neon | Backend::NeonDot => neon::unit,
        _ => scalar::unit,
    }
}

/// `Σ code · x` of every row, for every token: `out [tokens, rows]`.
pub fn dot(codes: &Codes<'_>, tokens: &[Token<'_>], out: &mut [f32]) {
    dot_on(backend(), codes, tokens, out);
}

fn dot_on(backend: Backend, codes: &Codes<'_>, tokens: &[Token<'_>], out: &mut [f32]) {
    check(codes, tokens, out);
    match backend {
        // SAFETY: a backend is named only after the processor said that it has it; `check` looked at the lengths.
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512Vnni => unsafe { avx512::dot(codes, tokens, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 | Backend::Avx2 => unsafe { avx2::dot(codes, tokens, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Backend::NeonDot => unsafe { neon::dot::<neon::Fours>(codes, tokens, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Backend::Neon => unsafe { neon::dot::<neon::Singles>(codes, tokens, out) },
        _ => scalar::dot(codes, tokens, out),
    }
    for (token, out) in tokens.iter().zip(out.chunks_mut(codes.rows.max(1))) {
        if !token.outliers.is_empty() {
            match backend {
                #[cfg(target_arch = "x86_64")]
                Backend::Avx512Vnni => {} // has them
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Backend::Avx512 => unsafe { avx512::outliers(codes, token.places, out) },
                _ => scalar::outliers(codes, token.places, out),
            }
        }
    }
}

/// `Σ scale · (code · x − zero)` of every row, for every token, where `scales [rows, blocks]` and every token's `zeros`
/// have one value for each 64 columns. No zeros at all count as zero.
pub fn dot_scaled(codes: &Codes<'_>, scales: &[f32], tokens: &[Token<'_>], zeros: &[&[f32]], out: &mut [f32]) {
    dot_scaled_on(backend(), codes, scales, tokens, zeros, out);
}

fn dot_scaled_on(
    backend: Backend,
    codes: &Codes<'_>,
    scales: &[f32],
    tokens: &[Token<'_>],
    zeros: &[&[f32]],
    out: &mut [f32],
) {
    let (main, blocks) = (codes.columns / SPAN * SPAN, codes.columns.div_ceil(RUN));
    check(codes, tokens, out);
    assert!(scales.len() == codes.rows * blocks && zeros.iter().all(|zeros| zeros.len() == blocks));
    match backend {
        // SAFETY: a backend is named only after the processor said that it has it; lengths were looked at.
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512Vnni => unsafe { avx512::dot_scaled(codes, scales, tokens, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 | Backend::Avx2 => unsafe { avx2::dot_scaled(codes, scales, tokens, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Backend::NeonDot => unsafe { neon::dot_scaled::<neon::Fours>(codes, scales, tokens, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Backend::Neon => unsafe { neon::dot_scaled::<neon::Singles>(codes, scales, tokens, out) },
        _ => scalar::dot_scaled(codes, scales, tokens, out),
    }
    let mut rest = vec![0u8; codes.columns - main];
    for (row, scales) in scales.chunks(blocks.max(1)).enumerate() {
        if !rest.is_empty() {
            unpack_row(&codes.packed(row)[main / 8 * codes.bits as usize..], codes.bits, &mut rest);
        }
        for (at, token) in tokens.iter().enumerate() {
            let sum = &mut out[at * codes.rows + row];
            *sum += scalar::rest(&rest, &token.rounded[main..], &scales[main / RUN..], token.tail);
            *sum -= zeros.get(at).map_or(0.0, |zeros| floats::dot(scales, zeros));
            for (column, x) in token.outliers {
                let column = *column as usize;
                *sum += f32::from(codes.code(row, column)) * x * scales[column / RUN];
            }
        }
    }
}

fn check(codes: &Codes<'_>, tokens: &[Token<'_>], out: &[f32]) {
    assert!(out.len() == tokens.len() * codes.rows && tokens.iter().all(|token| token.columns() == codes.columns));
}

#[cfg(test)]
mod tests {
    use super::super::activations::Activations;
    use super::super::backend::available;
    use super::*;
    use crate::layout::{BITS, pack_row};
    use proptest::prelude::*;

    fn noise(at: usize, seed: u32) -> f32 {
        ((at as u32).wrapping_add(seed).wrapping_mul(2_654_435_761) >> 8) as f32 / (1u32 << 23) as f32 - 1.0
    }

    /// What the rounded activations stand for, times codes and scales, in 64-bit floats.
    fn naive(codes: &[u8], zero: f32, scales: &[f32], x: &[f32]) -> (f64, f64) {
        let product =
            |at: usize| (f64::from(codes[at]) - f64::from(zero)) * f64::from(scales[at / RUN]) * f64::from(x[at]);
        let magnitude =
            |at: usize| (f64::from(codes[at]) + f64::from(zero)) * f64::from(scales[at / RUN] * x[at]).abs();
        ((0..codes.len()).map(product).sum(), (0..codes.len()).map(magnitude).sum())
    }

    proptest! {
        #[test]
        fn every_backend_is_the_naive_sum(
            bits in prop::sample::select(&BITS[..]),
            (columns, rows, tokens) in (1usize..9400, 1usize..7, 0usize..7),
            outliers in 0usize..3,
            seed in any::<u32>(),
        ) {
            let most = 1u32 << bits;
            let codes: Vec<u8> = (0..rows * columns).map(|at| ((noise(at, seed) + 1.0) / 2.0 * most as f32) as u32).map(|code| code.min(most - 1) as u8).collect();
            let mut packed = vec![0; rows * row_bytes(bits, columns)];
            for (codes, packed) in codes.chunks(columns).zip(packed.chunks_mut(row_bytes(bits, columns))) {
                pack_row(codes, bits, packed);
            }
            let mut x: Vec<f32> = (0..tokens * columns).map(|at| noise(at, !seed)).collect();
            for x in x.chunks_mut(columns) {
                (0..outliers * 9).for_each(|k| x[(seed as usize ^ (k * 7919)) % columns] = 60.0);
            }
            let scales: Vec<f32> = (0..columns.div_ceil(RUN)).map(|block| noise(block, seed / 2)).collect();
            let (ones, zero) = (vec![1.0; scales.len()], (most - 1) as f32 / 2.0);
            for backend in available() {
                let widths: Vec<u32> = widths(bits).iter().map(|(bits, ..)| *bits).collect();
                let all = Activations::of(&mut x.clone(), columns, &widths, unit_of(backend));
                let (mut plain, mut scaled) = (vec![0f32; tokens * rows], vec![0f32; tokens * rows]);
                let scales: Vec<f32> = (0..rows).flat_map(|_| scales.clone()).collect();
                let own: Vec<Vec<f32>> = (0..tokens).map(|token| all.sums(token).iter().map(|sum| sum * zero).collect()).collect();
                let own: Vec<&[f32]> = own.iter().map(Vec::as_slice).collect();
                for (codes, factor) in Codes::of(&packed, bits, columns) {
                    let zeros = if factor == 1.0 { &own[..] } else { &[] };
                    let of = all.tokens_for(codes.bits);
                    let (mut one, mut other) = (vec![9f32; tokens * rows], vec![9f32; tokens * rows]);
                    dot_on(backend, &codes, &of, &mut one);
                    dot_scaled_on(backend, &codes, &scales, &of, zeros, &mut other);
                    plain.iter_mut().zip(&one).for_each(|(sum, found)| *sum += factor * found);
                    scaled.iter_mut().zip(&other).for_each(|(sum, found)| *sum += factor * found);
                }
                for token in 0..tokens {
                    let x = all.values(token);
                    for row in 0..rows {
                        let codes = &codes[row * columns..(row + 1) * columns];
                        for (found, scales, zero) in [(&plain, &ones, 0.0), (&scaled, &scales, zero)] {
                            let (expected, magnitude) = naive(codes, zero, scales, &x);
                            let found = f64::from(found[token * rows + row]);
                            prop_assert!((found - expected).abs() <= 2e-6 * magnitude, "{backend}: {found} {expected}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_largest_products_do_not_overflow() {
        let columns = 2 * 4096 + 511;
        for (bits, x) in [1u32, 2, 4, 8].into_iter().flat_map(|bits| [(bits, 1.0), (bits, -1.0)]) {
            let packed = vec![u8::MAX; row_bytes(bits, columns)];
            let expected = ((1 << bits) - 1) as f32 * x * columns as f32;
            for backend in available() {
                let all = Activations::of(&mut vec![x; columns], columns, &[bits], unit_of(backend));
                let mut sum = [0f32];
                dot_on(backend, &Codes::of(&packed, bits, columns)[0].0, &all.tokens_for(bits), &mut sum);
                assert!((sum[0] / expected - 1.0).abs() < 1e-5, "{backend}: {} {expected}", sum[0]);
            }
        }
    }

    #[test]
    fn a_token_alone_gives_the_bits_it_gives_among_others() {
        let (columns, rows) = (4096 + 1000, 9);
        let packed: Vec<u8> = (0..rows * row_bytes(2, columns)).map(|at| (at * 37 % 251) as u8).collect();
        let x: Vec<f32> = (0..5 * columns).map(|at| noise(at, 3)).collect();
        for backend in available() {
            let sums = |x: &[f32]| {
                let all = Activations::of(&mut x.to_vec(), columns, &[2], unit_of(backend));
                let mut out = vec![0f32; all.tokens() * rows];
                dot_on(backend, &Codes::of(&packed, 2, columns)[0].0, &all.tokens_for(2), &mut out);
                out
            };
            let alone: Vec<f32> = x.chunks(columns).flat_map(sums).collect();
            assert_eq!(sums(&x), alone, "{backend}");
        }
    }
}
