//! Scale and codes of one row, or group of a row, of a difference.

use crate::kernels::by_backend;

/// Partial sums of a sum.
const LANES: usize = 16;

/// The most that an unbiased scale exceeds the least-squares scale by: where codes explain less than a quarter of a
/// row, noise would outweigh the gain.
pub(super) const MAX_SCALE_GROWTH: f32 = 4.0;

/// The largest code of a width.
///
/// # Panics
/// Where a code would not fit a byte.
#[must_use]
pub fn max_code(bits: u32) -> f32 {
    MaxCode::of(bits).0
}

/// The largest code of a width of at most 8 bits.
#[derive(Clone, Copy)]
struct MaxCode(f32);

impl MaxCode {
    fn of(bits: u32) -> Self {
        assert!(bits <= 8, "a code fits a byte");
        Self(((1u32 << bits) - 1) as f32)
    }
}

/// The uniform step, in standard deviations, that quantizes a Gaussian best: a first guess.
fn gaussian_step(bits: u32) -> f32 {
    match bits {
        2 => 0.996,
        3 => 0.586,
        4 => 0.335,
        _ => 0.031,
    }
}

by_backend! {
    /// Finds the scale that minimises `Σ weight · (delta − scale · (code − zero))²` over one row, and its codes.
    ///
    /// `delta`, `weight` and `codes` must have the same length. `guess` is a scale near the best one, or 0. Returns the
    /// scale; 0 where the row is all zeros. Panics where `bits` are more than 8.
    pub fn fit_row(delta: &[f32], weight: &[f32], bits: u32, zero: f32, guess: f32, codes: &mut [u8]) -> f32
        = fit_row_body
}

by_backend! {
    /// The largest part of a row's energy `Σ weight · delta²` that a scale explains at that zero.
    pub(crate) fn best_gain(delta: &[f32], weight: &[f32], bits: u32, zero: f32) -> f32 = best_gain_body
}

by_backend! {
    /// The scale at which given codes project the row onto itself without loss:
    /// `Σ weight · delta · value = Σ weight · delta²`. Least squares loses as large a share there as its error's of the
    /// energy. At most `MAX_SCALE_GROWTH` times `scale`.
    pub(crate) fn unbiased(delta: &[f32], weight: &[f32], scale: f32, zero: f32, codes: &[u8]) -> f32 = unbiased_body
}

by_backend! {
    /// The codes of one row at a given scale.
    pub(crate) fn encode(delta: &[f32], scale: f32, bits: u32, zero: f32, codes: &mut [u8]) = encode_body
}

#[inline(always)]
fn fit_row_body(delta: &[f32], weight: &[f32], bits: u32, zero: f32, guess: f32, codes: &mut [u8]) -> f32 {
    let max_code = MaxCode::of(bits);
    let mut scale = if guess > 0.0 && bits > 1 { guess } else { search(delta, weight, bits, zero).0 };
    if scale > 0.0 && bits > 1 {
        for _ in 0..2 {
            let (num, den) = level_sums(delta, weight, 1.0 / scale, zero, max_code);
            if den > 0.0 && num > 0.0 {
                scale = num / den;
            }
        }
    }
    encode_body(delta, scale, bits, zero, codes);
    scale
}

#[inline(always)]
fn best_gain_body(delta: &[f32], weight: &[f32], bits: u32, zero: f32) -> f32 {
    search(delta, weight, bits, zero).1
}

/// The best scale of a coarse search, and the energy that it explains.
#[inline(always)]
fn search(delta: &[f32], weight: &[f32], bits: u32, zero: f32) -> (f32, f32) {
    let (square, mass) = energy(delta, weight);
    if square <= 0.0 || mass <= 0.0 {
        return (0.0, 0.0);
    }
    let mut best = (0.0, -1.0);
    let first = (square / mass).sqrt() * gaussian_step(bits);
    let factors: &[f32] = if bits == 1 { &[1.0] } else { &[0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0] };
    for factor in factors {
        let (num, den) = level_sums(delta, weight, 1.0 / (first * factor), zero, MaxCode::of(bits));
        if den > 0.0 && num > 0.0 && num * num / den > best.1 {
            best = (num / den, num * num / den);
        }
    }
    if best.1 < 0.0 { (0.0, 0.0) } else { best }
}

/// `Σ w·d²` and `Σ w`.
#[inline(always)]
fn energy(delta: &[f32], weight: &[f32]) -> (f32, f32) {
    let (mut square, mut mass) = ([0f32; LANES], [0f32; LANES]);
    let (deltas, weights) = (delta.chunks_exact(LANES), weight.chunks_exact(LANES));
    for (lane, (d, w)) in deltas.remainder().iter().zip(weights.remainder()).enumerate() {
        square[lane] = w * d * d;
        mass[lane] = *w;
    }
    for (d, w) in deltas.zip(weights) {
        for lane in 0..LANES {
            square[lane] += w[lane] * d[lane] * d[lane];
            mass[lane] += w[lane];
        }
    }
    (square.iter().sum(), mass.iter().sum())
}

/// `Σ w·d·l` and `Σ w·l²`, where `l = code − zero` of each element at the scale `1 / inverse`. Their quotient is the
/// best scale for those codes, and `num² / den` the energy that it explains.
#[inline(always)]
fn level_sums(delta: &[f32], weight: &[f32], inverse: f32, zero: f32, max_code: MaxCode) -> (f32, f32) {
    let (mut num, mut den) = ([0f32; LANES], [0f32; LANES]);
    let (deltas, weights) = (delta.chunks_exact(LANES), weight.chunks_exact(LANES));
    for (lane, (d, w)) in deltas.remainder().iter().zip(weights.remainder()).enumerate() {
        let level = code_of(*d, inverse, zero, max_code) as f32 - zero;
        num[lane] = w * d * level;
        den[lane] = w * level * level;
    }
    for (d, w) in deltas.zip(weights) {
        for lane in 0..LANES {
            let level = code_of(d[lane], inverse, zero, max_code) as f32 - zero;
            let weighted = w[lane] * level;
            num[lane] += weighted * d[lane];
            den[lane] += weighted * level;
        }
    }
    (num.iter().sum(), den.iter().sum())
}

#[inline(always)]
fn unbiased_body(delta: &[f32], weight: &[f32], scale: f32, zero: f32, codes: &[u8]) -> f32 {
    let (square, _) = energy(delta, weight);
    let mut along = [0f32; LANES];
    for ((d, w), codes) in delta.chunks(LANES).zip(weight.chunks(LANES)).zip(codes.chunks(LANES)) {
        for (((along, d), w), code) in along.iter_mut().zip(d).zip(w).zip(codes) {
            *along += w * d * (f32::from(*code) - zero);
        }
    }
    let along: f32 = along.iter().sum();
    if along > 0.0 { (square / along).min(MAX_SCALE_GROWTH * scale) } else { scale }
}

#[inline(always)]
fn encode_body(delta: &[f32], scale: f32, bits: u32, zero: f32, codes: &mut [u8]) {
    let max_code = MaxCode::of(bits);
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (code, d) in codes.iter_mut().zip(delta) {
        *code = code_of(*d, inverse, zero, max_code) as u8;
    }
}

/// The code nearest to `d · inverse + zero`. Halves are rounded up, so a symmetric 1-bit code is the sign.
#[inline(always)]
fn code_of(d: f32, inverse: f32, zero: f32, MaxCode(max_code): MaxCode) -> i32 {
    let nearest = d * inverse + (zero + 0.5);
    let nearest = if nearest > 0.0 { nearest } else { 0.0 };
    let nearest = if nearest < max_code { nearest } else { max_code };
    // SAFETY: the two comparisons leave 0 to `max_code`, at most 255, and turn NaN into 0.
    unsafe { nearest.to_int_unchecked() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn error(delta: &[f32], scale: f32, zero: f32, codes: &[u8]) -> f32 {
        delta.iter().zip(codes).map(|(d, c)| (d - scale * (f32::from(*c) - zero)).powi(2)).sum()
    }

    fn gaussian(n: usize) -> Vec<f32> {
        let mut state = 1u64;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 + 0.5) / (1u64 << 24) as f32
        };
        (0..n).map(|_| (-2.0 * uniform().ln()).sqrt() * (std::f32::consts::TAU * uniform()).cos()).collect()
    }

    #[test]
    #[cfg_attr(miri, ignore)] // too slow
    fn a_gaussian_reaches_its_known_distortion() {
        let delta = gaussian(20_000);
        let (ones, mut codes) = (vec![1.0; delta.len()], vec![0; delta.len()]);
        let energy: f32 = delta.iter().map(|d| d * d).sum();
        for (bits, distortion) in [(1, 0.363), (2, 0.1188), (3, 0.0374), (4, 0.01154)] {
            let zero = max_code(bits) / 2.0;
            let scale = fit_row(&delta, &ones, bits, zero, 0.0, &mut codes);
            for guess in [0.0, 0.9 * scale, 1.1 * scale] {
                let scale = fit_row(&delta, &ones, bits, zero, guess, &mut codes);
                let found = error(&delta, scale, zero, &codes) / energy;
                assert!((found / distortion - 1.0).abs() < 0.06, "{bits} bits: {found} for {distortion}");
            }
        }
    }

    #[test]
    fn an_unbiased_scale_keeps_the_projection_of_a_row() {
        let (delta, weight) = (gaussian(1000), gaussian(1000).iter().map(|w| w * w).collect::<Vec<_>>());
        let mut codes = vec![0; delta.len()];
        for bits in [1, 2, 4] {
            let zero = max_code(bits) / 2.0;
            let best = fit_row(&delta, &weight, bits, zero, 0.0, &mut codes);
            let scale = unbiased(&delta, &weight, best, zero, &codes);
            let (mut kept, mut all) = (0.0, 0.0);
            for ((d, w), code) in delta.iter().zip(&weight).zip(&codes) {
                kept += w * d * scale * (f32::from(*code) - zero);
                all += w * d * d;
            }
            // At 4 bits `best` may be that of the codes before the last, which differ in a few places.
            let grows = if bits < 4 { scale > best } else { scale > 0.995 * best };
            assert!(grows && (kept / all - 1.0).abs() < 1e-4, "{bits} bits: {kept} of {all} at {scale} for {best}");
        }
        let mut spike = vec![0.0; 400];
        spike[3] = 1.0;
        let best = fit_row(&spike, &[1.0; 400], 1, 0.5, 0.0, &mut codes[..400]);
        assert_eq!(unbiased(&spike, &[1.0; 400], best, 0.5, &codes[..400]), MAX_SCALE_GROWTH * best);
        assert_eq!(unbiased(&[0.0; 9], &[1.0; 9], 0.0, 0.5, &[0; 9]), 0.0);
    }

    #[test]
    fn a_row_of_zeros_has_no_scale() {
        let mut codes = [9; 40];
        assert_eq!(fit_row(&[0.0; 40], &[1.0; 40], 2, 1.5, 0.0, &mut codes), 0.0);
    }

    #[test]
    fn a_heavy_weight_is_kept_best() {
        let mut weight = vec![1e-6; 64];
        weight[7] = 1.0;
        let mut delta = gaussian(64);
        delta[7] = 1.0;
        let mut codes = vec![0; 64];
        let scale = fit_row(&delta, &weight, 2, 1.5, 0.0, &mut codes);
        assert!((delta[7] - scale * (f32::from(codes[7]) - 1.5)).abs() < 0.02 * delta[7].abs());
    }

    #[test]
    #[should_panic(expected = "a code fits a byte")]
    fn a_code_wider_than_a_byte_is_refused() {
        encode(&[1e30], 1.0, 31, 0.0, &mut [0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]

        #[test]
        fn no_row_fits_worse_than_nothing(
            delta in prop::collection::vec(-1e3f32..1e3, 1..200), bits in prop::sample::select(&[1u32, 2, 3, 4, 8][..])
        ) {
            let (ones, mut codes) = (vec![1.0; delta.len()], vec![0; delta.len()]);
            let zero = max_code(bits) / 2.0;
            let scale = fit_row(&delta, &ones, bits, zero, 0.0, &mut codes);
            let energy: f32 = delta.iter().map(|d| d * d).sum();
            prop_assert!(error(&delta, scale, zero, &codes) <= energy * 1.0001);
            prop_assert!(codes.iter().all(|code| f32::from(*code) <= max_code(bits)));
        }
    }
}
