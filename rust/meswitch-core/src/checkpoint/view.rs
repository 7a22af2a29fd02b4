//! One tensor of a checkpoint.

use std::ops::{Deref, Range};
use std::sync::Arc;

use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::kernels::{widen_bf16, widen_f16};

/// One tensor of a checkpoint.
#[derive(Clone, Debug)]
pub struct View<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, as on disk.
    pub shape: Vec<usize>,
    /// Little-endian elements, row by row.
    pub data: Content<'a>,
}

/// The bytes of a tensor.
#[derive(Clone, Debug)]
pub enum Content<'a> {
    /// In mapped memory.
    Borrowed(&'a [u8]),
    /// Decoded to 32-bit floats, or the bytes of that in a range.
    Decoded(Arc<Vec<f32>>, Range<usize>),
    /// Read into memory, or the bytes of that in a range.
    Read(Arc<Vec<u8>>, Range<usize>),
}

impl From<Vec<f32>> for Content<'_> {
    fn from(values: Vec<f32>) -> Self {
        let whole = 0..size_of_val(values.as_slice());
        Self::Decoded(Arc::new(values), whole)
    }
}

impl From<Vec<u8>> for Content<'_> {
    fn from(bytes: Vec<u8>) -> Self {
        let whole = 0..bytes.len();
        Self::Read(Arc::new(bytes), whole)
    }
}

impl Deref for Content<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes,
            Self::Decoded(values, range) => &bytemuck::cast_slice(values)[range.clone()],
            Self::Read(bytes, range) => &bytes[range.clone()],
        }
    }
}

impl Content<'_> {
    /// `length` of its bytes, from one on.
    pub(super) fn part(self, start: usize, length: usize) -> Self {
        let of = |range: &Range<usize>| range.start + start..range.start + start + length;
        match self {
            Self::Borrowed(bytes) => Self::Borrowed(&bytes[start..start + length]),
            Self::Decoded(values, range) => Self::Decoded(values, of(&range)),
            Self::Read(bytes, range) => Self::Read(bytes, of(&range)),
        }
    }
}

impl View<'_> {
    /// The number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// The number of bytes of its elements.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        self.len() * self.dtype.bitsize() / 8
    }

    /// Whether it has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the elements are of a type that [`View::read`] can read.
    #[must_use]
    pub fn is_float(&self) -> bool {
        matches!(self.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)
    }

    /// Reads elements `start .. start + out.len()` as 32-bit floats. The tensor must be one of floats
    /// ([`View::is_float`]); of others the values are meaningless.
    ///
    /// # Panics
    /// Where the tensor has fewer elements.
    pub fn read(&self, start: usize, out: &mut [f32]) {
        let size = self.dtype.bitsize() / 8;
        let bytes = &self.data[start * size..(start + out.len()) * size];
        match self.dtype {
            Dtype::BF16 => widen_bf16(bytes.as_chunks().0, out),
            Dtype::F16 => widen_f16_bytes(bytes, out),
            _ => widen_f32(bytes, out),
        }
    }

    /// Checks that all elements of a float tensor are finite. `name` is the tensor's in the message.
    ///
    /// # Errors
    /// [`Error::NonFinite`].
    pub(crate) fn check_finite(&self, name: &str) -> Result<()> {
        if !self.is_float() {
            return Ok(());
        }
        let mut values = vec![0f32; 1 << 14];
        for start in (0..self.len()).step_by(values.len()) {
            let count = values.len().min(self.len() - start);
            self.read(start, &mut values[..count]);
            if let Some(index) = values[..count].iter().position(|value| !value.is_finite()) {
                return Err(Error::NonFinite(format!(
                    "expected finite weights, found {} in {name} at element {}",
                    values[index],
                    start + index
                )));
            }
        }
        Ok(())
    }

    /// The bytes of rows `start .. end`; a row is the last dimension.
    pub(crate) fn row_bytes(&self, start: usize, end: usize) -> &[u8] {
        let row = self.shape.last().copied().unwrap_or(1) * self.dtype.bitsize() / 8;
        &self.data[start * row..end * row]
    }
}

/// Widens little-endian half precision floats, which need not be aligned.
fn widen_f16_bytes(bytes: &[u8], out: &mut [f32]) {
    let mut halves = [half::f16::ZERO; 256];
    for (out, bytes) in out.chunks_mut(256).zip(bytes.chunks(512)) {
        for (half, pair) in halves.iter_mut().zip(bytes.chunks_exact(2)) {
            *half = half::f16::from_le_bytes([pair[0], pair[1]]);
        }
        widen_f16(&halves[..out.len()], out);
    }
}

fn widen_f32(bytes: &[u8], out: &mut [f32]) {
    for (value, quad) in out.iter_mut().zip(bytes.chunks_exact(4)) {
        *value = f32::from_le_bytes([quad[0], quad[1], quad[2], quad[3]]);
    }
}
