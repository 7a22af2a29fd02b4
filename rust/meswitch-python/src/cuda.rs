//! What there is of CUDA.

use meswitch_cuda::driver::{self, Device};
use meswitch_cuda::{Result, image};
use pyo3::prelude::*;

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
