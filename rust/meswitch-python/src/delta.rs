//! Opened delta directories and checkpoints.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::Arc;

use meswitch_core::checkpoint;
use meswitch_core::delta;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::types::{PyByteArray, PyBytes};

use crate::errors::to_python;
use crate::folder::Lock;
use crate::{dlpack, enter, enter_pool};

/// Where parameters lie, as Python says it.
type Sources = BTreeMap<String, (String, Part)>;
/// The first element of a part and its shape; `None` for a whole tensor.
type Part = Option<(usize, Vec<usize>)>;

fn sources(given: Sources) -> BTreeMap<String, checkpoint::Source> {
    given.into_iter().map(|(name, (tensor, part))| (name, checkpoint::Source { tensor, part })).collect()
}

/// A mapped Hugging Face checkpoint.
#[pyclass(frozen)]
pub struct Checkpoint(pub checkpoint::Checkpoint);

#[pymethods]
impl Checkpoint {
    /// Maps files of a folder; of two tensors of one name, the later file's counts.
    #[new]
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn new(py: Python<'_>, path: PathBuf, files: Vec<String>) -> PyResult<Self> {
        enter(py, || checkpoint::Checkpoint::open(&path, &files)).map(Self)
    }

    /// Opens a model that was quantized.
    #[staticmethod]
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn open_quantized(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        enter(py, || checkpoint::Checkpoint::open_quantized(&path)).map(Self)
    }

    /// What a quantized model was made of: that checkpoint's fingerprint; `None` for any other checkpoint.
    #[getter]
    fn quantized_from(&self) -> Option<String> {
        self.0.quantized_from().map(|base| base.fingerprint.clone())
    }

    /// The elements of a parameter, little-endian; those of a quantized model are decoded to 32-bit floats.
    fn read<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyByteArray>> {
        let view = enter_pool(py, || self.0.view(name))?;
        Ok(PyByteArray::new(py, &view.data))
    }

    /// The same files with these parameters, and aliases that are none: each the name of a tensor on disk, with the
    /// first element and the shape of a part of it.
    fn with_parameters(&self, parameters: Sources, aliases: Sources) -> PyResult<Self> {
        self.0.with_parameters(sources(parameters), sources(aliases)).map(Self).map_err(to_python)
    }

    /// The same tensors, all of zeros.
    fn zeros(&self) -> PyResult<Self> {
        self.0.zeros().map(Self).map_err(to_python)
    }

    /// A hash of names, dtypes, shapes and three kilobytes of each tensor.
    fn sample(&self, py: Python<'_>) -> PyResult<String> {
        enter(py, || self.0.sample())
    }

    /// The names of the tensors on disk, in no order.
    fn stored_names(&self) -> Vec<String> {
        self.0.stored_names().map(str::to_owned).collect()
    }

    /// The parameters, by name in order.
    fn names(&self) -> Vec<String> {
        self.0.names().to_vec()
    }

    /// Whether there is a parameter or an alias of that name.
    fn has(&self, name: &str) -> bool {
        self.0.has(name)
    }

    /// Where a parameter lies: the file, the tensor's name in it, and the first element and the shape of a part.
    fn source(&self, name: &str) -> Option<(PathBuf, String, Part)> {
        let (file, source) = self.0.source(name)?;
        Some((file.to_owned(), source.tensor, source.part))
    }

    /// A parameter's dtype, as safetensors names it, and its shape.
    fn info(&self, name: &str) -> PyResult<(String, Vec<usize>)> {
        let view = self.0.outline(name).map_err(to_python)?;
        Ok((view.dtype.to_string(), view.shape))
    }
}

/// An opened delta directory; it holds no tensors.
#[pyclass(frozen)]
pub struct Delta(pub Arc<delta::Delta>);

#[pymethods]
impl Delta {
    #[new]
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn new(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        enter_pool(py, || delta::Delta::open(&path)).map(|delta| Self(Arc::new(delta)))
    }

    /// The manifest, in JSON.
    fn manifest(&self) -> PyResult<String> {
        serde_json::to_string(self.0.manifest()).map_err(|error| PyValueError::new_err(error.to_string()))
    }

    /// The names of all sites, in the order of the manifest.
    fn names(&self) -> Vec<String> {
        self.0.manifest().sites.iter().map(|site| site.name.clone()).collect()
    }

    /// A site's entry of the manifest, in JSON; `None` where there is no such site.
    fn site(&self, name: &str) -> Option<String> {
        self.0.site(name).and_then(|site| serde_json::to_string(site).ok())
    }

    /// The version of the format that the directory has.
    #[getter]
    fn format_version(&self) -> u32 {
        self.0.manifest().format_version
    }

    /// What the directory holds: "delta" or "base".
    #[getter]
    fn kind(&self) -> String {
        self.0.manifest().kind.to_string()
    }

    /// The hash of the base that the delta was made against.
    #[getter]
    fn fingerprint(&self) -> String {
        self.0.manifest().base.fingerprint.clone()
    }

    /// The number of weights of the fine-tune.
    #[getter]
    fn parameters(&self) -> u64 {
        self.0.manifest().parameters()
    }

    /// What manifest and tensors weigh.
    #[getter]
    fn nbytes(&self) -> u64 {
        self.0.bytes()
    }

    /// The memory that all tensors take.
    #[getter]
    fn memory_bytes(&self) -> PyResult<usize> {
        self.0.memory_bytes().map_err(to_python)
    }

    /// The memory that the tensors of one site take where a residency loads them.
    fn site_memory_bytes(&self, site: &str) -> PyResult<usize> {
        self.0.site_memory_bytes(site).map_err(to_python)
    }

    /// Reads the tensors of one site, or of all, and compares them with their checksums.
    #[pyo3(signature = (site=None))]
    fn tensors(&self, py: Python<'_>, site: Option<&str>) -> PyResult<Tensors> {
        let read = || site.map_or_else(|| self.0.tensors(), |site| self.0.site_tensors(site));
        enter_pool(py, read).map(|tensors| Tensors(Arc::new(tensors)))
    }

    /// The bytes of a small file that the manifest names.
    fn read_file<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = enter_pool(py, || self.0.read_file(name))?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// Reads every byte and compares it with its checksum.
    fn verify(&self, py: Python<'_>) -> PyResult<()> {
        enter_pool(py, || self.0.verify())
    }

    /// Writes the directory anew at a place with some tensors (by `SITE/ROLE`) replaced by others of the same size.
    #[allow(clippy::needless_pass_by_value)] // what Python hands over
    fn rewrite(
        &self,
        py: Python<'_>,
        place: &Lock,
        tensors: HashMap<String, Vec<u8>>,
        errors: HashMap<String, f64>,
        settings: &str,
    ) -> PyResult<()> {
        let settings = serde_json::from_str(settings).map_err(|error| PyValueError::new_err(error.to_string()))?;
        let lock = place.get()?;
        enter_pool(py, || delta::rewrite_at(&self.0, &lock, &tensors, &errors, &settings))
    }

    /// Writes the directory anew in today's format, in its own place; false where it has it already.
    fn upgrade(&self, py: Python<'_>) -> PyResult<bool> {
        enter_pool(py, || delta::upgrade(&self.0))
    }

    /// Compares a base with the one the delta was made against: quickly, or all of its content. `allow_quantized`: a
    /// quantized form of that base will do.
    fn check_base(&self, py: Python<'_>, base: &Checkpoint, whole: bool, allow_quantized: bool) -> PyResult<()> {
        enter_pool(py, || self.0.check_base(&base.0, whole, allow_quantized))
    }
}

/// Tensors of a delta in memory that is given back when nothing of Python or Rust uses it any more.
#[pyclass(frozen)]
pub struct Tensors(pub Arc<delta::Tensors>);

#[pymethods]
impl Tensors {
    /// All of the memory as a DLPack capsule: bytes, which must not be written to.
    fn dlpack<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        dlpack::capsule(py, self.0.region().clone())
    }

    /// Where a tensor lies in that memory: its first byte and the one after its last; `None` if absent.
    fn extent(&self, site: &str, role: &str) -> Option<(usize, usize)> {
        self.0.extent(site, role).map(|range| (range.start, range.end))
    }
}

/// The checksum of some bytes, as manifests state it.
#[pyfunction]
#[allow(clippy::needless_pass_by_value)] // what Python hands over
pub fn checksum(py: Python<'_>, bytes: PyBackedBytes) -> PyResult<String> {
    enter_pool(py, || Ok(delta::checksum(&bytes).to_string()))
}
