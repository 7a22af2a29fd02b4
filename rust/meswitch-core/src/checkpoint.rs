//! Hugging Face checkpoints, memory-mapped.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use safetensors::Dtype;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::fingerprint;
use crate::kernels::{widen_bf16, widen_f16};

/// The file name of an unsharded checkpoint's tensors.
const SINGLE: &str = "model.safetensors";
/// The file name of a sharded checkpoint's index.
const INDEX: &str = "model.safetensors.index.json";

/// The name of the output layer, which may be tied to the embedding.
const HEAD: &str = "lm_head.weight";

/// A mapped checkpoint folder. Its files must not be changed while this lives.
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<PathBuf>,
    tensors: MmapedSafetensors,
    /// The tensors on disk, sorted.
    names: Vec<String>,
    /// Names of tied tensors, each with the name on disk.
    aliases: HashMap<String, String>,
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
    /// Maps the checkpoint of a folder: `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for an incomplete or damaged checkpoint, [`Error::Io`] where a file cannot be read.
    pub fn open(folder: &Path) -> Result<Self> {
        let (files, listed) = files_of(folder)?;
        // SAFETY: the mapping is read-only; as with any mapped model file, nothing may write to the files meanwhile.
        let tensors = unsafe { MmapedSafetensors::multi(&files) }.map_err(|error| {
            Error::Checkpoint(format!(
                "expected whole safetensors files, found a broken one in {}: {error}",
                folder.display()
            ))
        })?;
        let mut names: Vec<String> = tensors.tensors().into_iter().map(|(name, _)| name).collect();
        names.sort_unstable();
        if names.is_empty() {
            return Err(Error::Checkpoint(format!("expected tensors, found none in {}", folder.display())));
        }
        for name in listed {
            if names.binary_search(&name).is_err() {
                return Err(Error::Checkpoint(format!(
                    "expected every tensor of {INDEX}, found no {name} in {}",
                    folder.display()
                )));
            }
        }
        let mut aliases = HashMap::new();
        if names.binary_search_by(|name| name.as_str().cmp(HEAD)).is_err()
            && is_tied(folder)?
            && let Some(embedding) = names.iter().find(|name| is_embedding(name))
        {
            aliases.insert(HEAD.to_owned(), embedding.clone());
        }
        Ok(Self { path: folder.to_owned(), files, tensors, names, aliases })
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

    /// The names of the tensors on disk, sorted.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The tensor of that name. In a tied checkpoint, `lm_head.weight` is the embedding.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where there is none of that name.
    pub fn view(&self, name: &str) -> Result<View<'_>> {
        let view = self.tensors.get(self.on_disk(name)).map_err(|_| {
            Error::Checkpoint(format!("expected a tensor {name}, found none in {}", self.path.display()))
        })?;
        Ok(View { dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data() })
    }

    /// The name on disk of a tensor: that of the tensor it is tied to, else its own.
    #[must_use]
    pub fn on_disk<'a>(&'a self, name: &'a str) -> &'a str {
        self.aliases.get(name).map_or(name, String::as_str)
    }

    /// A quick hash of the names, dtypes, shapes and up to three kilobytes of each tensor.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where a tensor cannot be read.
    pub fn sample(&self) -> Result<String> {
        fingerprint::sample(self)
    }

    /// Whether the checkpoint has a tensor of that name, on disk or tied.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.aliases.contains_key(name) || self.names.binary_search_by(|stored| stored.as_str().cmp(name)).is_ok()
    }
}

/// The safetensors files of a folder, and the tensors that its index lists.
fn files_of(folder: &Path) -> Result<(Vec<PathBuf>, Vec<String>)> {
    let single = folder.join(SINGLE);
    let index = folder.join(INDEX);
    if !folder.is_dir() {
        return Err(Error::Checkpoint(format!("expected a checkpoint folder, found none at {}", folder.display())));
    }
    if !index.is_file() {
        if single.is_file() {
            return Ok((vec![single], Vec::new()));
        }
        return Err(Error::Checkpoint(format!("expected {SINGLE} or {INDEX}, found neither in {}", folder.display())));
    }
    let broken = |what: &str| Error::Checkpoint(format!("expected {what} in {}", index.display()));
    let text = fs::read_to_string(&index).map_err(Error::io(&index))?;
    let json: Value =
        serde_json::from_str(&text).map_err(|error| broken(&format!("an index in JSON, found {error}")))?;
    let map = json.get("weight_map").and_then(Value::as_object).ok_or_else(|| broken("a weight_map"))?;
    let mut files = BTreeMap::new();
    for (name, file) in map {
        let file = file
            .as_str()
            .filter(|file| !file.contains(['/', '\\']))
            .ok_or_else(|| broken("file names without folders"))?;
        let path = folder.join(file);
        if !path.is_file() {
            return Err(Error::Checkpoint(format!(
                "expected the shard {file} of {name}, found none in {}",
                folder.display()
            )));
        }
        files.insert(file.to_owned(), path);
    }
    Ok((files.into_values().collect(), map.keys().cloned().collect()))
}

/// Whether the configuration says that output layer and embedding are tied.
fn is_tied(folder: &Path) -> Result<bool> {
    let path = folder.join("config.json");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::io(&path)(error)),
    };
    let config: Value = serde_json::from_str(&text)
        .map_err(|error| Error::Checkpoint(format!("expected JSON in {}, found {error}", path.display())))?;
    // Absent means true: configurations omit the field where it has transformers' default.
    Ok(config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(true))
}

/// Whether a tensor of that name is the token embedding.
fn is_embedding(name: &str) -> bool {
    [".embed_tokens.weight", ".wte.weight", ".embed_in.weight", ".word_embeddings.weight"]
        .iter()
        .any(|end| name.ends_with(end) || name == &end[1..])
}
