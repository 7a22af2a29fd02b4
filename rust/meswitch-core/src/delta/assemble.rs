//! A whole delta directory from its sites, wherever they come from.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::Value;

use super::journal::{Finished, Journal};
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
    /// asked before every site and stops the job by returning false. With a `key`, which stands for everything that
    /// decides the outcome, finished sites outlast an interruption: a call with the same key goes on from there.
    ///
    /// # Errors
    /// Those of `site`; [`Error::Io`], [`Error::Interrupted`]. Nothing else than finished sites is left behind then, and
    /// those only by these two.
    pub fn write(
        &self,
        key: Option<&str>,
        sizes: &[(&str, u64)],
        specs: &[TensorSpec],
        progress: &mut dyn FnMut(Progress<'_>) -> bool,
        site: &mut dyn FnMut(usize, &mut Writer) -> Result<SiteEntry>,
    ) -> Result<Delta> {
        let total = sizes.iter().map(|(_, weights)| weights).sum();
        let mut folder = if key.is_some() { Folder::open(self.out) } else { Folder::create(self.out) }?;
        let mut draft = Draft::open(&mut folder, key, specs)?;
        let mut done = sizes[..draft.sites.len()].iter().map(|(_, weights)| weights).sum();
        let filled = sizes.iter().enumerate().skip(draft.sites.len()).try_for_each(|(at, (name, weights))| {
            if !progress(Progress { site: name, done, total }) {
                return Err(Error::Interrupted);
            }
            let entry = site(at, &mut draft.writer)?;
            done += weights;
            draft.add(entry, self.base)
        });
        let lasting = matches!(filled, Ok(()) | Err(Error::Interrupted | Error::Io { .. }));
        folder.keep(key.is_some() && lasting && !draft.sites.is_empty());
        filled.and_then(|()| self.finish(draft))?;
        folder.finish()?;
        progress(Progress { site: "", done, total });
        Delta::open(self.out)
    }

    /// Everything after the sites.
    fn finish(&self, draft: Draft) -> Result<()> {
        let Draft { mut writer, mut fingerprint, sites, .. } = draft;
        for name in self.base.names() {
            if !fingerprint.has(name) {
                fingerprint.add(name, &self.base.view(name)?);
            }
        }
        for file in self.files {
            writer.copy(file)?;
        }
        let base = BaseEntry {
            fingerprint: fingerprint.finish(),
            sample: sample(self.base)?,
            name: self.base_name.to_owned(),
        };
        writer.finish(self.manifest(base, BTreeMap::new(), sites)).map(drop)
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
        self.write(None, &sizes, &full_specs(entries)?, progress, &mut |at, writer| {
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

/// A directory on its way.
struct Draft {
    journal: Option<Journal>,
    writer: Writer,
    fingerprint: Fingerprint,
    sites: Vec<SiteEntry>,
}

impl Draft {
    /// Starts one, or goes on after the last whole site of an earlier writer with the same key.
    fn open(folder: &mut Folder, key: Option<&str>, specs: &[TensorSpec]) -> Result<Self> {
        let (journal, left) = key.map(|key| Journal::open(folder, key)).transpose()?.unzip();
        let left = left.unwrap_or_default();
        folder.keep(!left.is_empty());
        let writer = Writer::create(folder.path(), specs)?;
        let mut draft = Self { journal, writer, fingerprint: Fingerprint::default(), sites: Vec::new() };
        for Finished { entry, digest } in left {
            if !draft.writer.find(&entry)? {
                break;
            }
            if let Some(digest) = digest {
                draft.fingerprint.put(&entry.name, digest);
            }
            draft.sites.push(entry);
        }
        if let Some(journal) = &draft.journal {
            journal.keep(draft.sites.len())?;
            draft.writer.cut()?;
        }
        Ok(draft)
    }

    /// Takes in a site that was written.
    fn add(&mut self, entry: SiteEntry, base: &Checkpoint) -> Result<()> {
        let own = base.names().binary_search(&entry.name).is_ok();
        let digest = own.then(|| Ok(self.fingerprint.add(&entry.name, &base.view(&entry.name)?))).transpose()?;
        let site = Finished { entry, digest };
        if let Some(journal) = &mut self.journal {
            self.writer.flush()?;
            journal.add(&site)?;
        }
        self.sites.push(site.entry);
        Ok(())
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
