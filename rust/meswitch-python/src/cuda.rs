//! What there is of CUDA, and launches of its kernels. Tensors come as the addresses of their memory on the device.

use std::ffi::{CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use meswitch_cuda::arguments::{self, Launch, MOST_PARTS, MOST_SITES, Part, RowsLaunch, Slot, Workspace, int};
use meswitch_cuda::driver::{self, Device, Driver};
use meswitch_cuda::image::{self, Image};
use meswitch_cuda::kernels::{Dtype, Kernels};
use meswitch_cuda::{Error, Result};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::cuda_to_python;

/// The driver's version and every GPU.
fn examine() -> Result<(String, Vec<Device>)> {
    let driver = driver::driver()?;
    let (major, minor) = driver.version()?;
    Ok((format!("CUDA {major}.{minor}"), driver.devices()?))
}

/// The kernels that this build has, the driver, and the GPUs that it sees; of the first two, why there are none.
///
/// Initialises the driver, after which a forked process cannot use it.
#[pyfunction]
pub fn cuda_status(py: Python<'_>) -> (String, String, Vec<String>) {
    let kernels = image::embedded().map_or_else(|error| error.to_string(), |built| built.compiler.to_owned());
    match py.detach(examine) {
        Err(error) => (kernels, error.to_string(), Vec::new()),
        Ok((driver, devices)) => {
            let describe = |device: Device| {
                let (major, minor) = device.capability;
                format!("{} ({major}.{minor}, {} multiprocessors)", device.name, device.multiprocessors)
            };
            (kernels, driver, devices.into_iter().map(describe).collect())
        }
    }
}

/// Bits, zero, columns of a scale, rows; the addresses of codes, scales and row numbers (0: all rows).
type PartAddresses = (u32, f32, usize, usize, usize, usize, usize);

/// A delta as it lies in a table by slot. Addresses are of device memory, 0 for what the delta has not: column scales;
/// index, values and number of salient channels; u, v and rank; starts, gaps and values of sparse entries.
#[pyfunction]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // the signature that Python sees
pub fn cuda_slot<'py>(
    py: Python<'py>,
    columns: usize,
    exponent: i32,
    parts: Vec<PartAddresses>,
    column_scales: usize,
    salient: (usize, usize, usize),
    low_rank: (usize, usize, usize),
    sparse: (usize, usize, usize),
) -> PyResult<Bound<'py, PyBytes>> {
    let make = || {
        if parts.len() > MOST_PARTS {
            return Err(Error::Argument(format!("expected at most {MOST_PARTS} bit widths, found {}", parts.len())));
        }
        let mut slot = Slot {
            column_scales: column_scales as *const u16,
            salient_index: salient.0 as *const i32,
            salient: salient.1 as *const u16,
            salient_count: int("salient channels", salient.2)?,
            u: low_rank.0 as *const u16,
            v: low_rank.1 as *const u16,
            rank: int("rank", low_rank.2)?,
            starts: sparse.0 as *const i32,
            gaps: sparse.1 as *const u8,
            values: sparse.2 as *const u8,
            unit: (exponent as f32).exp2(),
            part_count: parts.len() as i32,
            ..Slot::EMPTY
        };
        for (part, (bits, zero, group_size, count, codes, scales, rows)) in slot.parts.iter_mut().zip(&parts) {
            *part = Part {
                codes: *codes as *const u8,
                scales: *scales as *const u16,
                rows: *rows as *const i32,
                ..Part::new(*bits, *zero, *group_size, *count, columns)?
            };
        }
        Ok(slot.bytes())
    };
    Ok(PyBytes::new(py, &make().map_err(cuda_to_python)?))
}

/// A table in device memory: its address and how many slots it has. Slot s is its entry s + 1, the first is zeros.
type TableAddress = (usize, usize);

/// Table, y, elements from one token of y to the next, rows.
type SiteAddresses = (TableAddress, usize, i64, usize);

/// The kernels on one device. Launches go onto the stream of that number and return at once.
///
/// Whoever calls keeps all memory that addresses lead to until the stream has come past the launch.
#[pyclass(frozen)]
pub struct CudaKernels {
    kernels: Kernels,
}

#[pymethods]
impl CudaKernels {
    /// Loads the kernels. `driver`: a library in place of the machine's own driver, with kernels of its own.
    #[new]
    #[pyo3(signature = (ordinal, driver=None))]
    fn new(py: Python<'_>, ordinal: i32, driver: Option<PathBuf>) -> PyResult<Self> {
        let load = || match driver {
            None => Kernels::load(driver::driver()?, ordinal, image::embedded()?.images),
            Some(path) => Kernels::load(open(&path)?, ordinal, &[NO_IMAGE]),
        };
        Ok(Self { kernels: py.detach(load).map_err(cuda_to_python)? })
    }

    /// Bytes that a launch over weights of so many `rows` works in: scratch, and partial sums, which begin as zeros.
    #[staticmethod]
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn workspace(rows: Vec<usize>, columns: usize, rank: usize, groups: usize) -> PyResult<(usize, usize)> {
        let sizes = shape_of(&rows, columns, rank).and_then(|launch| launch.workspace(groups));
        let sizes = sizes.map_err(cuda_to_python)?;
        Ok((offsets(&sizes).2, sizes.partial))
    }

    /// `y[t] += Δ̂ of its slot · x[t]` for weights with the same input. `x`: its address, and the elements from one
    /// token to the next. `groups`: addresses of groups, their number and the order of tokens, and how many there may
    /// be. `scratch`, `partial`: of `workspace` bytes, for this stream alone.
    #[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // the signature that Python sees
    fn linear(
        &self,
        py: Python<'_>,
        stream: usize,
        bf16: bool,
        sites: Vec<SiteAddresses>,
        x: (usize, i64),
        columns: usize,
        rank: usize,
        groups: (usize, usize, usize, usize),
        scratch: usize,
        partial: usize,
    ) -> PyResult<()> {
        let rows: Vec<usize> = sites.iter().map(|site| site.3).collect();
        let work = || {
            let mut launch = shape_of(&rows, columns, rank)?;
            let sizes = launch.workspace(groups.3)?;
            let (steps, vx, _) = offsets(&sizes);
            for (site, (table, y, y_stride, _)) in launch.sites.iter_mut().zip(&sites) {
                (site.slots, site.slot_count) = (table.0 as *const Slot, int("slots", table.1)?);
                (site.y, site.y_stride) = (*y as *mut c_void, *y_stride);
            }
            (launch.x, launch.x_stride) = (x.0 as *const c_void, x.1);
            launch.groups = groups.0 as *const arguments::Group;
            (launch.group_count, launch.order) = (groups.1 as *const i32, groups.2 as *const i32);
            (launch.ready, launch.partial) = (scratch as *mut u8, partial as *mut f32);
            (launch.steps, launch.vx) = ((scratch + steps) as *mut f32, (scratch + vx) as *mut f32);
            // SAFETY: the caller's promise that addresses are what they are said to be.
            unsafe { self.kernels.launch(dtype(bf16), &launch, groups.3, stream as *mut c_void) }
        };
        py.detach(work).map_err(cuda_to_python)
    }

    /// `y[i] += Δ̂ of its slot [ids[i], :]` for `count` rows of y. `slots`: the address of a slot for each, or 0 and one
    /// slot for all; `ids`: the address of a row for each, or 0 and the first of rows that follow one another.
    #[allow(clippy::too_many_arguments)] // the signature that Python sees
    fn rows(
        &self,
        py: Python<'_>,
        stream: usize,
        bf16: bool,
        table: TableAddress,
        slots: (usize, usize),
        ids: (usize, usize),
        y: (usize, i64),
        count: usize,
        shape: (usize, usize),
    ) -> PyResult<()> {
        let work = || {
            let launch = RowsLaunch {
                slots: table.0 as *const Slot,
                slot_of: slots.0 as *const i32,
                ids: ids.0 as *const i64,
                y: y.0 as *mut c_void,
                y_stride: y.1,
                count: int("rows", count)?,
                rows: int("rows", shape.0)?,
                columns: int("columns", shape.1)?,
                slot: int("slots", slots.1)?,
                first: int("rows", ids.1)?,
                slot_count: int("slots", table.1)?,
            };
            // SAFETY: as above.
            unsafe { self.kernels.launch_rows(dtype(bf16), &launch, stream as *mut c_void) }
        };
        py.detach(work).map_err(cuda_to_python)
    }
}

fn dtype(bf16: bool) -> Dtype {
    if bf16 { Dtype::BFloat16 } else { Dtype::Float32 }
}

/// A launch over weights of these rows, whose addresses are missing.
fn shape_of(rows: &[usize], columns: usize, rank: usize) -> Result<Launch> {
    if rows.len() > MOST_SITES {
        return Err(Error::Argument(format!("expected at most {MOST_SITES} weights, found {}", rows.len())));
    }
    let mut launch = Launch::EMPTY;
    for (site, rows) in launch.sites.iter_mut().zip(rows) {
        site.rows = int("rows", *rows)?;
    }
    launch.site_count = rows.len() as i32;
    launch.columns = int("columns", columns)?;
    launch.most_rows = int("rows", rows.iter().copied().max().unwrap_or(0))?;
    launch.most_rank = int("rank", rank)?;
    launch.splits = arguments::splits(rows.iter().sum(), columns);
    Ok(launch)
}

/// Where steps and vx begin in scratch memory that begins with `ready`, and its size.
fn offsets(sizes: &Workspace) -> (usize, usize, usize) {
    let steps = sizes.ready.next_multiple_of(16);
    let vx = (steps + sizes.steps).next_multiple_of(16);
    (steps, vx, vx + sizes.vx)
}

/// An image for a driver that has kernels of its own: it only looks at how an image begins.
const NO_IMAGE: Image = Image { name: "none", bytes: &0xba55_ed50_u32.to_le_bytes() };

/// A driver that stays open for ever, as the machine's own does.
fn open(path: &Path) -> Result<&'static Driver> {
    let name = CString::new(path.as_os_str().as_bytes()).map_err(|error| Error::NoDriver(error.to_string()))?;
    // SAFETY: whoever names a library says that it is a CUDA driver.
    let driver = unsafe { Driver::open(&name) }?;
    Ok(Box::leak(Box::new(driver)))
}
