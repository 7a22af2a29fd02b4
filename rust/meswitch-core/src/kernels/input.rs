//! The tokens of one expert, made ready for a delta.

use std::ops::Range;
use std::sync::Mutex;

use half::f16;

use super::floats::{multiply, narrow};
use super::matrix::Matrix;
use super::rows::widen_f16;
use super::sparse::Packed;
use super::tables::Tables;
use super::team::{self, ALONE};

/// Tokens ready for a site: `[tokens, …]` each.
#[derive(Default)]
pub(super) struct Input<'a> {
    /// Which.
    rows: &'a [u32],
    /// How many.
    pub tokens: usize,
    /// What activations were multiplied with.
    scales: Option<&'a [f16]>,
    /// Activations times column scales.
    pub scaled: Vec<f32>,
    /// Their sums to look up, where those need not be exact.
    pub tables: Vec<Tables>,
    /// Activations of the salient channels.
    pub salient: Vec<f32>,
    /// `V · x`.
    pub inner: Vec<f32>,
    /// Activations by column, for sparse entries.
    pub packed: Option<Packed>,
}

impl<'a> Input<'a> {
    /// Of `x [tokens, columns]`, whose `rows` say which they are, with `V · x` if that is known; unless `exact`, as sums to
    /// look up where scales allow it: taken from `ready`, for another weight, if of the same tokens and scales.
    pub fn new(
        matrix: &'a Matrix<'a>,
        rows: &'a [u32],
        x: Vec<f32>,
        known: Option<&[f32]>,
        ready: &mut [Self],
        exact: bool,
    ) -> Self {
        let columns = matrix.columns.max(1);
        let mut input = Self { rows, tokens: x.len() / columns, scales: matrix.column_scales, ..Self::default() };
        if matrix.sparse.is_some() {
            input.packed = (input.tokens > 0).then(|| Packed::of(&x, matrix.columns));
            return input;
        }
        if let Some((index, _)) = matrix.salient {
            for row in x.chunks(columns) {
                input.salient.extend(index.iter().map(|i| row[*i as usize] * matrix.unit));
            }
        }
        input.inner = known.map_or_else(|| inner(matrix, &x), <[f32]>::to_vec);
        input.scaled = x;
        if let Some(scales) = matrix.column_scales {
            let mut wide = vec![0f32; columns];
            widen_f16(scales, &mut wide);
            input.scaled.chunks_mut(columns).for_each(|row| multiply(row, &wide));
        }
        for part in matrix.parts.iter().filter(|part| !exact && part.is_looked_up(columns)) {
            let form = part.form(columns);
            if input.tables.iter().all(|tables| tables.form != form) {
                let mut alike = ready.iter_mut().filter(|other| other.rows == rows && other.scales == input.scales);
                let found = alike.find_map(|other| {
                    let at = other.tables.iter().position(|tables| tables.form == form)?;
                    Some(other.tables.swap_remove(at))
                });
                input.tables.push(found.unwrap_or_else(|| Tables::new(input.tokens, matrix.columns, form)));
            }
        }
        input
    }
}

/// Whether `V · x` is work for the whole team: then it must be made outside of its regions.
pub(super) fn wants_team(matrix: &Matrix<'_>, tokens: usize) -> bool {
    matrix.rank() * matrix.columns * tokens >= ALONE
}

/// `V · x · unit`, `[tokens, rank]`.
pub(super) fn inner(matrix: &Matrix<'_>, x: &[f32]) -> Vec<f32> {
    let Some((_, v)) = matrix.low_rank else { return Vec::new() };
    let (columns, rank) = (matrix.columns, matrix.rank());
    let tokens = x.len() / columns.max(1);
    let products = |of: Range<usize>| {
        let (mut sums, mut wide) = (vec![0f32; of.len() * tokens], vec![0f32; columns]);
        for (v, sums) in v[of.start * columns..of.end * columns].chunks(columns).zip(sums.chunks_mut(tokens)) {
            narrow(v, columns, x, &mut wide, sums, 1);
        }
        sums
    };
    let mut by_rank = vec![0f32; rank * tokens];
    if wants_team(matrix, tokens) {
        let all = Mutex::new(by_rank);
        team::parallel(&|index, threads| {
            let of = rank * index / threads..rank * (index + 1) / threads;
            let sums = products(of.clone());
            all.lock().expect("no thread panics while it holds this")[of.start * tokens..of.end * tokens]
                .copy_from_slice(&sums);
        });
        by_rank = all.into_inner().expect("as above");
    } else if tokens > 0 {
        by_rank = products(0..rank);
    }
    (0..tokens * rank).map(|at| by_rank[at % rank * tokens + at / rank] * matrix.unit).collect()
}
