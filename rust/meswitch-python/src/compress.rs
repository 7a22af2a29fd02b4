//! Delta directories written: compressed from a fine-tune, or of sites that are given.

use std::collections::HashMap;
use std::path::PathBuf;

use meswitch_core::Error;
use meswitch_core::codec::{Class, Settings, Zero};
use meswitch_core::compress::{Job, Plan};
use meswitch_core::delta::{Assembly, Progress, SiteEntry};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::Value;

use crate::delta::Checkpoint;
use crate::errors::to_python;

/// Compresses a fine-tune into a delta directory.
///
/// `plans` is a list of dicts, one a parameter in execution order; `moments` maps names to little-endian float32
/// E[x²]; `progress(site, done, total)` is called before every site.
#[pyfunction]
#[pyo3(signature = (base, finetune, out, plans, moments, files, settings, base_name, progress))]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // the signature that Python sees
pub fn compress(
    py: Python<'_>,
    base: &Checkpoint,
    finetune: &Checkpoint,
    out: PathBuf,
    plans: Vec<Bound<'_, PyDict>>,
    moments: HashMap<String, Vec<u8>>,
    files: Vec<PathBuf>,
    settings: &str,
    base_name: &str,
    progress: Py<PyAny>,
) -> PyResult<()> {
    let plans = plans.iter().map(|plan| read_plan(plan, &moments)).collect::<PyResult<Vec<_>>>()?;
    let settings: Value = serde_json::from_str(settings).map_err(|error| PyValueError::new_err(error.to_string()))?;
    let (base, finetune) = (&base.0, &finetune.0);
    let mut raised = None;
    let outcome = py.detach(|| {
        let job = Job { base, finetune, plans: &plans, out: &out, files: &files, settings, base_name };
        job.run(&mut |step| tell(&progress, step, &mut raised))
    });
    raised.map_or_else(|| outcome.map(drop).map_err(to_python), Err)
}

/// Writes a delta directory of sites that are given.
///
/// `sites` are entries of the manifest (docs/format.md) in JSON, one a parameter in execution order, without `tensors`
/// and with `bytes` and `bpw` of 0; `tensors(name)` gives a site's tensors in the format's order;
/// `progress(site, done, total)` is called before every site.
#[pyfunction]
#[pyo3(signature = (base, out, sites, tensors, files, settings, base_name, progress))]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // the signature that Python sees
pub fn write(
    py: Python<'_>,
    base: &Checkpoint,
    out: PathBuf,
    sites: Vec<String>,
    tensors: Py<PyAny>,
    files: Vec<PathBuf>,
    settings: &str,
    base_name: &str,
    progress: Py<PyAny>,
) -> PyResult<()> {
    let value = |error: serde_json::Error| PyValueError::new_err(error.to_string());
    let entries: Vec<SiteEntry> =
        sites.iter().map(|site| serde_json::from_str(site)).collect::<Result<_, _>>().map_err(value)?;
    let settings: Value = serde_json::from_str(settings).map_err(value)?;
    let base = &base.0;
    let (mut raised, mut refused) = (None, None);
    let outcome = py.detach(|| {
        let assembly = Assembly { base, out: &out, files: &files, settings, base_name };
        assembly.write_given(&entries, &mut |step| tell(&progress, step, &mut raised), &mut |entry| {
            let given = Python::attach(|py| tensors.call1(py, (&entry.name,))?.extract(py));
            given.map_err(|error| {
                refused = Some(error);
                Error::Interrupted
            })
        })
    });
    raised.or(refused).map_or_else(|| outcome.map(drop).map_err(to_python), Err)
}

/// Calls Python's `progress`; false where it raised, or a signal did.
fn tell(progress: &Py<PyAny>, step: Progress<'_>, raised: &mut Option<PyErr>) -> bool {
    let call = Python::attach(|py| {
        py.check_signals()?;
        progress.call1(py, (step.site, step.done, step.total)).map(drop)
    });
    *raised = call.err();
    raised.is_none()
}

fn read_plan(plan: &Bound<'_, PyDict>, moments: &HashMap<String, Vec<u8>>) -> PyResult<Plan> {
    let name: String = required(plan, "name")?;
    let quantize = match plan.get_item("bits")? {
        None => None,
        Some(bits) if bits.is_none() => None,
        Some(bits) => Some(read_settings(plan, bits.extract()?)?),
    };
    let moments = moments
        .get(&name)
        .map(|bytes| bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect());
    Ok(Plan { transposed: required(plan, "transposed")?, name, quantize, moments })
}

fn read_settings(plan: &Bound<'_, PyDict>, bits: u32) -> PyResult<Settings> {
    let zero: String = required(plan, "zero")?;
    let classes: Vec<(u32, Vec<u32>)> = required(plan, "classes")?;
    let group_size: Option<usize> = required(plan, "group_size")?;
    let known = |bits: &u32| meswitch_core::layout::BITS.contains(bits);
    if !known(&bits) || !classes.iter().all(|(bits, _)| known(bits)) || group_size == Some(0) {
        return Err(PyValueError::new_err(format!(
            "expected bits of 1, 2, 3, 4 or 8 and a positive group size, found {bits}"
        )));
    }
    Ok(Settings {
        bits,
        group_size,
        zero: match zero.as_str() {
            "symmetric" => Zero::Symmetric,
            "level" => Zero::Level,
            "auto" => Zero::Auto,
            other => {
                return Err(PyValueError::new_err(format!("expected zero of symmetric, level or auto, found {other}")));
            }
        },
        one_scale: required(plan, "one_scale")?,
        column_scales: required(plan, "column_scales")?,
        salient: required(plan, "salient")?,
        rank: required(plan, "rank")?,
        classes: classes.into_iter().map(|(bits, rows)| Class { bits, rows }).collect(),
        skip_unchanged_rows: required(plan, "skip_unchanged_rows")?,
    })
}

fn required<'py, T: for<'a> FromPyObject<'a, 'py>>(plan: &Bound<'py, PyDict>, key: &str) -> PyResult<T> {
    let value =
        plan.get_item(key)?.ok_or_else(|| PyValueError::new_err(format!("expected {key} in the plan, found none")))?;
    value.extract().map_err(Into::into)
}
