//! Decode kernels against the machine's own streaming rate, measured in the same run: GB/s of packed codes, and ratios.
//!
//!     cargo bench --bench kernels [-- BACKEND ...]
//!
//! Matrices are cycled through half a gigabyte, so that codes come from memory and not from a cache. Short passes of
//! the kernel alternate with passes that only read, on the same threads (libgomp's, as under torch, where it can be
//! loaded). A kernel's pass counts if it was not preempted and memory was fast just before and just after it; the ratio
//! is to the mean of those two reads.
//! *One by one* is the same ratio of plain reads of as many bytes as a matrix has, each in a call of its own: the cost of starting
//! and ending a call. Every backend and number of threads runs in its own process.

use std::ffi::CStr;
use std::hint::black_box;
use std::process::Command;
use std::time::Instant;

use half::f16;
use meswitch_core::kernels::{Matrix, Part, Terms, available, backend, delta_linear, threads};
use meswitch_core::layout::part_bytes;

/// Bytes of all matrices together.
const BUFFER_BYTES: usize = 1 << 29;
/// Bytes that the streaming read prefetches ahead; a tenth faster than without.
#[cfg(target_arch = "x86_64")]
const PREFETCH_BYTES: usize = 6144;
/// The least bytes of a pass: a few tenths of a millisecond.
const PASS_BYTES: usize = 1 << 22;
/// Passes that must count.
const PASSES: usize = 15;
/// Seconds after which a case makes do with fewer.
const MAX_SECONDS: f64 = 1.5;
/// Memory is fast at this share of the fastest read so far.
const FAST_SHARE: f64 = 0.8;
const SHAPES: [(usize, usize); 4] = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)];
/// Bits, tokens, columns that share a scale (0: the whole row).
const CASES: [(u32, usize, usize); 13] = [
    (1, 1, 0),
    (2, 1, 0),
    (3, 1, 0),
    (4, 1, 0),
    (8, 1, 0),
    (2, 1, 128),
    (1, 4, 0),
    (1, 16, 0),
    (2, 2, 0),
    (2, 4, 0),
    (2, 8, 0),
    (2, 16, 0),
    (4, 16, 0),
];

/// Sums a buffer's words on all threads: about the fastest that memory can be read.
fn stream(buffer: &[u8]) {
    threads::run_on_all(&|index, threads| {
        let share = buffer.len() / threads / 256 * 256;
        black_box(sum(&buffer[index * share..(index + 1) * share]));
    });
}

fn sum(part: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has AVX-512 F.
        return unsafe { sum_wide(part) };
    }
    sum_words(part)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_wide(part: &[u8]) -> u64 {
    sum_words(part)
}

#[inline(always)]
fn sum_words(part: &[u8]) -> u64 {
    let mut lanes = [0u64; 32];
    for words in part.chunks_exact(256) {
        #[cfg(target_arch = "x86_64")]
        for line in 0..4 {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a prefetch is a hint and never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(words.as_ptr().wrapping_add(line * 64 + PREFETCH_BYTES).cast()) };
        }
        for (lane, word) in lanes.iter_mut().zip(words.chunks_exact(8)) {
            *lane = lane.wrapping_add(u64::from_le_bytes(word.try_into().expect("eight")));
        }
    }
    lanes.iter().fold(0, |all, lane| all.wrapping_add(*lane))
}

/// How often this process was preempted.
fn preemptions() -> i64 {
    // SAFETY: `usage` is a valid record for the call to fill in.
    unsafe {
        let mut usage = std::mem::zeroed::<libc::rusage>();
        libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
        usage.ru_nivcsw
    }
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The result of a case: medians of the passes that counted.
struct Measurement {
    /// GB/s of streaming reads.
    streamed: f64,
    /// GB/s of codes.
    codes: f64,
    /// `codes / streamed`.
    ratio: f64,
    /// The same ratio for plain reads one by one.
    one_by_one: f64,
    /// How many passes counted.
    passes: usize,
}

/// Measures one case. `fastest` is the fastest read of all cases so far, in GB/s.
fn measure<'a>(
    buffer: &'a [u8],
    scales: &'a [f16],
    (rows, columns): (usize, usize),
    (bits, tokens, group): (u32, usize, usize),
    fastest: &mut f64,
) -> Measurement {
    let x: Vec<f32> = (0..tokens * columns).map(|i| (i % 17) as f32 - 8.0).collect();
    let group = if group == 0 { columns } else { group };
    let size = part_bytes(bits, rows, columns).expect("a size");
    let scales = &scales[..rows * columns / group];
    let matrix = |codes: &'a [u8]| {
        let parts = vec![Part { bits, zero: 1.5, group, rows: None, codes, scales }];
        Matrix::new(rows, columns, 0, Terms { parts, ..Terms::default() }).expect("lengths that fit")
    };
    let matrices: Vec<Matrix<'_>> = buffer.chunks_exact(size).map(matrix).collect();
    let count = PASS_BYTES.div_ceil(size);
    let bytes = (count * size) as f64 / 1e9;
    let (start, mut first) = (Instant::now(), 0);
    let mut next = || {
        first = (first + count) % (matrices.len() - count + 1);
        first
    };
    let (mut counted, mut disturbed) = (Vec::new(), Vec::new());
    let read = |first: usize| bytes / seconds(|| stream(&buffer[first * size..(first + count) * size]));
    let mut before = read(next());
    while counted.len() < PASSES && start.elapsed().as_secs_f64() < MAX_SECONDS {
        let (preempted, from) = (preemptions(), next());
        let spent = seconds(|| {
            for matrix in &matrices[from..from + count] {
                delta_linear(matrix, &x, false, &|_, _, values| {
                    black_box(values);
                });
            }
        });
        let from = next();
        let one_by_one = seconds(|| buffer[from * size..(from + count) * size].chunks_exact(size).for_each(stream));
        let after = read(next());
        *fastest = fastest.max(before).max(after);
        let pass = (f64::midpoint(before, after), bytes / spent, bytes / one_by_one);
        let undisturbed = preemptions() == preempted && before.min(after) > FAST_SHARE * *fastest;
        if undisturbed {
            counted.push(pass);
        } else {
            disturbed.push(pass);
        }
        before = after;
    }
    let passes = counted.len();
    let used = if passes == 0 { disturbed } else { counted };
    let median_of = |value: fn(&(f64, f64, f64)) -> f64| median(used.iter().map(value).collect());
    Measurement {
        streamed: median_of(|p| p.0),
        codes: median_of(|p| p.1),
        ratio: median_of(|p| p.1 / p.0),
        one_by_one: median_of(|p| p.2 / p.0),
        passes,
    }
}

/// Measures all cases in this process and prints a table.
fn table() {
    let buffer: Vec<u8> = (0..BUFFER_BYTES).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let scales = vec![f16::ONE; 14336 * 4096 / 128];
    println!("\nbackend {}, threads {}, OpenMP {}", backend(), threads::thread_count(), threads::uses_openmp());
    println!(
        "{:>12} {:>5} {:>6} {:>7} {:>12} {:>11} {:>6} {:>10} {:>9} {:>6}",
        "shape", "bits", "group", "tokens", "stream GB/s", "codes GB/s", "ratio", "one by one", "x 1 token", "passes"
    );
    let mut fastest = 0f64;
    for shape in SHAPES {
        let mut alone = [0f64; 9];
        for case in CASES {
            let (bits, tokens, group) = case;
            let measured = measure(&buffer, &scales, shape, case, &mut fastest);
            if tokens == 1 && group == 0 {
                alone[bits as usize] = measured.ratio;
            }
            println!(
                "{:>12} {bits:>5} {:>6} {tokens:>7} {:>12.2} {:>11.2} {:>6.2} {:>10.2} {:>9.2} {:>6}",
                format!("{}x{}", shape.0, shape.1),
                if group == 0 { "row".to_owned() } else { group.to_string() },
                measured.streamed,
                measured.codes,
                measured.ratio,
                measured.one_by_one,
                alone[bits as usize] / measured.ratio,
                measured.passes,
            );
        }
    }
}

fn main() {
    const NAME: &CStr = c"libgomp.so.1";
    if std::env::var_os("MESWITCH_BENCH_CHILD").is_some() {
        // SAFETY: a C string; libgomp's initialisers have no preconditions.
        unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        return table();
    }
    let asked: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let all: Vec<String> = available().map(|backend| backend.to_string()).filter(|name| name != "scalar").collect();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for name in if asked.is_empty() { all } else { asked } {
        for threads in [cores, 1] {
            let threads = threads.to_string();
            let program = std::env::current_exe().expect("a path");
            let status = Command::new(program)
                .envs([("MESWITCH_BENCH_CHILD", "1"), ("MESWITCH_BACKEND", &name)])
                .envs([("OMP_NUM_THREADS", &threads), ("RAYON_NUM_THREADS", &threads)])
                .status();
            assert!(status.is_ok_and(|status| status.success()), "{name}");
        }
    }
}
