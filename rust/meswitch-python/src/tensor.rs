//! Tensors of torch, lent by Python: their memory, checked once when they come in.

use half::f16;
use meswitch_core::Error;
use meswitch_core::kernels::{self, ElementType};
use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::errors::to_python;

/// The element types that the kernels know, as torch names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    Float32,
    BFloat16,
    Float16,
    Float8E5M2,
    Int32,
    UInt8,
}

const DTYPES: [(&str, Dtype); 6] = [
    ("float32", Dtype::Float32),
    ("bfloat16", Dtype::BFloat16),
    ("float16", Dtype::Float16),
    ("float8_e5m2", Dtype::Float8E5M2),
    ("int32", Dtype::Int32),
    ("uint8", Dtype::UInt8),
];

impl Dtype {
    /// Bytes of an element.
    fn size(self) -> usize {
        match self {
            Self::Float32 | Self::Int32 => 4,
            Self::BFloat16 | Self::Float16 => 2,
            Self::Float8E5M2 | Self::UInt8 => 1,
        }
    }

    /// The type of a torch dtype; `None` for one that no kernel takes.
    fn of(object: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        static KNOWN: PyOnceLock<Vec<(Py<PyAny>, Dtype)>> = PyOnceLock::new();
        let py = object.py();
        let known = KNOWN.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            DTYPES.iter().map(|(name, dtype)| Ok((torch.getattr(*name)?.unbind(), *dtype))).collect::<PyResult<_>>()
        })?;
        Ok(known.iter().find(|(torch, _)| torch.is(object)).map(|(_, dtype)| *dtype))
    }
}

/// A Rust type that stands for the elements of tensors of one dtype.
///
/// # Safety
/// Every bit pattern of `DTYPE` must be a value of the type, and both must have the same size.
pub unsafe trait Element: Copy {
    /// The dtype of such tensors.
    const DTYPE: Dtype;
}

// SAFETY: every bit pattern of 16 bits is a half precision float.
unsafe impl Element for f16 {
    const DTYPE: Dtype = Dtype::Float16;
}

// SAFETY: indices are never negative in a checked matrix, and every bit pattern of 32 bits is a `u32`.
unsafe impl Element for u32 {
    const DTYPE: Dtype = Dtype::Int32;
}

// SAFETY: the bits of a bfloat16 are any 16 bits.
unsafe impl Element for u16 {
    const DTYPE: Dtype = Dtype::BFloat16;
}

// SAFETY: every bit pattern of 32 bits is a float.
unsafe impl Element for f32 {
    const DTYPE: Dtype = Dtype::Float32;
}

/// A tensor on the CPU. Holding it keeps the tensor's memory alive; it does not keep others from writing to it.
pub struct Tensor {
    object: Py<PyAny>,
    address: usize,
    /// `None` for a dtype that no kernel takes.
    dtype: Option<Dtype>,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl<'a, 'py> FromPyObject<'a, 'py> for Tensor {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let shape: Vec<usize> = object.getattr(intern!(py, "shape"))?.extract()?;
        if !object.getattr(intern!(py, "is_cpu"))?.is_truthy()? {
            let device = object.getattr(intern!(py, "device"))?;
            return Err(PyValueError::new_err(format!("expected a tensor on the CPU, found {shape:?} on {device}")));
        }
        let strides = object.call_method0(intern!(py, "stride"))?.extract()?;
        let address: usize = object.call_method0(intern!(py, "data_ptr"))?.extract()?;
        let dtype = Dtype::of(&object.getattr(intern!(py, "dtype"))?)?;
        let tensor = Self { object: object.to_owned().unbind(), address, dtype, shape, strides };
        if let Some(dtype) = dtype
            && tensor.count() > 0
            && (address == 0 || !address.is_multiple_of(dtype.size()))
        {
            return Err(PyValueError::new_err(format!(
                "expected memory aligned to {} bytes, found address {address:#x}",
                dtype.size()
            )));
        }
        Ok(tensor)
    }
}

impl Tensor {
    /// Elements in all.
    fn count(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the elements lie one after another.
    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(length, stride)| {
            let fits = *length == 1 || *stride == expected;
            expected *= length;
            fits
        }) || self.count() == 0
    }

    /// The dtype's name, for messages.
    fn dtype_name(&self, py: Python<'_>) -> String {
        self.object.bind(py).getattr(intern!(py, "dtype")).map_or_else(|_| "?".to_owned(), |dtype| dtype.to_string())
    }

    fn format_error(&self, py: Python<'_>, expected: &str) -> PyErr {
        let found = format!("expected {expected}, found {} {:?}", self.dtype_name(py), self.shape);
        to_python(Error::Format(found))
    }

    /// The elements of a contiguous tensor of `T`'s dtype.
    ///
    /// # Safety
    /// The tensor must be kept, and must not be written to, as long as the slice is used.
    pub unsafe fn elements<T: Element>(&self, py: Python<'_>) -> PyResult<&'static [T]> {
        if self.dtype != Some(T::DTYPE) || !self.is_contiguous() {
            return Err(self.format_error(py, &format!("a contiguous tensor of {:?}", T::DTYPE)));
        }
        if self.count() == 0 {
            return Ok(&[]);
        }
        // SAFETY: checked above to be aligned, contiguous and of that type; the caller keeps the tensor.
        Ok(unsafe { std::slice::from_raw_parts(self.address as *const T, self.count()) })
    }

    /// The bytes of a contiguous tensor.
    ///
    /// # Safety
    /// As [`Self::elements`].
    pub unsafe fn bytes(&self, py: Python<'_>) -> PyResult<&'static [u8]> {
        let Some(size) = self.byte_count() else { return Err(self.format_error(py, "a contiguous tensor")) };
        if size == 0 {
            return Ok(&[]);
        }
        // SAFETY: a contiguous tensor has that many bytes; the caller keeps it.
        Ok(unsafe { std::slice::from_raw_parts(self.address as *const u8, size) })
    }

    /// Bytes of a contiguous tensor of a known dtype.
    fn byte_count(&self) -> Option<usize> {
        self.dtype.filter(|_| self.is_contiguous()).map(|dtype| self.count() * dtype.size())
    }

    /// The elements of a contiguous tensor, to be written.
    ///
    /// # Safety
    /// As [`Self::elements`], and nothing else may access the tensor meanwhile.
    #[allow(clippy::mut_from_ref)] // the memory is torch's
    pub unsafe fn elements_mut<T: Element>(&self, py: Python<'_>) -> PyResult<&'static mut [T]> {
        // SAFETY: passed on to the caller.
        let elements = unsafe { self.elements::<T>(py) }?;
        if elements.is_empty() {
            return Ok(&mut []);
        }
        // SAFETY: the same memory; the caller lets nothing else access it.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.address as *mut T, elements.len()) })
    }

    /// Rows of a tensor `[..., >= width]` of floats: how many, and the kernels' view of them.
    ///
    /// The view must not be used after this tensor is dropped. Raises `ValueError` for other shapes and dtypes.
    pub fn rows(&self, py: Python<'_>, width: usize) -> PyResult<(usize, kernels::Rows)> {
        let element = match self.dtype {
            Some(Dtype::Float32) => ElementType::F32,
            Some(Dtype::BFloat16) => ElementType::Bf16,
            Some(Dtype::Float16) => ElementType::F16,
            _ => {
                let found = self.dtype_name(py);
                return Err(PyValueError::new_err(format!("expected float32, bfloat16 or float16, found {found}")));
            }
        };
        let length = self.shape.last().copied().unwrap_or(0);
        if length < width {
            let message = format!("expected rows of at least {width} elements, found {length}");
            return Err(PyValueError::new_err(message));
        }
        let (count, stride) = if self.is_contiguous() {
            (self.count().checked_div(length).unwrap_or(0), length)
        } else if self.shape.len() == 2 && self.strides[1] == 1 {
            (self.shape[0], self.strides[0])
        } else {
            let message = format!("expected rows of neighbouring elements, found strides {:?}", self.strides);
            return Err(PyValueError::new_err(message));
        };
        // SAFETY: the tensor has that many rows at that distance, of at least `width` elements, aligned to their type.
        Ok((count, unsafe { kernels::Rows::new(self.address, stride, element) }))
    }

    /// As [`Self::rows`], of exactly `count` rows.
    pub fn exactly_rows(&self, py: Python<'_>, count: usize, width: usize) -> PyResult<kernels::Rows> {
        let (found, rows) = self.rows(py, width)?;
        if found != count {
            return Err(PyValueError::new_err(format!("expected {count} rows, found {found}")));
        }
        Ok(rows)
    }
}
