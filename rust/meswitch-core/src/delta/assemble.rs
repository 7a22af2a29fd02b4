//! Writing a whole delta directory from its sites, whatever makes them.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::journal::{Finished, JOURNAL, Journal};
use super::manifest::{BaseEntry, FileEntry, Kind, MANIFEST, Manifest, TENSORS, VERSION, raw};
use super::site::{SiteEntry, SiteKind};
use super::tensor::TensorSpec;
use super::writer::{check_copied_files, check_site_name, check_tensors, full_specs};
use super::{Delta, Writer};
use crate::checkpoint::Checkpoint;
use crate::crash::crash_point;
use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::folder::{Folder, Lock, Target};

/// A delta directory to be written, without its sites.
pub struct Assembly<'a> {
    /// What it holds.
    pub kind: Kind,
    /// The base of a delta; of a base, the checkpoint that it was made of.
    pub base: &'a Checkpoint,
    /// The path of the delta directory.
    pub out: &'a Path,
    /// Files to copy into it.
    pub files: &'a [PathBuf],
    /// The manifest's settings.
    pub settings: Value,
    /// The base's name in the manifest.
    pub base_name: &'a str,
}

/// How far a job has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The next site; empty at the end.
    pub site: &'a str,
    /// The number of weights done.
    pub done: u64,
    /// The number of weights in all.
    pub total: u64,
}

impl Assembly<'_> {
    /// Writes the directory. `sizes` are the sites in execution order, each with its number of weights; `specs` are all
    /// tensors that may be written, by full name; `site` writes the site of that index. `progress` is called before
    /// every site and stops the job by returning false. With a `key`, which must stand for everything that decides the
    /// result, finished sites survive an interruption: a call with the same key continues after them.
    ///
    /// # Errors
    /// Those of `site`; [`Error::Io`], [`Error::Interrupted`]. Only these two leave finished sites behind; nothing else
    /// is ever left.
    pub(crate) fn write(
        &self,
        key: Option<&str>,
        sizes: &[(&str, u64)],
        specs: &[TensorSpec],
        progress: &mut dyn FnMut(Progress<'_>) -> bool,
        site: &mut dyn FnMut(usize, &mut Writer) -> Result<SiteEntry>,
    ) -> Result<Delta> {
        check_copied_files(self.files)?;
        sizes.iter().try_for_each(|(name, _)| check_site_name(name))?;
        let lock = lock(self.out)?;
        let total = sizes.iter().map(|(_, weights)| weights).sum();
        let mut folder = if key.is_some() { Folder::open(lock) } else { Folder::create(lock) }?;
        let mut output = Output::open(&mut folder, key, specs)?;
        let mut done = sizes[..output.sites.len()].iter().map(|(_, weights)| weights).sum();
        let filled = sizes.iter().enumerate().skip(output.sites.len()).try_for_each(|(index, (name, weights))| {
            if !progress(Progress { site: name, done, total }) {
                return Err(Error::Interrupted);
            }
            let entry = site(index, &mut output.writer)?;
            done += weights;
            output.add(entry, self.base)
        });
        let lasting = matches!(filled, Ok(()) | Err(Error::Interrupted | Error::Io { .. }));
        folder.leave_on_failure(key.is_some() && lasting && !output.sites.is_empty());
        filled.and_then(|()| self.finish(output))?;
        let delta = commit(folder)?;
        progress(Progress { site: "", done, total });
        Ok(delta)
    }

    /// Writes everything after the sites.
    fn finish(&self, output: Output) -> Result<()> {
        let Output { mut writer, mut fingerprint, sites, .. } = output;
        for name in self.base.stored_names() {
            if !fingerprint.contains(name) {
                fingerprint.add(name, self.base)?;
            }
        }
        for file in self.files {
            writer.copy_file(file)?;
        }
        let base = BaseEntry {
            fingerprint: fingerprint.finish(),
            sample: self.base.sample()?,
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
            kind: self.kind,
            binding: None,
            writer: format!("meswitch {}", env!("CARGO_PKG_VERSION")),
            base,
            settings: raw(&self.settings),
            files,
            sites,
        }
    }

    /// Writes a directory of given sites, one for every parameter of the base. Sizes and checksums of `entries` are
    /// ignored; `tensors` returns one site's tensors, in the order of [`SiteEntry::tensor_specs`]. `progress` is called
    /// before every site and stops the job by returning false. A directory at `out` is replaced when the new one is
    /// complete.
    ///
    /// # Errors
    /// Before anything is written: [`Error::Architecture`] where sites and base do not match, [`Error::Format`] where a
    /// number of a site is out of range. Later: [`Error::NonFinite`] for a NaN or an infinity in a tensor,
    /// [`Error::Argument`] for a tensor of another size, [`Error::Interrupted`], [`Error::Io`], and those of `tensors`.
    pub fn write_given(
        &self,
        entries: &[SiteEntry],
        progress: &mut dyn FnMut(Progress<'_>) -> bool,
        tensors: &mut dyn FnMut(&SiteEntry) -> Result<Vec<Vec<u8>>>,
    ) -> Result<Delta> {
        self.check(entries)?;
        let sizes: Vec<_> =
            entries.iter().map(|entry| (entry.name.as_str(), entry.parameters().unwrap_or(0))).collect();
        self.write(None, &sizes, &full_specs(entries)?, progress, &mut |index, writer| {
            let mut entry = entries[index].clone();
            let tensors = tensors(&entry)?;
            let slices: Vec<&[u8]> = tensors.iter().map(Vec::as_slice).collect();
            check_tensors(&entry, &slices)?;
            writer.write_site(&mut entry, &slices)?;
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
            let base = self.base.outline(name)?;
            let mut base_shape = entry.shape.clone();
            if let Some(rows) = base_shape.first_mut() {
                *rows = rows.saturating_sub(entry.added());
            }
            let fits = match &entry.kind {
                SiteKind::Replaced => true,
                SiteKind::Shared => base_shape == base.shape && entry.dtype == base.dtype,
                _ => base_shape == base.shape,
            };
            if !fits {
                return Err(Error::Architecture(format!(
                    "expected {name} in the base's shape {:?} and dtype {}, found {base_shape:?} of {}",
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

/// Takes the right to write a delta directory.
///
/// # Errors
/// [`Error::Output`] where something else is there or another writer is at it, [`Error::Io`].
pub(super) fn lock(out: &Path) -> Result<Arc<Lock>> {
    Lock::take(Target::resolve(out, Some(MANIFEST))?)
}

/// Opens the complete directory that lies in a folder, as its readers will, and only then gives it its name.
///
/// # Errors
/// Those of [`Delta::open`] and [`Folder::commit`].
pub(super) fn commit(folder: Folder) -> Result<Delta> {
    Delta::open(folder.path())?;
    crash_point!("opened");
    // All that may fail comes before it loses its journal, without which the next writer starts over.
    folder.check()?;
    folder.files().sync_all()?;
    folder.files().remove(JOURNAL.as_ref())?;
    crash_point!("no journal");
    Delta::open(&folder.commit()?)
}

/// A directory that is being written.
struct Output {
    journal: Option<Journal>,
    writer: Writer,
    fingerprint: Fingerprint,
    sites: Vec<SiteEntry>,
}

impl Output {
    /// Starts a directory, or continues after the last complete site of an earlier job with the same key.
    fn open(folder: &mut Folder, key: Option<&str>, specs: &[TensorSpec]) -> Result<Self> {
        let (journal, finished) = key.map(|key| Journal::open(folder.files(), key)).transpose()?.unzip();
        let finished = finished.unwrap_or_default();
        folder.leave_on_failure(!finished.is_empty());
        folder.files().clear_all_but(&[JOURNAL, TENSORS])?;
        let writer = Writer::create(folder.files(), specs)?;
        let mut output = Self { journal, writer, fingerprint: Fingerprint::default(), sites: Vec::new() };
        for Finished { entry, digest } in finished {
            if !output.writer.resume_site(&entry)? {
                break;
            }
            if let Some(digest) = digest {
                output.fingerprint.insert(&entry.name, digest);
            }
            output.sites.push(entry);
        }
        if let Some(journal) = &mut output.journal {
            journal.truncate(output.sites.len())?;
            output.writer.truncate()?;
        }
        Ok(output)
    }

    /// Records a site that was written.
    fn add(&mut self, entry: SiteEntry, base: &Checkpoint) -> Result<()> {
        let hash = || self.fingerprint.add(&entry.name, base);
        let digest = base.is_stored(&entry.name).then(hash).transpose()?;
        let site = Finished { entry, digest };
        if let Some(journal) = &mut self.journal {
            self.writer.flush()?;
            journal.add(&site)?;
        }
        self.sites.push(site.entry);
        Ok(())
    }
}
