//! The threads that load.
//!
//! A load starts threads of its own and ends them with it. That costs less than a thousandth of reading a gigabyte,
//! and unlike a pool it works in a forked process, lets one load overtake another, and leaves no thread behind.

use std::slice::ChunksMut;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder};

use super::fill::Scratch;
use super::plan::Job;
use crate::error::{Error, Result};

/// Jobs that a thread takes at a time. Two threads that read into the same huge page at the same time both have it
/// zeroed, so each should stay in pages of its own for a while.
const BATCH: usize = 8;

/// What the threads of one load share.
struct Shared<'a, 'b> {
    /// The jobs that nobody has taken, in the file's order.
    batches: ChunksMut<'a, Job<'b>>,
    /// How many batches were taken.
    taken: usize,
    /// The first error in the file's order, and its batch.
    error: Option<(usize, Error)>,
}

/// Work on one job.
type Work<'a> = &'a (dyn Fn(&mut Job<'_>, &mut Scratch) -> Result<()> + Sync);

/// Runs every job, a single one on the calling thread, others on several, which have a low priority where the load
/// `yields`. After an error no batch is begun.
///
/// # Errors
/// Of the jobs that failed, the error of the first.
pub(super) fn run(jobs: &mut [Job<'_>], yields: bool, work: Work<'_>) -> Result<()> {
    let threads = jobs.len().min(thread_count());
    let batch = (jobs.len() / (2 * threads).max(1)).clamp(1, BATCH);
    let shared = Mutex::new(Shared { batches: jobs.chunks_mut(batch), taken: 0, error: None });
    thread::scope(|scope| {
        let load = || {
            if yields {
                lower_priority();
            }
            drain(&shared, work);
        };
        let start = |_: &usize| Builder::new().name("meswitch load".to_owned()).spawn_scoped(scope, load).is_ok();
        let started = if threads > 1 { (0..threads).take_while(start).count() } else { 0 };
        if started == 0 {
            drain(&shared, work);
        }
    });
    let error = lock(&shared).error.take();
    error.map_or(Ok(()), |(_, error)| Err(error))
}

/// Runs jobs until there are none, or one has failed.
fn drain(shared: &Mutex<Shared<'_, '_>>, work: Work<'_>) {
    let mut scratch = Scratch::default();
    while let Some((index, batch)) = next(shared) {
        let Err(error) = batch.iter_mut().try_for_each(|job| work(job, &mut scratch)) else { continue };
        let mut shared = lock(shared);
        if shared.error.as_ref().is_none_or(|(first, _)| index < *first) {
            shared.error = Some((index, error));
        }
    }
}

fn next<'a, 'b>(shared: &Mutex<Shared<'a, 'b>>) -> Option<(usize, &'a mut [Job<'b>])> {
    let mut shared = lock(shared);
    if shared.error.is_some() {
        return None;
    }
    let batch = shared.batches.next()?;
    shared.taken += 1;
    Some((shared.taken, batch))
}

fn lock<'a, T>(mutex: &'a Mutex<T>) -> MutexGuard<'a, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Enough to keep a disk busy, and on machines of many cores to copy and hash what is in memory already.
fn thread_count() -> usize {
    thread::available_parallelism().map_or(1, usize::from).clamp(4, 16)
}

/// Lets the calling thread run where others leave time: those that decode go on at their speed.
fn lower_priority() {
    #[cfg(target_os = "linux")] // elsewhere this is the priority of the whole process
    let _ = rustix::process::setpriority_process(None, NICE);
}

/// Measured beside two threads that decode: those keep five sixths of their speed. At a lower priority yet loads starve.
#[cfg(target_os = "linux")]
const NICE: i32 = 15;
