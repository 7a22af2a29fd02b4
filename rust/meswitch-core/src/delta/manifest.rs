//! The manifest, `meswitch.json`: what every site is, and the checksum of every byte.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::checksum;
use super::site::{SiteEntry, SiteFields};
use crate::error::{Error, Result};

/// The manifest's file name.
pub const MANIFEST: &str = "meswitch.json";
/// The tensors' file name.
pub const TENSORS: &str = "delta.safetensors";
/// The format version that this crate writes.
pub const VERSION: u32 = 3;
/// The oldest format version that it reads.
const OLDEST_VERSION: u32 = 1;

/// What a delta directory says of itself.
#[derive(Clone, Debug, Serialize)]
pub struct Manifest {
    /// The format's version.
    pub format_version: u32,
    /// The program that wrote the directory.
    pub writer: String,
    /// The base that the delta belongs to.
    pub base: BaseEntry,
    /// The settings of the program that wrote it; readers need not understand them.
    pub settings: Value,
    /// Every file of the directory but the manifest.
    pub files: BTreeMap<String, FileEntry>,
    /// Every parameter of the fine-tune, in execution order.
    pub sites: Vec<SiteEntry>,
}

/// A manifest as its JSON has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestFields {
    format_version: u32,
    writer: String,
    base: BaseEntry,
    settings: Value,
    files: BTreeMap<String, FileEntry>,
    sites: Vec<SiteFields>,
}

/// The base that a delta was made against.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseEntry {
    /// The hash of names, shapes, dtypes and all content.
    pub fingerprint: String,
    /// The hash of names, shapes, dtypes and up to three kilobytes of each tensor: quick to compute.
    pub sample: String,
    /// The name of the base; informative only.
    pub name: String,
}

/// A file of the directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its size in bytes.
    pub bytes: u64,
    /// The checksum of its content. For `delta.safetensors`, that of its header; its tensors have their own.
    pub checksum: String,
}

impl Manifest {
    /// The file's text: a line with the checksum of all that follows, then one line per site.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut body = format!(
            "\"format_version\": {},\n\"writer\": {},\n\"base\": {},\n\"settings\": {},\n\"files\": {},\n\"sites\": [\n",
            self.format_version,
            json(&self.writer),
            json(&self.base),
            json(&self.settings),
            json(&self.files)
        );
        let sites: Vec<String> = self.sites.iter().map(json).collect();
        body.push_str(&sites.join(",\n"));
        body.push_str("\n]}\n");
        format!("{{\"checksum\": \"{}\",\n{body}", checksum(body.as_bytes()))
    }

    /// Reads a manifest's text.
    ///
    /// # Errors
    /// [`Error::Checksum`] where bytes have changed. [`Error::Format`] for anything but a manifest of a known version
    /// whose sites are free of contradictions.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let broken = |what: String| Error::Format(format!("expected {what} in {MANIFEST}"));
        let body = checked_body(text)?;
        let mut object = Vec::with_capacity(body.len() + 1);
        object.push(b'{');
        object.extend_from_slice(body);
        let json: Value = serde_json::from_slice(&object).map_err(|error| broken(format!("JSON, found {error}")))?;
        let found = json.get("format_version").and_then(Value::as_u64);
        let known = u64::from(OLDEST_VERSION)..=u64::from(VERSION);
        let Some(version) = found.filter(|found| known.contains(found)) else {
            let found = found.map_or("none".into(), |version| version.to_string());
            return Err(broken(format!("format version {OLDEST_VERSION} to {VERSION}, found {found}")));
        };
        let fields: ManifestFields = serde_json::from_value(json)
            .map_err(|error| broken(format!("the fields of version {version}, found {error}")))?;
        let newer = fields.sites.iter().find_map(|site| match site {
            _ if version < 2 && site.sparse.is_some() => Some("sparse"),
            _ if version < 3 && site.parts.iter().any(|part| part.tiled) => Some("tiled"),
            _ => None,
        });
        if let Some(field) = newer {
            return Err(broken(format!("the fields of version {version}, found {field}")));
        }
        let ManifestFields { format_version, writer, base, settings, files, sites } = fields;
        let sites = sites.into_iter().map(SiteEntry::try_from).collect::<Result<_>>()?;
        Ok(Self { format_version, writer, base, settings, files, sites })
    }

    /// The number of weights of the fine-tune.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.sites.iter().filter_map(SiteEntry::parameters).sum()
    }
}

/// Checks a file's name: of no folder, not hidden, and printable.
pub(super) fn check_file_name(name: &str) -> Result<()> {
    if name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.') || name.chars().any(char::is_control) {
        return Err(Error::Format(format!("expected plain file names in {MANIFEST}, found {name:?}")));
    }
    Ok(())
}

/// What follows the first line, which states its checksum.
fn checked_body(text: &[u8]) -> Result<&[u8]> {
    let broken = |what: &str| Error::Format(format!("expected {what} in {MANIFEST}"));
    let end = text.iter().position(|byte| *byte == b'\n').ok_or_else(|| broken("a first line"))?;
    let (first, body) = (&text[..end], &text[end + 1..]);
    let stated = first
        .strip_prefix(b"{\"checksum\": \"")
        .and_then(|rest| rest.strip_suffix(b"\","))
        .ok_or_else(|| broken("a first line with its checksum, found another"))?;
    let found = checksum(body);
    if stated == found.as_bytes() {
        return Ok(body);
    }
    let stated = String::from_utf8_lossy(stated);
    Err(Error::Checksum(format!("expected checksum {stated} in {MANIFEST}, found {found}")))
}

/// The JSON of plain data, which cannot fail.
pub(super) fn json<T: Serialize + ?Sized>(value: &T) -> String {
    serde_json::to_string(value).expect("plain data is always JSON")
}
