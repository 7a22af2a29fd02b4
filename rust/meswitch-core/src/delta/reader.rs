//! Opening a delta directory: everything is checked but the content of tensors and files.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::TensorInfo;

use super::manifest::{MANIFEST, Manifest, TENSORS, check_file_name};
use super::site::{SiteEntry, SiteKind};
use super::{ALIGNMENT, PADDING};
use crate::error::{Error, Result};

/// The largest manifest that is read, in bytes.
const MAX_MANIFEST_BYTES: u64 = 1 << 30;

/// An opened delta directory.
///
/// Tensors stay mapped for as long as this lives. Their bytes are not compared with their checksums before
/// [`Delta::verify`] is called.
pub struct Delta {
    path: PathBuf,
    manifest: Manifest,
    manifest_bytes: u64,
    /// The index of each site in the manifest.
    sites: HashMap<String, usize>,
    pub(super) map: Mmap,
    pub(super) header_bytes: usize,
    pub(super) extents: Extents,
}

impl Delta {
    /// Opens a delta directory and checks its structure: manifest, sizes, names, dtypes, shapes, alignment.
    ///
    /// # Errors
    /// [`Error::Format`] or [`Error::Checksum`] for what is not a sound delta directory; [`Error::Io`] where a file is
    /// missing or cannot be read.
    pub fn open(path: &Path) -> Result<Self> {
        let manifest_path = path.join(MANIFEST);
        let size = fs::metadata(&manifest_path).map_err(Error::io(&manifest_path))?.len();
        if size > MAX_MANIFEST_BYTES {
            return Err(Error::Format(format!(
                "expected a manifest of at most {MAX_MANIFEST_BYTES} bytes, found {size}"
            )));
        }
        let manifest = Manifest::parse(&fs::read(&manifest_path).map_err(Error::io(&manifest_path))?)?;
        check_files(path, &manifest)?;
        let tensors_path = path.join(TENSORS);
        let file = File::open(&tensors_path).map_err(Error::io(&tensors_path))?;
        // SAFETY: the mapping is read-only. Writers of delta directories replace them by renaming and never write in
        // place.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(&tensors_path))?;
        let (header_bytes, extents) = check_header(&map, &manifest)?;
        let sites = manifest.sites.iter().enumerate().map(|(index, site)| (site.name.clone(), index)).collect();
        Ok(Self { path: path.to_owned(), manifest, manifest_bytes: size, sites, map, header_bytes, extents })
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The manifest.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The entry of a site; `None` where there is none of that name.
    #[must_use]
    pub fn site(&self, name: &str) -> Option<&SiteEntry> {
        self.sites.get(name).map(|index| &self.manifest.sites[*index])
    }

    /// The size of manifest and tensors in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.manifest_bytes + self.map.len() as u64
    }

    /// The range of a tensor's bytes in `delta.safetensors`: the first, and the one after the last. `None` where there
    /// is no such tensor.
    #[must_use]
    pub fn extent(&self, site: &str, role: &str) -> Option<(usize, usize)> {
        self.extents.get(&format!("{site}/{role}")).copied()
    }

    /// A tensor's bytes; `None` where there is no such tensor.
    #[must_use]
    pub fn tensor(&self, site: &str, role: &str) -> Option<&[u8]> {
        self.extent(site, role).map(|(start, end)| &self.map[start..end])
    }
}

fn check_files(folder: &Path, manifest: &Manifest) -> Result<()> {
    if !manifest.files.contains_key(TENSORS) {
        return Err(Error::Format(format!("expected {TENSORS} among the files of {MANIFEST}, found none")));
    }
    for (name, entry) in &manifest.files {
        check_file_name(name)?;
        let path = folder.join(name);
        let found = fs::metadata(&path).map_err(Error::io(&path))?.len();
        if found != entry.bytes {
            return Err(Error::Format(format!("expected {name} of {} bytes, found {found}", entry.bytes)));
        }
    }
    Ok(())
}

/// The range of each tensor's bytes in the file.
type Extents = HashMap<String, (usize, usize)>;

/// Checks the tensors' header against the manifest. Returns the header's size and the tensors' ranges.
fn check_header(map: &[u8], manifest: &Manifest) -> Result<(usize, Extents)> {
    let broken = |what: String| Error::Format(format!("expected {what} in {TENSORS}"));
    let (length, metadata) =
        SafeTensors::read_metadata(map).map_err(|error| broken(format!("a safetensors header, found {error}")))?;
    let start = length + 8;
    if start % ALIGNMENT != 0 {
        return Err(broken(format!("tensors from a multiple of {ALIGNMENT} on, found them from {start}")));
    }
    let tensors = metadata.tensors();
    let mut expected = 0;
    for site in &manifest.sites {
        expected += check_site(site, &tensors)?;
    }
    let extent = |info: &TensorInfo| (start + info.data_offsets.0, start + info.data_offsets.1);
    let extents: Extents = tensors.iter().map(|(name, info)| (name.clone(), extent(info))).collect();
    let found = extents.keys().filter(|name| !name.starts_with(PADDING)).count();
    if expected != found {
        return Err(broken(format!("{expected} tensors that {MANIFEST} names, found {found}")));
    }
    Ok((start, extents))
}

/// Checks that a site's tensors are as the manifest says. Returns how many it has.
fn check_site(site: &SiteEntry, tensors: &HashMap<String, &TensorInfo>) -> Result<usize> {
    let broken = |what: String| Error::Format(format!("expected {what} in {TENSORS}"));
    let specs = site.tensor_specs()?;
    if specs.len() != site.checksums.len() || specs.iter().any(|spec| !site.checksums.contains_key(&spec.name)) {
        return Err(Error::Format(format!(
            "expected a checksum for each tensor of {} in {MANIFEST}, found otherwise",
            site.name
        )));
    }
    for spec in &specs {
        let name = format!("{}/{}", site.name, spec.name);
        let info = tensors.get(&name).ok_or_else(|| broken(format!("a tensor {name}, found none")))?;
        let (dtype, shape) = (info.dtype.to_string(), &info.shape);
        if dtype != spec.dtype || *shape != spec.shape {
            return Err(broken(format!("{name} of {} {:?}, found {dtype} {shape:?}", spec.dtype, spec.shape)));
        }
        let offset = info.data_offsets.0;
        if offset % ALIGNMENT != 0 {
            return Err(broken(format!("{name} at a multiple of {ALIGNMENT}, found it at {offset}")));
        }
    }
    if site.kind == SiteKind::Replaced && site.parameters().is_none() {
        return Err(broken(format!("a size that can be at {}", site.name)));
    }
    Ok(specs.len())
}
