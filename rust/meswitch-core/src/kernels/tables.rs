//! Activations as sums to look up: for every half byte of a packed row, what each of its sixteen values adds to the row's
//! product with one token.
//!
//! Half a byte holds four 1-bit codes, two of 2 bits, one of 4, or half a code of 8 bits. A sum is
//! `Σ (factor · code − zero) · x` of its columns, rounded to a 16-bit multiple of a step that 64 bytes of the row share.
//! The step is the smallest with which no row's sum over those bytes leaves 16 bits, whatever its codes; so kernels add
//! in 16 bits, exactly, and rounding leaves an error of 1/400 of the product, and whatever the activations of 1/250.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::backend::Backend;
use super::floats::{add_times, magnitude};
use super::lookup::Tokens;
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::scalar;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::layout::{planes, row_bytes};

/// Bytes of a row that share a step.
pub const SEGMENT: usize = 64;
/// Values of half a byte.
pub(super) const HALF: usize = 16;
/// What the largest row's sum may be, in steps: what 16 bits hold, less half a step for the rounding of every half byte,
/// and as much again for that of the step itself.
const MOST: f32 = 32_767.0 - 2.0 * SEGMENT as f32;
/// Below this a step's inverse is no number any more; such activations count as zero.
const TINY: f32 = 1e-35;
/// Added to a small float, it leaves the nearest integer in the low bits.
pub(super) const ROUND: f32 = 12_582_912.0;

/// A byte's sums: its low half's, then its high half's.
///
/// Where kernels look bytes up and not words: the low bytes of the low half's sums, their high bytes, and so on.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Sums(pub [i16; 2 * HALF]);

/// Bytes of a row that share a step, and the group that they belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The first byte.
    pub start: usize,
    /// The one after the last.
    pub end: usize,
    /// How many bytes segments before it have.
    pub place: usize,
    /// Which of the row's scales is theirs.
    pub group: usize,
}

/// What decides how a part's rows are looked up: parts that have it in common share tables.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Form {
    /// Bits a code.
    pub bits: u32,
    /// The code value that means zero.
    pub zero: f32,
    /// Columns that share a scale.
    pub group: usize,
}

/// The tables of some tokens for one form, made a segment at a time: as they are first looked at, so that memory brings
/// codes meanwhile.
pub struct Tables {
    /// What they are for.
    pub form: Form,
    /// How many tokens.
    pub tokens: usize,
    /// A group's after another's.
    pub segments: Vec<Segment>,
    /// The groups, and the places of their segments.
    pub groups: Vec<(usize, Range<usize>)>,
    columns: usize,
    planes: Vec<(usize, Levels)>,
    /// Of the segments that are made, in turn: every token's.
    sums: Vec<Sums>,
    steps: Vec<f32>,
}

impl Tables {
    /// None made yet, for activations `[tokens, columns]`.
    #[must_use]
    pub fn new(tokens: usize, columns: usize, form: Form) -> Self {
        let (segments, mut at) = (segments(form, columns), 0);
        let of = |segments: &[Segment]| {
            at += segments.len();
            (segments[0].group, at - segments.len()..at)
        };
        let plane = |(bits, first, factor)| (first, Levels::of(bits, factor, zero_of(form, bits, first)));
        Self {
            form,
            tokens,
            groups: segments.chunk_by(|a, b| a.group == b.group).map(of).collect(),
            columns,
            planes: planes(form.bits, columns).into_iter().map(plane).collect(),
            sums: Vec::with_capacity(tokens * row_bytes(form.bits, columns)),
            steps: Vec::with_capacity(tokens * segments.len()),
            segments,
        }
    }

    /// Every token's sums for a segment, made of the activations if they are not there yet; segments come in turn.
    pub fn at(&mut self, at: usize, x: &[f32], backend: Backend) -> Tokens<'_> {
        let segment = self.segments[at];
        let (first, bytes) = (segment.place * self.tokens, segment.end - segment.start);
        if self.sums.len() <= first {
            self.make(segment, x, backend);
        }
        let sums = &self.sums[first..][..bytes * self.tokens];
        Tokens { sums, steps: &self.steps[at * self.tokens..][..self.tokens], bytes }
    }

    fn make(&mut self, segment: Segment, x: &[f32], backend: Backend) {
        let (first, levels) = self.planes.iter().rfind(|plane| plane.0 <= segment.start).expect("a plane");
        let of = |byte: usize| ((byte - first) * levels.columns).min(self.columns);
        for x in x.chunks_exact(self.columns) {
            let count = segment.end - segment.start;
            let sums = &mut self.sums.spare_capacity_mut()[..count];
            self.steps.push(levels.fill(backend, &x[of(segment.start)..of(segment.end)], sums));
            // SAFETY: `fill` writes them all.
            unsafe { self.sums.set_len(self.sums.len() + count) };
        }
    }
}

/// A plane's share of the zero, so that the sums of each lie about nothing.
fn zero_of(form: Form, bits: u32, first: usize) -> f32 {
    match (form.bits == bits, first) {
        (true, _) => form.zero,
        (_, 0) => 1.5,
        _ => form.zero - 1.5,
    }
}

/// The segments of a row: no two groups, and no two planes, in one.
fn segments(form: Form, columns: usize) -> Vec<Segment> {
    let (mut segments, mut place) = (Vec::new(), 0);
    for group in 0..columns.div_ceil(form.group.max(1)) {
        for (bits, first, _) in planes(form.bits, columns) {
            let byte = |column: usize| first + row_bytes(bits, column.min(columns));
            let end = byte((group + 1) * form.group);
            let starts = (byte(group * form.group)..end).step_by(SEGMENT);
            segments.extend(starts.map(|start| {
                let segment = Segment { start, end: end.min(start + SEGMENT), place, group };
                place += segment.end - start;
                segment
            }));
        }
    }
    segments
}

/// Of the low half of a byte and the high one, for each of its columns: what its activation is multiplied by, at each
/// value of the half.
pub(super) type Halves = [[[f32; HALF]; 4]; 2];

/// What a byte adds.
struct Levels {
    /// Columns of a byte.
    columns: usize,
    /// `factor · code − zero`.
    halves: Halves,
    /// The largest that a byte adds for an activation of one.
    reach: f32,
}

impl Levels {
    fn of(bits: u32, factor: f32, zero: f32) -> Self {
        let bits = bits as usize;
        let mut levels = Self { columns: 8 / bits, halves: [[[0.0; HALF]; 4]; 2], reach: 0.0 };
        for (half, terms) in levels.halves.iter_mut().enumerate() {
            let mut reach = 0f32;
            for (at, values) in terms.iter_mut().take(4 / bits.min(4)).enumerate() {
                *values = std::array::from_fn(|value| match bits {
                    // Half a code: each half's sums lie about zero.
                    8 if half == 0 => value as f32 - 7.5,
                    8 => (16 * value) as f32 - (zero - 7.5),
                    _ => factor * ((value >> (bits * at)) & ((1 << bits) - 1)) as f32 - zero,
                });
                reach = values.iter().fold(reach, |most, value| most.max(value.abs()));
            }
            levels.reach = if bits == 8 { levels.reach + reach } else { reach };
        }
        levels
    }

    /// Writes the sums of activations, zeros after the last; gives their step.
    fn fill(&self, backend: Backend, x: &[f32], sums: &mut [MaybeUninit<Sums>]) -> f32 {
        let step = magnitude(x) * self.reach / MOST;
        if !step.is_finite() {
            sums.fill(MaybeUninit::new(Sums([0; 2 * HALF])));
            return f32::NAN;
        }
        let inverse = if step > TINY { step.recip() } else { 0.0 };
        match self.columns {
            8 => fill_on::<8, 4>(backend, x, inverse, &self.halves, sums),
            4 => fill_on::<4, 2>(backend, x, inverse, &self.halves, sums),
            2 => fill_on::<2, 1>(backend, x, inverse, &self.halves, sums),
            _ => fill_on::<1, 1>(backend, x, inverse, &self.halves, sums),
        }
        step
    }
}

/// Sums of `COLUMNS` a byte, `TERMS` of them in half of it, in units of a step.
fn fill_on<const COLUMNS: usize, const TERMS: usize>(
    backend: Backend,
    x: &[f32],
    inverse: f32,
    halves: &Halves,
    sums: &mut [MaybeUninit<Sums>],
) {
    let mut near = [[0f32; COLUMNS]; SEGMENT];
    add_times(&mut near.as_flattened_mut()[..x.len()], x, inverse);
    let near = &near[..sums.len()];
    match backend {
        // SAFETY: a backend is named only after the processor said that it has it.
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 => unsafe { avx512::fill::<COLUMNS, TERMS>(near, halves, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Backend::Avx2 => unsafe { avx2::fill::<COLUMNS, TERMS>(near, halves, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Backend::Neon => unsafe { neon::fill::<COLUMNS, TERMS>(near, halves, sums) },
        _ => scalar::fill::<COLUMNS, TERMS>(near, halves, sums),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_cover_a_row_once_and_keep_groups_and_planes_apart() {
        for (bits, columns, group) in
            [(1, 4096, 4096), (2, 300, 300), (3, 1000, 1000), (3, 300, 128), (8, 200, 64), (2, 0, 1)]
        {
            let form = Form { bits, zero: 0.5, group };
            let mut bytes = vec![0; row_bytes(bits, columns)];
            let found = segments(form, columns);
            for segment in &found {
                assert!(segment.end - segment.start <= SEGMENT);
                bytes[segment.start..segment.end].iter_mut().for_each(|count| *count += 1);
            }
            assert!(bytes.iter().all(|count| *count == 1));
            assert!(found.is_sorted_by_key(|segment| segment.group));
        }
    }

    #[test]
    fn the_largest_sums_fit_in_sixteen_bits() {
        for bits in [1, 2, 3, 4, 8] {
            let columns = 512;
            let x: Vec<f32> = (0..columns).map(|at| if at % 3 == 0 { -7.0 } else { 1e-3 + at as f32 }).collect();
            let form = Form { bits, zero: ((1 << bits) - 1) as f32 / 2.0, group: columns };
            let mut tables = Tables::new(1, columns, form);
            for at in 0..tables.segments.len() {
                let sums = tables.at(at, &x, Backend::Scalar).sums;
                let most = |half: &[i16]| half.iter().map(|sum| i32::from(sum.unsigned_abs())).max().unwrap();
                let all: i32 = sums.iter().flat_map(|Sums(sums)| sums.chunks(HALF).map(most)).sum();
                assert!((16_000..=32_767).contains(&all), "{bits} bits: {all}");
            }
        }
    }
}
