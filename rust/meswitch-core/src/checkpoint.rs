//! Hugging Face checkpoints, memory-mapped through candle-core, one tensor at a time.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::safetensors::MmapedSafetensors;
use half::slice::HalfFloatSliceExt;
use safetensors::Dtype;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::kernels::by_backend;

/// The name of an unsharded checkpoint's tensors.
pub const SINGLE: &str = "model.safetensors";
/// The name of a sharded checkpoint's index.
pub const INDEX: &str = "model.safetensors.index.json";

const HEAD: &str = "lm_head.weight";

/// A mapped checkpoint folder.
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<PathBuf>,
    tensors: MmapedSafetensors,
    names: Vec<String>,
    aliases: HashMap<String, String>,
}

/// One tensor of a checkpoint: a view of the mapped file.
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
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the elements are of a type that [`View::read`] widens.
    #[must_use]
    pub fn is_float(&self) -> bool {
        matches!(self.dtype, Dtype::BF16 | Dtype::F16 | Dtype::F32)
    }

    /// Elements `start .. start + out.len()` as 32-bit floats; only of a float tensor.
    pub fn read(&self, start: usize, out: &mut [f32]) {
        let size = self.dtype.bitsize() / 8;
        let bytes = &self.data[start * size..(start + out.len()) * size];
        match self.dtype {
            Dtype::BF16 => widen_bf16(bytes, out),
            Dtype::F16 => widen_f16(bytes, out),
            _ => widen_f32(bytes, out),
        }
    }

    /// # Errors
    /// [`Error::NonFinite`] where a float of the tensor is; `name` is what the message calls it.
    pub fn finite(&self, name: &str) -> Result<()> {
        if !self.is_float() {
            return Ok(());
        }
        let mut values = vec![0f32; 1 << 14];
        for start in (0..self.len()).step_by(values.len()) {
            let count = values.len().min(self.len() - start);
            self.read(start, &mut values[..count]);
            if let Some(at) = values[..count].iter().position(|value| !value.is_finite()) {
                return Err(Error::NonFinite(format!(
                    "expected finite weights, found {} in {name} at element {}",
                    values[at],
                    start + at
                )));
            }
        }
        Ok(())
    }

    /// The bytes of rows `start .. end`, a row being the last dimension.
    #[must_use]
    pub fn row_slice(&self, start: usize, end: usize) -> &'a [u8] {
        let row = self.shape.last().copied().unwrap_or(1) * self.dtype.bitsize() / 8;
        &self.data[start * row..end * row]
    }
}

by_backend! {
    /// Widens little-endian bf16 elements.
    pub fn widen_bf16(bytes: &[u8], out: &mut [f32]) = widen_bf16_body
}

#[inline(always)]
fn widen_bf16_body(bytes: &[u8], out: &mut [f32]) {
    for (value, pair) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        *value = f32::from_bits(u32::from(u16::from_le_bytes([pair[0], pair[1]])) << 16);
    }
}

fn widen_f16(bytes: &[u8], out: &mut [f32]) {
    let mut halves = [half::f16::ZERO; 256];
    for (out, bytes) in out.chunks_mut(256).zip(bytes.chunks(512)) {
        for (half, pair) in halves.iter_mut().zip(bytes.chunks_exact(2)) {
            *half = half::f16::from_le_bytes([pair[0], pair[1]]);
        }
        halves[..out.len()].convert_to_f32_slice(out);
    }
}

fn widen_f32(bytes: &[u8], out: &mut [f32]) {
    for (value, quad) in out.iter_mut().zip(bytes.chunks_exact(4)) {
        *value = f32::from_le_bytes([quad[0], quad[1], quad[2], quad[3]]);
    }
}

impl Checkpoint {
    /// Maps the checkpoint of a folder: `model.safetensors`, or the shards that its index names.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] for what is not a whole checkpoint, [`Error::Io`] for what cannot be read.
    pub fn open(folder: &Path) -> Result<Self> {
        let (files, listed) = files_of(folder)?;
        // SAFETY: the files are opened read-only; as with any mapped model file, nobody may write to them meanwhile.
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
            && tied(folder)?
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

    /// The tensors on disk, by name in order.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The tensor of that name. A tied checkpoint answers `lm_head.weight` with its embedding.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where there is none.
    pub fn view(&self, name: &str) -> Result<View<'_>> {
        let view = self.tensors.get(self.on_disk(name)).map_err(|_| {
            Error::Checkpoint(format!("expected a tensor {name}, found none in {}", self.path.display()))
        })?;
        Ok(View { dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data() })
    }

    /// The name on disk of a tensor: its own, or that of the tensor it is tied to.
    #[must_use]
    pub fn on_disk<'a>(&'a self, name: &'a str) -> &'a str {
        self.aliases.get(name).map_or(name, String::as_str)
    }

    /// Whether the checkpoint has a tensor of that name, its own or a tied one.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.aliases.contains_key(name) || self.names.binary_search_by(|own| own.as_str().cmp(name)).is_ok()
    }
}

/// The safetensors files of a folder, and the names that its index lists.
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

fn tied(folder: &Path) -> Result<bool> {
    let path = folder.join("config.json");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Error::io(&path)(error)),
    };
    let config: Value = serde_json::from_str(&text)
        .map_err(|error| Error::Checkpoint(format!("expected JSON in {}, found {error}", path.display())))?;
    // Absent means tied: the default of every transformers configuration that leaves it out of its file.
    Ok(config.get("tie_word_embeddings").and_then(Value::as_bool).unwrap_or(true))
}

/// Whether a tensor of that name is the table of token embeddings.
fn is_embedding(name: &str) -> bool {
    [".embed_tokens.weight", ".wte.weight", ".embed_in.weight", ".word_embeddings.weight"]
        .iter()
        .any(|end| name.ends_with(end) || name == &end[1..])
}
