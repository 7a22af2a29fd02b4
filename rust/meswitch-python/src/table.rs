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

/// One weight of the base: its deltas by slot, and itself where it is packed.
#[pyclass(frozen)]
pub struct Table {
    rows: usize,
    columns: usize,
    base: Option<Py<Matrix>>,
    slots: Mutex<BTreeMap<usize, Py<Matrix>>>,
}

/// Matrices and the tokens that they are multiplied with.
type Work<'a> = Vec<(Py<Matrix>, &'a [u32])>;

fn products<'a>(work: &'a Work<'_>) -> Vec<Product<'a>> {
    work.iter().map(|(matrix, tokens)| Product { matrix: &matrix.get().matrix, tokens }).collect()
}

#[pymethods]
impl Table {
    /// A weight `[rows, columns]`; `base` is the weight itself, where it is packed.
    #[new]
    #[pyo3(signature = (rows, columns, base=None))]
    fn new(rows: usize, columns: usize, base: Option<Py<Matrix>>) -> PyResult<Self> {
        check_shape(base.as_ref(), rows, columns)?;
        Ok(Self { rows, columns, base, slots: Mutex::default() })
    }

    /// Puts a delta of that shape, or none, into a slot.
    fn set(&self, slot: usize, matrix: Option<Py<Matrix>>) -> PyResult<()> {
        check_shape(matrix.as_ref(), self.rows, self.columns)?;
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

fn check_shape(matrix: Option<&Py<Matrix>>, rows: usize, columns: usize) -> PyResult<()> {
    let Some(matrix) = matrix.map(Py::get) else { return Ok(()) };
    let found = (matrix.matrix.rows(), matrix.matrix.columns());
    if found == (rows, columns) {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("expected a matrix of {:?}, found {found:?}", (rows, columns))))
}

/// A weight with its deltas, its bfloat16 tensor unless it is packed, which slot each token belongs to (`None`: every
/// token is the base's), and the tensor of products.
type Site = (Py<Table>, Option<Tensor>, Option<Py<Rows>>, Tensor);

/// `y[t] = W · x[t]` of weights with the same input, and `Δ̂ of its slot · x[t]` for every token whose slot has a delta
/// there: at most `base_linear_tokens` tokens unless all weights are packed.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // what Python hands over
pub fn base_linear(py: Python<'_>, x: Tensor, sites: Vec<Site>) -> PyResult<()> {
    let Some(columns) = sites.first().map(|site| site.0.get().columns) else { return Ok(()) };
    let ((tokens, x), most) = (x.rows(py, columns)?, base_linear_tokens());
    let all: Vec<u32> = (0..tokens as u32).collect();
    let mut work: Vec<Work<'_>> = Vec::with_capacity(sites.len());
    for (table, weight, rows, _) in &sites {
        let packed = table.get().base.as_ref().filter(|_| weight.is_none());
        let mut products: Work<'_> = packed.map(|base| (base.clone_ref(py), all.as_slice())).into_iter().collect();
        products.extend(rows.iter().flat_map(|rows| table.get().work(py, rows.get())));
        work.push(products);
    }
    let mut jobs = Vec::with_capacity(sites.len());
    for ((table, weight, rows, y), work) in sites.iter().zip(&work) {
        let table = table.get();
        // SAFETY: `sites` keeps the tensor until this returns, and nobody writes to a base's weight.
        let weight = weight.as_ref().map(|weight| unsafe { weight.elements::<u16>(py) }).transpose()?;
        let weights = weight.map_or(table.rows * columns, <[u16]>::len);
        let found = (table.columns, weights, rows.as_ref().map_or(tokens, |rows| rows.get().total));
        let too_many = weight.is_some() && tokens > most;
        if found != (columns, table.rows * columns, tokens) || too_many || (weight.is_none() && table.base.is_none()) {
            return Err(PyValueError::new_err(format!(
                "expected {columns} columns, {} weights or a packed base, and {tokens} tokens, at most {most}, found \
                {found:?}",
                table.rows * columns,
            )));
        }
        let base = weight.map(|weight| BaseWeight { weight, rows: table.rows, columns, tokens });
        let y = y.exactly_rows(py, tokens, table.rows)?;
        jobs.push(kernels::Site { base, products: products(work), rows: table.rows, tokens, y });
    }
    enter(py, || {
        if tokens > 0 {
            // SAFETY: the tensors have that many rows of that many elements, tokens are below that, and there is a
            // kernel for weights that are not packed, for one token at least.
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
