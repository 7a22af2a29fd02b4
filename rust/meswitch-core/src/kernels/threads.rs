//! The threads that kernels run on.
//!
//! Where the process has loaded torch, kernels run on the threads of torch's own OpenMP runtime. A second thread pool
//! would make every later torch operator slower, because its threads and torch's would spin against each other.
//! Without torch, a loaded libgomp serves, then rayon's global pool; without rayon (feature `rayon` off), the calling
//! thread does the work.
//!
//! Neither pool's threads survive a fork, and a child that waits for them waits forever. After
//! [`watch_forks`], a forked child runs kernels on the calling thread alone.

mod openmp;

use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use self::openmp::OpenMp;

/// Multiplications below which waking other threads costs more than it saves.
pub(crate) const MIN_PARALLEL_WORK: usize = 1 << 18;

/// Work divided by thread index and number of threads.
type Work<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// Whether this process is a forked child.
static FORKED: AtomicBool = AtomicBool::new(false);

/// Registers a fork handler: kernels of children forked from now on run on one thread. Does nothing outside Unix.
pub fn watch_forks() {
    #[cfg(unix)]
    {
        extern "C" fn forked() {
            FORKED.store(true, Ordering::Relaxed);
        }
        // SAFETY: the handler only stores an atomic flag, which is allowed in a forked child.
        unsafe { libc::pthread_atfork(None, None, Some(forked)) };
    }
}

/// Runs `work` on the calling thread. Its rayon calls use the global pool; in a forked child, whose copy of that pool
/// has no threads, a pool of the calling thread's own.
///
/// # Panics
/// In a forked child that cannot start threads.
#[cfg(feature = "rayon")]
#[doc(hidden)]
pub fn with_rayon_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    use std::cell::OnceCell;
    use std::process;

    use rayon::{ThreadPool, ThreadPoolBuilder};

    thread_local! {
        /// The pool that the thread belongs to, and the process that has its other threads.
        static OWN: OnceCell<(u32, Option<ThreadPool>)> = const { OnceCell::new() };
    }
    if !FORKED.load(Ordering::Relaxed) {
        return work();
    }
    let process = OWN
        .with(|own| own.get_or_init(|| (process::id(), ThreadPoolBuilder::new().use_current_thread().build().ok())).0);
    if process == process::id() {
        return work();
    }
    // Forked again: this thread cannot leave its pool, so another thread takes the work to a new one.
    ThreadPoolBuilder::new().build().expect("a forked child can start threads").install(work)
}

/// Calls `work(index, threads)` once on each thread and returns after the last call. A panic in one of them is resumed
/// on the calling thread once the others have ended.
#[doc(hidden)]
pub fn run_on_all(work: Work<'_>) {
    if FORKED.load(Ordering::Relaxed) {
        return work(0, 1);
    }
    match openmp::loaded() {
        Some(openmp) => run_on_openmp(openmp, work),
        None => run_without_openmp(work),
    }
}

#[cfg(feature = "rayon")]
fn run_without_openmp(work: Work<'_>) {
    let threads = rayon::current_num_threads();
    rayon::scope(|scope| {
        for index in 1..threads {
            scope.spawn(move |_| work(index, threads));
        }
        work(0, threads);
    });
}

#[cfg(not(feature = "rayon"))]
fn run_without_openmp(work: Work<'_>) {
    work(0, 1);
}

/// The number of threads that kernels run on.
#[must_use]
pub fn thread_count() -> usize {
    if FORKED.load(Ordering::Relaxed) {
        return 1;
    }
    // SAFETY: a query without preconditions.
    openmp::loaded().map_or_else(pool_threads, |openmp| unsafe { (openmp.max_threads)() }.max(1) as usize)
}

fn pool_threads() -> usize {
    #[cfg(feature = "rayon")]
    return rayon::current_num_threads();
    #[cfg(not(feature = "rayon"))]
    1
}

/// Whether kernels run on the threads of a loaded OpenMP runtime, torch's own where torch is loaded.
#[must_use]
pub fn uses_openmp() -> bool {
    openmp::loaded().is_some()
}

/// What the threads of a parallel region share.
struct Task<'a> {
    work: Work<'a>,
    openmp: OpenMp,
    /// The first panic: C code cannot be unwound, so none may leave the region.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

fn run_on_openmp(openmp: OpenMp, work: Work<'_>) {
    let mut task = Task { work, openmp, panic: Mutex::new(None) };
    // SAFETY: the runtime calls `enter` on every thread with this pointer and returns after the last call ended.
    unsafe { (openmp.parallel)(enter, (&raw mut task).cast(), 0, 0) };
    if let Some(panic) = task.panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(panic);
    }
}

extern "C" fn enter(task: *mut c_void) {
    // SAFETY: `run_on_openmp` passes a task that outlives the region; threads only read it.
    let task = unsafe { &*task.cast::<Task<'_>>() };
    // SAFETY: inside a parallel region both are queries without preconditions.
    let (index, threads) = unsafe { ((task.openmp.thread_num)(), (task.openmp.num_threads)()) };
    // Unwind safe: the panic is resumed by the caller of the region, who sees it as if it had been its own.
    let outcome = catch_unwind(AssertUnwindSafe(|| (task.work)(index as usize, threads as usize)));
    if let Err(panic) = outcome {
        task.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::{c_int, c_uint};
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn every_thread_is_called_once() {
        let calls = AtomicUsize::new(0);
        let total = AtomicUsize::new(0);
        run_on_all(&|index, threads| {
            assert!(index < threads);
            calls.fetch_add(1, Ordering::Relaxed);
            total.store(threads, Ordering::Relaxed);
        });
        assert_eq!(calls.into_inner(), total.into_inner());
    }

    /// A runtime with one thread, which runs a region twice.
    fn twice() -> OpenMp {
        unsafe extern "C" fn parallel(region: openmp::RegionFn, data: *mut c_void, _: c_uint, _: c_uint) {
            region(data);
            region(data);
        }
        unsafe extern "C" fn zero() -> c_int {
            0
        }
        unsafe extern "C" fn one() -> c_int {
            1
        }
        OpenMp { parallel, thread_num: zero, num_threads: one, max_threads: one }
    }

    #[test]
    fn a_panic_reaches_the_caller_after_the_last_thread() {
        let calls = AtomicUsize::new(0);
        let work = |_: usize, _: usize| {
            let call = calls.fetch_add(1, Ordering::Relaxed);
            assert!(call > 0, "the first call panics");
        };
        let panic = catch_unwind(AssertUnwindSafe(|| run_on_openmp(twice(), &work))).unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"the first call panics"));
        assert_eq!(calls.into_inner(), 2);
    }
}
