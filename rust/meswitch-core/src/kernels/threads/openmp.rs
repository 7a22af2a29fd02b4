//! The OpenMP runtime that the process has loaded.

use std::ffi::{c_int, c_uint, c_void};

/// What a parallel region runs on each of its threads.
pub(super) type RegionFn = extern "C" fn(*mut c_void);

/// The entry points of a loaded OpenMP runtime: libgomp, or one with the same entry points (libiomp5, LLVM's libomp).
#[derive(Clone, Copy)]
pub(super) struct OpenMp {
    pub(super) parallel: unsafe extern "C" fn(RegionFn, *mut c_void, c_uint, c_uint),
    pub(super) thread_num: unsafe extern "C" fn() -> c_int,
    pub(super) num_threads: unsafe extern "C" fn() -> c_int,
    pub(super) max_threads: unsafe extern "C" fn() -> c_int,
}

/// The runtime that torch uses; without torch, a loaded libgomp.
///
/// Torch's is remembered for good. Anything else counts until the process loads another library, which may be torch.
#[cfg(all(target_os = "linux", not(miri)))]
pub(super) fn loaded() -> Option<OpenMp> {
    use std::sync::{OnceLock, PoisonError, RwLock};

    static OF_TORCH: OnceLock<OpenMp> = OnceLock::new();
    // Zero libraries are never loaded, so the first look always searches.
    static OTHER: RwLock<(u64, Option<OpenMp>)> = RwLock::new((0, None));
    if let Some(openmp) = OF_TORCH.get() {
        return Some(*openmp);
    }
    let loads = linux::loads();
    let other = *OTHER.read().unwrap_or_else(PoisonError::into_inner);
    if other.0 == loads {
        return other.1;
    }
    if let Some(openmp) = linux::of_library(c"libtorch_cpu.so") {
        return Some(*OF_TORCH.get_or_init(|| openmp));
    }
    let found = linux::libgomps().iter().find_map(|path| linux::of_library(path));
    *OTHER.write().unwrap_or_else(PoisonError::into_inner) = (loads, found);
    found
}

/// None: only Linux's loader is asked.
#[cfg(not(all(target_os = "linux", not(miri))))]
pub(super) fn loaded() -> Option<OpenMp> {
    None
}

#[cfg(all(target_os = "linux", not(miri)))]
mod linux {
    use std::ffi::{CStr, CString, c_int, c_uint, c_void};

    use super::{OpenMp, RegionFn};

    /// Calls `visit` with each loaded library until it returns true.
    fn visit_libraries(visit: &mut dyn FnMut(&libc::dl_phdr_info) -> bool) {
        extern "C" fn call(info: *mut libc::dl_phdr_info, _: usize, visit: *mut c_void) -> c_int {
            // SAFETY: the loader passes a valid record, and `visit` points to the closure below.
            let (info, visit) = unsafe { (&*info, &mut *visit.cast::<&mut dyn FnMut(&libc::dl_phdr_info) -> bool>()) };
            c_int::from(visit(info))
        }
        let mut visit = visit;
        // SAFETY: `call` has the required signature, and the closure outlives the call.
        unsafe { libc::dl_iterate_phdr(Some(call), (&raw mut visit).cast()) };
    }

    /// How many libraries the process has ever loaded.
    pub(super) fn loads() -> u64 {
        let mut loads = 0;
        visit_libraries(&mut |library| {
            loads = library.dlpi_adds;
            true
        });
        loads
    }

    /// The paths of the loaded libraries whose file name begins with `libgomp`.
    pub(super) fn libgomps() -> Vec<CString> {
        let mut paths = Vec::new();
        visit_libraries(&mut |library| {
            if !library.dlpi_name.is_null() {
                // SAFETY: the loader's names are C strings.
                let path = unsafe { CStr::from_ptr(library.dlpi_name) };
                if is_libgomp(path.to_bytes()) {
                    paths.push(path.to_owned());
                }
            }
            false
        });
        paths
    }

    pub(super) fn is_libgomp(path: &[u8]) -> bool {
        path.rsplit(|byte| *byte == b'/').next().is_some_and(|name| name.starts_with(b"libgomp"))
    }

    /// The runtime that a loaded library uses: its own symbols, or those of the libraries that it depends on.
    pub(super) fn of_library(name: &CStr) -> Option<OpenMp> {
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
            Some(OpenMp {
                parallel: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(RegionFn, *mut c_void, c_uint, c_uint)>(
                    parallel,
                ),
                thread_num: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(thread_num),
                num_threads: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(num_threads),
                max_threads: std::mem::transmute::<*mut c_void, unsafe extern "C" fn() -> c_int>(max_threads),
            })
        }
    }
}

#[cfg(all(test, target_os = "linux", not(miri)))]
mod tests {
    use super::linux::{is_libgomp, loads, of_library};

    #[test]
    fn only_a_file_of_that_name_is_libgomp() {
        for path in ["/usr/lib/libgomp.so.1", "/x/torch.libs/libgomp-98b21ff3.so.1.0.0", "libgomp.so.1"] {
            assert!(is_libgomp(path.as_bytes()), "{path}");
        }
        for path in ["", "linux-vdso.so.1", "/opt/libgomp-wheel/other.so", "/usr/lib/mylibgomp.so"] {
            assert!(!is_libgomp(path.as_bytes()), "{path}");
        }
    }

    #[test]
    fn a_library_that_is_not_loaded_is_not_loaded_now() {
        let before = loads();
        assert!(before > 0);
        assert!(of_library(c"libtorch_cpu.so").is_none());
        assert_eq!(loads(), before);
    }
}
