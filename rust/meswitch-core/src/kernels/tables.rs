//! Lookup tables made of activations: for every half byte of a packed row, what each of its sixteen values adds to the
//! row's product with one token.
//!
//! Half a byte holds four 1-bit codes, two 2-bit codes, one 4-bit code, or half an 8-bit code. A table entry is
//! `Σ (factor · code − zero) · x` over its columns, rounded to a 16-bit multiple of a step that the 64 bytes of a
//! segment share. The step is the smallest with which no row's total over a segment leaves 16 bits, whatever its codes.
//! So kernels add in 16 bits, exactly; rounding leaves a relative error of about 1/400 of a product, at worst 1/250.

use std::mem::MaybeUninit;
use std::ops::Range;

use super::backend::Backend;
use super::floats::{add_times, magnitude};
use super::lookup::TokenTables;
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::scalar;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::layout::{planes, row_bytes};

/// The most bytes of a row that share a step.
const SEGMENT_BYTES: usize = 64;
/// Values of half a byte.
pub(super) const HALF_VALUES: usize = 16;
/// The largest total of a row over a segment, in steps: what 16 bits hold, less half a step for the rounding of every
/// half byte, and as much again for the rounding of the step itself.
const MAX_TOTAL: f32 = 32_767.0 - 2.0 * SEGMENT_BYTES as f32;
/// Steps up to this have no finite inverse; such activations count as zero.
const MIN_STEP: f32 = 1e-35;
/// 1.5 · 2^23: added to a small float, it leaves the nearest integer in the low bits.
pub(super) const ROUND: f32 = 12_582_912.0;

/// A byte's lookup table: sixteen sums of its low half, then sixteen of its high half.
///
/// AVX2 and NEON look up bytes: there it holds the low bytes of the low half's sums, then their high bytes, then the
/// same of the high half.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Sums(pub(super) [i16; 2 * HALF_VALUES]);

/// Bytes of a row that share a step; they belong to one group and one plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// The first byte.
    pub(super) start: usize,
    /// The byte after the last.
    pub(super) end: usize,
    /// Bytes of all segments before it.
    bytes_before: usize,
    /// The index of their scale in a row.
    group: usize,
}

/// What decides the contents of lookup tables: parts with equal keys share tables.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct TableKey {
    /// Bits per code.
    pub(super) bits: u32,
    /// The code value that means 0.
    pub(super) zero: f32,
    /// Columns that share a scale.
    pub(super) group: usize,
}

/// The lookup tables of some tokens for one key. A segment's are made when they are first asked for: memory answers the
/// prefetches of codes meanwhile.
pub(super) struct Tables {
    /// What they are for.
    pub(super) key: TableKey,
    /// The number of tokens.
    pub(super) tokens: usize,
    /// The segments, group by group.
    pub(super) segments: Vec<Segment>,
    /// Each group's index, and the range of its segments.
    pub(super) groups: Vec<(usize, Range<usize>)>,
    columns: usize,
    /// The first byte of each plane, and its levels.
    planes: Vec<(usize, Levels)>,
    /// `[segments made so far][tokens][bytes]`.
    sums: Vec<Sums>,
    /// `[segments made so far][tokens]`.
    steps: Vec<f32>,
}

impl Tables {
    /// Tables for activations `[tokens, columns]`; none is made yet.
    pub(super) fn new(tokens: usize, columns: usize, key: TableKey) -> Self {
        let (segments, mut end) = (segments(key, columns), 0);
        let range = |segments: &[Segment]| {
            end += segments.len();
            (segments[0].group, end - segments.len()..end)
        };
        let plane = |(bits, first, factor)| (first, Levels::new(bits, factor, zero_of_plane(key, bits, first)));
        Self {
            key,
            tokens,
            groups: segments.chunk_by(|a, b| a.group == b.group).map(range).collect(),
            columns,
            planes: planes(key.bits, columns).into_iter().map(plane).collect(),
            sums: Vec::with_capacity(tokens * row_bytes(key.bits, columns)),
            steps: Vec::with_capacity(tokens * segments.len()),
            segments,
        }
    }

    /// All tokens' tables for a segment, made of the activations `x` on the first call. First calls must come in the
    /// order of segments, with the same `x` and `backend`.
    pub(super) fn segment(&mut self, index: usize, x: &[f32], backend: Backend) -> TokenTables<'_> {
        let segment = self.segments[index];
        let (first, bytes) = (segment.bytes_before * self.tokens, segment.end - segment.start);
        if self.sums.len() <= first {
            self.make(segment, x, backend);
        }
        let sums = &self.sums[first..][..bytes * self.tokens];
        TokenTables { sums, steps: &self.steps[index * self.tokens..][..self.tokens], bytes }
    }

    fn make(&mut self, segment: Segment, x: &[f32], backend: Backend) {
        let plane = self.planes.iter().rfind(|plane| plane.0 <= segment.start);
        let (first, levels) = plane.expect("the first plane starts at byte 0");
        let column = |byte: usize| ((byte - first) * levels.columns).min(self.columns);
        for x in x.chunks_exact(self.columns) {
            let count = segment.end - segment.start;
            let sums = &mut self.sums.spare_capacity_mut()[..count];
            self.steps.push(levels.fill(backend, &x[column(segment.start)..column(segment.end)], sums));
            // SAFETY: `fill` initialises all `count` elements.
            unsafe { self.sums.set_len(self.sums.len() + count) };
        }
    }
}

/// A plane's share of the zero: each plane's sums are centred about 0.
fn zero_of_plane(key: TableKey, bits: u32, first: usize) -> f32 {
    match (key.bits == bits, first) {
        (true, _) => key.zero,
        (_, 0) => 1.5,
        _ => key.zero - 1.5,
    }
}

/// The segments of a row, group by group. A segment lies in one group and one plane.
fn segments(key: TableKey, columns: usize) -> Vec<Segment> {
    let (mut segments, mut bytes_before) = (Vec::new(), 0);
    for group in 0..columns.div_ceil(key.group.max(1)) {
        for (bits, first, _) in planes(key.bits, columns) {
            let byte = |column: usize| first + row_bytes(bits, column.min(columns));
            let end = byte((group + 1) * key.group);
            let starts = (byte(group * key.group)..end).step_by(SEGMENT_BYTES);
            segments.extend(starts.map(|start| {
                let segment = Segment { start, end: end.min(start + SEGMENT_BYTES), bytes_before, group };
                bytes_before += segment.end - start;
                segment
            }));
        }
    }
    segments
}

/// `[half][column of the half][value of the half]`: what the column's activation is multiplied by.
pub(super) type HalfLevels = [[[f32; HALF_VALUES]; 4]; 2];

/// What the values of a byte's codes are, in one plane.
struct Levels {
    /// Columns per byte.
    columns: usize,
    /// `factor · code − zero`.
    halves: HalfLevels,
    /// The largest magnitude that a byte adds for an activation of 1.
    max_level: f32,
}

impl Levels {
    fn new(bits: u32, factor: f32, zero: f32) -> Self {
        let bits = bits as usize;
        let mut levels = Self { columns: 8 / bits, halves: [[[0.0; HALF_VALUES]; 4]; 2], max_level: 0.0 };
        for (half, terms) in levels.halves.iter_mut().enumerate() {
            let mut max_level = 0f32;
            for (index, values) in terms.iter_mut().take(4 / bits.min(4)).enumerate() {
                *values = std::array::from_fn(|value| match bits {
                    // Half a code: each half's sums are centred about 0.
                    8 if half == 0 => value as f32 - 7.5,
                    8 => (16 * value) as f32 - (zero - 7.5),
                    _ => factor * ((value >> (bits * index)) & ((1 << bits) - 1)) as f32 - zero,
                });
                max_level = values.iter().fold(max_level, |largest, value| largest.max(value.abs()));
            }
            levels.max_level = if bits == 8 { levels.max_level + max_level } else { max_level };
        }
        levels
    }

    /// Writes the tables of a segment's activations and returns their step. Columns beyond the last count as 0;
    /// activations that are not finite give zeros and a NaN step.
    fn fill(&self, backend: Backend, x: &[f32], sums: &mut [MaybeUninit<Sums>]) -> f32 {
        let step = magnitude(x) * self.max_level / MAX_TOTAL;
        if !step.is_finite() {
            sums.fill(MaybeUninit::new(Sums([0; 2 * HALF_VALUES])));
            return f32::NAN;
        }
        let inverse = if step > MIN_STEP { step.recip() } else { 0.0 };
        match self.columns {
            8 => fill_with::<8, 4>(backend, x, inverse, &self.halves, sums),
            4 => fill_with::<4, 2>(backend, x, inverse, &self.halves, sums),
            2 => fill_with::<2, 1>(backend, x, inverse, &self.halves, sums),
            _ => fill_with::<1, 1>(backend, x, inverse, &self.halves, sums),
        }
        step
    }
}

/// Writes tables for `COLUMNS` columns per byte, `TERMS` of which lie in each half, in units of a step.
fn fill_with<const COLUMNS: usize, const TERMS: usize>(
    backend: Backend,
    x: &[f32],
    inverse: f32,
    halves: &HalfLevels,
    sums: &mut [MaybeUninit<Sums>],
) {
    let mut scaled = [[0f32; COLUMNS]; SEGMENT_BYTES];
    add_times(&mut scaled.as_flattened_mut()[..x.len()], x, inverse);
    let scaled = &scaled[..sums.len()];
    match backend {
        // SAFETY: a `Backend` names only instruction sets that the processor has.
        #[cfg(target_arch = "x86_64")]
        Backend::Avx512 => unsafe { avx512::fill::<COLUMNS, TERMS>(scaled, halves, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Backend::Avx2 => unsafe { avx2::fill::<COLUMNS, TERMS>(scaled, halves, sums) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Backend::Neon => unsafe { neon::fill::<COLUMNS, TERMS>(scaled, halves, sums) },
        _ => scalar::fill::<COLUMNS, TERMS>(scaled, halves, sums),
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
            let key = TableKey { bits, zero: 0.5, group };
            let mut bytes = vec![0; row_bytes(bits, columns)];
            let found = segments(key, columns);
            for segment in &found {
                assert!(segment.end - segment.start <= SEGMENT_BYTES);
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
            let x: Vec<f32> =
                (0..columns).map(|index| if index % 3 == 0 { -7.0 } else { 1e-3 + index as f32 }).collect();
            let key = TableKey { bits, zero: ((1 << bits) - 1) as f32 / 2.0, group: columns };
            let mut tables = Tables::new(1, columns, key);
            for index in 0..tables.segments.len() {
                let sums = tables.segment(index, &x, Backend::Scalar).sums;
                let largest = |half: &[i16]| half.iter().map(|sum| i32::from(sum.unsigned_abs())).max().unwrap();
                let total: i32 = sums.iter().flat_map(|Sums(sums)| sums.chunks(HALF_VALUES).map(largest)).sum();
                assert!((16_000..=32_767).contains(&total), "{bits} bits: {total}");
            }
        }
    }
}
