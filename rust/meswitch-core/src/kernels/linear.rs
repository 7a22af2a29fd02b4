//! `y += Δ̂ · x` on a team of threads, for the tokens of several experts at once, and the base's own product with it.
//!
//! Every thread takes a share of the rows and goes through it block by block: the base's product, each expert's delta,
//! and the outcome is written once. Weights with the same input are one call, one after another on every thread. Nothing
//! waits in between, and what lies in a cache is used while it is there.

use std::ops::Range;

use super::dense::{self, Base};
use super::input::{self, Input};
use super::lookup::begin;
use super::matrix::Matrix;
use super::parts;
use super::rows::Rows;
use super::team::{self, ALONE};
use crate::layout::LINE;

/// Tokens whose sums are looked up together: those of more would not fit the cache.
const TOKENS: usize = 16;
/// Sums of a block: they stay in the second cache.
const SUMS: usize = 1 << 16;
/// Bytes of a block's codes where more tokens come for them: those stay there too.
const CODES: usize = 1 << 18;

/// The delta of one expert, and the rows of activations that are its tokens, rising.
pub struct Product<'a> {
    /// The delta.
    pub matrix: &'a Matrix<'a>,
    /// The rows.
    pub tokens: &'a [u32],
}

/// Adds `Δ̂ · x` of some tokens: `x [tokens, columns]`; `add(token, first row, values)` takes runs of rows as they come,
/// from many threads, each `(token, row)` exactly once. Unless `exact`, sums are looked up where scales allow it.
pub fn delta_linear(matrix: &Matrix<'_>, x: &[f32], exact: bool, add: &(dyn Fn(usize, usize, &[f32]) + Sync)) {
    let columns = matrix.columns.max(1);
    let all: Vec<u32> = (0..(x.len() / columns) as u32).collect();
    let read = |token: u32, out: &mut [f32]| out.copy_from_slice(&x[token as usize * columns..][..out.len()]);
    let items = Items::new(&[Product { matrix, tokens: &all }], matrix.rows, None, &read, exact);
    run(items.weights(), &|index, threads| {
        items.work(index, threads, &mut [], &|inputs, of, sums| {
            items.each(inputs, of, sums, &mut |token, values| add(token, of.start, values));
        });
    });
}

/// `y[t] += Δ̂ · x[t]` for the tokens of several experts on one weight. Unless `exact`, sums are looked up where
/// scales allow it.
///
/// # Safety
/// `x` must have the tokens' rows of as many elements as matrices have columns, `y` of as many as they have rows.
pub unsafe fn add_products(products: &[Product<'_>], x: Rows, y: Rows, exact: bool) {
    // SAFETY: the caller's promise.
    let read = |token: u32, out: &mut [f32]| unsafe { x.read(token as usize, out) };
    let rows = products.iter().map(|product| product.matrix.rows).max().unwrap_or(0);
    let items = Items::new(products, rows, None, &read, exact);
    run(items.weights(), &|index, threads| {
        items.work(index, threads, &mut [], &|inputs, of, sums| {
            // SAFETY: the caller's promise; every (token, row) is handed out once, so no two threads share an element.
            items.each(inputs, of, sums, &mut |token, values| unsafe { y.add(token, of.start, values) });
        });
    });
}

/// The base's weight, the deltas of it, and where products go.
pub struct Site<'a> {
    /// The weight.
    pub base: Base<'a>,
    /// The deltas.
    pub products: Vec<Product<'a>>,
    /// A row a token.
    pub y: Rows,
}

/// `y[t] = W · x[t]` of weights with the same input, and what each expert's delta adds to its own tokens, sums looked up
/// where scales allow it.
///
/// # Safety
/// [`dense::is_available`] must hold; weights must have as many columns and tokens as each other, `x` and every `y`
/// those tokens, of as many elements as the weight has columns and rows, and matrices their weight's shape.
pub unsafe fn linear(sites: &[Site<'_>], x: Rows) {
    // SAFETY: the caller's promise.
    let read = |token: u32, out: &mut [f32]| unsafe { x.read(token as usize, out) };
    let Some(split) = sites.first().map(|site| site.base.split(&read)) else { return };
    let mut all = Vec::with_capacity(sites.len());
    for site in sites {
        all.push((site, Items::new(&site.products, site.base.rows, Some(&site.base), &read, false)));
    }
    run(all.iter().map(|(_, items)| items.weights()).sum(), &|index, threads| {
        let mut before = Vec::new();
        for (Site { base, y, .. }, items) in &all {
            before = items.work(index, threads, &mut before, &|inputs, of, buffer| {
                let (all, own) = buffer.split_at_mut(base.tokens * of.len());
                dense::products(base, &split, of, all);
                items.each(inputs, of, own, &mut |token, values| {
                    all[token * of.len()..][..of.len()].iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
                });
                for (token, sums) in all.chunks(of.len()).enumerate() {
                    // SAFETY: the caller's promise; blocks have no row in common.
                    unsafe { y.write(token, of.start, sums) };
                }
            });
        }
    });
}

/// On the team, if there is work enough for one.
fn run(weights: usize, work: &(dyn Fn(usize, usize) + Sync)) {
    if weights < ALONE { work(0, 1) } else { team::parallel(work) }
}

type Read<'a> = &'a (dyn Fn(u32, &mut [f32]) + Sync);

/// Tokens of one expert, at most [`TOKENS`].
struct Item<'a> {
    matrix: &'a Matrix<'a>,
    tokens: &'a [u32],
    /// `V · x` where it is work for the whole team.
    inner: Option<Vec<f32>>,
}

/// The tokens of several experts on one weight.
struct Items<'a> {
    of: Vec<Item<'a>>,
    rows: usize,
    base: Option<&'a Base<'a>>,
    read: Read<'a>,
    exact: bool,
}

/// What a thread does with a block of rows: what it made ready of every item, the rows, room for their sums.
type Block<'a> = &'a dyn Fn(&mut [Input<'_>], &Range<usize>, &mut [f32]);

impl<'a> Items<'a> {
    fn new(products: &[Product<'a>], rows: usize, base: Option<&'a Base<'a>>, read: Read<'a>, exact: bool) -> Self {
        let mut items = Self { of: Vec::new(), rows, base, read, exact };
        for Product { matrix, tokens } in products {
            items.of.extend(tokens.chunks(TOKENS).map(|tokens| Item { matrix, tokens, inner: None }));
        }
        for at in 0..items.of.len() {
            let item = &items.of[at];
            if input::wants_team(item.matrix, item.tokens.len()) {
                items.of[at].inner = Some(input::inner(item.matrix, &items.read(item)));
            }
        }
        items
    }

    /// The activations `[tokens, columns]`.
    fn read(&self, item: &Item<'_>) -> Vec<f32> {
        let columns = item.matrix.columns;
        let mut wide = vec![0f32; item.tokens.len() * columns];
        for (token, wide) in item.tokens.iter().zip(wide.chunks_mut(columns.max(1))) {
            (self.read)(*token, wide);
        }
        wide
    }

    /// Columns and tokens of the base's product.
    fn of_base(&self) -> (usize, usize) {
        self.base.map_or((0, 0), |base| (base.columns, base.tokens))
    }

    /// How much is to be multiplied.
    fn weights(&self) -> usize {
        let (columns, tokens) = self.of_base();
        let products = |item: &Item<'_>| item.matrix.weights() * item.tokens.len();
        self.of.iter().map(products).sum::<usize>() + self.rows * columns * tokens
    }

    /// One thread's share, in blocks of rows with room for the sums of all the base's tokens, and of one item's after
    /// them. Takes what the thread made ready of the same tokens for another weight, and gives what it made for this.
    fn work(&self, index: usize, threads: usize, ready: &mut [Input<'a>], block: Block<'_>) -> Vec<Input<'a>> {
        let ((columns, all), rows) = (self.of_base(), self.rows);
        let deltas = |row: usize| self.of.iter().map(|item| item.matrix.bytes_before(row)).sum::<usize>();
        let of = share(rows, index, threads, &|row| row * columns * size_of::<u16>() + deltas(row));
        if of.is_empty() {
            return Vec::new();
        }
        let tokens = all + self.of.iter().map(|item| item.tokens.len()).max().unwrap_or(0);
        let crowded = self.of.iter().filter(|item| item.tokens.len() == TOKENS);
        let codes = crowded.map(|item| item.matrix.bytes_before(rows)).max().unwrap_or(0);
        let step = (SUMS / tokens.max(1)).min(CODES * rows / codes.max(1)).max(1).next_multiple_of(LINE);
        // Memory answers while activations are made ready: by every thread for itself, since what another core wrote
        // takes longer to read than to make.
        begin(self.base.map_or_else(|| self.codes(of.start), |base| base.bytes(of.start)));
        let input = |item: &Item<'a>| {
            let x = self.read(item);
            Input::new(item.matrix, item.tokens, x, item.inner.as_deref(), ready, self.exact)
        };
        let mut inputs: Vec<_> = self.of.iter().map(input).collect();
        let mut sums = vec![0f32; tokens * step.min(of.len())];
        for first in of.clone().step_by(step) {
            block(&mut inputs, &(first..(first + step).min(of.end)), &mut sums);
        }
        inputs
    }

    /// The first delta's codes from a row on.
    fn codes(&self, row: usize) -> &[u8] {
        let part = self.of.first().and_then(|item| Some((item.matrix.columns, item.matrix.parts.first()?)));
        part.map_or(&[], |(columns, part)| part.codes_from(part.span(0, row).end, columns))
    }

    /// The deltas of a block of rows: `take(token, values)`.
    fn each(&self, inputs: &mut [Input<'_>], of: &Range<usize>, sums: &mut [f32], take: &mut dyn FnMut(usize, &[f32])) {
        for (item, input) in self.of.iter().zip(inputs) {
            let sums = &mut sums[..item.tokens.len() * of.len()];
            sums.fill(0.0);
            parts::add(item.matrix, input, of, sums);
            for (token, sums) in item.tokens.iter().zip(sums.chunks(of.len().max(1))) {
                take(*token as usize, sums);
            }
        }
    }
}

/// The rows that a thread takes, from a multiple of [`LINE`] on: as many bytes as any other, of which `before(row)` lie
/// before a row.
fn share(rows: usize, index: usize, threads: usize, before: &dyn Fn(usize) -> usize) -> Range<usize> {
    let all = before(rows);
    let first = |index: usize| {
        let (mut low, mut high) = (0, rows.div_ceil(LINE));
        while low < high {
            let middle = low.midpoint(high);
            if before((middle * LINE).min(rows)) * threads < all * index {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        (low * LINE).min(rows)
    };
    let end = if index + 1 == threads { rows } else { first(index + 1) };
    (if index == 0 { 0 } else { first(index) })..end
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::super::matrix::Part;
    use super::*;
    use crate::layout::part_bytes;

    #[test]
    fn shares_hold_every_row_once_and_as_many_bytes() {
        let frequent: Vec<u32> = (0..800).collect();
        let rest: Vec<u32> = (800..8008).collect();
        let part =
            |bits, rows, count: usize| (bits, rows, vec![0u8; part_bytes(bits, count, 512)], vec![f16::ONE; count]);
        let parts = [part(8, Some(&frequent[..]), 800), part(1, Some(&rest[..]), 7208)];
        let parts = parts.iter().map(|(bits, rows, codes, scales)| Part {
            bits: *bits,
            zero: 0.0,
            group: 512,
            rows: *rows,
            codes,
            scales,
        });
        let matrix = Matrix {
            rows: 8008,
            columns: 512,
            unit: 1.0,
            parts: parts.collect(),
            column_scales: None,
            salient: None,
            low_rank: None,
            sparse: None,
        };
        matrix.check().unwrap();
        let of = |index, threads| share(8008, index, threads, &|row| matrix.bytes_before(row));
        for threads in 1..6 {
            let shares: Vec<_> = (0..threads).map(|index| of(index, threads)).collect();
            assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert_eq!((shares[0].start, shares[threads - 1].end), (0, 8008));
        }
        let half = of(0, 2).end;
        assert!((1152..=1216).contains(&half), "{half}");
        assert_eq!(share(0, 1, 2, &|_| 0), 0..0);
    }
}
