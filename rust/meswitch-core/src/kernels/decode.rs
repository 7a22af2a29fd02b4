//! `Σ code · x` of packed rows in integers: what a decode step is made of.
//!
//! An activation is 15 bits, `x ≈ step · (128 · high + low)`, as two signed bytes, so that one byte product of the
//! processor does half of it and the sum is exact. Codes are unpacked a run at a time, in registers, for all tokens.

use super::backend::Backend;
use super::backend::{self, has_vnni};
use crate::layout::{RUN, row_bytes, unpack_row};

/// The largest magnitude of an activation in steps: 128 · 127 and a low byte.
const MOST: f32 = 16_256.0;
/// Zeros after the last activation, so that a vector load never leaves the memory.
const PADDING: usize = 2 * RUN;

/// Activations of some tokens, in integers.
pub struct Steps {
    columns: usize,
    stride: usize,
    high: Vec<i8>,
    low: Vec<i8>,
    /// The step of each token.
    pub step: Vec<f32>,
    /// `Σ x` of each token, in steps.
    pub sum: Vec<i64>,
}

impl Steps {
    /// Rounds activations `[tokens, columns]`, each token by its own largest.
    #[must_use]
    pub fn of(x: &[f32], columns: usize) -> Self {
        let stride = columns + PADDING;
        let tokens = x.len() / columns.max(1);
        let mut steps = Self {
            columns,
            stride,
            high: vec![0; tokens * stride],
            low: vec![0; tokens * stride],
            step: Vec::with_capacity(tokens),
            sum: Vec::with_capacity(tokens),
        };
        for (token, row) in x.chunks_exact(columns.max(1)).enumerate() {
            let of = token * stride..token * stride + columns;
            let (step, sum) = round(row, &mut steps.high[of.clone()], &mut steps.low[of]);
            steps.step.push(step);
            steps.sum.push(sum);
        }
        steps
    }

    /// How many tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.step.len()
    }

    fn token(&self, token: usize) -> (&[i8], &[i8]) {
        let of = token * self.stride..(token + 1) * self.stride;
        (&self.high[of.clone()], &self.low[of])
    }
}

super::by_backend! {
    /// Rounds one token; returns its step and its sum in steps.
    pub fn round(x: &[f32], high: &mut [i8], low: &mut [i8]) -> (f32, i64) = round_body
}

#[inline(always)]
fn round_body(x: &[f32], high: &mut [i8], low: &mut [i8]) -> (f32, i64) {
    let mut lanes = [0f32; 16];
    for chunk in x.chunks(16) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if value.abs() > *lane { value.abs() } else { *lane };
        }
    }
    let largest = lanes.iter().fold(0f32, |most, lane| most.max(*lane));
    if largest == 0.0 || !largest.is_finite() {
        high.fill(0);
        low.fill(0);
        return (largest, 0);
    }
    let (inverse, mut sum) = (MOST / largest, 0i64);
    for ((x, high), low) in x.chunks(1024).zip(high.chunks_mut(1024)).zip(low.chunks_mut(1024)) {
        let mut part = 0i32;
        for ((x, high), low) in x.iter().zip(high).zip(low) {
            let scaled = x * inverse;
            let scaled = if scaled >= 0.0 { scaled + 0.5 } else { scaled - 0.5 };
            // SAFETY: within ±16,257 because `largest` bounds x, and NaN would have made `largest` a NaN or zero first.
            let steps: i32 = unsafe { if scaled.is_nan() { 0.0 } else { scaled }.to_int_unchecked() };
            let upper = (steps + 64) >> 7;
            *high = upper as i8;
            *low = (steps - (upper << 7)) as i8;
            part += steps;
        }
        sum += i64::from(part);
    }
    (largest / MOST, sum)
}

/// `Σ code · x` of one packed row for every token, in steps.
pub fn dot_row(packed: &[u8], bits: u32, steps: &Steps, out: &mut [i64]) {
    out.fill(0);
    if bits == 3 {
        let (low, high) = packed.split_at(row_bytes(2, steps.columns));
        dot_plane(low, 2, 1, steps, out);
        dot_plane(high, 1, 4, steps, out);
    } else {
        dot_plane(packed, bits, 1, steps, out);
    }
}

fn dot_plane(packed: &[u8], bits: u32, factor: i64, steps: &Steps, out: &mut [i64]) {
    #[cfg(target_arch = "x86_64")]
    match backend::backend() {
        // SAFETY: `backend` and `has_vnni` asked the processor.
        Backend::Avx512 if has_vnni() => return unsafe { x86::vnni(packed, bits, factor, steps, out) },
        // SAFETY: as above. 8-bit codes would saturate the 16-bit sums of pairs.
        Backend::Avx2 | Backend::Avx512 if bits < 8 => return unsafe { x86::avx2(packed, bits, factor, steps, out) },
        _ => {}
    }
    scalar(packed, bits, factor, steps, out);
}

fn scalar(packed: &[u8], bits: u32, factor: i64, steps: &Steps, out: &mut [i64]) {
    let mut codes = vec![0u8; steps.columns];
    unpack_row(packed, bits, &mut codes);
    for (token, sum) in out.iter_mut().enumerate() {
        let (high, low) = steps.token(token);
        for ((codes, high), low) in codes.chunks(4096).zip(high.chunks(4096)).zip(low.chunks(4096)) {
            let (mut upper, mut lower) = (0i32, 0i32);
            for ((code, high), low) in codes.iter().zip(high).zip(low) {
                upper += i32::from(*code) * i32::from(*high);
                lower += i32::from(*code) * i32::from(*low);
            }
            *sum += factor * (i64::from(upper) * 128 + i64::from(lower));
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{RUN, Steps};

    /// Tokens whose sums are kept in registers at once.
    const TOGETHER: usize = 4;

    /// # Safety
    /// The processor must have AVX-512 F, BW and VNNI.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    pub unsafe fn vnni(packed: &[u8], bits: u32, factor: i64, steps: &Steps, out: &mut [i64]) {
        for (at, sums) in out.chunks_mut(TOGETHER).enumerate() {
            let first = at * TOGETHER;
            // SAFETY: the same features.
            unsafe {
                match sums.len() {
                    1 => vnni_tokens::<1>(packed, bits, factor, steps, first, sums),
                    2 => vnni_tokens::<2>(packed, bits, factor, steps, first, sums),
                    3 => vnni_tokens::<3>(packed, bits, factor, steps, first, sums),
                    _ => vnni_tokens::<4>(packed, bits, factor, steps, first, sums),
                }
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn vnni_tokens<const N: usize>(
        packed: &[u8],
        bits: u32,
        factor: i64,
        steps: &Steps,
        first: usize,
        out: &mut [i64],
    ) {
        match bits {
            // SAFETY: the same features.
            1 => unsafe { vnni_width::<N, 8>(packed, factor, steps, first, out) },
            // SAFETY: the same features.
            2 => unsafe { vnni_width::<N, 4>(packed, factor, steps, first, out) },
            // SAFETY: the same features.
            4 => unsafe { vnni_width::<N, 2>(packed, factor, steps, first, out) },
            // SAFETY: the same features.
            _ => unsafe { vnni_width::<N, 1>(packed, factor, steps, first, out) },
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn vnni_width<const N: usize, const PLANES: usize>(
        packed: &[u8],
        factor: i64,
        steps: &Steps,
        first: usize,
        out: &mut [i64],
    ) {
        let mask = _mm512_set1_epi8(((1u16 << (8 / PLANES)) - 1) as i8);
        let tokens: [(*const i8, *const i8); N] = std::array::from_fn(|n| {
            let (high, low) = steps.token(first + n);
            (high.as_ptr(), low.as_ptr())
        });
        let (mut high, mut low) = ([_mm512_setzero_si512(); N], [_mm512_setzero_si512(); N]);
        let whole = packed.len() / RUN;
        for run in 0..whole {
            // SAFETY: a whole run of codes; its 64·PLANES columns are within every token's activations.
            unsafe {
                let codes = _mm512_loadu_si512(packed.as_ptr().add(run * RUN).cast());
                for plane in 0..PLANES {
                    let shift = _mm_cvtsi32_si128((plane * 8 / PLANES) as i32);
                    let part = _mm512_and_si512(_mm512_srl_epi16(codes, shift), mask);
                    let column = (run * PLANES + plane) * RUN;
                    for n in 0..N {
                        high[n] =
                            _mm512_dpbusd_epi32(high[n], part, _mm512_loadu_si512(tokens[n].0.add(column).cast()));
                        low[n] = _mm512_dpbusd_epi32(low[n], part, _mm512_loadu_si512(tokens[n].1.add(column).cast()));
                    }
                }
            }
        }
        let width = packed.len() % RUN;
        if width > 0 {
            let there = (1u64 << width) - 1;
            // SAFETY: masked loads touch the run's `width` bytes, and activations that padding makes long enough.
            unsafe {
                let codes = _mm512_maskz_loadu_epi8(there, packed.as_ptr().add(whole * RUN).cast());
                for plane in 0..PLANES {
                    let shift = _mm_cvtsi32_si128((plane * 8 / PLANES) as i32);
                    let part = _mm512_and_si512(_mm512_srl_epi16(codes, shift), mask);
                    let column = whole * RUN * PLANES + plane * width;
                    if column >= steps.columns {
                        break;
                    }
                    for n in 0..N {
                        let x = _mm512_maskz_loadu_epi8(there, tokens[n].0.add(column));
                        high[n] = _mm512_dpbusd_epi32(high[n], part, x);
                        let x = _mm512_maskz_loadu_epi8(there, tokens[n].1.add(column));
                        low[n] = _mm512_dpbusd_epi32(low[n], part, x);
                    }
                }
            }
        }
        for n in 0..N {
            let (high, low) = (_mm512_reduce_add_epi32(high[n]), _mm512_reduce_add_epi32(low[n]));
            out[n] += factor * (i64::from(high) * 128 + i64::from(low));
        }
    }

    /// # Safety
    /// The processor must have AVX2; `bits` must be below 8.
    #[target_feature(enable = "avx2")]
    pub unsafe fn avx2(packed: &[u8], bits: u32, factor: i64, steps: &Steps, out: &mut [i64]) {
        let planes = 8 / bits as usize;
        for (token, sum) in out.iter_mut().enumerate() {
            let (high, low) = steps.token(token);
            // SAFETY: the same features.
            let (high, low) = unsafe {
                (avx2_dot(packed, planes, steps.columns, high), avx2_dot(packed, planes, steps.columns, low))
            };
            *sum += factor * (high * 128 + low);
        }
    }

    #[target_feature(enable = "avx2")]
    unsafe fn avx2_dot(packed: &[u8], planes: usize, columns: usize, x: &[i8]) -> i64 {
        let bits = 8 / planes;
        let (mask, ones) = (_mm256_set1_epi8(((1u16 << bits) - 1) as i8), _mm256_set1_epi16(1));
        let mut sum = _mm256_setzero_si256();
        let mut rest = 0i64;
        for (run, bytes) in packed.chunks(RUN).enumerate() {
            let width = bytes.len();
            for start in (0..width / 32 * 32).step_by(32) {
                // SAFETY: 32 bytes of the run, and 32 activations that padding makes sure of.
                unsafe {
                    let codes = _mm256_loadu_si256(bytes.as_ptr().add(start).cast());
                    for plane in 0..planes {
                        let column = run * RUN * planes + plane * width + start;
                        if column >= columns {
                            break;
                        }
                        let shift = _mm_cvtsi32_si128((plane * bits) as i32);
                        let part = _mm256_and_si256(_mm256_srl_epi16(codes, shift), mask);
                        let pairs = _mm256_maddubs_epi16(part, _mm256_loadu_si256(x.as_ptr().add(column).cast()));
                        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, ones));
                    }
                }
            }
            for (at, byte) in bytes.iter().enumerate().skip(width / 32 * 32) {
                for plane in 0..planes {
                    let column = run * RUN * planes + plane * width + at;
                    if column < columns {
                        let code = (byte >> (plane * bits)) & ((1u16 << bits) - 1) as u8;
                        rest += i64::from(code) * i64::from(x[column]);
                    }
                }
            }
        }
        let mut lanes = [0i32; 8];
        // SAFETY: eight 32-bit lanes.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sum) };
        rest + lanes.iter().map(|lane| i64::from(*lane)).sum::<i64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{BITS, pack_row};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_path_gives_the_exact_sum(
            (bits, codes) in prop::sample::select(&BITS[..]).prop_flat_map(|bits| {
                (Just(bits), prop::collection::vec(0..=((1u16 << bits) - 1) as u8, 1..1300))
            }),
            tokens in 1usize..7,
            seed in any::<u32>(),
        ) {
            let columns = codes.len();
            let x: Vec<f32> = (0..tokens * columns).map(|i| ((i as u32).wrapping_mul(2_654_435_761) ^ seed) as f32 / 1e9 - 2.0).collect();
            let steps = Steps::of(&x, columns);
            let mut packed = vec![0; row_bytes(bits, columns)];
            pack_row(&codes, bits, &mut packed);
            let expected: Vec<i64> = (0..tokens).map(|token| {
                let (high, low) = steps.token(token);
                codes.iter().zip(high.iter().zip(low)).map(|(c, (h, l))| i64::from(*c) * (128 * i64::from(*h) + i64::from(*l))).sum()
            }).collect();
            let mut found = vec![7; tokens];
            dot_row(&packed, bits, &steps, &mut found);
            prop_assert_eq!(&found, &expected);
            if bits != 3 {
                found.fill(0);
                scalar(&packed, bits, 1, &steps, &mut found);
                prop_assert_eq!(&found, &expected);
                #[cfg(target_arch = "x86_64")]
                if bits < 8 && is_x86_feature_detected!("avx2") {
                    found.fill(0);
                    // SAFETY: just asked.
                    unsafe { x86::avx2(&packed, bits, 1, &steps, &mut found) };
                    prop_assert_eq!(&found, &expected);
                }
            }
        }

        #[test]
        fn steps_are_near(x in prop::collection::vec(-1e4f32..1e4, 1..300)) {
            let steps = Steps::of(&x, x.len());
            let largest = x.iter().fold(0f32, |most, x| most.max(x.abs()));
            let (high, low) = steps.token(0);
            for ((x, high), low) in x.iter().zip(high).zip(low) {
                let found = (i32::from(*high) * 128 + i32::from(*low)) as f32 * steps.step[0];
                prop_assert!((found - x).abs() <= largest / MOST * 0.51 + 1e-6);
            }
        }
    }

    #[test]
    fn nothing_and_what_is_not_finite() {
        assert_eq!(Steps::of(&[0.0; 5], 5).sum, [0]);
        assert!(Steps::of(&[1.0, f32::INFINITY], 2).step[0].is_infinite());
        let mut out = [3];
        dot_row(&[], 2, &Steps::of(&[], 1), &mut []);
        dot_row(&[0; 4], 2, &Steps::of(&[1.0], 1), &mut out);
        assert_eq!(out, [0]);
    }
}
