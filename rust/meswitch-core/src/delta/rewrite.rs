//! Rewriting a delta directory with some of its tensors replaced.

use std::collections::HashMap;
use std::path::Path;

use serde_json::Value;

use super::folder::Folder;
use super::manifest::{Manifest, TENSORS};
use super::site::SiteEntry;
use super::writer::full_specs;
use super::{Delta, Writer};
use crate::error::{Error, Result};

/// Writes a copy of a delta directory to `out` with some tensors replaced by others of the same size.
///
/// `tensors` are named `SITE/ROLE`, `errors` are new relative errors by site, and `settings` replaces the manifest's. A
/// directory at `out`, `source` itself included, is replaced when the copy is complete; a failure leaves it as it was.
///
/// # Errors
/// [`Error::Argument`] for a tensor that `source` does not have in that size, or where another process writes to `out`;
/// [`Error::Io`].
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
    let folder = Folder::create(out)?;
    let mut writer = Writer::create(folder.path(), &full_specs(&manifest.sites)?)?;
    let mut sites = manifest.sites.clone();
    for site in &mut sites {
        if let Some(error) = errors.get(&site.name) {
            site.relative_error = *error;
        }
        let slices = slices(site, source, tensors)?;
        writer.write_site(site, &slices)?;
    }
    for name in manifest.files.keys().filter(|name| *name != TENSORS) {
        writer.copy_file(&source.path().join(name))?;
    }
    writer.finish(Manifest { settings, sites, ..manifest.clone() })?;
    folder.finish()
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
