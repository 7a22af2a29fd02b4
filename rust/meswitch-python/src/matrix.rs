//! The delta of one weight on the CPU: tensors' memory in, tensors' memory out.

use std::collections::BTreeMap;
use std::sync::Mutex;

use meswitch_core::Error;
use meswitch_core::kernels::{self, BaseWeight, ElementType, Part, Product, SparseEntries, Terms};
use meswitch_core::layout::{self, legacy};
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
    matrix: kernels::Matrix<'static>,
    // Never read: it keeps the borrowed memory alive.
    _keep: Py<PyAny>,
}

/// A tensor of rows: address, how many, elements from one to the next, dtype name.
type Tensor<'a> = (usize, usize, usize, &'a str);

/// Which slot each token of a step belongs to.
#[pyclass(frozen)]
pub struct Rows {
    total: usize,
    groups: Vec<(usize, Vec<u32>)>,
}

#[pymethods]
impl Rows {
    /// One slot a token; below zero is the base.
    #[new]
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn new(slots: Vec<i64>) -> Self {
        let mut groups: Vec<(usize, Vec<u32>)> = Vec::new();
        for (token, slot) in slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
            let slot = *slot as usize;
            match groups.iter_mut().find(|group| group.0 == slot) {
                Some(group) => group.1.push(token as u32),
                None => groups.push((slot, vec![token as u32])),
            }
        }
        Self { total: slots.len(), groups }
    }
}

/// The deltas of one weight, by slot.
#[pyclass(frozen)]
pub struct Table {
    rows: usize,
    columns: usize,
    slots: Mutex<BTreeMap<usize, Py<Matrix>>>,
}

#[pymethods]
impl Table {
    #[new]
    fn new(rows: usize, columns: usize) -> Self {
        Self { rows, columns, slots: Mutex::default() }
    }

    /// Puts a delta of that shape, or none, into a slot.
    fn set(&self, slot: usize, matrix: Option<Py<Matrix>>) -> PyResult<()> {
        if let Some(delta) = matrix.as_ref().map(Py::get) {
            let found = (delta.matrix.rows(), delta.matrix.columns());
            if found != (self.rows, self.columns) {
                let message = format!("expected a delta of {:?}, found {found:?}", (self.rows, self.columns));
                return Err(PyValueError::new_err(message));
            }
        }
        let mut slots = self.slots.lock().expect("no thread panics while it holds this");
        match matrix {
            Some(matrix) => slots.insert(slot, matrix),
            None => slots.remove(&slot),
        };
        Ok(())
    }

    /// `y[t] += Δ̂ of its slot · x[t]` for every token whose slot has a delta here. Unless `exact`, sums of
    /// activations are looked up, rounded. Both tensors have a row for every token of `rows`.
    fn delta_linear(&self, py: Python<'_>, y: Tensor<'_>, x: Tensor<'_>, rows: &Rows, exact: bool) -> PyResult<()> {
        let (y, x) = (rows_of(y, rows.total, self.rows)?, rows_of(x, rows.total, self.columns)?);
        let mine = self.of(py, rows);
        let products = products(&mine);
        // SAFETY: the caller's tensors have `rows.total` rows of that many elements, and tokens are below that.
        py.detach(|| unsafe { kernels::add_products(&products, x, y, exact) });
        Ok(())
    }
}

/// A weight's deltas, its memory (bfloat16), which slot each token belongs to (none: every token is the base's), and the
/// address of products, a row after another.
type Site = (Py<Table>, Memory, Option<Py<Rows>>, usize);

/// `y[t] = W · x[t]` of weights with the same input, and `Δ̂ of its slot · x[t]` for every token whose slot has a delta
/// there: at most `base_linear_tokens` tokens, products of the input's dtype.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // what Python hands over
pub fn base_linear(py: Python<'_>, x: Tensor<'_>, sites: Vec<Site>) -> PyResult<()> {
    let ((_, tokens, _, dtype), most) = (x, base_linear_tokens());
    let Some(columns) = sites.first().map(|site| site.0.get().columns) else { return Ok(()) };
    let x = rows_of(x, tokens, columns)?;
    let mine: Vec<Mine<'_>> = sites
        .iter()
        .map(|(table, _, rows, _)| rows.as_ref().map(|rows| table.get().of(py, rows.get())).unwrap_or_default())
        .collect();
    let mut jobs = Vec::with_capacity(sites.len());
    for ((table, weight, rows, address), mine) in sites.iter().zip(&mine) {
        let (table, weight) = (table.get(), slice(*weight)?);
        let found = (table.columns, weight.len(), rows.as_ref().map_or(tokens, |rows| rows.get().total));
        if found != (columns, table.rows * columns, tokens) || tokens > most {
            return Err(PyValueError::new_err(format!(
                "expected {columns} columns, {} weights and {tokens} tokens, at most {most}, found {found:?}",
                table.rows * columns,
            )));
        }
        let base = BaseWeight { weight, rows: table.rows, columns, tokens };
        let y = rows_of((*address, tokens, table.rows, dtype), tokens, table.rows)?;
        jobs.push(kernels::Site { base, products: products(mine), y });
    }
    if tokens > 0 {
        // SAFETY: the caller's tensors have that many rows of that many elements, tokens are below that, and there is a
        // kernel, for one token at least.
        py.detach(|| unsafe { kernels::linear(&jobs, x) });
    }
    Ok(())
}

/// Deltas and their tokens.
type Mine<'a> = Vec<(Py<Matrix>, &'a [u32])>;

fn products<'a>(mine: &'a Mine<'_>) -> Vec<Product<'a>> {
    mine.iter().map(|(delta, tokens)| Product { matrix: &delta.get().matrix, tokens }).collect()
}

impl Table {
    /// The deltas of the slots that have tokens.
    fn of<'a>(&self, py: Python<'_>, rows: &'a Rows) -> Mine<'a> {
        let slots = self.slots.lock().expect("no thread panics while it holds this");
        let delta = |(slot, tokens): &'a (usize, Vec<u32>)| Some((slots.get(slot)?.clone_ref(py), tokens.as_slice()));
        rows.groups.iter().filter_map(delta).collect()
    }
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
                Ok(Part { bits, zero, group, rows, codes: slice(codes)?.into(), scales: slice(scales)? })
            })
            .collect::<PyResult<_>>()?;
        let column_scales = column_scales.map(slice).transpose()?;
        let salient = salient.map(|(index, values)| PyResult::Ok((slice(index)?, slice(values)?))).transpose()?;
        let low_rank = low_rank.map(|(u, v)| PyResult::Ok((slice(u)?, slice(v)?))).transpose()?;
        let terms = Terms { parts, column_scales, salient, low_rank };
        let matrix = match sparse {
            None => kernels::Matrix::new(rows, columns, exponent, terms),
            Some(_) if !terms.parts.is_empty() || terms.salient.is_some() || terms.low_rank.is_some() => {
                Err(Error::Format(format!(
                    "expected 0 parts beside sparse entries in a site of {rows} x {columns}, found {}",
                    terms.parts.len()
                )))
            }
            Some((starts, gaps, values)) => {
                let entries = SparseEntries { starts: slice(starts)?, gaps: slice(gaps)?, values: slice(values)? };
                kernels::Matrix::from_sparse(rows, columns, exponent, entries)
            }
        };
        Ok(Self { matrix: matrix.map_err(to_python)?, _keep: keep })
    }

    /// `y[t] += scale · Δ̂[ids[t], :]` for the tokens named; ids beyond the rows add nothing.
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn delta_embedding(
        &self,
        py: Python<'_>,
        y: Tensor<'_>,
        tokens: Vec<usize>,
        ids: Vec<i64>,
        scale: f32,
    ) -> PyResult<()> {
        let total = y.1;
        let y = rows_of(y, total, self.matrix.columns())?;
        check_tokens(&tokens, total)?;
        py.detach(|| {
            let mut row = vec![0f32; self.matrix.columns()];
            for (token, id) in tokens.iter().zip(ids) {
                if (0..self.matrix.rows() as i64).contains(&id) {
                    row.fill(0.0);
                    kernels::add_row(&self.matrix, id as usize, scale, &mut row);
                    // SAFETY: `token < total`, and the caller's tensor has `total` rows of `columns` elements.
                    unsafe { y.add(*token, 0, &row) };
                }
            }
        });
        Ok(())
    }

    /// Writes the rows of `weight [rows, columns]` and the delta together from `start` on to `out [count, columns]`.
    fn merged(&self, py: Python<'_>, weight: Tensor<'_>, start: usize, out: Tensor<'_>) -> PyResult<()> {
        let (count, columns) = (out.1, self.matrix.columns());
        self.check_rows(start, count)?;
        let (weight, out) = (rows_of(weight, self.matrix.rows(), columns)?, rows_of(out, count, columns)?);
        // SAFETY: both tensors have those rows, of as many elements as the matrix has columns.
        py.detach(|| unsafe { kernels::merged(&self.matrix, weight, start..start + count, out) });
        Ok(())
    }

    /// Writes rows `start .. start + count` of the delta to 32-bit floats at an address, `[count, columns]`.
    fn dense(&self, py: Python<'_>, start: usize, count: usize, address: usize) -> PyResult<()> {
        self.check_rows(start, count)?;
        let length = count * self.matrix.columns();
        if length == 0 {
            return Ok(());
        }
        // SAFETY: the caller's tensor is contiguous 32-bit floats of `count` rows of `columns`.
        let out = unsafe { std::slice::from_raw_parts_mut(address as *mut f32, length) };
        py.detach(|| kernels::dense_rows(&self.matrix, start, out));
        Ok(())
    }
}

impl Matrix {
    fn check_rows(&self, start: usize, count: usize) -> PyResult<()> {
        if start.checked_add(count).is_none_or(|end| end > self.matrix.rows()) {
            let message = format!("expected rows below {}, found {start} + {count}", self.matrix.rows());
            return Err(PyValueError::new_err(message));
        }
        Ok(())
    }
}

/// For how many tokens `Table.linear` has a kernel on this processor.
#[pyfunction]
pub fn base_linear_tokens() -> usize {
    if kernels::has_base_kernel() { kernels::MAX_BASE_TOKENS } else { 0 }
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

fn rows_of((address, count, stride, dtype): Tensor<'_>, total: usize, width: usize) -> PyResult<kernels::Rows> {
    let kind = match dtype {
        "float32" => ElementType::F32,
        "bfloat16" => ElementType::Bf16,
        "float16" => ElementType::F16,
        other => return Err(PyValueError::new_err(format!("expected float32, bfloat16 or float16, found {other}"))),
    };
    if count != total {
        return Err(PyValueError::new_err(format!("expected {total} rows, found {count}")));
    }
    if stride < width {
        return Err(PyValueError::new_err(format!("expected rows of at least {width} elements, found {stride}")));
    }
    // SAFETY: a live tensor's memory, which the caller lends for the call; `stride` is at least what is asked for.
    Ok(unsafe { kernels::Rows::new(address, stride, kind) })
}

/// Fills `out` with rows of codes as format versions 1 and 2 have them, in today's layout.
#[pyfunction]
pub fn tile(py: Python<'_>, codes: Memory, bits: u32, columns: usize, out: Memory) -> PyResult<()> {
    let packed = slice::<u8>(codes)?;
    let stride = if layout::BITS.contains(&bits) { legacy::row_bytes(bits, columns) } else { 0 };
    let rows = packed.len().checked_div(stride).unwrap_or(0);
    if rows * stride != packed.len() || layout::part_bytes(bits, rows, columns) != out.1 {
        let message = format!("expected whole rows of {columns} codes and room for them, found {codes:?} and {out:?}");
        return Err(PyValueError::new_err(message));
    }
    if rows > 0 {
        let tiled = py.detach(|| legacy::to_tiled(packed, bits, columns));
        // SAFETY: a live tensor's memory of that many bytes, which the caller lends for the call.
        unsafe { std::slice::from_raw_parts_mut(out.0 as *mut u8, out.1) }.copy_from_slice(&tiled);
    }
    Ok(())
}
