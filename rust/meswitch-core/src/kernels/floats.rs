//! Arithmetic in 32-bit floats, with the same bits on every instruction set.

use half::f16;

use super::by_backend;
use super::rows::widen_f16;
use crate::layout;

/// Partial sums of a sum.
const LANES: usize = 16;

by_backend! {
    /// Unpacks one row of codes.
    pub(crate) fn unpack(packed: &[u8], bits: u32, codes: &mut [u8]) = layout::unpack_row
}

by_backend! {
    /// `out = factor · scale · (code − zero)`, element by element; an empty `factors` counts as all 1.
    pub(crate) fn scaled_levels(codes: &[u8], zero: f32, scale: f32, factors: &[f32], out: &mut [f32]) = scaled_levels_body
}

#[inline(always)]
fn scaled_levels_body(codes: &[u8], zero: f32, scale: f32, factors: &[f32], out: &mut [f32]) {
    let level = |code: u8| (f32::from(code) - zero) * scale;
    if factors.is_empty() {
        out.iter_mut().zip(codes).for_each(|(out, code)| *out = level(*code));
    } else {
        out.iter_mut().zip(codes).zip(factors).for_each(|((out, code), factor)| *out = level(*code) * factor);
    }
}

by_backend! {
    /// `Σ a·b` in [`LANES`] partial sums.
    pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 = dot_body
}

#[inline(always)]
fn dot_body(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (whole_a, whole_b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for ((lane, a), b) in lanes.iter_mut().zip(whole_a.remainder()).zip(whole_b.remainder()) {
        *lane = a * b;
    }
    for (a, b) in whole_a.zip(whole_b) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    total(lanes)
}

/// Adds up the partial sums as a tree, so that few additions wait for another.
#[inline(always)]
fn total(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] += lanes[i + half];
        }
    }
    lanes[0]
}

by_backend! {
    /// `Σ |x|`.
    pub(crate) fn magnitude(x: &[f32]) -> f32 = magnitude_body
}

#[inline(always)]
fn magnitude_body(x: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let whole = x.chunks_exact(LANES);
    lanes.iter_mut().zip(whole.remainder()).for_each(|(lane, x)| *lane = x.abs());
    for x in whole {
        lanes.iter_mut().zip(x).for_each(|(lane, x)| *lane += x.abs());
    }
    total(lanes)
}

by_backend! {
    /// Widens `values [count, width]` into the buffer `wide` and adds its products with `x [tokens, width]` to
    /// `sums [tokens, count]`.
    pub(crate) fn add_narrow_product(values: &[f16], width: usize, x: &[f32], wide: &mut [f32], sums: &mut [f32], count: usize)
        = add_narrow_product_body
}

#[inline(always)]
fn add_narrow_product_body(values: &[f16], width: usize, x: &[f32], wide: &mut [f32], sums: &mut [f32], count: usize) {
    widen_f16(values, wide);
    for (x, sums) in x.chunks_exact(width).zip(sums.chunks_exact_mut(count)) {
        if let [x] = x {
            sums.iter_mut().zip(&*wide).for_each(|(sum, value)| *sum += value * x);
            continue;
        }
        for (sum, row) in sums.iter_mut().zip(wide.chunks_exact(width)) {
            *sum += dot_body(row, x);
        }
    }
}

by_backend! {
    /// `out += values · scale`.
    pub(crate) fn add_times(out: &mut [f32], values: &[f32], scale: f32) = add_times_body
}

#[inline(always)]
fn add_times_body(out: &mut [f32], values: &[f32], scale: f32) {
    for (out, value) in out.iter_mut().zip(values) {
        *out += value * scale;
    }
}

by_backend! {
    /// `out *= scales`, element by element.
    pub(crate) fn multiply(out: &mut [f32], scales: &[f32]) = multiply_body
}

#[inline(always)]
fn multiply_body(out: &mut [f32], scales: &[f32]) {
    for (out, scale) in out.iter_mut().zip(scales) {
        *out *= scale;
    }
}
