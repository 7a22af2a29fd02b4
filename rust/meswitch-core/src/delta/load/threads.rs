//! The threads that load.
//!
//! A load starts threads of its own and ends them with it. That costs less than a thousandth of reading a gigabyte,
//! and unlike a pool it works in a forked process, lets one load overtake another, and leaves no thread behind.

use std::slice::IterMut;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder};

use super::fill::Scratch;
use super::plan::Job;
use crate::error::{Error, Result};

/// What the threads of one load share.
struct Shared<'a, 'b> {
    /// The jobs that nobody has begun, in the file's order.
    jobs: IterMut<'a, Job<'b>>,
    /// The place of the next one.
    next: usize,
    /// The first error in the file's order, and its place.
    error: Option<(usize, Error)>,
}

/// Work on one job.
type Work<'a> = &'a (dyn Fn(&mut Job<'_>, &mut Scratch) -> Result<()> + Sync);

/// Runs every job, a single one on the calling thread, others on several. After an error no job is begun.
///
/// # Errors
/// Of the jobs that failed, the error of the first.
pub(super) fn run(jobs: &mut [Job<'_>], work: Work<'_>) -> Result<()> {
    let threads = jobs.len().min(thread_count());
    let shared = Mutex::new(Shared { jobs: jobs.iter_mut(), next: 0, error: None });
    thread::scope(|scope| {
        let load = || {
            lower_priority();
            drain(&shared, work);
        };
        let start = |_| Builder::new().name("meswitch load".to_owned()).spawn_scoped(scope, load).is_ok();
        let started = if threads > 1 { (0..threads).take_while(|index| start(*index)).count() } else { 0 };
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
    while let Some((index, job)) = next(shared) {
        let Err(error) = work(job, &mut scratch) else { continue };
        let mut shared = lock(shared);
        if shared.error.as_ref().is_none_or(|(first, _)| index < *first) {
            shared.error = Some((index, error));
        }
    }
}

fn next<'a, 'b>(shared: &Mutex<Shared<'a, 'b>>) -> Option<(usize, &'a mut Job<'b>)> {
    let mut shared = lock(shared);
    if shared.error.is_some() {
        return None;
    }
    let job = shared.jobs.next()?;
    shared.next += 1;
    Some((shared.next - 1, job))
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

/// Beside two threads that decode, four that load get a tenth of the time at most.
#[cfg(target_os = "linux")]
const NICE: i32 = 15;
