//! Decode kernels against the machine's own streaming rate, measured in the same run: GB/s of packed codes, and ratios.
//!
//!     cargo bench --bench kernels
//!
//! Matrices are cycled through a gigabyte, so that codes come from memory and not from a cache. Medians of rounds that
//! take turns with the streaming read, because machines drift.

use std::hint::black_box;
use std::time::Instant;

use half::f16;
use meswitch_core::kernels::matrix::{Matrix, Part};
use meswitch_core::kernels::{backend, linear};
use meswitch_core::layout::row_bytes;

const BYTES: usize = 1 << 30;
const ROUNDS: usize = 7;
const SHAPES: [(usize, usize); 4] = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)];

/// Sums a buffer's words: the quickest that memory can be read.
fn stream(buffer: &[u8], threads: usize) -> f64 {
    let start = Instant::now();
    let share = buffer.len() / threads;
    std::thread::scope(|scope| {
        for part in buffer.chunks(share) {
            scope.spawn(move || black_box(sum(part)));
        }
    });
    buffer.len() as f64 / start.elapsed().as_secs_f64()
}

fn sum(part: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: just asked.
        return unsafe { sum_wide(part) };
    }
    part.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight"))).fold(0, u64::wrapping_add)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_wide(part: &[u8]) -> u64 {
    let mut lanes = [0u64; 32];
    for words in part.chunks_exact(256) {
        for (lane, word) in lanes.iter_mut().zip(words.chunks_exact(8)) {
            *lane = lane.wrapping_add(u64::from_le_bytes(word.try_into().expect("eight")));
        }
    }
    lanes.iter().fold(0, |all, lane| all.wrapping_add(*lane))
}

/// One pass over all matrices that the buffer holds: bytes a second.
fn decode(buffer: &[u8], scales: &[f16], rows: usize, columns: usize, bits: u32, tokens: usize) -> f64 {
    let x: Vec<f32> = (0..tokens * columns).map(|i| (i % 17) as f32 - 8.0).collect();
    let size = rows * row_bytes(bits, columns);
    let matrices: Vec<Matrix<'_>> = buffer
        .chunks_exact(size)
        .map(|codes| Matrix {
            rows,
            columns,
            unit: 1.0,
            parts: vec![Part { bits, zero: 1.5, group: columns, rows: None, codes, scales: &scales[..rows] }],
            column_scales: None,
            salient: None,
            low_rank: None,
            sparse: None,
        })
        .collect();
    let start = Instant::now();
    for matrix in &matrices {
        linear::delta_linear(matrix, &x, false, &|_, _, values| {
            black_box(values);
        });
    }
    (matrices.len() * size) as f64 / start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let buffer: Vec<u8> = (0..BYTES).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let scales = vec![f16::ONE; 14336];
    let threads = meswitch_core::kernels::team::threads();
    println!("backend {}, {threads} threads, {ROUNDS} rounds", backend());
    println!("{:>14} {:>5} {:>7} {:>12} {:>12} {:>7}", "shape", "bits", "tokens", "stream GB/s", "codes GB/s", "ratio");
    for (rows, columns) in SHAPES {
        for (bits, tokens) in [(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (2, 4), (2, 16)] {
            let (mut streamed, mut decoded, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                let (s, d) = (stream(&buffer, threads), decode(&buffer, &scales, rows, columns, bits, tokens));
                streamed.push(s / 1e9);
                decoded.push(d / 1e9);
                ratios.push(d / s);
            }
            println!(
                "{:>14} {bits:>5} {tokens:>7} {:>12.2} {:>12.2} {:>7.2}",
                format!("{rows}x{columns}"),
                median(streamed),
                median(decoded),
                median(ratios)
            );
        }
    }
}
