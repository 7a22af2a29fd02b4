//! The activations of one batch of tokens, prepared for one delta.

use std::ops::Range;
use std::sync::Mutex;

use half::f16;

use super::floats::{add_narrow_product, multiply};
use super::matrix::Matrix;
use super::rows::widen_f16;
use super::sparse::TokenColumns;
use super::tables::Tables;
use super::threads::{self, MIN_PARALLEL_WORK};

/// What the terms of a delta are multiplied with; `[tokens, …]` each.
#[derive(Default)]
pub(super) struct Input<'a> {
    /// The tokens' numbers.
    token_rows: &'a [u32],
    /// How many tokens.
    pub(super) tokens: usize,
    /// The column scales that `scaled` includes.
    column_scales: Option<&'a [f16]>,
    /// Activations times column scales, for codes.
    pub(super) scaled: Vec<f32>,
    /// Lookup tables made of `scaled`; empty where products must be exact.
    pub(super) tables: Vec<Tables>,
    /// Activations of the salient channels times the matrix's unit.
    pub(super) salient: Vec<f32>,
    /// `V · x` times the matrix's unit.
    pub(super) low_rank: Vec<f32>,
    /// Activations by column, for sparse entries.
    pub(super) by_column: Option<TokenColumns>,
}

impl<'a> Input<'a> {
    /// Prepares `x [tokens, columns]`. `low_rank` is `V · x` where the caller has it. Unless `exact`, lookup tables are
    /// set up where scales allow them, or taken out of `reusable` where those have the same tokens, column scales and
    /// key.
    pub(super) fn new(
        matrix: &'a Matrix<'a>,
        token_rows: &'a [u32],
        x: Vec<f32>,
        low_rank: Option<&[f32]>,
        reusable: &mut [Self],
        exact: bool,
    ) -> Self {
        let columns = matrix.columns.max(1);
        let column_scales = matrix.column_scales;
        let mut input = Self { token_rows, tokens: x.len() / columns, column_scales, ..Self::default() };
        if matrix.sparse.is_some() {
            input.by_column = (input.tokens > 0).then(|| TokenColumns::new(&x, matrix.columns));
            return input;
        }
        if let Some((index, _)) = matrix.salient {
            for row in x.chunks(columns) {
                input.salient.extend(index.iter().map(|i| row[*i as usize] * matrix.unit));
            }
        }
        input.low_rank = low_rank.map_or_else(|| low_rank_input(matrix, &x), <[f32]>::to_vec);
        input.scaled = x;
        if let Some(scales) = column_scales {
            let mut wide = vec![0f32; columns];
            widen_f16(scales, &mut wide);
            input.scaled.chunks_mut(columns).for_each(|row| multiply(row, &wide));
        }
        for part in matrix.parts.iter().filter(|part| !exact && part.allows_tables(columns)) {
            let key = part.table_key(columns);
            if input.tables.iter().all(|tables| tables.key != key) {
                let mut same_input = reusable
                    .iter_mut()
                    .filter(|other| other.token_rows == token_rows && other.column_scales == column_scales);
                let reused = same_input.find_map(|other| {
                    let index = other.tables.iter().position(|tables| tables.key == key)?;
                    Some(other.tables.swap_remove(index))
                });
                input.tables.push(reused.unwrap_or_else(|| Tables::new(input.tokens, matrix.columns, key)));
            }
        }
        input
    }
}

/// Whether [`low_rank_input`] runs on all threads; then it must not be called from one of them.
pub(super) fn is_parallel(matrix: &Matrix<'_>, tokens: usize) -> bool {
    matrix.rank() * matrix.columns * tokens >= MIN_PARALLEL_WORK
}

/// `V · x` times the matrix's unit, `[tokens, rank]`; empty without a low-rank part.
pub(super) fn low_rank_input(matrix: &Matrix<'_>, x: &[f32]) -> Vec<f32> {
    let Some((_, v)) = matrix.low_rank else { return Vec::new() };
    let (columns, rank) = (matrix.columns, matrix.rank());
    let tokens = x.len() / columns.max(1);
    let products = |rows: Range<usize>| {
        let (mut sums, mut wide) = (vec![0f32; rows.len() * tokens], vec![0f32; columns]);
        for (v, sums) in v[rows.start * columns..rows.end * columns].chunks(columns).zip(sums.chunks_mut(tokens)) {
            add_narrow_product(v, columns, x, &mut wide, sums, 1);
        }
        sums
    };
    let mut by_rank = vec![0f32; rank * tokens];
    if is_parallel(matrix, tokens) {
        let shared = Mutex::new(by_rank);
        threads::run_on_all(&|index, threads| {
            let rows = rank * index / threads..rank * (index + 1) / threads;
            let sums = products(rows.clone());
            shared.lock().expect("no thread panics while it holds the lock")[rows.start * tokens..rows.end * tokens]
                .copy_from_slice(&sums);
        });
        by_rank = shared.into_inner().expect("no thread panicked while it held the lock");
    } else if tokens > 0 {
        by_rank = products(0..rank);
    }
    (0..tokens * rank).map(|index| by_rank[index % rank * tokens + index / rank] * matrix.unit).collect()
}
