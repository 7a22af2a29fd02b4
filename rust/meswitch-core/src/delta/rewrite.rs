//! Rewriting a delta directory with some of its tensors replaced.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use serde_json::value::RawValue;

use super::assemble::{commit, lock};
use super::manifest::{Manifest, TENSORS, VERSION, raw};
use super::site::SiteEntry;
use super::writer::{check_tensors, full_specs};
use super::{Delta, Writer};
use crate::error::{Error, Result};
use crate::folder::{Folder, Lock};

/// Writes a copy of a delta directory to `out` with some tensors replaced by others of the same size.
///
/// `tensors` are named `SITE/ROLE` and lie as today's format has them, `errors` are new relative errors by site, and
/// `settings` replaces the manifest's. The copy has today's version whatever that of `source`. A directory at `out`,
/// `source` itself included, is replaced when the copy is complete; a failure leaves it as it was. What is copied must
/// have its checksum.
///
/// # Errors
/// Before anything is written: [`Error::Argument`] for a tensor that `source` does not have in that size, or an error
/// that is not of a site of it, finite and 0 or more; [`Error::Output`] where something else is at `out`. Later:
/// [`Error::NonFinite`] for a NaN or an infinity in a new tensor, [`Error::Checksum`] for a tensor or file of `source`
/// that has changed, [`Error::Io`].
pub fn rewrite(
    source: &Delta,
    out: &Path,
    tensors: &HashMap<String, Vec<u8>>,
    errors: &HashMap<String, f64>,
    settings: &Value,
) -> Result<()> {
    let manifest = checked(source, tensors, errors, Some(raw(settings)))?;
    copy(source, manifest, &lock(out)?, tensors)
}

/// As [`rewrite`], at a place where the caller may write.
///
/// # Errors
/// Those of [`rewrite`].
#[doc(hidden)]
pub fn rewrite_at(
    source: &Delta,
    lock: &Arc<Lock>,
    tensors: &HashMap<String, Vec<u8>>,
    errors: &HashMap<String, f64>,
    settings: &Value,
) -> Result<()> {
    copy(source, checked(source, tensors, errors, Some(raw(settings)))?, lock, tensors)
}

/// Writes a delta directory anew in today's version of the format, in its own place. Returns whether it had an older
/// one; otherwise nothing is done.
///
/// # Errors
/// [`Error::Checksum`] for a tensor or file that has changed since it was written: the directory is then left as it is.
/// [`Error::Output`] where another process writes it; [`Error::Io`].
pub fn upgrade(source: &Delta) -> Result<bool> {
    let is_old = source.manifest().format_version < VERSION;
    if is_old {
        let nothing = HashMap::new();
        let manifest = checked(source, &nothing, &HashMap::new(), None)?;
        copy(source, manifest, &lock(source.path())?, &nothing)?;
    }
    Ok(is_old)
}

/// The manifest of the copy, but for what its writer fills in, after a check of what is to be replaced.
fn checked(
    source: &Delta,
    tensors: &HashMap<String, Vec<u8>>,
    errors: &HashMap<String, f64>,
    settings: Option<Box<RawValue>>,
) -> Result<Manifest> {
    let mut manifest = source.manifest().clone();
    manifest.settings = settings.unwrap_or(manifest.settings);
    let sites = std::mem::take(&mut manifest.sites);
    manifest.sites = sites.into_iter().map(SiteEntry::into_current).collect::<Result<_>>()?;
    check_sizes(&manifest.sites, tensors)?;
    let cannot_be =
        |(name, error): &(&String, &f64)| source.site(name).is_none() || !error.is_finite() || **error < 0.0;
    if let Some((name, error)) = errors.iter().find(cannot_be) {
        return Err(Error::Argument(format!(
            "expected a finite error of a site of the delta, found {error} of {name}"
        )));
    }
    for site in &mut manifest.sites {
        site.relative_error = errors.get(&site.name).copied().unwrap_or(site.relative_error);
    }
    Ok(manifest)
}

fn copy(source: &Delta, mut manifest: Manifest, lock: &Arc<Lock>, tensors: &HashMap<String, Vec<u8>>) -> Result<()> {
    let folder = Folder::create(lock.clone())?;
    let mut writer = Writer::create(folder.files(), &full_specs(&manifest.sites)?)?;
    for site in &mut manifest.sites {
        let old = source.site_tensors(&site.name)?;
        let specs = site.tensor_specs()?;
        let slice = |role: &str| {
            let new = tensors.get(&format!("{}/{role}", site.name)).map(Vec::as_slice);
            new.or_else(|| old.tensor(&site.name, role))
        };
        let slices: Vec<&[u8]> = specs.iter().filter_map(|spec| slice(&spec.name)).collect();
        check_tensors(site, &slices)?;
        writer.write_site(site, &slices)?;
    }
    for name in manifest.files.keys().filter(|name| *name != TENSORS) {
        writer.write_file(name, &source.read_file(name)?)?;
    }
    writer.finish(manifest)?;
    commit(folder).map(drop)
}

/// Checks that new tensors have the size of those that they replace.
fn check_sizes(sites: &[SiteEntry], tensors: &HashMap<String, Vec<u8>>) -> Result<()> {
    let specs = full_specs(sites)?;
    let sizes: HashMap<&str, usize> = specs.iter().map(|spec| (spec.name.as_str(), spec.size())).collect();
    match tensors.iter().find(|(name, bytes)| sizes.get(name.as_str()) != Some(&bytes.len())) {
        None => Ok(()),
        Some((name, bytes)) => Err(Error::Argument(format!(
            "expected a tensor of the delta in its size, found {name} of {} bytes",
            bytes.len()
        ))),
    }
}
