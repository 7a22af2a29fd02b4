//! Checkpoints: Hugging Face safetensors, memory-mapped, or a model that was quantized.

mod quantized;
mod view;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use candle_core::safetensors::MmapedSafetensors;

use self::quantized::Quantized;
pub use self::view::{Content, View};
use crate::delta::BaseEntry;
use crate::error::{Error, Result};
use crate::fingerprint::{self, Digest};
use crate::memory::Region;

/// An open checkpoint, and the parameters that lie in it. Mapped files must not be changed while this lives.
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<PathBuf>,
    store: Arc<Store>,
    /// The parameters, sorted.
    names: Vec<String>,
    /// Where parameters and aliases lie that are no whole tensor of their own name.
    sources: BTreeMap<String, Source>,
    /// [`Checkpoint::sample`], once it was asked for.
    sample: Arc<OnceLock<String>>,
    /// What stands in for the content of every tensor, as long as the longest of them.
    zeros: Option<Arc<Region>>,
}

/// What tensors are read from.
enum Store {
    /// Safetensors files.
    Files {
        maps: Vec<MmapedSafetensors>,
        /// The file of every tensor, by its name on disk.
        file_of: BTreeMap<String, usize>,
    },
    /// A directory of kind base.
    Quantized(Quantized),
}

/// Where a parameter lies: in a tensor on disk, or in a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The tensor's name on disk.
    pub tensor: String,
    /// The part's first element and its shape; `None` for the whole tensor.
    pub part: Option<(usize, Vec<usize>)>,
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
        let mut file_of = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            // SAFETY: the mapping is read-only; as with any mapped model file, nothing may write to the file meanwhile.
            let map = unsafe { MmapedSafetensors::new(file) }.map_err(|error| {
                // The cause names the file.
                Error::Checkpoint(format!("expected whole safetensors files, found a broken one: {error}"))
            })?;
            file_of.extend(map.tensors().into_iter().map(|(name, _)| (name, index)));
            maps.push(map);
        }
        if file_of.is_empty() {
            return Err(Error::Checkpoint(format!("expected tensors, found none in {}", folder.display())));
        }
        let names = file_of.keys().cloned().collect();
        Ok(Self::new(folder, files, names, Store::Files { maps, file_of }))
    }

    /// Opens a model that was quantized. Its tensors are decoded, each when it is viewed, to 32-bit floats.
    ///
    /// # Errors
    /// Those of [`crate::Delta::open`], and [`Error::Checkpoint`] for a directory of another kind.
    pub fn open_quantized(folder: &Path) -> Result<Self> {
        let quantized = Quantized::open(folder)?;
        let mut names: Vec<String> = quantized.names().map(str::to_owned).collect();
        names.sort_unstable();
        Ok(Self::new(folder, quantized.files(), names, Store::Quantized(quantized)))
    }

    fn new(folder: &Path, files: Vec<PathBuf>, names: Vec<String>, store: Store) -> Self {
        let (path, sources, store) = (folder.to_owned(), BTreeMap::new(), Arc::new(store));
        Self { path, files, store, names, sources, sample: Arc::default(), zeros: None }
    }

    /// The checkpoint that a quantized model was made of; `None` for any other.
    #[must_use]
    pub fn quantized_from(&self) -> Option<&BaseEntry> {
        match &*self.store {
            Store::Files { .. } => None,
            Store::Quantized(quantized) => Some(quantized.base()),
        }
    }

    /// The same tensors, all of zeros, which take no memory as long as they are only read.
    ///
    /// # Errors
    /// [`Error::Io`] where there are not enough addresses.
    pub fn zeros(&self) -> Result<Self> {
        let mut longest = 0;
        for name in self.stored_names() {
            longest = longest.max(self.stored_outline(name)?.nbytes());
        }
        let zeros = Some(Arc::new(Region::new(longest).map_err(Error::io(&self.path))?));
        let (path, files, names) = (self.path.clone(), self.files.clone(), self.names.clone());
        let (store, sources) = (Arc::clone(&self.store), self.sources.clone());
        Ok(Self { path, files, store, names, sources, sample: Arc::default(), zeros })
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
            source.outline(name, self.stored_outline(&source.tensor)?)?;
        }
        sources.retain(|name, source| source.part.is_some() || source.tensor != *name);
        let (path, files) = (self.path.clone(), self.files.clone());
        let (store, sample) = (Arc::clone(&self.store), Arc::clone(&self.sample));
        Ok(Self { path, files, store, names, sources, sample, zeros: self.zeros.clone() })
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

    /// The names of all tensors on disk, in no order.
    pub fn stored_names(&self) -> impl Iterator<Item = &str> {
        let (file_of, quantized) = match &*self.store {
            Store::Files { file_of, .. } => (Some(file_of), None),
            Store::Quantized(quantized) => (None, Some(quantized)),
        };
        let in_files = file_of.into_iter().flat_map(BTreeMap::keys).map(String::as_str);
        in_files.chain(quantized.into_iter().flat_map(Quantized::names))
    }

    /// Whether there is a tensor of that name on disk.
    #[must_use]
    pub fn is_stored(&self, name: &str) -> bool {
        match &*self.store {
            Store::Files { file_of, .. } => file_of.contains_key(name),
            Store::Quantized(quantized) => quantized.has(name),
        }
    }

    /// The parameter or alias of that name. One that is quantized is decoded.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where there is none of that name; those of [`Checkpoint::stored_view`].
    pub fn view(&self, name: &str) -> Result<View<'_>> {
        let source = self.find(name)?;
        source.part_of(name, self.stored_view(&source.tensor)?)
    }

    /// The parameter or alias of that name without its elements, which must not be read: nothing is decoded.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where there is none of that name.
    pub fn outline(&self, name: &str) -> Result<View<'_>> {
        let source = self.find(name)?;
        source.outline(name, self.stored_outline(&source.tensor)?)
    }

    /// The tensor of that name on disk. One that is quantized is decoded.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where there is none of that name; of a quantized one, those of reading it.
    pub fn stored_view(&self, name: &str) -> Result<View<'_>> {
        let view = match &*self.store {
            Store::Files { maps, file_of } => {
                let file = file_of.get(name).ok_or_else(|| self.missing(name))?;
                let view = maps[*file].get(name).map_err(|_| self.missing(name))?;
                View { dtype: view.dtype(), shape: view.shape().to_vec(), data: Content::Borrowed(view.data()) }
            }
            Store::Quantized(quantized) if quantized.has(name) => quantized.view(name)?,
            Store::Quantized(_) => return Err(self.missing(name)),
        };
        match &self.zeros {
            None => Ok(view),
            Some(zeros) => Ok(View { data: Content::Borrowed(&zeros[..view.nbytes()]), ..view }),
        }
    }

    /// [`Checkpoint::stored_view`] without the elements.
    fn stored_outline(&self, name: &str) -> Result<View<'_>> {
        match &*self.store {
            Store::Files { .. } => self.stored_view(name),
            Store::Quantized(quantized) => quantized.outline(name).ok_or_else(|| self.missing(name)),
        }
    }

    /// A hash of the dtype, shape and content of a tensor on disk.
    ///
    /// # Errors
    /// Those of [`Checkpoint::stored_view`].
    pub(crate) fn digest(&self, name: &str) -> Result<Digest> {
        match &*self.store {
            Store::Quantized(quantized) => quantized.digest(name).ok_or_else(|| self.missing(name)),
            Store::Files { .. } => Ok(fingerprint::digest(&self.stored_view(name)?)),
        }
    }

    /// Where a parameter or an alias lies, and its file. `None` where there is none of that name.
    #[must_use]
    pub fn source(&self, name: &str) -> Option<(&Path, Source)> {
        let source = self.find(name).ok()?;
        let file = match &*self.store {
            Store::Files { file_of, .. } => *file_of.get(&source.tensor)?,
            Store::Quantized(_) => 0,
        };
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

    fn find(&self, name: &str) -> Result<Source> {
        let own = || self.has(name).then(|| Source { tensor: name.to_owned(), part: None });
        self.sources.get(name).cloned().or_else(own).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> Error {
        Error::Checkpoint(format!("expected a tensor {name}, found none in {}", self.path.display()))
    }
}

impl Source {
    /// What lies there, of the whole tensor. `name` is the parameter's in the message.
    fn part_of<'a>(&self, name: &str, whole: View<'a>) -> Result<View<'a>> {
        let outline = self.outline(name, whole.clone())?;
        let Some((start, _)) = &self.part else { return Ok(whole) };
        let size = whole.dtype.bitsize() / 8;
        Ok(View { data: whole.data.part(start * size, outline.nbytes()), ..outline })
    }

    /// Dtype and shape of what lies there.
    fn outline<'a>(&self, name: &str, whole: View<'a>) -> Result<View<'a>> {
        let Some((start, shape)) = &self.part else { return Ok(whole) };
        let elements = shape.iter().try_fold(1usize, |product, axis| product.checked_mul(*axis));
        let end = elements.and_then(|count| start.checked_add(count)).filter(|end| *end <= whole.len());
        if end.is_none() {
            return Err(Error::Checkpoint(format!(
                "expected {shape:?} of {name} from element {start} on, found {:?} in {}",
                whole.shape, self.tensor
            )));
        }
        Ok(View { shape: shape.clone(), ..whole })
    }
}
