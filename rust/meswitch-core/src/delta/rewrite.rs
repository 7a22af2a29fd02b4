//! Rewriting a delta directory with some of its tensors replaced.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use super::assemble::{commit, target};
use super::manifest::{Manifest, TENSORS};
use super::site::SiteEntry;
use super::writer::{check_tensors, full_specs};
use super::{Delta, Writer};
use crate::error::{Error, Result};
use crate::folder::Folder;

/// Writes a copy of a delta directory to `out` with some tensors replaced by others of the same size.
///
/// `tensors` are named `SITE/ROLE`, `errors` are new relative errors by site, and `settings` replaces the manifest's. A
/// directory at `out`, `source` itself included, is replaced when the copy is complete; a failure leaves it as it was.
/// What is copied keeps its checksum, and must have it.
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
    settings: Value,
) -> Result<()> {
    let manifest = source.manifest();
    for (name, bytes) in tensors {
        let old = name.rsplit_once('/').and_then(|(site, role)| source.tensor(site, role));
        if old.map(<[u8]>::len) != Some(bytes.len()) {
            let found = bytes.len();
            return Err(Error::Argument(format!(
                "expected a tensor of the delta in its size, found {name} of {found} bytes"
            )));
        }
    }
    let cannot_be =
        |(name, error): &(&String, &f64)| source.site(name).is_none() || !error.is_finite() || **error < 0.0;
    if let Some((name, error)) = errors.iter().find(cannot_be) {
        return Err(Error::Argument(format!(
            "expected a finite error of a site of the delta, found {error} of {name}"
        )));
    }
    let folder = Folder::create(target(out)?)?;
    let mut writer = Writer::create(folder.files(), &full_specs(&manifest.sites)?)?;
    let mut sites = manifest.sites.clone();
    for site in &mut sites {
        let before = site.clone();
        if let Some(error) = errors.get(&site.name) {
            site.relative_error = *error;
        }
        let slices = slices(site, source, tensors)?;
        check_tensors(site, &slices)?;
        writer.write_site(site, &slices)?;
        check_copied(&before, site, tensors)?;
    }
    for (name, entry) in manifest.files.iter().filter(|(name, _)| *name != TENSORS) {
        let copied = writer.copy_file(&source.path().join(name))?;
        if copied != *entry {
            return Err(changed(&entry.checksum, name, &copied.checksum));
        }
    }
    writer.finish(Manifest { settings, sites, ..manifest.clone() })?;
    commit(folder).map(drop)
}

/// Checks that the tensors of a site that are not new have the checksums that they had.
fn check_copied(before: &SiteEntry, now: &SiteEntry, tensors: &HashMap<String, Vec<u8>>) -> Result<()> {
    for (role, stated) in &before.checksums {
        let name = format!("{}/{role}", before.name);
        match now.checksums.get(role) {
            Some(found) if found != stated && !tensors.contains_key(&name) => {
                return Err(changed(stated, &name, found));
            }
            _ => {}
        }
    }
    Ok(())
}

fn changed(stated: &str, name: &str, found: &str) -> Error {
    Error::Checksum(format!("expected checksum {stated} of {name}, which is copied, found {found}"))
}

/// The tensors of a site in file order, new ones in place of old ones.
fn slices<'a>(site: &SiteEntry, source: &'a Delta, tensors: &'a HashMap<String, Vec<u8>>) -> Result<Vec<&'a [u8]>> {
    let specs = site.tensor_specs()?;
    let slice = |role: &str| {
        let new = tensors.get(&format!("{}/{role}", site.name)).map(Vec::as_slice);
        new.or_else(|| source.tensor(&site.name, role))
    };
    Ok(specs.iter().filter_map(|spec| slice(&spec.name)).collect())
}
