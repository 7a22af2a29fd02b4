//! Products of a step: the deltas of a weight by slot, and which slot each token belongs to.

use std::collections::BTreeMap;
use std::sync::Mutex;

use meswitch_core::kernels::{self, BaseWeight, Product};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::enter;
use crate::matrix::Matrix;
use crate::tensor::Tensor;

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

/// Deltas and the tokens that they are for.
type Work<'a> = Vec<(Py<Matrix>, &'a [u32])>;

fn products<'a>(work: &'a Work<'_>) -> Vec<Product<'a>> {
    work.iter().map(|(delta, tokens)| Product { matrix: &delta.get().matrix, tokens }).collect()
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
        let before = match matrix {
            Some(matrix) => slots.insert(slot, matrix),
            None => slots.remove(&slot),
        };
        // The lock first: dropping a matrix may run Python, which may let another thread wait for this lock.
        drop(slots);
        drop(before);
        Ok(())
    }

    /// `y[t] += Δ̂ of its slot · x[t]` for every token whose slot has a delta here. Unless `exact`, sums of
    /// activations are looked up, rounded. Both tensors have a row for every token of `rows`.
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn delta_linear(&self, py: Python<'_>, y: Tensor, x: Tensor, rows: &Rows, exact: bool) -> PyResult<()> {
        let y = y.exactly_rows(py, rows.total, self.rows)?;
        let x = x.exactly_rows(py, rows.total, self.columns)?;
        let work = self.work(py, rows);
        let products = products(&work);
        enter(py, || {
            // SAFETY: the tensors have `rows.total` rows of that many elements, and tokens are below that.
            unsafe { kernels::add_products(&products, x, y, exact) };
            Ok(())
        })
    }
}

impl Table {
    /// The deltas of the slots that have tokens.
    fn work<'a>(&self, py: Python<'_>, rows: &'a Rows) -> Work<'a> {
        let slots = self.slots.lock().expect("no thread panics while it holds this");
        let delta = |(slot, tokens): &'a (usize, Vec<u32>)| Some((slots.get(slot)?.clone_ref(py), tokens.as_slice()));
        rows.groups.iter().filter_map(delta).collect()
    }
}

/// A weight's deltas, its bfloat16 tensor, which slot each token belongs to (`None`: every token is the base's), and the
/// tensor of products.
type Site = (Py<Table>, Tensor, Option<Py<Rows>>, Tensor);

/// `y[t] = W · x[t]` of weights with the same input, and `Δ̂ of its slot · x[t]` for every token whose slot has a delta
/// there: at most `base_linear_tokens` tokens, products of the input's dtype.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // what Python hands over
pub fn base_linear(py: Python<'_>, x: Tensor, sites: Vec<Site>) -> PyResult<()> {
    let Some(columns) = sites.first().map(|site| site.0.get().columns) else { return Ok(()) };
    let ((tokens, x), most) = (x.rows(py, columns)?, base_linear_tokens());
    let work: Vec<Work<'_>> = sites
        .iter()
        .map(|(table, _, rows, _)| rows.as_ref().map(|rows| table.get().work(py, rows.get())).unwrap_or_default())
        .collect();
    let mut jobs = Vec::with_capacity(sites.len());
    for ((table, weight, rows, y), work) in sites.iter().zip(&work) {
        let table = table.get();
        // SAFETY: `sites` keeps the tensor until this returns, and nobody writes to a base's weight.
        let weight = unsafe { weight.elements::<u16>(py) }?;
        let found = (table.columns, weight.len(), rows.as_ref().map_or(tokens, |rows| rows.get().total));
        if found != (columns, table.rows * columns, tokens) || tokens > most {
            return Err(PyValueError::new_err(format!(
                "expected {columns} columns, {} weights and {tokens} tokens, at most {most}, found {found:?}",
                table.rows * columns,
            )));
        }
        let base = BaseWeight { weight, rows: table.rows, columns, tokens };
        jobs.push(kernels::Site { base, products: products(work), y: y.exactly_rows(py, tokens, table.rows)? });
    }
    enter(py, || {
        if tokens > 0 {
            // SAFETY: the tensors have that many rows of that many elements, tokens are below that, and there is a
            // kernel, for one token at least.
            unsafe { kernels::linear(&jobs, x) };
        }
        Ok(())
    })
}

/// For how many tokens `base_linear` has a kernel on this processor.
#[pyfunction]
pub fn base_linear_tokens() -> usize {
    if kernels::has_base_kernel() { kernels::MAX_BASE_TOKENS } else { 0 }
}
