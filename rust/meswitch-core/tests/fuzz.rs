//! The fuzz targets of `fuzz/` on their corpus, and on random changes of it.
#![cfg(not(miri))] // maps files

#[path = "../../../fuzz/src/lib.rs"]
#[allow(clippy::missing_panics_doc, dead_code, unreachable_pub)]
mod targets;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Seconds for each target's changes; a few thousand changes where it is not set.
const SECONDS: &str = "MESWITCH_FUZZ_SECONDS";

/// What numbers in JSON are changed to.
const NUMBERS: [&str; 12] = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "255",
    "4294967295",
    "2147483648",
    "9223372036854775807",
    "18446744073709551615",
    "1e300",
    "null",
];

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(target);
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Pseudorandom numbers, the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % limit.max(1)
    }

    /// Changes some bytes: flipped, removed, repeated, or a number for another.
    fn change(&mut self, data: &mut Vec<u8>) {
        for _ in 0..=self.below(3) {
            let at = self.below(data.len());
            match self.below(5) {
                0 if !data.is_empty() => data[at] ^= 1 << self.below(8),
                1 => drop(data.drain(at..(at + self.below(9)).min(data.len()))),
                2 => {
                    let end = (at + self.below(40)).min(data.len());
                    let copy = data[at..end].to_vec();
                    let to = self.below(data.len());
                    data.splice(to..to, copy);
                }
                _ => {
                    let digit = |byte: &u8| byte.is_ascii_digit();
                    let Some(start) = data[at.min(data.len())..].iter().position(digit).map(|found| at + found) else {
                        continue;
                    };
                    let length = data[start..].iter().take_while(|byte| digit(byte)).count();
                    let number = NUMBERS[self.below(NUMBERS.len())];
                    data.splice(start..start + length, number.bytes());
                }
            }
        }
    }
}

fn replay(target: &str, run: fn(&[u8])) {
    let corpus = corpus(target);
    corpus.iter().for_each(|data| run(data));
    let seconds = std::env::var(SECONDS).ok().and_then(|seconds| seconds.parse().ok()).map(Duration::from_secs);
    let (start, mut random, mut count) = (Instant::now(), Random(0x9e37_79b9_7f4a_7c15), 0u64);
    while seconds.map_or(count < 2000, |seconds| start.elapsed() < seconds) {
        let mut data = corpus[random.below(corpus.len())].clone();
        random.change(&mut data);
        run(&data);
        count += 1;
    }
    println!("{target}: {count} changes");
}

#[test]
fn manifests() {
    replay("manifest", targets::manifest);
}

#[test]
fn directories() {
    replay("directory", targets::directory);
}

#[test]
fn checkpoints() {
    replay("checkpoint", targets::checkpoint);
}

#[test]
fn journals() {
    replay("journal", targets::journal);
}
