//! A whole delta directory from its sites, wherever they come from.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::Value;

use super::manifest::{BaseEntry, FileEntry, Kind, Manifest, SiteEntry, TensorSpec, VERSION};
use super::writer::full_specs;
use super::{Delta, Folder, Writer};
use crate::checkpoint::{Checkpoint, View};
use crate::error::{Error, Result};
use crate::fingerprint::{Fingerprint, sample};

/// All of a delta directory but its sites.
pub struct Assembly<'a> {
    /// The base.
    pub base: &'a Checkpoint,
    /// Where the delta directory goes.
    pub out: &'a Path,
    /// Files to lie beside the tensors.
    pub files: &'a [PathBuf],
    /// What the manifest says of the settings.
    pub settings: Value,
    /// What the manifest calls the base.
    pub base_name: &'a str,
}

/// How far a job is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The site that is next.
    pub site: &'a str,
    /// Weights done.
    pub done: u64,
    /// Weights in all.
    pub total: u64,
}

impl Assembly<'_> {
    /// Writes the directory. `sizes` are the sites in the order in which a model runs them, each with its number of
    /// weights; `specs` all tensors that may come, by full name; `site` writes the one of that index. `progress` is
    /// asked before every site and stops the job by returning false.
    ///
    /// # Errors
    /// Those of `site`; [`Error::Io`], [`Error::Interrupted`]. Nothing is left behind then.
    pub fn write(
        &self,
        sizes: &[(&str, u64)],
        specs: &[TensorSpec],
        progress: &mut dyn FnMut(Progress<'_>) -> bool,
        site: &mut dyn FnMut(usize, &mut Writer) -> Result<SiteEntry>,
    ) -> Result<Delta> {
        let total = sizes.iter().map(|(_, weights)| weights).sum();
        let folder = Folder::create(self.out)?;
        let mut writer = Writer::create(folder.path(), specs)?;
        let (mut sites, mut fingerprint, mut done) = (Vec::new(), Fingerprint::default(), 0);
        for (at, (name, weights)) in sizes.iter().enumerate() {
            if !progress(Progress { site: name, done, total }) {
                return Err(Error::Interrupted);
            }
            sites.push(site(at, &mut writer)?);
            if self.base.names().binary_search_by(|own| own.as_str().cmp(name)).is_ok() {
                fingerprint.add(name, &self.base.view(name)?);
            }
            done += weights;
        }
        for name in self.base.names().iter().filter(|name| !fingerprint.has(name)).cloned().collect::<Vec<_>>() {
            fingerprint.add(&name, &self.base.view(&name)?);
        }
        for file in self.files {
            writer.copy(file)?;
        }
        let base = BaseEntry {
            fingerprint: fingerprint.finish(),
            sample: sample(self.base)?,
            name: self.base_name.to_owned(),
        };
        writer.finish(self.manifest(base, BTreeMap::new(), sites))?;
        folder.finish()?;
        progress(Progress { site: "", done, total });
        Delta::open(self.out)
    }

    pub(crate) fn manifest(
        &self,
        base: BaseEntry,
        files: BTreeMap<String, FileEntry>,
        sites: Vec<SiteEntry>,
    ) -> Manifest {
        Manifest {
            format_version: VERSION,
            writer: format!("meswitch {}", env!("CARGO_PKG_VERSION")),
            base,
            settings: self.settings.clone(),
            files,
            sites,
        }
    }

    /// Writes a directory whose sites are given, one for every parameter of the base. `entries` say what they are, but
    /// for sizes and checksums; `tensors` gives those of one, in the order of its entry's specs.
    ///
    /// # Errors
    /// Before any work, [`Error::Architecture`] where sites and base do not match, [`Error::Format`] where a site's
    /// fields contradict each other; [`Error::NonFinite`] for a NaN or an infinity in a tensor; those of `tensors` and
    /// of `write`.
    pub fn write_given(
        &self,
        entries: &[SiteEntry],
        progress: &mut dyn FnMut(Progress<'_>) -> bool,
        tensors: &mut dyn FnMut(&SiteEntry) -> Result<Vec<Vec<u8>>>,
    ) -> Result<Delta> {
        self.check(entries)?;
        let sizes: Vec<_> =
            entries.iter().map(|entry| (entry.name.as_str(), entry.parameters().unwrap_or(0))).collect();
        self.write(&sizes, &full_specs(entries)?, progress, &mut |at, writer| {
            let mut entry = entries[at].clone();
            let tensors = tensors(&entry)?;
            let slices: Vec<&[u8]> = tensors.iter().map(Vec::as_slice).collect();
            check_tensors(&entry, &slices)?;
            writer.site(&mut entry, &slices)?;
            Ok(entry)
        })
    }

    fn check(&self, entries: &[SiteEntry]) -> Result<()> {
        let mut named = HashSet::new();
        for entry in entries {
            let name = &entry.name;
            if !named.insert(name.as_str()) {
                return Err(Error::Argument(format!("expected one site of each name, found two of {name}")));
            }
            if !self.base.has(name) {
                return Err(Error::Architecture(format!("expected only parameters of the base, found {name}")));
            }
            let base = self.base.view(name)?;
            let mut known = entry.shape.clone();
            if let Some(rows) = known.first_mut() {
                *rows = rows.saturating_sub(entry.added);
            }
            let fits = match entry.kind {
                Kind::Replaced => true,
                Kind::Shared => known == base.shape && entry.dtype == base.dtype.to_string(),
                _ => known == base.shape,
            };
            if !fits {
                return Err(Error::Architecture(format!(
                    "expected {name} in the base's shape {:?} and dtype {}, found {known:?} of {}",
                    base.shape, base.dtype, entry.dtype
                )));
            }
        }
        match self.base.names().iter().find(|name| !named.contains(name.as_str())) {
            Some(name) => {
                Err(Error::Architecture(format!("expected a site for the base's parameter {name}, found none")))
            }
            None => Ok(()),
        }
    }
}

/// Whether tensors have their sizes, and floats that are finite.
fn check_tensors(entry: &SiteEntry, tensors: &[&[u8]]) -> Result<()> {
    for (spec, data) in entry.specs()?.into_iter().zip(tensors) {
        let name = format!("{}/{}", entry.name, spec.role);
        let dtype: Dtype = serde_json::from_value(spec.dtype.into())
            .map_err(|_| Error::Argument(format!("expected a dtype of safetensors for {name}, found another")))?;
        let expected = spec.shape.iter().product::<usize>() * dtype.bitsize() / 8;
        if data.len() != expected {
            return Err(Error::Argument(format!("expected {expected} bytes of {name}, found {}", data.len())));
        }
        View { dtype, shape: spec.shape, data }.finite(&name)?;
    }
    Ok(())
}
