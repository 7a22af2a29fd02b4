//! Activations rounded to signed bytes, so that one byte product of the processor does a column.
//!
//! A column's step is shared by few others, so that one large activation spoils only its neighbours'. Columns are taken
//! in *spans* of 512 (a whole run of the narrowest codes), and eight spans are a *segment*. Within a segment, the same
//! four neighbouring columns of every span share a step: 32 columns in all, whose products a kernel can sum in one
//! 32-bit lane without looking at the step. Columns after the last whole span share one step. Where that would leave
//! too large an error, the largest columns are not rounded at all: a kernel multiplies them one by one.

use crate::layout::{self, RUN};

/// Columns of a span.
pub const SPAN: usize = 8 * RUN;
/// Columns that share a set of steps.
pub const SEGMENT: usize = 8 * SPAN;
/// Steps of a segment.
pub const STEPS: usize = SPAN / 4;
/// Sums are kept in as many parts.
const LANES: usize = 16;
/// Zeros after the last activation, so that a vector load never leaves the memory.
const PADDING: usize = SPAN + RUN;
/// Relative error of the activations from which on outliers are taken out.
const ENOUGH: f32 = 0.006;
/// Multiples of the root mean square above which a column is an outlier, tried in turn. Below the last, no step can be
/// larger than leaves an error of a hundredth.
const OUTLIERS: [f32; 2] = [6.0, 4.0];
/// The largest magnitude of an activation in steps.
const MOST: f32 = 127.0;
/// Below this a step's inverse is no longer a number; such activations count as zero.
const TINY: f32 = 1e-30;
/// Added to a small float, it leaves the nearest integer in the low bits.
const ROUND: f32 = 12_582_912.0;

/// One cache line of rounded activations.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([i8; RUN]);

/// Activations of some tokens, in integers.
pub struct Activations {
    columns: usize,
    /// Lines of a token.
    stride: usize,
    lines: Vec<Line>,
    steps: Vec<f32>,
    /// For every code width in use, the steps of its planes, and where each token's outliers lie.
    planes: Vec<Planes>,
    tail: Vec<f32>,
    /// `Σ x` of every 64 columns, in lanes.
    sums: Vec<f32>,
    outliers: Vec<Vec<(u32, f32)>>,
}

struct Planes {
    bits: u32,
    steps: Vec<f32>,
    places: Vec<Places>,
}

/// Where the codes of outliers lie in a packed row, and what they are multiplied by; sixteen at a time, zeros at the end.
#[derive(Default)]
pub struct Places {
    /// Which 32-bit word of the row.
    pub words: Vec<i32>,
    /// How far up in the word.
    pub shifts: Vec<i32>,
    /// The activations.
    pub values: Vec<f32>,
}

impl Places {
    fn of(outliers: &[(u32, f32)], bits: u32, columns: usize) -> Self {
        let mut places = Self::default();
        for (column, value) in outliers {
            let (byte, shift) = layout::place(*column as usize, bits, columns);
            places.words.push((byte / 4) as i32);
            places.shifts.push((byte % 4 * 8) as i32 + shift as i32);
            places.values.push(*value);
        }
        let whole = outliers.len().next_multiple_of(LANES);
        places.words.resize(whole, 0);
        places.shifts.resize(whole, 0);
        places.values.resize(whole, 0.0);
        places
    }
}

/// One token as kernels see it.
#[derive(Clone, Copy)]
pub struct Token<'a> {
    columns: usize,
    /// Rounded activations, zeros after the last column.
    pub rounded: &'a [i8],
    /// `STEPS` steps a segment.
    pub steps: &'a [f32],
    /// The step of the columns after the last whole span.
    pub tail: f32,
    /// The columns that were not rounded, and their values.
    pub outliers: &'a [(u32, f32)],
    /// Where their codes lie.
    pub places: &'a Places,
}

impl Token<'_> {
    /// How many columns.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }
}

impl Activations {
    /// Rounds activations `[tokens, columns]`; what is in `x` afterwards means nothing. `unit(bits, plane)` is what a
    /// kernel multiplies a plane's codes by, for every one of `widths` (1, 2, 4 or 8 bits a code).
    #[must_use]
    pub fn of(x: &mut [f32], columns: usize, widths: &[u32], unit: fn(u32, usize) -> f32) -> Self {
        let tokens = x.len() / columns.max(1);
        let stride = (columns + PADDING).div_ceil(RUN);
        let steps = columns / SPAN * SPAN;
        let (steps, blocks) = (steps.div_ceil(SEGMENT) * STEPS, columns.div_ceil(RUN));
        let mut all = Self {
            columns,
            stride,
            lines: vec![Line([0; RUN]); tokens * stride],
            steps: vec![0.0; tokens * steps],
            planes: Vec::new(),
            tail: vec![0.0; tokens],
            sums: vec![0.0; tokens * blocks * LANES],
            outliers: vec![Vec::new(); tokens],
        };
        for (token, x) in x.chunks_exact_mut(columns.max(1)).enumerate() {
            let rounded = all.lines[token * stride..].as_mut_ptr().cast::<i8>();
            // SAFETY: the token's `stride` lines are as many times 64 bytes, more than `columns` of them, and nothing else refers to them.
            let rounded = unsafe { std::slice::from_raw_parts_mut(rounded, columns) };
            all.tail[token] = round(
                x,
                rounded,
                &mut all.steps[token * steps..(token + 1) * steps],
                &mut all.sums[token * blocks * LANES..(token + 1) * blocks * LANES],
                &mut all.outliers[token],
            );
        }
        for bits in widths {
            let planes = 8 / *bits as usize;
            let units: [f32; 8] = std::array::from_fn(|block| unit(*bits, block % planes).recip());
            let mut scaled = all.steps.clone();
            for (steps, unit) in scaled.chunks_exact_mut(LANES).zip(units.iter().cycle()) {
                steps.iter_mut().for_each(|step| *step *= unit);
            }
            let places = all.outliers.iter().map(|outliers| Places::of(outliers, *bits, columns)).collect();
            all.planes.push(Planes { bits: *bits, steps: scaled, places });
        }
        all
    }

    /// All tokens for codes of `bits`, one of the widths asked for.
    #[must_use]
    pub fn tokens_for(&self, bits: u32) -> Vec<Token<'_>> {
        (0..self.tokens()).map(|token| self.token(token, bits)).collect()
    }

    /// How many tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tail.len()
    }

    /// How many columns.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    fn token(&self, token: usize, bits: u32) -> Token<'_> {
        let lines = &self.lines[token * self.stride..(token + 1) * self.stride];
        // SAFETY: as many bytes as the lines have.
        let rounded = unsafe { std::slice::from_raw_parts(lines.as_ptr().cast::<i8>(), self.stride * RUN) };
        let planes = self.planes.iter().find(|planes| planes.bits == bits).expect("a width asked for");
        let count = self.steps.len() / self.tokens();
        Token {
            columns: self.columns,
            rounded,
            steps: &planes.steps[token * count..(token + 1) * count],
            tail: self.tail[token],
            outliers: &self.outliers[token],
            places: &planes.places[token],
        }
    }

    /// `Σ x`.
    #[must_use]
    pub fn sum(&self, token: usize) -> f32 {
        sum(self.lanes(token))
    }

    /// `Σ x` of every 64 columns.
    #[must_use]
    pub fn sums(&self, token: usize) -> Vec<f32> {
        self.lanes(token).chunks_exact(LANES).map(|lanes| lanes.iter().sum()).collect()
    }

    fn lanes(&self, token: usize) -> &[f32] {
        let count = self.columns.div_ceil(RUN) * LANES;
        &self.sums[token * count..(token + 1) * count]
    }
}

super::by_backend! {
    /// `Σ x` in lanes.
    pub fn sum(x: &[f32]) -> f32 = sum_body
}

#[inline(always)]
fn sum_body(x: &[f32]) -> f32 {
    total(lanes(x, |sum, x| sum + x, |a, b| a + b))
}

super::by_backend! {
    /// Rounds one token; gives the step of its last columns.
    pub fn round(x: &mut [f32], rounded: &mut [i8], steps: &mut [f32], sums: &mut [f32], outliers: &mut Vec<(u32, f32)>)
        -> f32 = round_body
}

#[inline(always)]
fn round_body(
    x: &mut [f32],
    rounded: &mut [i8],
    steps: &mut [f32],
    sums: &mut [f32],
    outliers: &mut Vec<(u32, f32)>,
) -> f32 {
    let largest = most(x);
    let unit = if largest < TINY { 1.0 } else { largest.recip() };
    let energy = total(lanes(x, |sum, x| sum + (x * unit) * (x * unit), |a, b| a + b));
    if !energy.is_finite() {
        steps.fill(f32::NAN);
        sums.fill(f32::NAN);
        return f32::NAN;
    }
    let mean = largest * (energy / x.len() as f32).sqrt();
    let main = x.len() / SPAN * SPAN;
    let (mut tail, mut error) = choose(x, main, unit, steps);
    for limit in OUTLIERS {
        if error > energy * ENOUGH * ENOUGH {
            take_outliers(x, mean * limit, outliers);
            (tail, error) = choose(x, main, unit, steps);
        }
    }
    let segments = x[..main].chunks(SEGMENT).zip(rounded.chunks_mut(SEGMENT));
    for ((x, rounded), (steps, sums)) in segments.zip(steps.chunks_exact(STEPS).zip(sums.chunks_mut(SEGMENT / 4))) {
        round_segment(x, rounded, steps, sums);
    }
    let inverse = inverse(tail);
    for ((x, rounded), sum) in
        x[main..].chunks(RUN).zip(rounded[main..].chunks_mut(RUN)).zip(sums[main / 4..].chunks_exact_mut(LANES))
    {
        for (x, rounded) in x.iter().zip(rounded) {
            let value = x * inverse + ROUND;
            *rounded = value.to_bits() as i8;
            sum[0] += (value - ROUND) * tail;
        }
    }
    for (column, x) in outliers {
        sums[*column as usize / RUN * LANES] += *x;
    }
    tail
}

/// Chooses steps; gives that of the last columns, and the sum of squares, in units, that rounding is expected to leave.
#[inline(always)]
fn choose(x: &[f32], main: usize, unit: f32, steps: &mut [f32]) -> (f32, f32) {
    let mut squares = 0f32;
    for (x, steps) in x[..main].chunks(SEGMENT).zip(steps.chunks_exact_mut(STEPS)) {
        for (at, steps) in steps.chunks_exact_mut(4).enumerate() {
            let mut most = [0f32; LANES];
            for span in x.chunks_exact(SPAN) {
                let x = lane(span, at);
                most = of(|i| larger(x[i].abs(), most[i]));
            }
            most = of(|i| larger(most[i ^ 1], most[i]));
            most = of(|i| larger(most[i ^ 2], most[i]));
            steps.copy_from_slice(&[most[0], most[4], most[8], most[12]]);
        }
        steps.iter_mut().for_each(|step| *step = step_of(*step));
        let sum = total(lanes(steps, |sum, step| sum + (step * unit) * (step * unit), |a, b| a + b));
        squares += sum * (x.len() / STEPS) as f32;
    }
    let tail = step_of(most(&x[main..]));
    (tail, (squares + (tail * unit) * (tail * unit) * (x.len() - main) as f32) / 12.0)
}

#[inline(always)]
fn round_segment(x: &[f32], rounded: &mut [i8], steps: &[f32], sums: &mut [f32]) {
    for block in 0..8 {
        let steps = lane(steps, block);
        let inverses = of(|i| inverse(steps[i]));
        let (mut wide, mut wide_inverses) = ([[0f32; LANES]; 4], [[0f32; LANES]; 4]);
        for part in 0..4 {
            wide[part] = of(|i| steps[4 * part + i / 4]);
            wide_inverses[part] = of(|i| inverses[4 * part + i / 4]);
        }
        for span in 0..x.len() / SPAN {
            let mut sum = [0f32; LANES];
            for part in 0..4 {
                let at = span * SPAN / LANES + block * 4 + part;
                let x = lane(x, at);
                let value = of(|i| x[i] * wide_inverses[part][i] + ROUND);
                for (rounded, value) in rounded[at * LANES..(at + 1) * LANES].iter_mut().zip(value) {
                    *rounded = value.to_bits() as i8;
                }
                sum = of(|i| sum[i] + (value[i] - ROUND) * wide[part][i]);
            }
            sums[(span * 8 + block) * LANES..(span * 8 + block + 1) * LANES].copy_from_slice(&sum);
        }
    }
}

#[inline(always)]
fn of(lane: impl Fn(usize) -> f32) -> [f32; LANES] {
    let mut lanes = [0f32; LANES];
    for (at, value) in lanes.iter_mut().enumerate() {
        *value = lane(at);
    }
    lanes
}

#[inline(always)]
fn lane(x: &[f32], at: usize) -> [f32; LANES] {
    x[at * LANES..(at + 1) * LANES].try_into().expect("as many")
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[inline(always)]
fn step_of(most: f32) -> f32 {
    if most < TINY { 0.0 } else { most * (1.0 / MOST) }
}

#[inline(always)]
fn inverse(step: f32) -> f32 {
    if step == 0.0 { 0.0 } else { step.recip() }
}

#[inline(always)]
fn most(x: &[f32]) -> f32 {
    lanes(x, |most, x| larger(x.abs(), most), larger).into_iter().fold(0.0, larger)
}

/// Folds into lanes, four of them at once.
#[inline(always)]
fn lanes(x: &[f32], fold: impl Fn(f32, f32) -> f32, join: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    let mut lanes = [0f32; 4 * LANES];
    let whole = x.chunks_exact(4 * LANES);
    for (lane, x) in lanes.iter_mut().zip(whole.remainder()) {
        *lane = fold(*lane, *x);
    }
    for x in whole {
        for at in 0..4 * LANES {
            lanes[at] = fold(lanes[at], x[at]);
        }
    }
    of(|i| join(join(lanes[i], lanes[i + LANES]), join(lanes[i + 2 * LANES], lanes[i + 3 * LANES])))
}

/// Sums lanes, halves onto halves.
#[inline(always)]
fn total(mut lanes: [f32; LANES]) -> f32 {
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
    }
    lanes[0]
}

#[inline(never)]
fn take_outliers(x: &mut [f32], limit: f32, outliers: &mut Vec<(u32, f32)>) {
    for (column, x) in x.iter_mut().enumerate() {
        if x.abs() > limit {
            outliers.push((column as u32, *x));
            *x = 0.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    impl Activations {
        /// What the rounded activations stand for.
        pub fn values(&self, token: usize) -> Vec<f32> {
            let (of, main) = (self.token(token, self.planes[0].bits), self.columns / SPAN * SPAN);
            let steps = &self.steps[token * self.steps.len() / self.tokens()..];
            let step = |c: usize| if c < main { steps[c / SEGMENT * STEPS + c % SPAN / 4] } else { of.tail };
            let mut x: Vec<f32> = (0..self.columns).map(|c| f32::from(of.rounded[c]) * step(c)).collect();
            for (column, value) in of.outliers {
                assert_eq!(x[*column as usize], 0.0);
                x[*column as usize] = *value;
            }
            x
        }
    }

    /// The same, and that the sums are its sums.
    fn back(all: &Activations, token: usize) -> Vec<f32> {
        let x = all.values(token);
        for (sum, x) in all.sums(token).iter().zip(x.chunks(RUN)) {
            let expected: f64 = x.iter().map(|x| f64::from(*x)).sum();
            let magnitude: f64 = x.iter().map(|x| f64::from(x.abs())).sum();
            assert!((f64::from(*sum) - expected).abs() <= 1e-5 * magnitude);
        }
        x
    }

    fn relative_error(x: &[f32]) -> f32 {
        let found = back(&Activations::of(&mut x.to_vec(), x.len(), &[8], |_, _| 1.0), 0);
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
        norm(&mut found.iter().zip(x).map(|(a, b)| a - b)) / norm(&mut x.iter().copied())
    }

    /// Normal values, by the sum of twelve uniform ones.
    fn normal(count: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut uniform = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        (0..count).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
    }

    #[test]
    fn the_error_stays_below_one_per_cent() {
        for columns in [300, 576, 2048, 4096, 11008, 14336] {
            let plain = normal(columns, 1);
            assert!(relative_error(&plain) < 0.008, "{columns}: {}", relative_error(&plain));
            for (outliers, times) in [(1, 50.0), (7, 50.0), (3, 1000.0), (20, 10.0)] {
                let mut x = plain.clone();
                (0..outliers).for_each(|k| x[k * 37 % columns] *= times);
                assert!(relative_error(&x) < 0.01, "{columns}, {outliers} x {times}: {}", relative_error(&x));
            }
            // Heavy tails, as after a gated activation.
            let product: Vec<f32> = plain.iter().zip(normal(columns, 2)).map(|(a, b)| a * b).collect();
            assert!(relative_error(&product) < 0.01, "{columns}: {}", relative_error(&product));
        }
    }

    proptest! {
        #[test]
        fn no_value_is_far_from_its_own(x in prop::collection::vec(-1e4f32..1e4, 1..1700), scale in -20i32..20) {
            let x: Vec<f32> = x.iter().map(|x| x * (scale as f32).exp2()).collect();
            let all = Activations::of(&mut x.clone(), x.len(), &[8], |_, _| 1.0);
            let largest = x.iter().fold(0f32, |most, x| most.max(x.abs()));
            for (found, x) in back(&all, 0).iter().zip(&x) {
                prop_assert!((found - x).abs() <= largest / MOST * 0.51);
            }
        }
    }

    #[test]
    fn nothing_and_what_is_not_finite() {
        let of = |x: &[f32]| Activations::of(&mut x.to_vec(), x.len(), &[8], |_, _| 1.0);
        assert_eq!(back(&of(&[0.0; 5]), 0), [0.0; 5]);
        assert_eq!(back(&of(&[0.0; 600]), 0), [0.0; 600]);
        assert_eq!(of(&[]).tokens(), 0);
        for bad in [f32::NAN, f32::INFINITY] {
            let all = of(&[0.0, bad]);
            assert!(all.tail[0].is_nan() && all.sums(0)[0].is_nan());
        }
    }
}
