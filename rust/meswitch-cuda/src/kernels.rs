//! The kernels on a device, and their launch.

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::ptr;

use crate::Result;
use crate::arguments::{Launch, RowsLaunch};
use crate::driver::Driver;
use crate::image::Image;

/// Threads of a block, of every kernel.
const THREADS: c_uint = 256;

/// The type of x and y.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// bfloat16.
    BFloat16 = 0,
    /// float32.
    Float32 = 1,
}

#[derive(Debug)]
struct Kernel {
    function: *mut c_void,
    shared: c_uint,
    /// As many blocks as the device holds at a time; they deal the work out among themselves.
    blocks: c_uint,
}

/// The kernels on one device, in its primary context, which is the one that torch uses.
#[derive(Debug)]
pub struct Kernels {
    driver: &'static Driver,
    context: *mut c_void,
    prepare: [Kernel; 2],
    multiply: Kernel,
    finish: [Kernel; 2],
    rows: [Kernel; 2],
}

// SAFETY: handles of the driver belong to the process; the driver may be called from any thread.
unsafe impl Send for Kernels {}
// SAFETY: as above; nothing here changes after loading.
unsafe impl Sync for Kernels {}

/// `cuFuncSetAttribute`: the most shared memory of a block.
const MOST_SHARED: c_int = 8;
/// Bytes of shared memory, as `cuda/include/delta.cuh` has them.
const PREPARE_SHARED: c_uint = 2080;
const MULTIPLY_SHARED: c_uint = 100_352;
const FINISH_SHARED: c_uint = 3072;
const ROWS_SHARED: c_uint = 33_280;

impl Kernels {
    /// Loads the kernels onto a device and keeps its primary context. Never call this while a graph is captured.
    ///
    /// # Errors
    /// What the driver says: of the ordinal, of an image, of a kernel that no image has.
    pub fn load(driver: &'static Driver, ordinal: i32, images: &[Image]) -> Result<Self> {
        let device = driver.device(ordinal)?;
        let multiprocessors = driver.describe(device)?.multiprocessors as c_uint;
        let mut context = ptr::null_mut();
        // SAFETY: it writes the handle of a context that lives until it is released, which it never is.
        driver.check("cuDevicePrimaryCtxRetain", unsafe { (driver.retain_primary)(&raw mut context, device) })?;
        let load = || {
            let modules = images.iter().map(|image| load_module(driver, image)).collect::<Result<Vec<_>>>()?;
            let kernel = |name, shared| load_kernel(driver, &modules, multiprocessors, name, shared);
            Ok(Self {
                driver,
                context,
                prepare: [
                    kernel(c"delta_prepare_bf16", PREPARE_SHARED)?,
                    kernel(c"delta_prepare_f32", PREPARE_SHARED)?,
                ],
                multiply: kernel(c"delta_multiply", MULTIPLY_SHARED)?,
                finish: [kernel(c"delta_finish_bf16", FINISH_SHARED)?, kernel(c"delta_finish_f32", FINISH_SHARED)?],
                rows: [kernel(c"delta_rows_bf16", ROWS_SHARED)?, kernel(c"delta_rows_f32", ROWS_SHARED)?],
            })
        };
        // SAFETY: the context was retained above.
        unsafe { driver.within(context, load) }
    }

    /// Puts a launch onto a stream and returns at once.
    ///
    /// # Errors
    /// [`Error::Argument`] as of [`Launch::workspace`], or what the driver says.
    ///
    /// # Safety
    /// The stream belongs to this device's primary context. All that the launch points to is as its fields say, is in
    /// device memory, and stays so until the stream has come past it; nothing else works in its workspace meanwhile.
    /// There are at most `most_groups` groups.
    pub unsafe fn launch(&self, dtype: Dtype, launch: &Launch, most_groups: usize, stream: *mut c_void) -> Result<()> {
        launch.workspace(most_groups)?;
        let kernels = [&self.prepare[dtype as usize], &self.multiply, &self.finish[dtype as usize]];
        // SAFETY: the caller's promise.
        unsafe { self.put(&kernels, ptr::from_ref(launch).cast(), stream) }
    }

    /// Puts a launch that adds rows onto a stream and returns at once.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// As of [`Kernels::launch`].
    pub unsafe fn launch_rows(&self, dtype: Dtype, launch: &RowsLaunch, stream: *mut c_void) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.put(&[&self.rows[dtype as usize]], ptr::from_ref(launch).cast(), stream) }
    }

    /// One kernel after another, with the same parameters.
    ///
    /// # Safety
    /// These are the kernels' parameters, and what they point to is as above.
    unsafe fn put(&self, kernels: &[&Kernel], parameters: *const c_void, stream: *mut c_void) -> Result<()> {
        let mut parameters = [parameters.cast_mut()];
        let mut put = |kernel: &&Kernel| {
            // SAFETY: the caller's promise; the driver copies parameters before it returns.
            self.driver.check("cuLaunchKernel", unsafe {
                (self.driver.launch)(
                    kernel.function,
                    kernel.blocks,
                    1,
                    1,
                    THREADS,
                    1,
                    1,
                    kernel.shared,
                    stream,
                    parameters.as_mut_ptr(),
                    ptr::null_mut(),
                )
            })
        };
        // SAFETY: the context was retained when kernels were loaded.
        unsafe { self.driver.within(self.context, || kernels.iter().try_for_each(&mut put)) }
    }
}

fn load_module(driver: &Driver, image: &Image) -> Result<*mut c_void> {
    let mut module = ptr::null_mut();
    // SAFETY: a whole fat binary, which lives for ever.
    driver.check("cuModuleLoadData", unsafe { (driver.load)(&raw mut module, image.bytes.as_ptr().cast()) })?;
    Ok(module)
}

/// The kernel of this name, from whichever module has it.
fn load_kernel(
    driver: &Driver,
    modules: &[*mut c_void],
    multiprocessors: c_uint,
    name: &CStr,
    shared: c_uint,
) -> Result<Kernel> {
    let (mut function, mut resident) = (ptr::null_mut(), 0);
    // SAFETY: a loaded module, and a string that ends with a zero.
    let mut find = |module: &*mut c_void| unsafe { (driver.function)(&raw mut function, *module, name.as_ptr()) };
    let code = modules.iter().map(&mut find).find(|code| *code == 0);
    driver.check("cuModuleGetFunction", code.unwrap_or(NOT_FOUND))?;
    // SAFETY: a function of a loaded module; the last call writes one number.
    unsafe {
        driver.check("cuFuncSetAttribute", (driver.set_attribute)(function, MOST_SHARED, shared as c_int))?;
        driver.check(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            (driver.occupancy)(&raw mut resident, function, THREADS as c_int, shared as usize),
        )?;
    }
    Ok(Kernel { function, shared, blocks: multiprocessors * resident.max(1) as c_uint })
}

/// `CUDA_ERROR_NOT_FOUND`.
const NOT_FOUND: c_int = 500;
