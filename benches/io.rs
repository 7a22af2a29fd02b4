//! The I/O paths of a delta directory, in GB/s: open, load into memory cold and warm, verify, checksum.

use std::fs::{self, File};
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::path::Path;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use meswitch_core::checkpoint::Checkpoint;
use meswitch_core::codec::{Settings, Zero};
use meswitch_core::compress::{Job, Plan};
use meswitch_core::delta::{Delta, Kind, TENSORS, checksum};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

const SITES: usize = 16;
const SIDE: usize = 2048;

/// Writes a checkpoint of bf16 matrices. Another seed changes every weight a little.
fn save(folder: &Path, seed: u32) {
    fs::create_dir_all(folder).expect("a folder");
    let data: Vec<Vec<u8>> = (0..SITES as u32)
        .map(|site| {
            (0..(SIDE * SIDE) as u32)
                .flat_map(|i| (0x3c00 + (i.wrapping_mul(site + 7 + seed) >> 9) as u16 % 64).to_le_bytes())
                .collect()
        })
        .collect();
    let views = data.iter().enumerate().map(|(at, data)| {
        (format!("site.{at}.weight"), TensorView::new(Dtype::BF16, vec![SIDE, SIDE], data).expect("a view"))
    });
    serialize_to_file(views, None, &folder.join("model.safetensors")).expect("a checkpoint");
}

fn delta(root: &Path) -> Delta {
    save(&root.join("base"), 0);
    save(&root.join("finetune"), 2);
    let files = ["model.safetensors".to_owned()];
    let (base, finetune) = (
        Checkpoint::open(&root.join("base"), &files).expect("base"),
        Checkpoint::open(&root.join("finetune"), &files).expect("fine-tune"),
    );
    let settings = Settings { zero: Zero::Symmetric, ..Settings::default() };
    let plans: Vec<Plan> = finetune
        .names()
        .iter()
        .map(|name| Plan {
            name: name.clone(),
            transposed: false,
            owner: None,
            quantize: Some(settings.clone()),
            moments: None,
        })
        .collect();
    let job = Job {
        kind: Kind::Delta,
        base: &base,
        finetune: &finetune,
        plans: &plans,
        out: &root.join("delta"),
        files: &[],
        settings: serde_json::Value::Null,
        base_name: "bench",
    };
    job.run(&mut |_| true, &mut |_| Ok(None)).expect("a delta")
}

/// Drops a file from the page cache, so that the next read comes from the disk.
fn drop_from_cache(path: &Path) {
    let file = File::open(path).expect("the tensors");
    file.sync_all().expect("a sync");
    // SAFETY: an open descriptor; the call takes no pointers.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}

fn io(c: &mut Criterion) {
    let root = tempfile::tempdir().expect("a folder");
    let delta = delta(root.path());
    let (folder, file) = (root.path().join("delta"), root.path().join("delta").join(TENSORS));
    let bytes = delta.bytes();
    let mut group = c.benchmark_group("io");
    group.sample_size(20);
    group.bench_function("open and validate", |b| b.iter(|| Delta::open(black_box(&folder)).expect("sound")));
    group.throughput(Throughput::BytesDecimal(bytes));
    group.bench_function("load warm", |b| b.iter(|| black_box(&delta).tensors().expect("sound")));
    let cold = root.path().join("cold");
    fs::create_dir(&cold).expect("a folder");
    for name in ["meswitch.json", TENSORS] {
        fs::copy(folder.join(name), cold.join(name)).expect("a copy");
    }
    group.bench_function("load cold", |b| {
        b.iter_batched(
            || {
                drop_from_cache(&cold.join(TENSORS));
                Delta::open(&cold).expect("sound")
            },
            |delta| delta.tensors().expect("sound"),
            BatchSize::PerIteration,
        );
    });
    group.bench_function("verify", |b| b.iter(|| delta.verify().expect("sound")));
    let whole = fs::read(&file).expect("the tensors");
    group.bench_function("checksum", |b| b.iter(|| checksum(black_box(&whole))));
    group.finish();
}

criterion_group!(benches, io);
criterion_main!(benches);
