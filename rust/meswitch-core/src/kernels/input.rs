//! The tokens of one expert, made ready for a delta.

use std::ops::Range;
use std::sync::Mutex;

use half::f16;

use super::activations::Activations;
use super::decode;
use super::floats::{multiply, narrow};
use super::matrix::{Matrix, Part};
use super::rows::widen_f16;
use super::sparse::Packed;
use super::team::{self, ALONE};

/// Tokens ready for a site: `[tokens, …]` each.
#[derive(Default)]
pub(super) struct Input {
    /// How many.
    pub tokens: usize,
    /// Activations times column scales, unless all parts take integers.
    pub scaled: Vec<f32>,
    /// The same in integers, where sums need not be exact.
    pub integers: Option<Activations>,
    /// Activations of the salient channels.
    pub salient: Vec<f32>,
    /// `V · x`.
    pub inner: Vec<f32>,
    /// Activations by column, for sparse entries.
    pub packed: Option<Packed>,
}

impl Input {
    /// Of `x [tokens, columns]`; unless `exact`, rounded to 8 bits where scales allow it.
    pub fn new(matrix: &Matrix<'_>, x: Vec<f32>, exact: bool) -> Self {
        let columns = matrix.columns.max(1);
        let mut input = Self { tokens: x.len() / columns, ..Self::default() };
        if matrix.sparse.is_some() {
            input.packed = (input.tokens > 0).then(|| Packed::of(&x, matrix.columns));
            return input;
        }
        if let Some((index, _)) = matrix.salient {
            for row in x.chunks(columns) {
                input.salient.extend(index.iter().map(|i| row[*i as usize] * matrix.unit));
            }
        }
        if let Some((_, v)) = matrix.low_rank {
            input.inner = inner(v, &x, matrix);
        }
        input.scaled = x;
        if let Some(scales) = matrix.column_scales {
            let mut wide = vec![0f32; columns];
            widen_f16(scales, &mut wide);
            input.scaled.chunks_mut(columns).for_each(|row| multiply(row, &wide));
        }
        let whole = |part: &Part<'_>| !exact && part.takes_integers(matrix.columns);
        if matrix.parts.iter().any(whole) {
            let mut widths: Vec<u32> =
                matrix.parts.iter().flat_map(|part| decode::widths(part.bits)).map(|w| w.0).collect();
            widths.sort_unstable();
            widths.dedup();
            let mut x =
                if matrix.parts.iter().all(whole) { std::mem::take(&mut input.scaled) } else { input.scaled.clone() };
            input.integers = Some(Activations::of(&mut x, matrix.columns, &widths, decode::unit()));
        }
        input
    }
}

/// Whether `V · x` is work for the whole team: such an input must be made outside of its regions.
pub(super) fn wants_team(matrix: &Matrix<'_>, tokens: usize) -> bool {
    matrix.rank() * matrix.columns * tokens >= ALONE
}

/// `V · x · unit`, `[tokens, rank]`.
fn inner(v: &[f16], x: &[f32], matrix: &Matrix<'_>) -> Vec<f32> {
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
