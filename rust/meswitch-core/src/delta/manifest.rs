//! The manifest, `meswitch.json`: what every site is, and the checksum of every byte.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::checksum;
use super::checksum::{Checksum, is_hex};
use super::site::{SiteEntry, SiteFields};
use crate::error::{Error, Result};

/// The manifest's file name.
pub const MANIFEST: &str = "meswitch.json";
/// The tensors' file name.
pub const TENSORS: &str = "delta.safetensors";
/// The format version that this crate writes.
pub const VERSION: u32 = 4;
/// The oldest format version that it reads.
const OLDEST_VERSION: u32 = 1;
/// The largest manifest that is read, in bytes.
pub(super) const MAX_BYTES: u64 = 64 << 20;
/// The longest text of settings, in bytes, and how deeply its JSON may be nested.
const MAX_SETTINGS: (usize, usize) = (1 << 20, 64);

/// What a directory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// What a fine-tune changes of a base.
    Delta,
    /// A whole model: what it changes of a model of zeros.
    Base,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Delta { "delta" } else { "base" })
    }
}

/// What a delta directory says of itself.
#[derive(Clone, Debug, Serialize)]
pub struct Manifest {
    /// The format's version, of a directory that was read; what is written has [`VERSION`].
    pub format_version: u32,
    /// What the directory holds; before format version 4 always a delta.
    pub kind: Kind,
    /// What ties the tensors to the sites, in a directory that was read; none before format version 4.
    pub binding: Option<Checksum>,
    /// The program that wrote the directory.
    pub writer: String,
    /// The base that the delta belongs to.
    pub base: BaseEntry,
    /// The settings of the program that wrote it, in JSON; readers need not understand them.
    pub settings: Box<RawValue>,
    /// Every file of the directory but the manifest.
    pub files: BTreeMap<String, FileEntry>,
    /// Every parameter of the fine-tune, in execution order.
    pub sites: Vec<SiteEntry>,
}

/// The field that says which fields there are.
#[derive(Deserialize)]
struct Version {
    format_version: Option<serde_json::Number>,
}

/// A manifest as its JSON has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ManifestFields<'a> {
    #[serde(rename = "checksum")]
    _checksum: Checksum,
    format_version: u32,
    kind: Option<Kind>,
    binding: Option<Checksum>,
    writer: String,
    base: BaseEntry,
    settings: Box<RawValue>,
    files: BTreeMap<String, FileEntry>,
    #[serde(borrow)]
    sites: &'a RawValue,
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
    pub checksum: Checksum,
}

impl Manifest {
    /// The file's text: a line with the checksum of all that follows, then one line per site.
    #[must_use]
    pub fn to_text(&self) -> String {
        let sites = self.sites_text();
        let body = format!(
            "\"format_version\": {VERSION},\n\"kind\": \"{}\",\n\"binding\": \"{}\",\n\"writer\": {},\n\"base\": {},\n\
            \"settings\": {},\n\"files\": {},\n\"sites\": {sites}}}\n",
            self.kind,
            checksum(sites.as_bytes()),
            json(&self.writer),
            json(&self.base),
            json(&self.settings),
            json(&self.files)
        );
        format!("{{\"checksum\": \"{}\",\n{body}", checksum(body.as_bytes()))
    }

    /// The checksum of the sites' text, which `delta.safetensors` repeats: it ties one file to the other.
    #[cfg(feature = "compress")]
    pub(super) fn binding(&self) -> Checksum {
        checksum(self.sites_text().as_bytes())
    }

    fn sites_text(&self) -> String {
        let sites: Vec<String> = self.sites.iter().map(json).collect();
        format!("[\n{}\n]", sites.join(",\n"))
    }

    /// Reads a manifest's text.
    ///
    /// # Errors
    /// [`Error::Checksum`] where bytes have changed. [`Error::Format`] for anything but a manifest of a known version
    /// whose sites are free of contradictions.
    pub fn parse(text: &[u8]) -> Result<Self> {
        check_first_line(text)?;
        let Version { format_version } =
            serde_json::from_slice(text).map_err(|error| broken("JSON", &error.to_string()))?;
        let found = format_version.as_ref().and_then(serde_json::Number::as_u64);
        let known = u64::from(OLDEST_VERSION)..=u64::from(VERSION);
        let Some(version) = found.filter(|found| known.contains(found)) else {
            let found = format_version.map_or("none".into(), |version| version.to_string());
            return Err(broken(&format!("format version {OLDEST_VERSION} to {VERSION}"), &found));
        };
        let fields: ManifestFields = serde_json::from_slice(text)
            .map_err(|error| broken(&format!("the fields of version {version}"), &error.to_string()))?;
        let ManifestFields { format_version, kind, binding: stated, writer, base, settings, files, sites, .. } = fields;
        let binding = (version >= 4).then(|| checksum(sites.get().as_bytes()));
        if kind.is_some() != (version >= 4) {
            let (expected, found) = if version >= 4 { ("a kind", "none") } else { ("no kind", "one") };
            return Err(broken(expected, found));
        }
        if stated != binding {
            let text = |binding: Option<Checksum>| binding.map_or("none".to_owned(), |binding| binding.to_string());
            return Err(broken(&format!("binding {}", text(binding)), &text(stated)));
        }
        let sites: Vec<SiteFields> = serde_json::from_str(sites.get())
            .map_err(|error| broken(&format!("the fields of version {version}"), &error.to_string()))?;
        let sites = sites.into_iter().map(|fields| fields.entry(format_version)).collect::<Result<_>>()?;
        let kind = kind.unwrap_or(Kind::Delta);
        let manifest = Self { format_version, kind, binding, writer, base, settings, files, sites };
        manifest.check()?;
        Ok(manifest)
    }

    /// Checks everything that can be checked without the other files.
    fn check(&self) -> Result<()> {
        for (field, hash) in [("fingerprint", &self.base.fingerprint), ("sample", &self.base.sample)] {
            if !is_hex(hash, 64) {
                return Err(broken(&format!("a {field} of 64 lower-case hexadecimal digits"), hash));
            }
        }
        let (longest, deepest) = MAX_SETTINGS;
        let (length, depth) = (self.settings.get().len(), depth(self.settings.get()));
        if length > longest || depth > deepest {
            let found = format!("{length} bytes, {depth} levels deep");
            return Err(broken(&format!("settings of at most {longest} bytes, {deepest} levels deep"), &found));
        }
        if !self.files.contains_key(TENSORS) {
            return Err(broken(&format!("{TENSORS} among the files"), "none"));
        }
        if let Some(name) = self.files.keys().find(|name| !is_plain(name)) {
            return Err(broken("plain names of other files", &format!("{name:?}")));
        }
        let mut names = HashSet::with_capacity(self.sites.len());
        for site in &self.sites {
            if self.kind == Kind::Base && site.added() > 0 {
                return Err(broken("no added rows in a base", &format!("{} in {}", site.added(), site.name)));
            }
            site.check()?;
            if !names.insert(site.name.as_str()) {
                return Err(broken("one site of each name", &format!("two of {}", site.name)));
            }
        }
        Ok(())
    }

    /// The number of weights of the fine-tune.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.sites.iter().filter_map(SiteEntry::parameters).sum()
    }
}

fn broken(expected: &str, found: &str) -> Error {
    Error::Format(format!("expected {expected} in {MANIFEST}, found {found}"))
}

/// Whether a file other than the manifest may have this name.
pub(super) fn is_plain(name: &str) -> bool {
    let forbidden = |c: char| c == '/' || c == '\\' || c.is_control();
    !name.is_empty() && name != MANIFEST && !name.starts_with('.') && !name.contains(forbidden)
}

/// Checks a file's name: of no folder, not hidden, printable, and not the manifest's.
#[cfg(feature = "compress")]
pub(super) fn check_file_name(name: &str) -> Result<()> {
    if is_plain(name) { Ok(()) } else { Err(broken("plain names of other files", &format!("{name:?}"))) }
}

/// How deeply lists and objects of a JSON text are nested.
fn depth(json: &str) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0usize, 0, false, false);
    for byte in json.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_string,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_string => depth -= 1,
            _ => {}
        }
    }
    deepest
}

/// Compares all that follows the first line with the checksum that the line states.
fn check_first_line(text: &[u8]) -> Result<()> {
    let end = text.iter().position(|byte| *byte == b'\n').ok_or_else(|| broken("a first line", "none"))?;
    let (first, body) = (&text[..end], &text[end + 1..]);
    let stated = first
        .strip_prefix(b"{\"checksum\": \"")
        .and_then(|rest| rest.strip_suffix(b"\","))
        .and_then(Checksum::from_hex)
        .ok_or_else(|| broken("a first line with its checksum", "another"))?;
    let found = checksum(body);
    if stated == found {
        return Ok(());
    }
    Err(Error::Checksum(format!("expected checksum {stated} in {MANIFEST}, found {found}")))
}

/// The JSON of plain data, which cannot fail.
pub(super) fn json<T: Serialize + ?Sized>(value: &T) -> String {
    serde_json::to_string(value).expect("plain data is always JSON")
}

/// Any JSON as a manifest has it.
#[cfg(feature = "compress")]
pub(super) fn raw(value: &serde_json::Value) -> Box<RawValue> {
    serde_json::value::to_raw_value(value).expect("JSON is always JSON")
}
