//! Hugging Face checkpoints, memory-mapped.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use candle_core::safetensors::MmapedSafetensors;
use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::fingerprint;
use crate::kernels::{widen_bf16, widen_f16};
use crate::memory::Region;

/// A mapped checkpoint: some safetensors files, and the parameters that lie in them. The files must not be changed while
/// this lives.
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<PathBuf>,
    maps: Arc<[MmapedSafetensors]>,
    /// The file of every tensor, by its name on disk.
    stored: Arc<BTreeMap<String, usize>>,
    /// The parameters, sorted.
    names: Vec<String>,
    /// Where parameters and aliases lie that are no whole tensor of their own name.
    sources: BTreeMap<String, Source>,
    /// [`Checkpoint::sample`], once it was asked for.
    sample: Arc<OnceLock<String>>,
    /// What stands in for the content of every tensor, as long as the longest of them.
    zeros: Option<Arc<Region>>,
}

/// Where a parameter lies: in a tensor on disk, or in a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The tensor's name on disk.
    pub tensor: String,
    /// The part's first element and its shape; `None` for the whole tensor.
    pub part: Option<(usize, Vec<usize>)>,
}

/// One tensor, borrowed from a mapped checkpoint.
#[derive(Clone, Debug)]
pub struct View<'a> {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, as on disk.
    pub shape: Vec<usize>,
    /// Little-endian elements, row by row.
    pub data: &'a [u8],
}

impl<'a> View<'a> {
    /// The number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the elements are of a type that [`View::read`] can read.
    #[must_use]
    pub fn is_float(&self) -> bool {
        matches!(self.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)
    }

    /// Reads elements `start .. start + out.len()` as 32-bit floats. The tensor must be one of floats
    /// ([`View::is_float`]); of others the values are meaningless.
    ///
    /// # Panics
    /// Where the tensor has fewer elements.
    pub fn read(&self, start: usize, out: &mut [f32]) {
        let size = self.dtype.bitsize() / 8;
        let bytes = &self.data[start * size..(start + out.len()) * size];
        match self.dtype {
            Dtype::BF16 => widen_bf16(bytes.as_chunks().0, out),
            Dtype::F16 => widen_f16_bytes(bytes, out),
            _ => widen_f32(bytes, out),
        }
    }

    /// Checks that all elements of a float tensor are finite. `name` is the tensor's in the message.
    ///
    /// # Errors
    /// [`Error::NonFinite`].
    pub(crate) fn check_finite(&self, name: &str) -> Result<()> {
        if !self.is_float() {
            return Ok(());
        }
        let mut values = vec![0f32; 1 << 14];
        for start in (0..self.len()).step_by(values.len()) {
            let count = values.len().min(self.len() - start);
            self.read(start, &mut values[..count]);
            if let Some(index) = values[..count].iter().position(|value| !value.is_finite()) {
                return Err(Error::NonFinite(format!(
                    "expected finite weights, found {} in {name} at element {}",
                    values[index],
                    start + index
                )));
            }
        }
        Ok(())
    }

    /// The bytes of rows `start .. end`; a row is the last dimension.
    pub(crate) fn row_bytes(&self, start: usize, end: usize) -> &'a [u8] {
        let row = self.shape.last().copied().unwrap_or(1) * self.dtype.bitsize() / 8;
        &self.data[start * row..end * row]
    }
}

/// Widens little-endian half precision floats, which need not be aligned.
fn widen_f16_bytes(bytes: &[u8], out: &mut [f32]) {
    let mut halves = [half::f16::ZERO; 256];
    for (out, bytes) in out.chunks_mut(256).zip(bytes.chunks(512)) {
        for (half, pair) in halves.iter_mut().zip(bytes.chunks_exact(2)) {
            *half = half::f16::from_le_bytes([pair[0], pair[1]]);
        }
        widen_f16(&halves[..out.len()], out);
    }
}

fn widen_f32(bytes: &[u8], out: &mut [f32]) {
    for (value, quad) in out.iter_mut().zip(bytes.chunks_exact(4)) {
        *value = f32::from_le_bytes([quad[0], quad[1], quad[2], quad[3]]);
    }
}

impl Checkpoint {
    /// Maps `files` of a folder. Where two hold a tensor of one name, the later file's counts. All tensors are parameters
    /// under their own names.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for files that are missing, damaged or empty.
    pub fn open(folder: &Path, files: &[String]) -> Result<Self> {
        let files: Vec<PathBuf> = files.iter().map(|file| folder.join(file)).collect();
        let mut maps = Vec::with_capacity(files.len());
        let mut stored = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            // SAFETY: the mapping is read-only; as with any mapped model file, nothing may write to the file meanwhile.
            let map = unsafe { MmapedSafetensors::new(file) }.map_err(|error| {
                // The cause names the file.
                Error::Checkpoint(format!("expected whole safetensors files, found a broken one: {error}"))
            })?;
            stored.extend(map.tensors().into_iter().map(|(name, _)| (name, index)));
            maps.push(map);
        }
        if stored.is_empty() {
            return Err(Error::Checkpoint(format!("expected tensors, found none in {}", folder.display())));
        }
        let names = stored.keys().cloned().collect();
        let (maps, stored) = (maps.into(), Arc::new(stored));
        let (path, sources, sample) = (folder.to_owned(), BTreeMap::new(), Arc::default());
        Ok(Self { path, files, maps, stored, names, sources, sample, zeros: None })
    }

    /// The same tensors, all of zeros, which take no memory as long as they are only read.
    ///
    /// # Errors
    /// [`Error::Io`] where there are not enough addresses.
    pub fn zeros(&self) -> Result<Self> {
        let mut longest = 0;
        for name in self.stored_names() {
            longest = longest.max(self.stored_view(name)?.data.len());
        }
        let zeros = Some(Arc::new(Region::new(longest).map_err(Error::io(&self.path))?));
        let (path, files, names) = (self.path.clone(), self.files.clone(), self.names.clone());
        let (maps, stored, sources) = (Arc::clone(&self.maps), Arc::clone(&self.stored), self.sources.clone());
        Ok(Self { path, files, maps, stored, names, sources, sample: Arc::default(), zeros })
    }

    /// The same files with these parameters instead. `aliases` are answered for, and are no parameters.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for a source that is not in the files.
    pub fn with_parameters(
        &self,
        parameters: BTreeMap<String, Source>,
        aliases: BTreeMap<String, Source>,
    ) -> Result<Self> {
        let names: Vec<String> = parameters.keys().cloned().collect();
        let mut sources = aliases;
        sources.extend(parameters);
        for (name, source) in &sources {
            self.source_view(name, source)?;
        }
        sources.retain(|name, source| source.part.is_some() || source.tensor != *name);
        let (path, files) = (self.path.clone(), self.files.clone());
        let (maps, stored, sample) = (Arc::clone(&self.maps), Arc::clone(&self.stored), Arc::clone(&self.sample));
        Ok(Self { path, files, maps, stored, names, sources, sample, zeros: self.zeros.clone() })
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that hold the tensors.
    #[must_use]
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// The names of the parameters, sorted.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The names of all tensors on disk, sorted.
    pub fn stored_names(&self) -> impl Iterator<Item = &str> {
        self.stored.keys().map(String::as_str)
    }

    /// Whether there is a tensor of that name on disk.
    #[must_use]
    pub fn is_stored(&self, name: &str) -> bool {
        self.stored.contains_key(name)
    }

    /// The parameter or alias of that name.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where there is none of that name.
    pub fn view(&self, name: &str) -> Result<View<'_>> {
        match self.sources.get(name) {
            Some(source) => self.source_view(name, source),
            None if self.has(name) => self.stored_view(name),
            None => Err(self.missing(name)),
        }
    }

    /// The tensor of that name on disk.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where there is none of that name.
    pub fn stored_view(&self, name: &str) -> Result<View<'_>> {
        let file = self.stored.get(name).ok_or_else(|| self.missing(name))?;
        let view = self.maps[*file].get(name).map_err(|_| self.missing(name))?;
        let data = view.data();
        let data = self.zeros.as_ref().map_or(data, |zeros| &zeros[..data.len()]);
        Ok(View { dtype: view.dtype(), shape: view.shape().to_vec(), data })
    }

    /// Where a parameter or an alias lies, and its file. `None` where there is none of that name.
    #[must_use]
    pub fn source(&self, name: &str) -> Option<(&Path, Source)> {
        let own = || self.has(name).then(|| Source { tensor: name.to_owned(), part: None });
        let source = self.sources.get(name).cloned().or_else(own)?;
        let file = *self.stored.get(&source.tensor)?;
        Some((&self.files[file], source))
    }

    /// A quick hash of the names, dtypes, shapes and up to three kilobytes of each tensor on disk, as they were when it
    /// was first asked for. From then on the files are not read for it.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where a tensor cannot be read.
    pub fn sample(&self) -> Result<String> {
        if let Some(sample) = self.sample.get() {
            return Ok(sample.clone());
        }
        let sample = fingerprint::sample(self)?;
        Ok(self.sample.get_or_init(|| sample).clone())
    }

    /// Whether there is a parameter or an alias of that name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.sources.contains_key(name) || self.names.binary_search_by(|known| known.as_str().cmp(name)).is_ok()
    }

    fn source_view(&self, name: &str, source: &Source) -> Result<View<'_>> {
        let whole = self.stored_view(&source.tensor)?;
        let Some((start, shape)) = &source.part else { return Ok(whole) };
        let size = whole.dtype.bitsize() / 8;
        let elements = shape.iter().try_fold(1usize, |product, axis| product.checked_mul(*axis));
        let end = elements.and_then(|count| start.checked_add(count)).filter(|end| *end <= whole.len());
        let end = end.ok_or_else(|| {
            Error::Checkpoint(format!(
                "expected {shape:?} of {name} from element {start} on, found {:?} in {}",
                whole.shape, source.tensor
            ))
        })?;
        Ok(View { dtype: whole.dtype, shape: shape.clone(), data: &whole.data[start * size..end * size] })
    }

    fn missing(&self, name: &str) -> Error {
        Error::Checkpoint(format!("expected a tensor {name}, found none in {}", self.path.display()))
    }
}
