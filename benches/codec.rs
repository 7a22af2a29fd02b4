//! The codec, in GB/s of 16-bit weights of one model read: fitting a row, and a whole site from mapped memory.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use meswitch_core::checkpoint::{Content, View};
use meswitch_core::codec::{Pair, Settings, fit, quantize};
use meswitch_core::layout;
use safetensors::tensor::Dtype;

const OUT: usize = 1024;
const IN: usize = 4096;

fn weights(seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    (0..OUT * IN)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            bf16::from_f32((state >> 8) as f32 / (1 << 24) as f32 - 0.5).to_le_bytes()
        })
        .collect()
}

fn view(data: &[u8]) -> View<'_> {
    View { dtype: Dtype::BF16, shape: vec![OUT, IN], data: Content::Borrowed(data) }
}

fn rows(c: &mut Criterion) {
    let mut delta = vec![0f32; IN];
    view(&weights(3)).read(0, &mut delta);
    let (ones, mut codes) = (vec![1f32; IN], vec![0u8; IN]);
    let mut group = c.benchmark_group("row of 4096");
    group.throughput(Throughput::BytesDecimal(2 * IN as u64));
    for bits in layout::BITS {
        group.bench_function(format!("fit at {bits} bits"), |b| {
            b.iter(|| fit::fit_row(black_box(&delta), &ones, bits, fit::max_code(bits) / 2.0, 0.0, &mut codes));
        });
        let mut packed = vec![0; layout::row_bytes(bits, IN)];
        group.bench_function(format!("pack at {bits} bits"), |b| {
            b.iter(|| layout::pack_row(black_box(&codes), bits, &mut packed));
        });
    }
    group.finish();
}

fn sites(c: &mut Criterion) {
    let (base, finetune) = (weights(1), weights(2));
    let mut group = c.benchmark_group("site of 1024 x 4096");
    group.sample_size(10).throughput(Throughput::BytesDecimal(2 * (OUT * IN) as u64));
    let plain = Settings::default();
    let kinds = [
        ("2 bits", plain.clone()),
        ("2 bits, column scales", Settings { column_scales: true, ..plain.clone() }),
        ("2 bits, 8 salient channels", Settings { salient: 8, ..plain.clone() }),
        ("1 bit over rank 1", Settings { bits: 1, rank: 1, ..plain }),
    ];
    for (name, settings) in kinds {
        group.bench_function(name, |b| {
            b.iter(|| {
                let pair = Pair::new("bench", view(&base), view(&finetune), false).expect("a pair");
                quantize(&pair, None, &settings, &mut || Ok(None)).expect("finite")
            });
        });
    }
    group.finish();
}

criterion_group!(benches, rows, sites);
criterion_main!(benches);
