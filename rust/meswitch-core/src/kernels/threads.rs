//! The threads that kernels run on.
//!
//! Where the process has loaded libgomp (torch does), kernels run on libgomp's own OpenMP threads. A second thread pool
//! would make every later torch operator slower, because its threads and libgomp's would spin against each other.
//! Without libgomp, rayon's global pool serves; without rayon (feature `rayon` off), the calling thread does the work.
//!
//! Neither pool's threads survive a fork, and a child that waits for them waits forever. After
//! [`watch_forks`], a forked child runs kernels on the calling thread alone.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Multiplications below which waking other threads costs more than it saves.
pub(crate) const MIN_PARALLEL_WORK: usize = 1 << 18;

type RegionFn = extern "C" fn(*mut c_void);

/// The entry points of a loaded libgomp.
#[derive(Clone, Copy)]
struct Gomp {
    parallel: unsafe extern "C" fn(RegionFn, *mut c_void, c_uint, c_uint),
    thread_num: unsafe extern "C" fn() -> c_int,
    num_threads: unsafe extern "C" fn() -> c_int,
    max_threads: unsafe extern "C" fn() -> c_int,
}

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

/// Runs `work`, whose rayon calls use the global pool; in a forked child they use a new pool, dropped afterwards.
///
/// # Panics
/// In a forked child that cannot start threads.
#[cfg(feature = "rayon")]
#[doc(hidden)]
pub fn with_rayon_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    if !FORKED.load(Ordering::Relaxed) {
        return work();
    }
    rayon::ThreadPoolBuilder::new().build().expect("a forked child can start threads").install(work)
}

/// Calls `work(index, threads)` once on each thread and returns after the last call. `work` must not panic: under
/// libgomp that aborts the process.
#[doc(hidden)]
pub fn run_on_all(work: Work<'_>) {
    if FORKED.load(Ordering::Relaxed) {
        return work(0, 1);
    }
    match gomp() {
        Some(gomp) => {
            let mut task = Task { work, gomp };
            // SAFETY: libgomp calls `enter` on every thread with this pointer and returns after the last call ended.
            unsafe { (gomp.parallel)(enter, (&raw mut task).cast(), 0, 0) };
        }
        None => run_without_gomp(work),
    }
}

#[cfg(feature = "rayon")]
fn run_without_gomp(work: Work<'_>) {
    let threads = rayon::current_num_threads();
    rayon::scope(|scope| {
        for index in 1..threads {
            scope.spawn(move |_| work(index, threads));
        }
        work(0, threads);
    });
}

#[cfg(not(feature = "rayon"))]
fn run_without_gomp(work: Work<'_>) {
    work(0, 1);
}

/// The number of threads that kernels run on.
#[must_use]
pub fn thread_count() -> usize {
    if FORKED.load(Ordering::Relaxed) {
        return 1;
    }
    // SAFETY: a query without preconditions.
    gomp().map_or_else(pool_threads, |gomp| unsafe { (gomp.max_threads)() }.max(1) as usize)
}

fn pool_threads() -> usize {
    #[cfg(feature = "rayon")]
    return rayon::current_num_threads();
    #[cfg(not(feature = "rayon"))]
    1
}

/// Whether kernels run on the threads of a loaded libgomp.
#[must_use]
pub fn uses_libgomp() -> bool {
    gomp().is_some()
}

struct Task<'a> {
    work: Work<'a>,
    gomp: Gomp,
}

extern "C" fn enter(task: *mut c_void) {
    // SAFETY: `run_on_all` passes a task that outlives the region; threads only read it.
    let task = unsafe { &*task.cast::<Task<'_>>() };
    // SAFETY: inside a parallel region both are queries without preconditions.
    let (index, threads) = unsafe { ((task.gomp.thread_num)(), (task.gomp.num_threads)()) };
    (task.work)(index as usize, threads as usize);
}

/// The libgomp that the process has loaded. A find is remembered; a miss is not, because torch may be loaded later.
fn gomp() -> Option<Gomp> {
    static FOUND: OnceLock<Gomp> = OnceLock::new();
    if let Some(gomp) = FOUND.get() {
        return Some(*gomp);
    }
    let gomp = find_gomp()?;
    Some(*FOUND.get_or_init(|| gomp))
}

#[cfg(all(target_os = "linux", not(miri)))]
fn find_gomp() -> Option<Gomp> {
    use std::ffi::{CStr, CString};

    extern "C" fn visit(info: *mut libc::dl_phdr_info, _: usize, found: *mut c_void) -> c_int {
        // SAFETY: the loader passes a valid record, and `found` points to the option below.
        let (name, found) = unsafe { ((*info).dlpi_name, &mut *found.cast::<Option<CString>>()) };
        if name.is_null() {
            return 0;
        }
        // SAFETY: the loader's names are C strings.
        let name = unsafe { CStr::from_ptr(name) };
        if name.to_bytes().windows(7).any(|part| part == b"libgomp") {
            *found = Some(name.to_owned());
            return 1;
        }
        0
    }

    let mut name: Option<CString> = None;
    // SAFETY: `visit` has the required signature and `name` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut name).cast()) };
    let name = name?;
    // SAFETY: RTLD_NOLOAD opens only a library that is loaded already; the handle is never closed.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_LAZY) };
    if handle.is_null() {
        return None;
    }
    let symbol = |name: &CStr| {
        // SAFETY: an open handle and a C string.
        let symbol = unsafe { libc::dlsym(handle, name.as_ptr()) };
        (!symbol.is_null()).then_some(symbol)
    };
    let (parallel, thread_num) = (symbol(c"GOMP_parallel")?, symbol(c"omp_get_thread_num")?);
    let (num_threads, max_threads) = (symbol(c"omp_get_num_threads")?, symbol(c"omp_get_max_threads")?);
    // SAFETY: the documented signatures of these four OpenMP entry points.
    unsafe {
        Some(Gomp {
            parallel: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(RegionFn, *mut c_void, c_uint, c_uint)>(
                parallel,
            ),
            thread_num: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(thread_num),
            num_threads: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(num_threads),
            max_threads: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(max_threads),
        })
    }
}

#[cfg(not(all(target_os = "linux", not(miri))))]
fn find_gomp() -> Option<Gomp> {
    None
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_thread_is_called_once() {
        let calls = AtomicUsize::new(0);
        let total = AtomicUsize::new(0);
        super::run_on_all(&|index, threads| {
            assert!(index < threads);
            calls.fetch_add(1, Ordering::Relaxed);
            total.store(threads, Ordering::Relaxed);
        });
        assert_eq!(calls.into_inner(), total.into_inner());
    }
}
