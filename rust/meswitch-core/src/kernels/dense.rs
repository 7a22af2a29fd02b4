//! `W · x` for few tokens and a base's own weights in bfloat16: what a decode step reads most of.

use std::ops::Range;

use super::rows::add_bf16;

#[cfg(target_arch = "x86_64")]
mod x86;

/// Tokens that one call takes: beyond, torch's own product is as quick.
pub const TOKENS: usize = 16;
/// Columns of a block: a vector of weights.
const BLOCK: usize = 32;

/// A base's weight, and how many tokens it is multiplied with: `weight [rows, columns]`.
pub struct Base<'a> {
    /// bfloat16, row by row.
    pub weight: &'a [u16],
    /// Output channels.
    pub rows: usize,
    /// Input channels.
    pub columns: usize,
    /// At most [`TOKENS`].
    pub tokens: usize,
}

/// Tokens' activations as a kernel takes them, in whole blocks, zeros after the last column.
pub(super) enum Split {
    /// As 32-bit floats, even columns of a block before its odd ones.
    Floats(Vec<f32>),
    /// As bfloat16.
    Pairs(Vec<u16>),
}

/// Whether this processor has a kernel here.
#[must_use]
pub fn is_available() -> bool {
    super::backend() >= super::Backend::Avx512
}

impl Base<'_> {
    /// The bytes of the weights from a row on.
    pub(super) fn bytes(&self, row: usize) -> &[u8] {
        let weight = &self.weight[row * self.columns..];
        // SAFETY: as many bytes as the weights have; any bits are bytes.
        unsafe { std::slice::from_raw_parts(weight.as_ptr().cast(), size_of_val(weight)) }
    }

    fn stride(&self) -> usize {
        self.columns.next_multiple_of(BLOCK)
    }

    /// The tokens' activations.
    pub(super) fn split(&self, read: &dyn Fn(u32, &mut [f32])) -> Split {
        if has_pairs() {
            Split::Pairs(self.ready(read, &|wide, out| add_bf16(out, wide)))
        } else {
            Split::Floats(self.ready(read, &|wide, out| apart(wide, out)))
        }
    }

    fn ready<T: Copy + Default>(&self, read: &dyn Fn(u32, &mut [f32]), put: &dyn Fn(&[f32], &mut [T])) -> Vec<T> {
        let stride = self.stride();
        let (mut ready, mut wide) = (vec![T::default(); self.tokens * stride], vec![0f32; stride]);
        for (token, ready) in ready.chunks_mut(stride.max(1)).enumerate() {
            read(token as u32, &mut wide[..self.columns]);
            put(&wide, ready);
        }
        ready
    }
}

#[cfg(target_arch = "x86_64")]
fn has_pairs() -> bool {
    x86::has_pairs()
}

#[cfg(not(target_arch = "x86_64"))]
fn has_pairs() -> bool {
    false
}

super::by_backend! {
    /// Even columns of each block before its odd ones.
    pub fn apart(x: &[f32], out: &mut [f32]) = apart_body
}

#[inline(always)]
fn apart_body(x: &[f32], out: &mut [f32]) {
    for (x, out) in x.chunks_exact(BLOCK).zip(out.chunks_exact_mut(BLOCK)) {
        for at in 0..BLOCK / 2 {
            out[at] = x[2 * at];
            out[at + BLOCK / 2] = x[2 * at + 1];
        }
    }
}

/// The base's product of some rows: `out [tokens, rows]`, of what `split` gave.
pub(super) fn products(base: &Base<'_>, split: &Split, of: &Range<usize>, out: &mut [f32]) {
    let ready = match split {
        Split::Floats(x) => x.len(),
        Split::Pairs(x) => x.len(),
    };
    assert!(is_available() && ready == base.tokens * base.stride() && out.len() == base.tokens * of.len());
    #[cfg(target_arch = "x86_64")]
    x86::products(base, split, of, out);
}
