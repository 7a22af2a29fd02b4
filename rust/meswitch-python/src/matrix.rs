//! The delta of one weight, as the kernels read it.

use meswitch_core::Error;
use meswitch_core::kernels::{self, Part, SparseEntries, Terms};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::enter;
use crate::tensor::Tensor;

/// Bits, zero, group size, rows, codes, scales.
type PartTensors = (u32, f32, usize, Option<Tensor>, Tensor, Tensor);

/// The delta of one weight, `[rows, columns]`, over tensors that it keeps.
#[pyclass(frozen)]
pub struct Matrix {
    pub matrix: kernels::Matrix<'static>,
    // Never read: they keep the borrowed memory alive.
    _tensors: Vec<Tensor>,
}

#[pymethods]
impl Matrix {
    /// Borrows a site's tensors, which nobody may write to from then on. Lengths and indices are checked here, once.
    #[new]
    #[pyo3(signature = (rows, columns, exponent, parts, column_scales, salient, low_rank, sparse))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        rows: usize,
        columns: usize,
        exponent: i32,
        parts: Vec<PartTensors>,
        column_scales: Option<Tensor>,
        salient: Option<(Tensor, Tensor)>,
        low_rank: Option<(Tensor, Tensor)>,
        sparse: Option<(Tensor, Tensor, Tensor)>,
    ) -> PyResult<Self> {
        let terms = read_terms(py, &parts, column_scales.as_ref(), salient.as_ref(), low_rank.as_ref())?;
        let entries = sparse.as_ref().map(|tensors| read_entries(py, tensors)).transpose()?;
        let matrix = enter(py, || match entries {
            None => kernels::Matrix::new(rows, columns, exponent, terms),
            Some(_) if !terms.parts.is_empty() || terms.salient.is_some() || terms.low_rank.is_some() => {
                Err(Error::Format(format!(
                    "expected 0 parts beside sparse entries in a site of {rows} x {columns}, found {}",
                    terms.parts.len()
                )))
            }
            Some(entries) => kernels::Matrix::from_sparse(rows, columns, exponent, entries),
        })?;
        let mut tensors = Vec::new();
        for (_, _, _, rows, codes, scales) in parts {
            tensors.extend(rows.into_iter().chain([codes, scales]));
        }
        tensors.extend(column_scales);
        tensors.extend([salient, low_rank].into_iter().flatten().flat_map(|(first, second)| [first, second]));
        tensors.extend(sparse.into_iter().flat_map(|(starts, gaps, values)| [starts, gaps, values]));
        Ok(Self { matrix, _tensors: tensors })
    }

    /// Output and input channels.
    #[getter]
    fn shape(&self) -> (usize, usize) {
        (self.matrix.rows(), self.matrix.columns())
    }

    /// `y[t] += scale · Δ̂[ids[t], :]` for the tokens named; ids beyond the rows add nothing.
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn delta_embedding(
        &self,
        py: Python<'_>,
        y: Tensor,
        tokens: Vec<usize>,
        ids: Vec<i64>,
        scale: f32,
    ) -> PyResult<()> {
        let (total, rows) = y.rows(py, self.matrix.columns())?;
        check_tokens(&tokens, total)?;
        enter(py, || {
            let mut row = vec![0f32; self.matrix.columns()];
            for (token, id) in tokens.iter().zip(ids) {
                if (0..self.matrix.rows() as i64).contains(&id) {
                    row.fill(0.0);
                    kernels::add_row(&self.matrix, id as usize, scale, &mut row);
                    // SAFETY: `token < total`, and the caller's tensor has `total` rows of `columns` elements.
                    unsafe { rows.add(*token, 0, &row) };
                }
            }
            Ok(())
        })
    }

    /// Writes the rows of `weight [rows, columns]` and the delta together from `start` on to `out [count, columns]`.
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn merged(&self, py: Python<'_>, weight: Tensor, start: usize, out: Tensor) -> PyResult<()> {
        let columns = self.matrix.columns();
        let (count, out) = out.rows(py, columns)?;
        self.check_rows(start, count)?;
        let weight = weight.exactly_rows(py, self.matrix.rows(), columns)?;
        enter(py, || {
            // SAFETY: both tensors have those rows, of as many elements as the matrix has columns.
            unsafe { kernels::merged(&self.matrix, weight, start..start + count, out) };
            Ok(())
        })
    }

    /// Writes the rows from `start` on of this, and of another of the same shape together, to `out [count, columns]`.
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn summed(&self, py: Python<'_>, other: Option<&Self>, start: usize, out: Tensor) -> PyResult<()> {
        let (count, out) = out.rows(py, self.matrix.columns())?;
        self.check_rows(start, count)?;
        if let Some(other) = other {
            other.check_rows(start, count)?;
            if other.matrix.columns() != self.matrix.columns() {
                let (expected, found) = (self.matrix.columns(), other.matrix.columns());
                return Err(PyValueError::new_err(format!("expected {expected} columns, found {found}")));
            }
        }
        let matrices: Vec<_> = [Some(self), other].into_iter().flatten().map(|matrix| &matrix.matrix).collect();
        enter(py, || {
            // SAFETY: the tensor has those rows, of as many elements as the matrices have columns.
            unsafe { kernels::summed(&matrices, start..start + count, out) };
            Ok(())
        })
    }

    /// Writes the rows of the delta from `start` on to `out float32 [count, columns]`.
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn dense(&self, py: Python<'_>, start: usize, out: Tensor) -> PyResult<()> {
        let (count, _) = out.rows(py, self.matrix.columns())?;
        self.check_rows(start, count)?;
        // SAFETY: the caller's tensor is kept until this returns, and nothing else accesses it meanwhile.
        let rows = unsafe { out.elements_mut::<f32>(py) }?;
        enter(py, || {
            kernels::dense_rows(&self.matrix, start, rows);
            Ok(())
        })
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

/// Borrows the tensors of a quantized site; `Matrix` keeps them.
fn read_terms(
    py: Python<'_>,
    parts: &[PartTensors],
    column_scales: Option<&Tensor>,
    salient: Option<&(Tensor, Tensor)>,
    low_rank: Option<&(Tensor, Tensor)>,
) -> PyResult<Terms<'static>> {
    let parts = parts
        .iter()
        .map(|(bits, zero, group, rows, codes, scales)| {
            // SAFETY: `Matrix` keeps these tensors as long as it lives, and its caller writes to none of them.
            let (rows, codes, scales) = unsafe {
                (rows.as_ref().map(|rows| rows.elements(py)).transpose()?, codes.bytes(py)?, scales.elements(py)?)
            };
            Ok(Part { bits: *bits, zero: *zero, group: *group, rows, codes, scales })
        })
        .collect::<PyResult<_>>()?;
    // SAFETY: as above.
    unsafe {
        Ok(Terms {
            parts,
            column_scales: column_scales.map(|scales| scales.elements(py)).transpose()?,
            salient: salient
                .map(|(index, values)| PyResult::Ok((index.elements(py)?, values.elements(py)?)))
                .transpose()?,
            low_rank: low_rank.map(|(u, v)| PyResult::Ok((u.elements(py)?, v.elements(py)?))).transpose()?,
        })
    }
}

/// Borrows the tensors of a sparse site; `Matrix` keeps them.
fn read_entries(py: Python<'_>, tensors: &(Tensor, Tensor, Tensor)) -> PyResult<SparseEntries<'static>> {
    let (starts, gaps, values) = tensors;
    // SAFETY: `Matrix` keeps these tensors as long as it lives, and its caller writes to none of them.
    unsafe { Ok(SparseEntries { starts: starts.elements(py)?, gaps: gaps.bytes(py)?, values: values.bytes(py)? }) }
}

fn check_tokens(tokens: &[usize], total: usize) -> PyResult<()> {
    match tokens.iter().find(|token| **token >= total) {
        None => Ok(()),
        Some(token) => Err(PyValueError::new_err(format!("expected tokens below {total}, found {token}"))),
    }
}
