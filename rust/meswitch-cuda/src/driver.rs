//! The CUDA driver, opened when it is first asked for.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;

use crate::{Error, Result};

macro_rules! driver {
    ($($name:ident = $symbol:literal ($($arg:ty),* $(,)?);)*) => {
        /// The functions of libcuda that are needed, and no more. The library stays open for ever.
        #[derive(Debug)]
        pub struct Driver { $(pub(crate) $name: unsafe extern "C" fn($($arg),*) -> c_int,)* }

        impl Driver {
            /// Opens a library and initialises the driver in it.
            ///
            /// # Errors
            /// [`Error::NoDriver`], in the loader's words, or what the driver says: no device, most often.
            ///
            /// # Safety
            /// The library is a CUDA driver: its functions have the types of `cuda.h`.
            pub unsafe fn open(library: &CStr) -> Result<Self> {
                // SAFETY: the caller's promise; a symbol's address becomes a function of the type that it has.
                unsafe {
                    let library = Library::open(library)?;
                    let driver = Self {
                        $($name: std::mem::transmute::<
                            ptr::NonNull<c_void>, unsafe extern "C" fn($($arg),*) -> c_int
                        >(library.symbol($symbol)?),)*
                    };
                    driver.check("cuInit", (driver.init)(0))?;
                    Ok(driver)
                }
            }
        }
    };
}

driver! {
    init = c"cuInit" (c_uint);
    version = c"cuDriverGetVersion" (*mut c_int);
    device_count = c"cuDeviceGetCount" (*mut c_int);
    device = c"cuDeviceGet" (*mut c_int, c_int);
    device_name = c"cuDeviceGetName" (*mut c_char, c_int, c_int);
    attribute = c"cuDeviceGetAttribute" (*mut c_int, c_int, c_int);
    retain_primary = c"cuDevicePrimaryCtxRetain" (*mut *mut c_void, c_int);
    current = c"cuCtxGetCurrent" (*mut *mut c_void);
    set_current = c"cuCtxSetCurrent" (*mut c_void);
    load = c"cuModuleLoadData" (*mut *mut c_void, *const c_void);
    function = c"cuModuleGetFunction" (*mut *mut c_void, *mut c_void, *const c_char);
    set_attribute = c"cuFuncSetAttribute" (*mut c_void, c_int, c_int);
    occupancy = c"cuOccupancyMaxActiveBlocksPerMultiprocessor" (*mut c_int, *mut c_void, c_int, usize);
    launch = c"cuLaunchKernel" (
        *mut c_void, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, *mut c_void, *mut *mut c_void,
        *mut *mut c_void,
    );
    error_name = c"cuGetErrorName" (c_int, *mut *const c_char);
}

/// A shared library that stays open.
struct Library(ptr::NonNull<c_void>);

impl Library {
    /// # Safety
    /// The library's initialisers may run.
    unsafe fn open(name: &CStr) -> Result<Self> {
        // SAFETY: a string that ends with a zero; initialisers are the caller's promise.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        ptr::NonNull::new(handle).map(Self).ok_or_else(|| Error::NoDriver(loader_error()))
    }

    fn symbol(&self, name: &CStr) -> Result<ptr::NonNull<c_void>> {
        // SAFETY: an open library, and a string that ends with a zero.
        let address = unsafe { libc::dlsym(self.0.as_ptr(), name.as_ptr()) };
        ptr::NonNull::new(address).ok_or_else(|| Error::NoDriver(loader_error()))
    }
}

/// What went wrong in this thread's last call of the loader.
fn loader_error() -> String {
    // SAFETY: null, or a string that lives until this thread's next call of the loader.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() { "no reason given".into() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    }
}

/// This machine's driver, looked for once.
///
/// # Errors
/// As [`Driver::open`], the same at every call.
pub fn driver() -> Result<&'static Driver> {
    static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
    // SAFETY: the name belongs to the CUDA driver.
    DRIVER.get_or_init(|| unsafe { Driver::open(c"libcuda.so.1") }).as_ref().map_err(Clone::clone)
}

const MULTIPROCESSORS: c_int = 16;
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// The driver's name of it.
    pub name: String,
    /// Its compute capability.
    pub capability: (i32, i32),
    /// Its multiprocessors.
    pub multiprocessors: i32,
}

impl Driver {
    pub(crate) fn check(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let mut name = ptr::null();
        // SAFETY: the name becomes a string of the driver's that lives for ever, or stays null.
        let name = unsafe {
            let known = (self.error_name)(code, &raw mut name) == 0 && !name.is_null();
            if known { CStr::from_ptr(name).to_string_lossy().into_owned() } else { "an error without a name".into() }
        };
        Err(Error::Driver { call, code, name })
    }

    /// The newest CUDA that the driver knows: major and minor.
    ///
    /// # Errors
    /// What the driver says.
    pub fn version(&self) -> Result<(i32, i32)> {
        let mut version = 0;
        // SAFETY: it writes one number.
        self.check("cuDriverGetVersion", unsafe { (self.version)(&raw mut version) })?;
        Ok((version / 1000, version % 1000 / 10))
    }

    /// Every GPU, by ordinal.
    ///
    /// # Errors
    /// What the driver says.
    pub fn devices(&self) -> Result<Vec<Device>> {
        let mut count = 0;
        // SAFETY: it writes one number.
        self.check("cuDeviceGetCount", unsafe { (self.device_count)(&raw mut count) })?;
        (0..count).map(|ordinal| self.describe(self.device(ordinal)?)).collect()
    }

    pub(crate) fn device(&self, ordinal: c_int) -> Result<c_int> {
        let mut device = 0;
        // SAFETY: it writes one number.
        self.check("cuDeviceGet", unsafe { (self.device)(&raw mut device, ordinal) })?;
        Ok(device)
    }

    pub(crate) fn describe(&self, device: c_int) -> Result<Device> {
        let mut name: [c_char; 128] = [0; 128];
        // SAFETY: it writes a string of at most 128 bytes, its zero included.
        let name = unsafe {
            self.check("cuDeviceGetName", (self.device_name)(name.as_mut_ptr(), 128, device))?;
            CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned()
        };
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: it writes one number.
            self.check("cuDeviceGetAttribute", unsafe { (self.attribute)(&raw mut value, which, device) })?;
            Ok(value)
        };
        let capability = (attribute(CAPABILITY_MAJOR)?, attribute(CAPABILITY_MINOR)?);
        Ok(Device { name, capability, multiprocessors: attribute(MULTIPROCESSORS)? })
    }

    /// Runs something with a context current, and puts back what was.
    ///
    /// # Safety
    /// The context is alive.
    pub(crate) unsafe fn within<T>(&self, context: *mut c_void, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut before = ptr::null_mut();
        // SAFETY: a live context of the caller's, and the one that was current.
        unsafe {
            self.check("cuCtxGetCurrent", (self.current)(&raw mut before))?;
            if before == context {
                return work();
            }
            self.check("cuCtxSetCurrent", (self.set_current)(context))?;
            let outcome = work();
            self.check("cuCtxSetCurrent", (self.set_current)(before))?;
            outcome
        }
    }
}
