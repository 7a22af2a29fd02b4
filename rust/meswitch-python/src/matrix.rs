//! The delta of one weight on the CPU: tensors' memory in, tensors' memory out.

use half::{bf16, f16};
use meswitch_core::Error;
use meswitch_core::kernels::{linear, matrix, sparse};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::to_python;

/// A tensor's memory: address and number of bytes.
type Memory = (usize, usize);

/// Bits, zero, group size, rows, codes, scales.
type PartMemory = (u32, f32, usize, Option<Memory>, Memory, Memory);

/// The delta of one weight, `[rows, columns]`, over memory that `keep` owns.
#[pyclass(frozen)]
pub struct Matrix {
    matrix: matrix::Matrix<'static>,
    // Never read: it keeps the borrowed memory alive.
    _keep: Py<PyAny>,
}

/// Rows of activations: address, bytes an element is apart from the next row's, and the type's code.
#[derive(Clone, Copy)]
struct Rows {
    address: usize,
    stride: usize,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    F32,
    Bf16,
    F16,
}

#[pymethods]
impl Matrix {
    /// Borrows a site's tensors; `keep` must own them all. Lengths and indices are checked here, once.
    #[new]
    #[pyo3(signature = (rows, columns, exponent, parts, column_scales, salient, low_rank, sparse, keep))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        rows: usize,
        columns: usize,
        exponent: i32,
        parts: Vec<PartMemory>,
        column_scales: Option<Memory>,
        salient: Option<(Memory, Memory)>,
        low_rank: Option<(Memory, Memory)>,
        sparse: Option<(Memory, Memory, Memory)>,
        keep: Py<PyAny>,
    ) -> PyResult<Self> {
        let parts = parts
            .into_iter()
            .map(|(bits, zero, group, rows, codes, scales)| {
                let rows = rows.map(slice::<u32>).transpose()?;
                Ok(matrix::Part { bits, zero, group, rows, codes: slice(codes)?, scales: slice(scales)? })
            })
            .collect::<PyResult<_>>()?;
        let matrix = matrix::Matrix {
            rows,
            columns,
            unit: (exponent as f32).exp2(),
            parts,
            column_scales: column_scales.map(slice).transpose()?,
            salient: salient.map(|(index, values)| Ok::<_, PyErr>((slice(index)?, slice(values)?))).transpose()?,
            low_rank: low_rank.map(|(u, v)| Ok::<_, PyErr>((slice(u)?, slice(v)?))).transpose()?,
            sparse: sparse
                .map(|(starts, gaps, values)| {
                    Ok::<_, PyErr>(sparse::Sparse {
                        starts: slice(starts)?,
                        gaps: slice(gaps)?,
                        values: slice(values)?,
                    })
                })
                .transpose()?,
        };
        matrix.check().map_err(to_python)?;
        Ok(Self { matrix, _keep: keep })
    }

    /// `y[t] += Δ̂ · x[t]` for the tokens named; all of them where none are. Unless `exact`, activations are
    /// rounded to 15 bits.
    ///
    /// `y` and `x` are (address, row stride in elements, dtype name); both have `total` rows.
    fn delta_linear(
        &self,
        py: Python<'_>,
        y: (usize, usize, &str),
        x: (usize, usize, &str),
        total: usize,
        tokens: Option<Vec<usize>>,
        exact: bool,
    ) -> PyResult<()> {
        let tokens = tokens.unwrap_or_else(|| (0..total).collect());
        let (y, x) = (rows_of(y, self.matrix.rows)?, rows_of(x, self.matrix.columns)?);
        check_tokens(&tokens, total)?;
        py.detach(|| {
            let columns = self.matrix.columns;
            let mut gathered = vec![0f32; tokens.len() * columns];
            for (token, out) in tokens.iter().zip(gathered.chunks_mut(columns.max(1))) {
                // SAFETY: the caller's tensor has `total` rows of at least `columns` elements, and `token < total`.
                unsafe { x.read(*token, out) };
            }
            linear::delta_linear(&self.matrix, &gathered, exact, &|token, first, values| {
                // SAFETY: as above for `y`; every (token, row) is handed out once, so no two threads share an element.
                unsafe { y.add(tokens[token], first, values) };
            });
        });
        Ok(())
    }

    /// `y[t] += scale · Δ̂[ids[t], :]` for the tokens named; ids beyond the rows add nothing.
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn delta_embedding(
        &self,
        py: Python<'_>,
        y: (usize, usize, &str),
        total: usize,
        tokens: Vec<usize>,
        ids: Vec<i64>,
        scale: f32,
    ) -> PyResult<()> {
        let y = rows_of(y, self.matrix.columns)?;
        check_tokens(&tokens, total)?;
        py.detach(|| {
            let mut row = vec![0f32; self.matrix.columns];
            for (token, id) in tokens.iter().zip(ids) {
                if (0..self.matrix.rows as i64).contains(&id) {
                    row.fill(0.0);
                    linear::add_row(&self.matrix, id as usize, scale, &mut row);
                    // SAFETY: `token < total`, and the caller's tensor has `total` rows of `columns` elements.
                    unsafe { y.add(*token, 0, &row) };
                }
            }
        });
        Ok(())
    }

    /// Writes rows `start .. start + count` of the delta to 32-bit floats at an address, `[count, columns]`.
    fn dense(&self, py: Python<'_>, start: usize, count: usize, address: usize) -> PyResult<()> {
        if start.checked_add(count).is_none_or(|end| end > self.matrix.rows) {
            return Err(PyValueError::new_err(format!(
                "expected rows below {}, found {start} + {count}",
                self.matrix.rows
            )));
        }
        let length = count * self.matrix.columns;
        if length == 0 {
            return Ok(());
        }
        // SAFETY: the caller's tensor is contiguous 32-bit floats of `count` rows of `columns`.
        let out = unsafe { std::slice::from_raw_parts_mut(address as *mut f32, length) };
        py.detach(|| linear::dense(&self.matrix, start, out));
        Ok(())
    }
}

fn check_tokens(tokens: &[usize], total: usize) -> PyResult<()> {
    match tokens.iter().find(|token| **token >= total) {
        None => Ok(()),
        Some(token) => Err(PyValueError::new_err(format!("expected tokens below {total}, found {token}"))),
    }
}

/// A tensor's memory as elements.
fn slice<T>((address, bytes): Memory) -> PyResult<&'static [T]> {
    if bytes == 0 {
        return Ok(&[]);
    }
    if address == 0 || address % align_of::<T>() != 0 || bytes % size_of::<T>() != 0 {
        return Err(to_python(Error::Format(format!(
            "expected {}-byte aligned memory, found {bytes} bytes at {address:#x}",
            align_of::<T>()
        ))));
    }
    // SAFETY: a live tensor's memory, aligned and whole; `Matrix` keeps its owner alive as long as the slice.
    Ok(unsafe { std::slice::from_raw_parts(address as *const T, bytes / size_of::<T>()) })
}

fn rows_of((address, stride, dtype): (usize, usize, &str), width: usize) -> PyResult<Rows> {
    let kind = match dtype {
        "float32" => Kind::F32,
        "bfloat16" => Kind::Bf16,
        "float16" => Kind::F16,
        other => return Err(PyValueError::new_err(format!("expected float32, bfloat16 or float16, found {other}"))),
    };
    if stride < width {
        return Err(PyValueError::new_err(format!("expected rows of at least {width} elements, found {stride}")));
    }
    Ok(Rows { address, stride, kind })
}

impl Rows {
    /// # Safety
    /// The memory must have a row `row` of at least `out.len()` elements.
    unsafe fn read(self, row: usize, out: &mut [f32]) {
        let at = row * self.stride;
        // SAFETY: the caller's promise.
        unsafe {
            match self.kind {
                Kind::F32 => {
                    out.copy_from_slice(std::slice::from_raw_parts((self.address as *const f32).add(at), out.len()));
                }
                Kind::Bf16 => {
                    let values = std::slice::from_raw_parts((self.address as *const bf16).add(at), out.len());
                    out.iter_mut().zip(values).for_each(|(out, value)| *out = value.to_f32());
                }
                Kind::F16 => {
                    let values = std::slice::from_raw_parts((self.address as *const f16).add(at), out.len());
                    out.iter_mut().zip(values).for_each(|(out, value)| *out = value.to_f32());
                }
            }
        }
    }

    /// # Safety
    /// The memory must have a row `row` of at least `first + values.len()` elements, and nobody else at them.
    unsafe fn add(self, row: usize, first: usize, values: &[f32]) {
        let at = row * self.stride + first;
        // SAFETY: the caller's promise.
        unsafe {
            match self.kind {
                Kind::F32 => {
                    let out = std::slice::from_raw_parts_mut((self.address as *mut f32).add(at), values.len());
                    out.iter_mut().zip(values).for_each(|(out, value)| *out += value);
                }
                Kind::Bf16 => {
                    let out = std::slice::from_raw_parts_mut((self.address as *mut bf16).add(at), values.len());
                    out.iter_mut().zip(values).for_each(|(out, value)| *out = bf16::from_f32(out.to_f32() + value));
                }
                Kind::F16 => {
                    let out = std::slice::from_raw_parts_mut((self.address as *mut f16).add(at), values.len());
                    out.iter_mut().zip(values).for_each(|(out, value)| *out = f16::from_f32(out.to_f32() + value));
                }
            }
        }
    }
}
