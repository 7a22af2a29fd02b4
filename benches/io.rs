//! Loading a delta against what the machine can do, in the same run: from the disk against plain direct reads, from the
//! page cache against copies in memory, and what is left of decoding meanwhile.
//!
//!     cargo bench --bench io
//!
//! A delta of a gigabyte, of tensors in the sizes of a 7B model's at 2 bits, is written below the target folder. Ways
//! take turns, one round after another; rates are medians, and ratios are medians of the rounds' own ratios.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use memmap2::{Advice, Mmap};
use meswitch_core::Region;
use meswitch_core::checkpoint::Checkpoint;
use meswitch_core::delta::{Assembly, Delta, Kind, SiteEntry, SiteKind, TENSORS, checksum};
use meswitch_core::kernels::threads;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

/// Decoder layers of the delta.
const LAYERS: usize = 20;
/// Rows and columns of a layer's tensors, of bfloat16: in bytes codes of attention and MLP, their scales, two norms.
const SHAPES: [(usize, usize); 16] = [
    (2048, 1024),
    (2048, 1024),
    (2048, 1024),
    (2048, 1024),
    (5504, 1024),
    (5504, 1024),
    (5504, 1024),
    (4096, 1),
    (4096, 1),
    (4096, 1),
    (4096, 1),
    (11008, 1),
    (11008, 1),
    (4096, 1),
    (4096, 1),
    (4096, 1),
];
/// Rows and columns of embeddings and head.
const VOCABULARY: (usize, usize) = (16000, 1024);
/// Bytes of one plain read or copy.
const BLOCK_BYTES: usize = 1 << 22;
/// How often every way has its turn.
const ROUNDS: usize = 5;

fn site(name: String, (rows, columns): (usize, usize)) -> SiteEntry {
    SiteEntry {
        name,
        shape: vec![rows, columns],
        dtype: Dtype::BF16,
        kind: SiteKind::Replaced,
        transposed: false,
        owner: None,
        bytes: 0,
        bpw: 0.0,
        relative_error: 0.0,
        checksums: Vec::new(),
    }
}

/// Writes a delta whose tensors are stored whole. Returns its folder.
fn write_delta(root: &Path) -> PathBuf {
    let mut sites = vec![site("embeddings".to_owned(), VOCABULARY)];
    for layer in 0..LAYERS {
        sites.extend(SHAPES.iter().enumerate().map(|(at, shape)| site(format!("layer.{layer}.{at}"), *shape)));
    }
    sites.push(site("head".to_owned(), VOCABULARY));
    let view = || TensorView::new(Dtype::BF16, vec![1], &[0, 0]).expect("a view");
    let base = sites.iter().map(|site| (site.name.clone(), view()));
    serialize_to_file(base, None, &root.join("model.safetensors")).expect("a checkpoint");
    let base = Checkpoint::open(root, &["model.safetensors".to_owned()]).expect("a base");
    let (out, settings) = (root.join("delta"), serde_json::Value::Null);
    let assembly = Assembly { kind: Kind::Delta, base: &base, out: &out, files: &[], settings, base_name: "bench" };
    let tensors = |site: &SiteEntry| {
        let values = site.shape.iter().product::<usize>() as u32;
        let value = |i: u32| ((i.wrapping_mul(2_654_435_761) >> 16) as u16 & 0xbfff).to_le_bytes();
        Ok(vec![(0..values).flat_map(value).collect()])
    };
    assembly.write_given(&sites, &mut |_| true, &mut { tensors }).expect("a delta");
    out
}

/// Drops a file from the page cache, so that the next read comes from the disk.
fn drop_from_cache(path: &Path) {
    let file = File::open(path).expect("the tensors");
    file.sync_all().expect("a sync");
    // SAFETY: an open descriptor; the call takes no pointers.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
}

/// Reads a file past the page cache, one block after another, to the places of these blocks.
fn read_direct<'a>(path: &Path, blocks: impl Iterator<Item = &'a mut [u8]>) {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).expect("a disk");
    let mut position = 0;
    for block in blocks {
        position += file.read_at(block, position).expect("a read") as u64;
    }
}

/// Copies on several threads.
fn copy(from: &[u8], to: &mut [u8], threads: usize) {
    let share = from.len().div_ceil(threads);
    thread::scope(|scope| {
        for (from, to) in from.chunks(share).zip(to.chunks_mut(share)) {
            scope.spawn(|| to.copy_from_slice(from));
        }
    });
}

/// Reads memory on the threads of kernels.
fn stream(memory: &[u8]) {
    threads::run_on_all(&|index, threads| {
        let words: &[u64] = bytemuck::cast_slice(&memory[..memory.len() / 8 * 8]);
        let share = words.len() / threads / 32 * 32;
        let mut lanes = [0u64; 32];
        for words in words[index * share..(index + 1) * share].chunks_exact(32) {
            lanes.iter_mut().zip(words).for_each(|(lane, word)| *lane = lane.wrapping_add(*word));
        }
        black_box(lanes);
    });
}

/// Seconds that this process has used of processors.
fn processor_seconds() -> f64 {
    // SAFETY: `usage` is a valid record for the call to fill in.
    let usage = unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

fn seconds<T>(work: impl FnOnce() -> T) -> f64 {
    let start = Instant::now();
    black_box(work());
    start.elapsed().as_secs_f64()
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A way of doing something with all bytes, by name; it returns the seconds that count.
type Way<'a> = (&'static str, Box<dyn FnMut() -> f64 + 'a>);

/// Runs ways in turns, and prints their rates and each one's ratio to the first.
fn compare(title: &str, bytes: usize, mut ways: Vec<Way<'_>>) {
    let (mut times, mut used) = (vec![Vec::new(); ways.len()], vec![Vec::new(); ways.len()]);
    for _ in 0..ROUNDS {
        for (at, (_, run)) in ways.iter_mut().enumerate() {
            // What a way frees is soon as dear to get as any memory; all find as much that was just freed.
            Region::new(bytes).expect("memory").fill(1);
            let start = processor_seconds();
            times[at].push(run());
            used[at].push(processor_seconds() - start);
        }
    }
    println!("\n{title:<40} {:>8} {:>9} {:>6} {:>9}", "ms", "ms of CPU", "GB/s", "of first");
    for ((name, _), (of_way, used)) in ways.iter().zip(times.iter().zip(used)) {
        let time = median(of_way.iter().copied());
        let used = 1e3 * median(used.into_iter());
        let ratio = median(of_way.iter().zip(&times[0]).map(|(time, first)| first / time));
        let rate = bytes as f64 / 1e9 / time;
        println!("{name:<40} {:>8.1} {used:>9.1} {rate:>6.2} {:>8.0}%", time * 1e3, ratio * 100.0);
    }
}

fn from_disk(folder: &Path, bytes: usize) {
    let file = folder.join(TENSORS);
    let mut buffer = Region::new(BLOCK_BYTES).expect("memory");
    let cold = |work: &mut dyn FnMut()| {
        drop_from_cache(&file);
        seconds(work)
    };
    let delta = Delta::open(folder).expect("sound");
    delta.tensors().expect("sound"); // verified
    let ways: Vec<Way<'_>> = vec![
        ("direct reads, one after another", {
            Box::new(|| {
                cold(&mut || {
                    let mut memory = Region::new(bytes.next_multiple_of(BLOCK_BYTES)).expect("memory");
                    read_direct(&file, memory.chunks_mut(BLOCK_BYTES));
                })
            })
        }),
        ("the same into one block of memory", {
            Box::new(|| {
                cold(&mut || {
                    let mut position = 0;
                    let direct =
                        OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&file).expect("a disk");
                    while position < bytes as u64 {
                        let n = direct.read_at(&mut buffer, position).expect("a read") as u64;
                        if n == 0 {
                            break;
                        }
                        position += n;
                    }
                })
            })
        }),
        ("first load", {
            Box::new(|| {
                let delta = Delta::open(folder).expect("sound");
                cold(&mut || drop(delta.tensors().expect("sound")))
            })
        }),
        ("later load", Box::new(|| cold(&mut || drop(delta.tensors().expect("sound"))))),
        ("map, populate", Box::new(|| cold(&mut || drop(map(&file))))),
    ];
    compare("from the disk", bytes, ways);
}

/// Maps a file and brings in all of its pages.
fn map(path: &Path) -> Mmap {
    let file = File::open(path).expect("the tensors");
    // SAFETY: nobody writes to the file.
    let map = unsafe { Mmap::map(&file) }.expect("a map");
    map.advise(Advice::PopulateRead).expect("pages");
    map
}

fn from_cache(folder: &Path, bytes: usize) {
    let file = folder.join(TENSORS);
    let source = fs::read(&file).expect("the tensors");
    let delta = Delta::open(folder).expect("sound");
    delta.tensors().expect("sound");
    let mut there = Region::new(source.len()).expect("memory");
    let new = || Region::new(source.len()).expect("memory");
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let ways: Vec<Way<'_>> = vec![
        ("copy into new memory", Box::new(|| seconds(|| copy(&source, &mut new(), cores)))),
        ("copy into memory that is there", Box::new(|| seconds(|| copy(&source, &mut there, cores)))),
        ("first load", {
            Box::new(|| {
                let delta = Delta::open(folder).expect("sound");
                seconds(|| delta.tensors().expect("sound"))
            })
        }),
        ("later load", Box::new(|| seconds(|| delta.tensors().expect("sound")))),
        ("map, populate", Box::new(|| seconds(|| map(&file)))),
        ("verify", Box::new(|| seconds(|| delta.verify().expect("sound")))),
        ("checksum of it", Box::new(|| seconds(|| checksum(&source)))),
    ];
    compare("from the page cache", bytes, ways);
}

fn streams(folder: &Path, bytes: usize) {
    let tensors = Delta::open(folder).and_then(|delta| delta.tensors()).expect("sound");
    let map = map(&folder.join(TENSORS));
    let ways: Vec<Way<'_>> = vec![
        ("a loaded delta", Box::new(|| seconds(|| stream(tensors.region())))),
        ("a mapped file", Box::new(|| seconds(|| stream(&map)))),
    ];
    compare("read by kernels' threads", bytes, ways);
}

/// What is left of the rate of kernels' threads while a delta is loaded, and how long that takes.
fn decoding_beside_loads(folder: &Path, bytes: usize) {
    let (delta, file) = (Delta::open(folder).expect("sound"), folder.join(TENSORS));
    let memory = delta.tensors().expect("sound");
    // Larger than caches, and a token's worth: a load does not wait for the end of it.
    let part = &memory.region()[..bytes / 8];
    let rate_until = |end: &dyn Fn() -> bool| {
        let (start, mut passes) = (Instant::now(), 0);
        while !end() {
            stream(part);
            passes += 1;
        }
        f64::from(passes) / start.elapsed().as_secs_f64()
    };
    println!("\n{:<40} {:>8} {:>6} {:>9}", "kernels' threads beside a load", "ms", "GB/s", "keep");
    for (name, cold) in [("from the disk", true), ("from the page cache", false)] {
        let (mut times, mut kept) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            let (start, ended) = (Instant::now(), AtomicBool::new(false));
            let alone = rate_until(&|| start.elapsed().as_secs_f64() > 1.0);
            if cold {
                drop_from_cache(&file);
            }
            let beside = thread::scope(|scope| {
                let load = scope.spawn(|| {
                    let delta = Delta::open(folder).expect("sound");
                    let time = seconds(|| delta.tensors().expect("sound"));
                    ended.store(true, Ordering::Relaxed);
                    time
                });
                let beside = rate_until(&|| ended.load(Ordering::Relaxed));
                times.push(load.join().expect("a load"));
                beside
            });
            kept.push(beside / alone);
        }
        let time = median(times.into_iter());
        let kept = 100.0 * median(kept.into_iter());
        println!("{name:<40} {:>8.1} {:>6.2} {kept:>8.0}%", time * 1e3, bytes as f64 / 1e9 / time);
    }
}

fn main() {
    // Kernels run on its threads, as under torch.
    const OPENMP: &CStr = c"libgomp.so.1";
    // SAFETY: a C string; libgomp's initialisers have no preconditions.
    unsafe { libc::dlopen(OPENMP.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder");
    let folder = write_delta(root.path());
    let delta = Delta::open(&folder).expect("sound");
    let bytes = delta.bytes() as usize;
    // A file that was just written would be verified at every load.
    thread::sleep(Duration::from_secs(3));
    println!("{} sites, {:.2} GB", delta.manifest().sites.len(), bytes as f64 / 1e9);
    println!("open and validate: {:.2} ms", 1e3 * median((0..99).map(|_| seconds(|| Delta::open(&folder)))));
    from_disk(&folder, bytes);
    from_cache(&folder, bytes);
    streams(&folder, bytes);
    decoding_beside_loads(&folder, bytes);
}
