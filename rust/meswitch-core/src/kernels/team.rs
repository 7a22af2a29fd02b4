//! The threads that kernels run on: torch's own OpenMP team where there is one.
//!
//! A second pool would make every later torch operator slower (its threads and libgomp's spin against each other), so
//! the libgomp that torch has loaded is looked up at run time and asked for its team. Without one, rayon's pool serves.
//! Neither comes along where a process forks, and who waits for them there waits forever.

use std::ffi::{c_int, c_uint, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Fewer multiplications than this are not worth waking a team for.
pub const ALONE: usize = 1 << 18;

type Region = extern "C" fn(*mut c_void);

/// The entry points of a loaded libgomp.
#[derive(Clone, Copy)]
struct Gomp {
    parallel: unsafe extern "C" fn(Region, *mut c_void, c_uint, c_uint),
    thread: unsafe extern "C" fn() -> c_int,
    threads: unsafe extern "C" fn() -> c_int,
    most: unsafe extern "C" fn() -> c_int,
}

/// Work that a team shares out by thread index and number of threads.
type Work<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// Whether this process was forked.
static FORKED: AtomicBool = AtomicBool::new(false);

/// Has kernels of processes that are forked from now on work on one thread.
pub fn watch_forks() {
    #[cfg(unix)]
    {
        extern "C" fn forked() {
            FORKED.store(true, Ordering::Relaxed);
        }
        // SAFETY: a forked child may store a flag, whatever its parent was doing.
        unsafe { libc::pthread_atfork(None, None, Some(forked)) };
    }
}

/// Runs what shares its work out by rayon: in a forked process on threads of its own.
///
/// # Panics
/// Where a forked process gets no threads.
pub fn with_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    if !FORKED.load(Ordering::Relaxed) {
        return work();
    }
    rayon::ThreadPoolBuilder::new().build().expect("threads of one's own").install(work)
}

/// Runs `work(index, threads)` once on every thread of the team and returns when all are done. Must not panic.
pub fn parallel(work: Work<'_>) {
    if FORKED.load(Ordering::Relaxed) {
        return work(0, 1);
    }
    match gomp() {
        Some(gomp) => {
            let mut task = Task { work, gomp };
            // SAFETY: libgomp calls `enter` on every thread with this pointer and returns when all have come back.
            unsafe { (gomp.parallel)(enter, (&raw mut task).cast(), 0, 0) };
        }
        None => {
            let threads = rayon::current_num_threads();
            rayon::scope(|scope| {
                for index in 1..threads {
                    scope.spawn(move |_| work(index, threads));
                }
                work(0, threads);
            });
        }
    }
}

/// How many threads the team has.
#[must_use]
pub fn threads() -> usize {
    if FORKED.load(Ordering::Relaxed) {
        return 1;
    }
    // SAFETY: a plain query.
    gomp().map_or_else(rayon::current_num_threads, |gomp| unsafe { (gomp.most)() }.max(1) as usize)
}

/// Whether kernels run on torch's team.
#[must_use]
pub fn is_shared() -> bool {
    gomp().is_some()
}

struct Task<'a> {
    work: Work<'a>,
    gomp: Gomp,
}

extern "C" fn enter(task: *mut c_void) {
    // SAFETY: `parallel` passes a task that outlives the region; threads only read it.
    let task = unsafe { &*task.cast::<Task<'_>>() };
    // SAFETY: inside a parallel region both are plain queries.
    let (index, threads) = unsafe { ((task.gomp.thread)(), (task.gomp.threads)()) };
    (task.work)(index as usize, threads as usize);
}

/// The libgomp that the process has loaded, looked up when first asked for. None is not remembered: torch may come.
fn gomp() -> Option<Gomp> {
    static FOUND: OnceLock<Gomp> = OnceLock::new();
    if let Some(gomp) = FOUND.get() {
        return Some(*gomp);
    }
    let gomp = find()?;
    Some(*FOUND.get_or_init(|| gomp))
}

#[cfg(target_os = "linux")]
fn find() -> Option<Gomp> {
    use std::ffi::{CStr, CString};

    extern "C" fn visit(info: *mut libc::dl_phdr_info, _: usize, found: *mut c_void) -> c_int {
        // SAFETY: the loader passes a valid record, and `found` is the option below.
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
    // SAFETY: `visit` fits the signature and `name` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut name).cast()) };
    let name = name?;
    // SAFETY: only a library that is loaded already is opened, and it is never closed.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_LAZY) };
    if handle.is_null() {
        return None;
    }
    let symbol = |name: &CStr| {
        // SAFETY: a live handle and a C string.
        let symbol = unsafe { libc::dlsym(handle, name.as_ptr()) };
        (!symbol.is_null()).then_some(symbol)
    };
    let (parallel, thread) = (symbol(c"GOMP_parallel")?, symbol(c"omp_get_thread_num")?);
    let (threads, most) = (symbol(c"omp_get_num_threads")?, symbol(c"omp_get_max_threads")?);
    // SAFETY: the signatures of the OpenMP run-time's documented entry points.
    unsafe {
        Some(Gomp {
            parallel: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(Region, *mut c_void, c_uint, c_uint)>(
                parallel,
            ),
            thread: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(thread),
            threads: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(threads),
            most: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(most),
        })
    }
}

#[cfg(not(target_os = "linux"))]
fn find() -> Option<Gomp> {
    None
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_thread_works_once() {
        let calls = AtomicUsize::new(0);
        let most = AtomicUsize::new(0);
        super::parallel(&|index, threads| {
            assert!(index < threads);
            calls.fetch_add(1, Ordering::Relaxed);
            most.store(threads, Ordering::Relaxed);
        });
        assert_eq!(calls.into_inner(), most.into_inner());
    }
}
