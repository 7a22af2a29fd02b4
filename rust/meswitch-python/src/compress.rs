//! Delta directories written: compressed from a fine-tune, or of sites that are given.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use meswitch_core::Error;
use meswitch_core::codec::{self, Class, Pair, Settings, Zero};
use meswitch_core::compress::{Job, Plan};
use meswitch_core::delta::{Assembly, Kind, Owner, Progress, SiteEntry};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyBytes, PyDict};
use serde_json::Value;

use crate::delta::Checkpoint;
use crate::enter_pool;
use crate::errors::to_python;

/// Compresses a fine-tune into a delta directory. With the kind "base" a whole model is written, `finetune`, and `base`
/// are its `zeros`.
///
/// `plans` is a list of dicts, one a parameter in execution order; `moments` maps names to little-endian float32
/// E[x²]; `progress(site, done, total)` is called before every site, first with the weights that an interrupted call
/// of the same arguments had done. `factor(site)` gives, as little-endian float32, U of H⁻¹ = UᵀU with H = E[x xᵀ] for
/// error compensation, or `None`; it is asked in the order of the plans.
#[pyfunction]
#[pyo3(signature = (kind, base, finetune, out, plans, moments, files, settings, base_name, progress, factor=None))]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // the signature that Python sees
pub fn compress(
    py: Python<'_>,
    kind: &str,
    base: &Checkpoint,
    finetune: &Checkpoint,
    out: PathBuf,
    plans: Vec<Bound<'_, PyDict>>,
    moments: HashMap<String, Vec<u8>>,
    files: Vec<PathBuf>,
    settings: &str,
    base_name: &str,
    progress: Py<PyAny>,
    factor: Option<Py<PyAny>>,
) -> PyResult<()> {
    let plans = plans.iter().map(|plan| read_plan(plan, &moments)).collect::<PyResult<Vec<_>>>()?;
    let (kind, settings) = (read_kind(kind)?, read_json(settings)?);
    let (base, finetune) = (&base.0, &finetune.0);
    let (mut raised, mut refused) = (None, None);
    let outcome = enter_pool(py, || {
        let job = Job { kind, base, finetune, plans: &plans, out: &out, files: &files, settings, base_name };
        job.run(&mut |step| report_progress(&progress, step, &mut raised), &mut |site| {
            let Some(factor) = &factor else { return Ok(None) };
            let given = Python::attach(|py| {
                let values: Option<PyBackedBytes> = factor.call1(py, (site,))?.extract(py)?;
                Ok(values.map(|values| floats(&values)))
            });
            given.map_err(|error: PyErr| {
                refused = Some(error);
                Error::Interrupted
            })
        })
    });
    raised.or(refused).map_or_else(|| outcome.map(drop), Err)
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
    let entries =
        sites.iter().map(|site| SiteEntry::from_json(site)).collect::<Result<Vec<_>, _>>().map_err(to_python)?;
    let settings = read_json(settings)?;
    let base = &base.0;
    let (mut raised, mut refused) = (None, None);
    let outcome = enter_pool(py, || {
        let assembly = Assembly { kind: Kind::Delta, base, out: &out, files: &files, settings, base_name };
        assembly.write_given(&entries, &mut |step| report_progress(&progress, step, &mut raised), &mut |entry| {
            let given = Python::attach(|py| tensors.call1(py, (&entry.name,))?.extract(py));
            given.map_err(|error| {
                refused = Some(error);
                Error::Interrupted
            })
        })
    });
    raised.or(refused).map_or_else(|| outcome.map(drop), Err)
}

fn read_kind(kind: &str) -> PyResult<Kind> {
    match kind {
        "delta" => Ok(Kind::Delta),
        "base" => Ok(Kind::Base),
        _ => Err(PyValueError::new_err(format!("expected kind delta or base, found {kind}"))),
    }
}

/// Calls Python's `progress`; false where it raised, or a signal did.
fn report_progress(progress: &Py<PyAny>, step: Progress<'_>, raised: &mut Option<PyErr>) -> bool {
    let call = Python::attach(|py| {
        py.check_signals()?;
        progress.call1(py, (step.site, step.done, step.total)).map(drop)
    });
    *raised = call.err();
    raised.is_none()
}

/// What `compress` would write, in bytes and a few too many, if the sites in `shared` are the base's and no others.
#[pyfunction]
#[pyo3(signature = (base, finetune, plans, shared, files, settings, base_name))]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // the signature that Python sees
pub fn estimate_bytes(
    base: &Checkpoint,
    finetune: &Checkpoint,
    plans: Vec<Bound<'_, PyDict>>,
    shared: HashSet<String>,
    files: Vec<PathBuf>,
    settings: &str,
    base_name: &str,
) -> PyResult<u64> {
    let plans = plans.iter().map(|plan| read_plan(plan, &HashMap::new())).collect::<PyResult<Vec<_>>>()?;
    let (settings, out) = (read_json(settings)?, Path::new(""));
    let kind = Kind::Delta;
    let job =
        Job { kind, base: &base.0, finetune: &finetune.0, plans: &plans, out, files: &files, settings, base_name };
    job.estimated_bytes(&shared).map_err(to_python)
}

/// Whether a fine-tune's parameter is the base's, cast to its own dtype at most.
#[pyfunction]
pub fn is_shared(py: Python<'_>, base: &Checkpoint, finetune: &Checkpoint, name: &str) -> PyResult<bool> {
    enter_pool(py, || Ok(meswitch_core::compress::is_shared(&base.0.view(name)?, &finetune.0.view(name)?)))
}

/// `Σ importance · Δ²` of every row of a site, as little-endian float64; `moments` are its E[x²].
#[pyfunction]
#[pyo3(signature = (base, finetune, name, transposed, moments))]
pub fn row_energies<'py>(
    py: Python<'py>,
    base: &Checkpoint,
    finetune: &Checkpoint,
    name: &str,
    transposed: bool,
    moments: Option<&[u8]>,
) -> PyResult<Bound<'py, PyBytes>> {
    let moments = moments.map(floats);
    let work = || {
        let pair = Pair::new(name, base.0.view(name)?, finetune.0.view(name)?, transposed)?;
        codec::row_energies(&pair, moments.as_deref())
    };
    Ok(bytes(py, &enter_pool(py, work)?))
}

/// What each candidate (a plan's settings) leaves in each of some rows of a site: `Σ importance · (Δ − Δ̂)²`,
/// as little-endian float64.
#[pyfunction]
#[pyo3(signature = (base, finetune, name, transposed, moments, rows, candidates))]
#[allow(clippy::too_many_arguments, clippy::needless_pass_by_value)] // the signature that Python sees
pub fn probe<'py>(
    py: Python<'py>,
    base: &Checkpoint,
    finetune: &Checkpoint,
    name: &str,
    transposed: bool,
    moments: Option<&[u8]>,
    rows: Vec<usize>,
    candidates: Vec<Bound<'py, PyDict>>,
) -> PyResult<Vec<Bound<'py, PyBytes>>> {
    let moments = moments.map(floats);
    let read = |candidate: &Bound<'py, PyDict>| read_settings(candidate, required(candidate, "bits")?);
    let candidates = candidates.iter().map(read).collect::<PyResult<Vec<_>>>()?;
    let work = || {
        let pair = Pair::new(name, base.0.view(name)?, finetune.0.view(name)?, transposed)?;
        if let Some(row) = rows.iter().find(|row| **row >= pair.rows) {
            return Err(Error::Argument(format!("expected rows below {} of {name}, found {row}", pair.rows)));
        }
        codec::probe(&pair, moments.as_deref(), &rows, &candidates)
    };
    Ok(enter_pool(py, work)?.iter().map(|errors| bytes(py, errors)).collect())
}

fn bytes<'py>(py: Python<'py>, values: &[f64]) -> Bound<'py, PyBytes> {
    PyBytes::new(py, &values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn read_json(text: &str) -> PyResult<Value> {
    serde_json::from_str(text).map_err(|error| PyValueError::new_err(error.to_string()))
}

fn read_plan(plan: &Bound<'_, PyDict>, moments: &HashMap<String, Vec<u8>>) -> PyResult<Plan> {
    let name: String = required(plan, "name")?;
    let quantize = match plan.get_item("bits")? {
        None => None,
        Some(bits) if bits.is_none() => None,
        Some(bits) => Some(read_settings(plan, bits.extract()?)?),
    };
    let moments = moments.get(&name).map(|bytes| floats(bytes));
    let owner: Option<(u32, Option<u32>)> = plan.get_item("owner")?.map(|owner| owner.extract()).transpose()?;
    let owner = owner.map(|(layer, moe_expert)| Owner { layer, moe_expert });
    Ok(Plan { transposed: required(plan, "transposed")?, owner, name, quantize, moments })
}

fn read_settings(plan: &Bound<'_, PyDict>, bits: u32) -> PyResult<Settings> {
    let zero: String = required(plan, "zero")?;
    let classes: Vec<(u32, Vec<u32>)> = required(plan, "classes")?;
    let group_size: Option<usize> = required(plan, "group_size")?;
    let known = |bits: &u32| meswitch_core::layout::BITS.contains(bits);
    if !known(&bits) || !classes.iter().all(|(bits, _)| *bits == 0 || known(bits)) || group_size == Some(0) {
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
        unbiased: required(plan, "unbiased")?,
        salient: required(plan, "salient")?,
        rank: required(plan, "rank")?,
        classes: classes.into_iter().map(|(bits, rows)| Class { bits, rows }).collect(),
        skip_unchanged_rows: required(plan, "skip_unchanged_rows")?,
        sparse: required(plan, "sparse")?,
    })
}

fn required<'py, T: for<'a> FromPyObject<'a, 'py>>(plan: &Bound<'py, PyDict>, key: &str) -> PyResult<T> {
    let value =
        plan.get_item(key)?.ok_or_else(|| PyValueError::new_err(format!("expected {key} in the plan, found none")))?;
    value.extract().map_err(Into::into)
}
