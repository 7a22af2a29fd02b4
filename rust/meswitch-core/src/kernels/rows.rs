//! Rows of a tensor that somebody else owns, read and added to as 32-bit floats.

use half::f16;

use super::by_backend;
use super::floats::add_times;

/// Element types of activations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// 32-bit floats.
    F32,
    /// The upper half of 32-bit floats.
    Bf16,
    /// IEEE half floats.
    F16,
}

/// Rows of neighbouring elements.
#[derive(Clone, Copy)]
pub struct Rows {
    address: usize,
    stride: usize,
    kind: Kind,
}

impl Rows {
    /// Rows at an address, `stride` elements from one to the next.
    ///
    /// # Safety
    /// For as long as this or a copy is used, rows and elements asked for must be there, and written by nobody else.
    #[must_use]
    pub unsafe fn new(address: usize, stride: usize, kind: Kind) -> Self {
        Self { address, stride, kind }
    }

    /// Reads the first elements of a row.
    ///
    /// # Safety
    /// The memory must have a row `row` of at least `out.len()` elements.
    pub unsafe fn read(self, row: usize, out: &mut [f32]) {
        let (at, length) = (row * self.stride, out.len());
        // SAFETY: the caller's promise; a tensor is aligned to its elements.
        unsafe {
            match self.kind {
                Kind::F32 => {
                    out.copy_from_slice(std::slice::from_raw_parts((self.address as *const f32).add(at), length));
                }
                Kind::Bf16 => widen_bf16(std::slice::from_raw_parts((self.address as *const u16).add(at), length), out),
                Kind::F16 => widen_f16(std::slice::from_raw_parts((self.address as *const f16).add(at), length), out),
            }
        }
    }

    /// Writes a row's elements from `first` on.
    ///
    /// # Safety
    /// As [`Self::add`].
    pub unsafe fn write(self, row: usize, first: usize, values: &[f32]) {
        let (at, length) = (row * self.stride + first, values.len());
        // SAFETY: the caller's promise; a tensor is aligned to its elements, and any bits are a value.
        unsafe {
            match self.kind {
                Kind::F32 => std::slice::from_raw_parts_mut((self.address as *mut f32).add(at), length).fill(0.0),
                Kind::Bf16 | Kind::F16 => {
                    std::slice::from_raw_parts_mut((self.address as *mut u16).add(at), length).fill(0);
                }
            }
            self.add(row, first, values);
        }
    }

    /// Writes row `other` of `base` with `values` added, rounded once.
    ///
    /// # Safety
    /// As [`Self::add`], and `base` must have that row of as many elements.
    pub unsafe fn sum(self, row: usize, base: Self, other: usize, values: &[f32]) {
        let (at, from, length) = (row * self.stride, other * base.stride, values.len());
        // SAFETY: the caller's promise; a tensor is aligned to its elements, and any bits are a value.
        unsafe {
            match (self.kind, base.kind) {
                (Kind::F32, _) => {
                    let out = std::slice::from_raw_parts_mut((self.address as *mut f32).add(at), length);
                    base.read(other, out);
                    add_times(out, values, 1.0);
                }
                (Kind::Bf16, Kind::Bf16) => {
                    let base = std::slice::from_raw_parts((base.address as *const u16).add(from), length);
                    let out = std::slice::from_raw_parts_mut((self.address as *mut u16).add(at), length);
                    sum_bf16(base, values, out);
                }
                _ => {
                    let mut wide = vec![0f32; length];
                    base.read(other, &mut wide);
                    add_times(&mut wide, values, 1.0);
                    self.write(row, 0, &wide);
                }
            }
        }
    }

    /// Adds to a row's elements from `first` on.
    ///
    /// # Safety
    /// The memory must have a row `row` of at least `first + values.len()` elements, and nobody else at them.
    pub unsafe fn add(self, row: usize, first: usize, values: &[f32]) {
        let (at, length) = (row * self.stride + first, values.len());
        // SAFETY: the caller's promise; a tensor is aligned to its elements.
        unsafe {
            match self.kind {
                Kind::F32 => {
                    let out = std::slice::from_raw_parts_mut((self.address as *mut f32).add(at), length);
                    out.iter_mut().zip(values).for_each(|(out, value)| *out += value);
                }
                Kind::Bf16 => {
                    add_bf16(std::slice::from_raw_parts_mut((self.address as *mut u16).add(at), length), values);
                }
                Kind::F16 => {
                    add_f16(std::slice::from_raw_parts_mut((self.address as *mut f16).add(at), length), values);
                }
            }
        }
    }
}

/// 16-bit floats to 32-bit ones.
pub fn widen_f16(halves: &[f16], out: &mut [f32]) {
    use half::slice::HalfFloatSliceExt;
    halves.convert_to_f32_slice(out);
}

fn add_f16(out: &mut [f16], values: &[f32]) {
    use half::slice::HalfFloatSliceExt;
    let mut wide = [0f32; 256];
    for (out, values) in out.chunks_mut(wide.len()).zip(values.chunks(wide.len())) {
        let wide = &mut wide[..out.len()];
        out.convert_to_f32_slice(wide);
        wide.iter_mut().zip(values).for_each(|(out, value)| *out += value);
        out.convert_from_f32_slice(wide);
    }
}

by_backend! {
    /// bfloat16 to 32-bit floats.
    pub fn widen_bf16(halves: &[u16], out: &mut [f32]) = widen_bf16_body
}

#[inline(always)]
fn widen_bf16_body(halves: &[u16], out: &mut [f32]) {
    for (out, half) in out.iter_mut().zip(halves) {
        *out = f32::from_bits(u32::from(*half) << 16);
    }
}

by_backend! {
    /// Adds to bfloat16, rounding to the nearest, halves to even.
    pub fn add_bf16(out: &mut [u16], values: &[f32]) = add_bf16_body
}

#[inline(always)]
fn add_bf16_body(out: &mut [u16], values: &[f32]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = plus_bf16(*out, *value);
    }
}

/// The same to another place; where the processor rounds, numbers below the least normal one count as zeros.
pub fn sum_bf16(base: &[u16], values: &[f32], out: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    if super::backend() >= super::Backend::Avx512 && is_x86_feature_detected!("avx512bf16") {
        // SAFETY: the processor was asked.
        return unsafe { sum_bf16_rounded(base, values, out) };
    }
    sum_bf16_wide(base, values, out);
}

/// `sum_bf16` by the processor's own rounding, a third as many instructions, and past the caches: what is written is
/// more than they hold, and read once all of it is there.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn sum_bf16_rounded(base: &[u16], values: &[f32], out: &mut [u16]) {
    use std::arch::x86_64::*;
    const BLOCK: usize = 32;
    let aligned = out.as_ptr().align_offset(2 * BLOCK) == 0;
    let whole = if aligned { out.len().min(base.len()).min(values.len()) / BLOCK * BLOCK } else { 0 };
    let blocks = base[..whole].chunks_exact(BLOCK).zip(values[..whole].chunks_exact(BLOCK));
    for (out, (base, values)) in out[..whole].chunks_exact_mut(BLOCK).zip(blocks) {
        // The next row of a base is asked for while this one is added to.
        _mm_prefetch::<_MM_HINT_T0>(base.as_ptr().wrapping_add(whole).cast());
        // SAFETY: 32 elements of each, which a line takes; any bits are a value.
        unsafe {
            let sum = |at: usize| {
                let half = _mm512_cvtepu16_epi32(_mm256_loadu_si256(base.as_ptr().add(at).cast()));
                let wide = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(half));
                _mm512_add_ps(wide, _mm512_loadu_ps(values.as_ptr().add(at)))
            };
            let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(sum(BLOCK / 2), sum(0)));
            _mm512_stream_si512(out.as_mut_ptr().cast(), rounded);
        }
    }
    _mm_sfence();
    sum_bf16_body(&base[whole..], &values[whole..], &mut out[whole..]);
}

by_backend! {
    /// `sum_bf16` as every processor can.
    pub fn sum_bf16_wide(base: &[u16], values: &[f32], out: &mut [u16]) = sum_bf16_body
}

#[inline(always)]
fn sum_bf16_body(base: &[u16], values: &[f32], out: &mut [u16]) {
    for ((out, base), value) in out.iter_mut().zip(base).zip(values) {
        *out = plus_bf16(*base, *value);
    }
}

#[inline(always)]
fn plus_bf16(half: u16, value: f32) -> u16 {
    let sum = f32::from_bits(u32::from(half) << 16) + value;
    let bits = sum.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    if sum.is_nan() { 0x7fc0 } else { rounded as u16 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sums_are_rounded_as_half_does(pairs in prop::collection::vec((any::<u16>(), any::<f32>()), 0..70)) {
            let values: Vec<f32> = pairs.iter().map(|pair| pair.1).collect();
            let mut brain: Vec<bf16> = pairs.iter().map(|pair| bf16::from_bits(pair.0)).collect();
            let mut half: Vec<f16> = pairs.iter().map(|pair| f16::from_bits(pair.0)).collect();
            let expected: Vec<_> = brain.iter().zip(&values).map(|(a, b)| bf16::from_f32(a.to_f32() + b)).collect();
            let expected_half: Vec<_> = half.iter().zip(&values).map(|(a, b)| f16::from_f32(a.to_f32() + b)).collect();
            // SAFETY: one row of that many elements each.
            unsafe {
                Rows::new(brain.as_mut_ptr() as usize, 0, Kind::Bf16).add(0, 0, &values);
                Rows::new(half.as_mut_ptr() as usize, 0, Kind::F16).add(0, 0, &values);
            }
            for ((found, expected), (half, expected_half)) in brain.iter().zip(&expected).zip(half.iter().zip(&expected_half)) {
                prop_assert!(found == expected || (found.is_nan() && expected.is_nan()));
                prop_assert!(half == expected_half || (half.is_nan() && expected_half.is_nan()));
            }
        }

        #[test]
        fn a_row_and_its_delta_are_rounded_once(
            pairs in prop::collection::vec((any::<u16>(), any::<f32>()), 0..200),
            skip in 0..2usize,
        ) {
            #[repr(align(64))]
            struct Line([u16; 256]);
            let (base, values): (Vec<u16>, Vec<f32>) = pairs.into_iter().unzip();
            let mut out = Line([7; 256]);
            sum_bf16(&base, &values, &mut out.0[skip..skip + base.len()]);
            for ((found, base), value) in out.0[skip..].iter().zip(&base).zip(&values) {
                let (found, base) = (bf16::from_bits(*found), bf16::from_bits(*base));
                let expected = bf16::from_f32(base.to_f32() + value);
                let least = expected.to_f32().abs() <= f32::MIN_POSITIVE;
                prop_assert!(found == expected || (found.is_nan() && expected.is_nan()) || least && found.to_f32().abs() <= expected.to_f32().abs());
            }
            prop_assert!(out.0[skip + base.len()..].iter().all(|untouched| *untouched == 7));
        }

        #[test]
        fn what_is_read_is_what_is_there(values in prop::collection::vec(any::<u16>(), 6..70)) {
            let mut out = vec![0f32; 3];
            // SAFETY: two rows of three elements.
            unsafe { Rows::new(values.as_ptr() as usize, 3, Kind::Bf16).read(1, &mut out) };
            for (found, value) in out.iter().zip(&values[3..]) {
                prop_assert_eq!(found.to_bits(), u32::from(*value) << 16);
            }
        }
    }
}
