//! `W · x` with a base weight in bfloat16 and few tokens: most of what a decode step reads.

use std::ops::Range;

use super::rows::add_bf16;

#[cfg(target_arch = "x86_64")]
mod x86;

/// The most tokens that one call multiplies with; with more, torch's own product is as fast.
pub const MAX_BASE_TOKENS: usize = 16;
/// Columns that are multiplied at once: one vector of weights.
const DENSE_COLUMNS: usize = 32;

/// A base weight `[rows, columns]`, and the number of tokens it is multiplied with.
pub struct BaseWeight<'a> {
    /// The bits of bfloat16 numbers, row by row.
    pub weight: &'a [u16],
    /// Output channels.
    pub rows: usize,
    /// Input channels.
    pub columns: usize,
    /// At most [`MAX_BASE_TOKENS`].
    pub tokens: usize,
}

/// Activations in the order a kernel reads them, padded with zeros to a multiple of [`DENSE_COLUMNS`].
pub(super) enum Activations {
    /// 32-bit floats; of every [`DENSE_COLUMNS`] the even columns before the odd ones.
    Floats(Vec<f32>),
    /// bfloat16, in order.
    Bf16(Vec<u16>),
}

/// Whether this processor has a kernel for base weights (it needs AVX-512).
#[must_use]
pub fn has_base_kernel() -> bool {
    super::backend() >= super::Backend::Avx512
}

impl BaseWeight<'_> {
    /// The bytes of the weight from a row on.
    pub(super) fn bytes(&self, row: usize) -> &[u8] {
        let weight = &self.weight[row * self.columns..];
        // SAFETY: the same memory and length; every bit pattern is a valid byte.
        unsafe { std::slice::from_raw_parts(weight.as_ptr().cast(), size_of_val(weight)) }
    }

    /// Columns, padded.
    fn stride(&self) -> usize {
        self.columns.next_multiple_of(DENSE_COLUMNS)
    }

    /// Reads all tokens' activations. `read(token, out)` writes one token's.
    pub(super) fn activations(&self, read: &dyn Fn(u32, &mut [f32])) -> Activations {
        if prefers_bf16() {
            Activations::Bf16(self.convert(read, &|wide, out| add_bf16(out, wide)))
        } else {
            Activations::Floats(self.convert(read, &|wide, out| split_even_odd(wide, out)))
        }
    }

    fn convert<T: Copy + Default>(&self, read: &dyn Fn(u32, &mut [f32]), write: &dyn Fn(&[f32], &mut [T])) -> Vec<T> {
        let stride = self.stride();
        let (mut converted, mut wide) = (vec![T::default(); self.tokens * stride], vec![0f32; stride]);
        for (token, converted) in converted.chunks_mut(stride.max(1)).enumerate() {
            read(token as u32, &mut wide[..self.columns]);
            write(&wide, converted);
        }
        converted
    }
}

#[cfg(target_arch = "x86_64")]
fn prefers_bf16() -> bool {
    x86::prefers_bf16()
}

#[cfg(not(target_arch = "x86_64"))]
fn prefers_bf16() -> bool {
    false
}

super::by_backend! {
    /// Writes the even columns of every [`DENSE_COLUMNS`] before the odd ones.
    fn split_even_odd(x: &[f32], out: &mut [f32]) = split_even_odd_body
}

#[inline(always)]
fn split_even_odd_body(x: &[f32], out: &mut [f32]) {
    for (x, out) in x.chunks_exact(DENSE_COLUMNS).zip(out.chunks_exact_mut(DENSE_COLUMNS)) {
        for pair in 0..DENSE_COLUMNS / 2 {
            out[pair] = x[2 * pair];
            out[pair + DENSE_COLUMNS / 2] = x[2 * pair + 1];
        }
    }
}

/// Writes the products of rows `rows` to `out [tokens, rows]`. `x` comes from [`BaseWeight::activations`].
pub(super) fn products(base: &BaseWeight<'_>, x: &Activations, rows: &Range<usize>, out: &mut [f32]) {
    let converted = match x {
        Activations::Floats(x) => x.len(),
        Activations::Bf16(x) => x.len(),
    };
    assert!(has_base_kernel() && converted == base.tokens * base.stride() && out.len() == base.tokens * rows.len());
    #[cfg(target_arch = "x86_64")]
    // SAFETY: `has_base_kernel` says that the processor has AVX-512, and lengths were checked.
    unsafe {
        x86::products(base, x, rows, out);
    };
}
