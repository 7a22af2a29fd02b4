//! What the kernels are given, and their launch. The structures are those of `cuda/include/delta.cuh`.

use std::ffi::{CStr, c_int, c_uint, c_void};
use std::ptr;

use crate::driver::Driver;
use crate::image::Image;
use crate::{Error, Result};

/// Parts of a slot, at most.
pub const MOST_PARTS: usize = 5;
/// Weights of a launch, at most.
pub const MOST_SITES: usize = 4;
/// Tokens of a group, at most.
pub const MOST_TOKENS: usize = 4;
/// Groups times sites of a launch, at most.
pub const MOST_UNITS: usize = 512;

const WIDTHS: usize = 4;
const SLICE: usize = 2048;
const TILE_ROWS: usize = 64;
const THREADS: c_uint = 256;

/// Rows of a site that share a bit width. All pointers are to device memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// The packed codes of format version 4, at a multiple of 16 bytes.
    pub codes: *const u8,
    /// f16 `[groups, count]`.
    pub scales: *const u16,
    /// The rows `[count]`, rising; null for all rows of the site.
    pub rows: *const i32,
    /// How many rows.
    pub count: i32,
    /// 1, 2, 3, 4 or 8.
    pub bits: i32,
    /// Twice the code that means 0.
    pub twice_zero: i32,
    /// Columns that share a scale, at most all.
    pub group_size: i32,
}

/// One slot's delta of a site. A table of them lies in device memory and may change between two launches.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// The first `part_count` count. No row is in two.
    pub parts: [Part; MOST_PARTS],
    /// f16 `[columns]`, or null.
    pub column_scales: *const u16,
    /// Salient channels `[salient_count]`.
    pub salient_index: *const i32,
    /// f16 `[rows, salient_count]`.
    pub salient: *const u16,
    /// f16 `[rows, rank]`.
    pub u: *const u16,
    /// f16 `[rank, columns]`.
    pub v: *const u16,
    /// Where the sparse entries of each row start `[rows + 1]`, or null.
    pub starts: *const i32,
    /// `[entries]`.
    pub gaps: *const u8,
    /// f8 e5m2 `[entries]`.
    pub values: *const u8,
    /// `2^exponent`.
    pub unit: f32,
    /// How many parts.
    pub part_count: i32,
    /// How many salient channels.
    pub salient_count: i32,
    /// Rank of the low-rank part.
    pub rank: i32,
}

/// Tokens of one slot: `order[first .. first + count]`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    /// Their slot.
    pub slot: i32,
    /// The first of them in `order`.
    pub first: i32,
    /// From one to [`MOST_TOKENS`].
    pub count: i32,
}

/// A weight of a launch.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// Its deltas by slot, in device memory.
    pub slots: *const Slot,
    /// `[tokens, rows]`, of the type of x.
    pub y: *mut c_void,
    /// Elements from one token of y to the next.
    pub y_stride: i64,
    /// Output channels.
    pub rows: i32,
    /// Zero.
    pub reserved: i32,
}

/// A launch: `y[t] += Δ̂_slot(t) · x[t]` for weights that share an input. All pointers are to device memory.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// The first `site_count` count.
    pub sites: [Site; MOST_SITES],
    /// Groups of tokens, see [`groups`].
    pub groups: *const Group,
    /// Their number.
    pub group_count: *const i32,
    /// Tokens, group by group.
    pub order: *const i32,
    /// `[tokens, columns]`.
    pub x: *const c_void,
    /// Elements from one token of x to the next.
    pub x_stride: i64,
    /// Of [`Workspace::ready`] bytes, at a multiple of 16.
    pub ready: *mut u8,
    /// Of [`Workspace::steps`] bytes.
    pub steps: *mut f32,
    /// Of [`Workspace::vx`] bytes.
    pub vx: *mut f32,
    /// Of [`Workspace::partial`] bytes: zeros before a launch, and after it.
    pub partial: *mut f32,
    /// Input channels.
    pub columns: i32,
    /// How many sites.
    pub site_count: i32,
    /// Shares of the columns, see [`splits`].
    pub splits: i32,
    /// The most rows of a site.
    pub most_rows: i32,
    /// The highest rank of a slot.
    pub most_rank: i32,
    /// Zero.
    pub reserved: i32,
}

const _: () = assert!(size_of::<Part>() == 40 && size_of::<Slot>() == 280 && size_of::<Launch>() == 224);

/// Groups of tokens, and the tokens in their order, for the slot of each token. Tokens of slot −1 are in no group.
#[must_use]
pub fn groups(slots: &[i32]) -> (Vec<Group>, Vec<i32>) {
    let mut order: Vec<usize> = (0..slots.len()).filter(|token| slots[*token] >= 0).collect();
    order.sort_by_key(|token| slots[*token]);
    let mut groups: Vec<Group> = Vec::new();
    for (at, token) in order.iter().enumerate() {
        match groups.last_mut() {
            Some(last) if last.slot == slots[*token] && (last.count as usize) < MOST_TOKENS => last.count += 1,
            _ => groups.push(Group { slot: slots[*token], first: at as i32, count: 1 }),
        }
    }
    (groups, order.into_iter().map(|token| token as i32).collect())
}

/// Shares of the columns that a launch is divided into: the fewest that give about 64 items, which is what it takes to
/// keep memory busy. It depends on shapes alone, so a token's bits do not depend on the batch.
///
/// `rows`: the sum of the sites'.
#[must_use]
pub fn splits(rows: usize, columns: usize) -> i32 {
    const ITEMS: usize = 64;
    const LEAST_COLUMNS: usize = 1024;
    ITEMS.div_ceil(rows.div_ceil(TILE_ROWS).max(1)).clamp(1, (columns / LEAST_COLUMNS).max(1)) as i32
}

/// Bytes of device memory that a launch works in. Launches of one stream may share them; other streams need their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workspace {
    /// x as tensor cores read it.
    pub ready: usize,
    /// What its integers are worth.
    pub steps: usize,
    /// `v · x`.
    pub vx: usize,
    /// Codes times x; zeros at first.
    pub partial: usize,
}

impl Launch {
    /// The workspace of this launch, for at most so many groups.
    ///
    /// # Errors
    /// [`Error::Argument`] for counts that the kernels do not take.
    pub fn workspace(&self, most_groups: usize) -> Result<Workspace> {
        let count = |name: &str, value: i32, least: usize, most: usize| match usize::try_from(value) {
            Ok(count) if (least..=most).contains(&count) => Ok(count),
            _ => Err(Error::Argument(format!("{name}: expected {least} to {most}, found {value}"))),
        };
        let sites = count("sites", self.site_count, 1, MOST_SITES)?;
        let columns = count("columns", self.columns, 1, 1 << 24)?;
        let splits = count("splits", self.splits, 1, 64)?;
        let rows = count("rows", self.most_rows, 1, 1 << 24)?;
        let rank = count("rank", self.most_rank, 0, 1 << 16)?;
        let units = most_groups.saturating_mul(sites);
        if units > MOST_UNITS {
            let text = format!("expected at most {MOST_UNITS} groups times sites, found {most_groups} times {sites}");
            return Err(Error::Argument(text));
        }
        Ok(Workspace {
            ready: units * WIDTHS * columns.next_multiple_of(256) * 2 * MOST_TOKENS,
            steps: units * WIDTHS * columns.div_ceil(SLICE) * MOST_TOKENS * size_of::<f32>(),
            vx: units * MOST_TOKENS * rank * size_of::<f32>(),
            partial: units * splits * MOST_TOKENS * rows * size_of::<f32>(),
        })
    }
}

/// The type of x and y.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// bfloat16.
    BFloat16,
    /// float32.
    Float32,
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
        let kind = usize::from(dtype == Dtype::Float32);
        let mut parameters = [ptr::from_ref(launch).cast_mut().cast::<c_void>()];
        let mut put = |kernel: &Kernel| {
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
        let kernels = [&self.prepare[kind], &self.multiply, &self.finish[kind]];
        // SAFETY: the context was retained when kernels were loaded.
        unsafe { self.driver.within(self.context, || kernels.into_iter().try_for_each(&mut put)) }
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
