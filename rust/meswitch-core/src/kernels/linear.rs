//! `y += Δ̂ · x` for the tokens of several experts at once, alone or together with the base's own product.
//!
//! Every thread takes a share of the rows and goes through it in blocks: the base's product, then each expert's delta,
//! then the result is written once. Weights with the same input go through one call, one after another on every thread.
//! Threads never wait for each other within a call.

use std::ops::Range;

use super::dense::{self, BaseWeight};
use super::input::{self, Input};
use super::lookup::prefetch_start;
use super::matrix::Matrix;
use super::parts;
use super::rows::Rows;
use super::threads::{self, MIN_PARALLEL_WORK};
use crate::layout::LINE_ROWS;

/// Tokens of one batch: lookup tables of more would not stay in a cache.
const BATCH_TOKENS: usize = 16;
/// Sums of a block of rows: they stay in the L2 cache.
const BLOCK_SUMS: usize = 1 << 16;
/// Bytes of a block's codes where several batches read them: they stay in the L2 cache too.
const BLOCK_CODE_BYTES: usize = 1 << 18;

/// The delta of one expert, and its tokens: rows of `x` and `y`, rising.
pub struct Product<'a> {
    /// The delta.
    pub matrix: &'a Matrix<'a>,
    /// The rows of activations.
    pub tokens: &'a [u32],
}

/// Multiplies a delta with `x [tokens, columns]`. Calls `add(token, first row, values)` for runs of rows, from many
/// threads and in any order; each `(token, row)` comes exactly once. Unless `exact`, products use lookup tables where
/// the scales allow it.
pub fn delta_linear(matrix: &Matrix<'_>, x: &[f32], exact: bool, add: &(dyn Fn(usize, usize, &[f32]) + Sync)) {
    let columns = matrix.columns.max(1);
    let tokens: Vec<u32> = (0..(x.len() / columns) as u32).collect();
    let read = |token: u32, out: &mut [f32]| out.copy_from_slice(&x[token as usize * columns..][..out.len()]);
    let job = Job::new(&[Product { matrix, tokens: &tokens }], matrix.rows, None, &read, exact);
    run(job.work(), &|index, threads| {
        job.run_share(index, threads, &mut [], &|inputs, rows, sums| {
            job.add_deltas(inputs, rows, sums, &mut |token, values| add(token, rows.start, values));
        });
    });
}

/// `y[t] += Δ̂ · x[t]` for the tokens of several experts on one weight. Unless `exact`, products use lookup tables
/// where the scales allow it. Returns when all threads are done.
///
/// # Safety
/// `x` and `y` must have every row that `products` name: of as many elements as the matrices have columns in `x`, and
/// rows in `y`. Nothing else may access `y` meanwhile.
pub unsafe fn add_products(products: &[Product<'_>], x: Rows, y: Rows, exact: bool) {
    // SAFETY: the caller guarantees the rows of `x`.
    let read = |token: u32, out: &mut [f32]| unsafe { x.read(token as usize, out) };
    let rows = products.iter().map(|product| product.matrix.rows).max().unwrap_or(0);
    let job = Job::new(products, rows, None, &read, exact);
    run(job.work(), &|index, threads| {
        job.run_share(index, threads, &mut [], &|inputs, rows, sums| {
            // SAFETY: the caller guarantees the rows of `y`; no two threads get the same (token, row).
            job.add_deltas(inputs, rows, sums, &mut |token, values| unsafe { y.add(token, rows.start, values) });
        });
    });
}

/// A weight of the base, the deltas of it, and where the products go.
pub struct Site<'a> {
    /// The weight, unless it is packed.
    pub base: Option<BaseWeight<'a>>,
    /// The deltas, and before them a packed weight with all tokens.
    pub products: Vec<Product<'a>>,
    /// The weight's output channels.
    pub rows: usize,
    /// The number of tokens.
    pub tokens: usize,
    /// One row per token.
    pub y: Rows,
}

/// `y[t] = W · x[t]` for weights with the same input, plus what each expert's delta adds to its own tokens. Products of
/// packed weights and of deltas use lookup tables where the scales allow it. Returns when all threads are done.
///
/// # Safety
/// [`dense::has_base_kernel`] must hold unless all weights are packed. All weights must have the same number of columns
/// and tokens, and each matrix its weight's shape. `x` and every `y` must have a row for each token, of as many elements
/// as the weight has columns and rows. Nothing else may access a `y` meanwhile.
pub unsafe fn linear(sites: &[Site<'_>], x: Rows) {
    // SAFETY: the caller guarantees the rows of `x`.
    let read = |token: u32, out: &mut [f32]| unsafe { x.read(token as usize, out) };
    let activations = sites.iter().find_map(|site| site.base.as_ref()).map(|base| base.activations(&read));
    let mut jobs = Vec::with_capacity(sites.len());
    for site in sites {
        let job = Job::new(&site.products, site.rows, site.base.as_ref(), &read, false);
        jobs.push((site, Job { kept_tokens: site.tokens, ..job }));
    }
    run(jobs.iter().map(|(_, job)| job.work()).sum(), &|index, threads| {
        let mut reusable = Vec::new();
        for (Site { base, tokens, y, .. }, job) in &jobs {
            reusable = job.run_share(index, threads, &mut reusable, &|inputs, rows, buffer| {
                let (base_sums, delta_sums) = buffer.split_at_mut(tokens * rows.len());
                match base.as_ref().zip(activations.as_ref()) {
                    Some((base, activations)) => dense::products(base, activations, rows, base_sums),
                    None => base_sums.fill(0.0),
                }
                job.add_deltas(inputs, rows, delta_sums, &mut |token, values| {
                    let sums = &mut base_sums[token * rows.len()..][..rows.len()];
                    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
                });
                for (token, sums) in base_sums.chunks(rows.len()).enumerate() {
                    // SAFETY: the caller guarantees the rows of `y`; blocks have no row in common.
                    unsafe { y.write(token, rows.start, sums) };
                }
            });
        }
    });
}

/// Calls `share(index, threads)` on all threads where there is work enough for them, else on this one.
fn run(work: usize, share: &(dyn Fn(usize, usize) + Sync)) {
    if work < MIN_PARALLEL_WORK { share(0, 1) } else { threads::run_on_all(share) }
}

/// Writes a token's activations.
type ReadFn<'a> = &'a (dyn Fn(u32, &mut [f32]) + Sync);

/// Handles a block of rows: `(inputs of every batch, rows, buffer for sums)`.
type BlockFn<'a> = &'a dyn Fn(&mut [Input<'_>], &Range<usize>, &mut [f32]);

/// At most [`BATCH_TOKENS`] tokens of one expert.
struct Batch<'a> {
    matrix: &'a Matrix<'a>,
    tokens: &'a [u32],
    /// `V · x`, where that is work enough for all threads.
    low_rank_input: Option<Vec<f32>>,
}

/// The products of one weight.
struct Job<'a> {
    batches: Vec<Batch<'a>>,
    rows: usize,
    base: Option<&'a BaseWeight<'a>>,
    /// How many tokens have sums of their own, which all products are added to.
    kept_tokens: usize,
    read: ReadFn<'a>,
    exact: bool,
}

impl<'a> Job<'a> {
    /// Splits the products into batches. Runs on all threads where low-rank parts are large.
    fn new(
        products: &[Product<'a>],
        rows: usize,
        base: Option<&'a BaseWeight<'a>>,
        read: ReadFn<'a>,
        exact: bool,
    ) -> Self {
        let mut job = Self { batches: Vec::new(), rows, base, kept_tokens: 0, read, exact };
        for Product { matrix, tokens } in products {
            let batches = tokens.chunks(BATCH_TOKENS);
            job.batches.extend(batches.map(|tokens| Batch { matrix, tokens, low_rank_input: None }));
        }
        for index in 0..job.batches.len() {
            let batch = &job.batches[index];
            if input::is_parallel(batch.matrix, batch.tokens.len()) {
                job.batches[index].low_rank_input = Some(input::low_rank_input(batch.matrix, &job.activations(batch)));
            }
        }
        job
    }

    /// A batch's activations `[tokens, columns]`.
    fn activations(&self, batch: &Batch<'_>) -> Vec<f32> {
        let columns = batch.matrix.columns;
        let mut wide = vec![0f32; batch.tokens.len() * columns];
        for (token, wide) in batch.tokens.iter().zip(wide.chunks_mut(columns.max(1))) {
            (self.read)(*token, wide);
        }
        wide
    }

    /// The cost in multiplications.
    fn work(&self) -> usize {
        let work = |batch: &Batch<'_>| batch.matrix.work_per_token() * batch.tokens.len();
        let base_work = self.base.map_or(0, |base| base.columns * base.tokens);
        self.batches.iter().map(work).sum::<usize>() + self.rows * base_work
    }

    /// Runs one thread's share of the rows in blocks. The buffer of sums has room for the kept tokens, then for the
    /// largest batch's. `reusable` are the inputs that this thread made for another weight of the same activations;
    /// returns the inputs it made for this one.
    fn run_share(
        &self,
        index: usize,
        threads: usize,
        reusable: &mut [Input<'a>],
        run_block: BlockFn<'_>,
    ) -> Vec<Input<'a>> {
        let columns = self.base.map_or(0, |base| base.columns);
        let codes_before = |row: usize| self.batches.iter().map(|batch| batch.matrix.bytes_before(row)).sum::<usize>();
        let bytes_before = |row: usize| row * columns * size_of::<u16>() + codes_before(row);
        let rows = share_of_rows(self.rows, index, threads, &bytes_before);
        if rows.is_empty() {
            return Vec::new();
        }
        let tokens = self.kept_tokens + self.batches.iter().map(|batch| batch.tokens.len()).max().unwrap_or(0);
        let block_rows = self.block_rows(tokens);
        // Memory answers while inputs are made. Every thread makes its own: reading what another core just wrote takes
        // longer than making it again.
        prefetch_start(self.base.map_or_else(|| self.first_codes(rows.start), |base| base.bytes(rows.start)));
        let input = |batch: &Batch<'a>| {
            let x = self.activations(batch);
            Input::new(batch.matrix, batch.tokens, x, batch.low_rank_input.as_deref(), reusable, self.exact)
        };
        let mut inputs: Vec<_> = self.batches.iter().map(input).collect();
        let mut sums = vec![0f32; tokens * block_rows.min(rows.len())];
        for first in rows.clone().step_by(block_rows) {
            run_block(&mut inputs, &(first..(first + block_rows).min(rows.end)), &mut sums);
        }
        inputs
    }

    /// Rows of a block, for sums of `tokens` tokens each.
    fn block_rows(&self, tokens: usize) -> usize {
        let full = self.batches.iter().filter(|batch| batch.tokens.len() == BATCH_TOKENS);
        let codes = full.map(|batch| batch.matrix.bytes_before(self.rows)).max().unwrap_or(0);
        let rows = (BLOCK_SUMS / tokens.max(1)).min(BLOCK_CODE_BYTES * self.rows / codes.max(1));
        rows.max(1).next_multiple_of(LINE_ROWS)
    }

    /// The first batch's codes from a row on.
    fn first_codes(&self, row: usize) -> &[u8] {
        let batch = self.batches.first();
        let part = batch.and_then(|batch| Some((batch.matrix.columns, batch.matrix.parts.first()?)));
        part.map_or(&[], |(columns, part)| part.codes_from(part.positions(0, row).end, columns))
    }

    /// Computes the deltas of rows `rows`, and calls `add(token, values)` for each token of each batch.
    fn add_deltas(
        &self,
        inputs: &mut [Input<'_>],
        rows: &Range<usize>,
        sums: &mut [f32],
        add: &mut dyn FnMut(usize, &[f32]),
    ) {
        for (batch, input) in self.batches.iter().zip(inputs) {
            let sums = &mut sums[..batch.tokens.len() * rows.len()];
            sums.fill(0.0);
            parts::add(batch.matrix, input, rows, sums);
            for (token, sums) in batch.tokens.iter().zip(sums.chunks(rows.len().max(1))) {
                add(*token as usize, sums);
            }
        }
    }
}

/// The rows of one thread's share, from a multiple of [`LINE_ROWS`] on. Shares have about equal bytes;
/// `bytes_before(row)` are those of all rows before one.
fn share_of_rows(rows: usize, index: usize, threads: usize, bytes_before: &dyn Fn(usize) -> usize) -> Range<usize> {
    let total = bytes_before(rows);
    let first = |index: usize| {
        let (mut low, mut high) = (0, rows.div_ceil(LINE_ROWS));
        while low < high {
            let middle = low.midpoint(high);
            if bytes_before((middle * LINE_ROWS).min(rows)) * threads < total * index {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        (low * LINE_ROWS).min(rows)
    };
    let end = if index + 1 == threads { rows } else { first(index + 1) };
    (if index == 0 { 0 } else { first(index) })..end
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::super::matrix::{Part, Terms};
    use super::*;
    use crate::layout::part_bytes;

    #[test]
    fn shares_hold_every_row_once_and_equal_bytes() {
        let frequent: Vec<u32> = (0..800).collect();
        let rest: Vec<u32> = (800..8008).collect();
        let (scales, codes) = (vec![f16::ONE; 7208], vec![0; part_bytes(1, 8008, 512 * 8).unwrap()]);
        let part = |bits, rows, count: usize| Part {
            bits,
            zero: 0.0,
            group: 512,
            rows: Some(rows),
            codes: &codes[..part_bytes(bits, count, 512).unwrap()],
            scales: &scales[..count],
        };
        let parts = vec![part(8, &frequent[..], 800), part(1, &rest[..], 7208)];
        let matrix = Matrix::new(8008, 512, 0, Terms { parts, ..Terms::default() }).unwrap();
        let share = |index, threads| share_of_rows(8008, index, threads, &|row| matrix.bytes_before(row));
        for threads in 1..6 {
            let shares: Vec<_> = (0..threads).map(|index| share(index, threads)).collect();
            assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert_eq!((shares[0].start, shares[threads - 1].end), (0, 8008));
        }
        let half = share(0, 2).end;
        assert!((1152..=1216).contains(&half), "{half}");
        assert_eq!(share_of_rows(0, 1, 2, &|_| 0), 0..0);
    }
}
