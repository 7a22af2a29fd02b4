//! Rows of a tensor in memory that the caller lends, read and written as 32-bit floats.

use half::f16;

use super::by_backend;
use super::floats::add_times;

/// The element type of a lent tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElementType {
    /// 32-bit floats.
    F32,
    /// bfloat16: the upper half of a 32-bit float.
    Bf16,
    /// IEEE 754 half precision.
    F16,
}

/// The rows of a lent tensor. The elements of a row are contiguous; rows may be any distance apart.
///
/// A plain copyable pointer: it does not keep the memory alive, and nothing checks the row numbers it is given.
#[derive(Clone, Copy)]
pub struct Rows {
    address: usize,
    stride: usize,
    dtype: ElementType,
}

impl Rows {
    /// Describes rows that start at `address`, `stride` elements from one to the next.
    ///
    /// # Safety
    /// While this or a copy is used, the memory of every row that is accessed must be valid, aligned to its elements,
    /// and not written by anything else.
    #[must_use]
    pub unsafe fn new(address: usize, stride: usize, dtype: ElementType) -> Self {
        Self { address, stride, dtype }
    }

    /// Reads the first `out.len()` elements of a row.
    ///
    /// # Safety
    /// Row `row` must exist and have that many elements.
    pub unsafe fn read(self, row: usize, out: &mut [f32]) {
        let (offset, length) = (row * self.stride, out.len());
        // SAFETY: the caller guarantees the row; `new` requires alignment.
        unsafe {
            match self.dtype {
                ElementType::F32 => {
                    out.copy_from_slice(std::slice::from_raw_parts((self.address as *const f32).add(offset), length));
                }
                ElementType::Bf16 => {
                    widen_bf16(std::slice::from_raw_parts((self.address as *const [u8; 2]).add(offset), length), out);
                }
                ElementType::F16 => {
                    widen_f16(std::slice::from_raw_parts((self.address as *const f16).add(offset), length), out);
                }
            }
        }
    }

    /// Writes `values` to a row's elements from `first` on.
    ///
    /// # Safety
    /// As [`Self::add`].
    pub unsafe fn write(self, row: usize, first: usize, values: &[f32]) {
        let (offset, length) = (row * self.stride + first, values.len());
        // SAFETY: the caller guarantees the row; `new` requires alignment; every bit pattern is a value.
        unsafe {
            match self.dtype {
                ElementType::F32 => {
                    std::slice::from_raw_parts_mut((self.address as *mut f32).add(offset), length).fill(0.0);
                }
                ElementType::Bf16 | ElementType::F16 => {
                    std::slice::from_raw_parts_mut((self.address as *mut u16).add(offset), length).fill(0);
                }
            }
            self.add(row, first, values);
        }
    }

    /// Writes row `base_row` of `base` plus `values` to a row. A 16-bit result is rounded once.
    ///
    /// # Safety
    /// As [`Self::add`], and `base` must have that row of as many elements.
    pub unsafe fn write_sum(self, row: usize, base: Self, base_row: usize, values: &[f32]) {
        let (to, from, length) = (row * self.stride, base_row * base.stride, values.len());
        // SAFETY: the caller guarantees the row; `new` requires alignment; every bit pattern is a value.
        unsafe {
            match (self.dtype, base.dtype) {
                (ElementType::F32, _) => {
                    let out = std::slice::from_raw_parts_mut((self.address as *mut f32).add(to), length);
                    base.read(base_row, out);
                    add_times(out, values, 1.0);
                }
                (ElementType::Bf16, ElementType::Bf16) => {
                    let base = std::slice::from_raw_parts((base.address as *const u16).add(from), length);
                    let out = std::slice::from_raw_parts_mut((self.address as *mut u16).add(to), length);
                    sum_bf16(base, values, out);
                }
                _ => {
                    let mut wide = vec![0f32; length];
                    base.read(base_row, &mut wide);
                    add_times(&mut wide, values, 1.0);
                    self.write(row, 0, &wide);
                }
            }
        }
    }

    /// Adds `values` to a row's elements from `first` on.
    ///
    /// # Safety
    /// Row `row` must exist and have at least `first + values.len()` elements, which nothing else accesses meanwhile.
    pub unsafe fn add(self, row: usize, first: usize, values: &[f32]) {
        let (offset, length) = (row * self.stride + first, values.len());
        // SAFETY: the caller guarantees the row; `new` requires alignment.
        unsafe {
            match self.dtype {
                ElementType::F32 => {
                    let out = std::slice::from_raw_parts_mut((self.address as *mut f32).add(offset), length);
                    out.iter_mut().zip(values).for_each(|(out, value)| *out += value);
                }
                ElementType::Bf16 => {
                    add_bf16(std::slice::from_raw_parts_mut((self.address as *mut u16).add(offset), length), values);
                }
                ElementType::F16 => {
                    add_f16(std::slice::from_raw_parts_mut((self.address as *mut f16).add(offset), length), values);
                }
            }
        }
    }
}

/// Widens half precision floats.
pub(crate) fn widen_f16(halves: &[f16], out: &mut [f32]) {
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
    /// Widens little-endian bfloat16 numbers.
    pub(crate) fn widen_bf16(numbers: &[[u8; 2]], out: &mut [f32]) = widen_bf16_body
}

#[inline(always)]
fn widen_bf16_body(numbers: &[[u8; 2]], out: &mut [f32]) {
    for (out, number) in out.iter_mut().zip(numbers) {
        *out = f32::from_bits(u32::from(u16::from_le_bytes(*number)) << 16);
    }
}

by_backend! {
    /// `out += values` in bfloat16, rounded to nearest, ties to even.
    pub(crate) fn add_bf16(out: &mut [u16], values: &[f32]) = add_bf16_body
}

#[inline(always)]
fn add_bf16_body(out: &mut [u16], values: &[f32]) {
    for (out, value) in out.iter_mut().zip(values) {
        *out = plus_bf16(*out, *value);
    }
}

/// `out = base + values` in bfloat16, rounded to nearest, ties to even. With AVX-512 BF16, subnormal numbers count as
/// zero.
fn sum_bf16(base: &[u16], values: &[f32], out: &mut [u16]) {
    #[cfg(target_arch = "x86_64")]
    if super::backend() >= super::Backend::Avx512 && is_x86_feature_detected!("avx512bf16") {
        // SAFETY: the processor has these instructions.
        return unsafe { sum_bf16_avx512(base, values, out) };
    }
    sum_bf16_portable(base, values, out);
}

/// [`sum_bf16`] with the processor's own rounding: a third of the instructions. Stores bypass the caches, because a
/// merged weight is larger than they are and is read only after all of it is written.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn sum_bf16_avx512(base: &[u16], values: &[f32], out: &mut [u16]) {
    use std::arch::x86_64::*;
    const STEP: usize = 32;
    let aligned = out.as_ptr().align_offset(2 * STEP) == 0;
    let vectorized = if aligned { out.len().min(base.len()).min(values.len()) / STEP * STEP } else { 0 };
    let steps = base[..vectorized].chunks_exact(STEP).zip(values[..vectorized].chunks_exact(STEP));
    for (out, (base, values)) in out[..vectorized].chunks_exact_mut(STEP).zip(steps) {
        // Prefetches the base's next row.
        _mm_prefetch::<_MM_HINT_T0>(base.as_ptr().wrapping_add(vectorized).cast());
        // SAFETY: 32 elements of each, `out` aligned to a cache line; every bit pattern is a value.
        unsafe {
            let sum = |offset: usize| {
                let half = _mm512_cvtepu16_epi32(_mm256_loadu_si256(base.as_ptr().add(offset).cast()));
                let wide = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(half));
                _mm512_add_ps(wide, _mm512_loadu_ps(values.as_ptr().add(offset)))
            };
            let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(sum(STEP / 2), sum(0)));
            _mm512_stream_si512(out.as_mut_ptr().cast(), rounded);
        }
    }
    _mm_sfence();
    sum_bf16_body(&base[vectorized..], &values[vectorized..], &mut out[vectorized..]);
}

by_backend! {
    /// [`sum_bf16`] without special instructions.
    fn sum_bf16_portable(base: &[u16], values: &[f32], out: &mut [u16]) = sum_bf16_body
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
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]

        #[test]
        fn sums_are_rounded_as_half_does(pairs in prop::collection::vec((any::<u16>(), any::<f32>()), 0..70)) {
            let values: Vec<f32> = pairs.iter().map(|pair| pair.1).collect();
            let mut brain: Vec<bf16> = pairs.iter().map(|pair| bf16::from_bits(pair.0)).collect();
            let mut half: Vec<f16> = pairs.iter().map(|pair| f16::from_bits(pair.0)).collect();
            let expected: Vec<_> = brain.iter().zip(&values).map(|(a, b)| bf16::from_f32(a.to_f32() + b)).collect();
            let expected_half: Vec<_> = half.iter().zip(&values).map(|(a, b)| f16::from_f32(a.to_f32() + b)).collect();
            // SAFETY: one row of that many elements each.
            unsafe {
                Rows::new(brain.as_mut_ptr() as usize, 0, ElementType::Bf16).add(0, 0, &values);
                Rows::new(half.as_mut_ptr() as usize, 0, ElementType::F16).add(0, 0, &values);
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
                let subnormal = expected.to_f32().abs() <= f32::MIN_POSITIVE;
                prop_assert!(found == expected || (found.is_nan() && expected.is_nan()) || subnormal && found.to_f32().abs() <= expected.to_f32().abs());
            }
            prop_assert!(out.0[skip + base.len()..].iter().all(|untouched| *untouched == 7));
        }

        #[test]
        fn what_is_read_is_what_is_there(values in prop::collection::vec(any::<u16>(), 6..70)) {
            let mut out = vec![0f32; 3];
            // SAFETY: two rows of three elements.
            unsafe { Rows::new(values.as_ptr() as usize, 3, ElementType::Bf16).read(1, &mut out) };
            for (found, value) in out.iter().zip(&values[3..]) {
                prop_assert_eq!(found.to_bits(), u32::from(*value) << 16);
            }
        }
    }
}
