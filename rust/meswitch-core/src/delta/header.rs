//! The header of `delta.safetensors`: which tensors there are and where each lies.

use std::collections::BTreeMap;
use std::fmt;

use safetensors::Dtype;
use serde::de::{self, MapAccess};
use serde::{Deserialize, Deserializer, Serialize};

use super::checksum::Checksum;
use super::manifest::{MANIFEST, TENSORS, json};
use super::site::SiteEntry;
use super::tensor::TensorSpec;
use super::{ALIGNMENT, PADDING};
use crate::error::{Error, Result};

/// The largest header that safetensors reads, in bytes.
pub(super) const MAX_BYTES: usize = 100_000_000;

/// At least the length of the metadata's text.
const METADATA_BYTES: usize = 128;

/// Where the metadata says which manifest the file belongs to.
const BINDING: &str = "binding";

/// What a header says of one tensor.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    /// The first byte and the one after the last, counted from the end of the header.
    data_offsets: (usize, usize),
}

/// What a header says of the file.
type Metadata = BTreeMap<String, String>;

/// A header, built tensor by tensor.
#[derive(Serialize)]
pub(super) struct Header {
    #[serde(rename = "__metadata__")]
    metadata: Metadata,
    #[serde(flatten)]
    entries: BTreeMap<String, Entry>,
    /// Where the next tensor starts, counted from the end of the header.
    #[serde(skip)]
    pub(super) position: usize,
    #[serde(skip)]
    paddings: usize,
    /// The length of the text, or a few bytes more.
    #[serde(skip)]
    length: usize,
}

impl Header {
    pub(super) fn new() -> Self {
        let metadata = [("format".to_owned(), "meswitch".to_owned())].into();
        Self { metadata, entries: BTreeMap::new(), position: 0, paddings: 0, length: METADATA_BYTES }
    }

    /// The header of these sites, tied to the manifest that names them.
    ///
    /// # Errors
    /// [`Error::Format`] where a number of a site is out of range.
    pub(super) fn of(sites: &[SiteEntry], binding: Option<Checksum>) -> Result<Self> {
        let mut header = Self::new();
        binding.into_iter().for_each(|binding| header.bind(binding));
        for site in sites {
            for spec in site.tensor_specs()? {
                header.add(&spec.of_site(&site.name))?;
            }
        }
        Ok(header)
    }

    /// Ties the file to the manifest of that binding.
    pub(super) fn bind(&mut self, binding: Checksum) {
        self.metadata.insert(BINDING.to_owned(), binding.to_string());
    }

    /// Adds a tensor under its full name, and before it one that pads to its alignment. Returns the size of the padding.
    ///
    /// # Errors
    /// [`Error::Format`] where the header becomes longer than readers of safetensors take, or the file larger than there
    /// are addresses.
    pub(super) fn add(&mut self, tensor: &TensorSpec) -> Result<usize> {
        let start = self.position.checked_next_multiple_of(ALIGNMENT);
        let end = start.and_then(|start| start.checked_add(tensor.size()));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(broken("tensors of a size that can be", &tensor.name));
        };
        let padding = start - self.position;
        if padding > 0 {
            let name = format!("{PADDING}{}", self.paddings);
            self.entry(name, Entry { dtype: Dtype::U8, shape: vec![padding], data_offsets: (self.position, start) });
            self.paddings += 1;
        }
        let entry = Entry { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets: (start, end) };
        self.entry(tensor.name.clone(), entry);
        if self.length > MAX_BYTES {
            return Err(broken(
                &format!("a header of at most {MAX_BYTES} bytes"),
                &format!("more from {} on", tensor.name),
            ));
        }
        Ok(padding)
    }

    fn entry(&mut self, name: String, entry: Entry) {
        self.length += json(&name).len() + 1 + json(&entry).len() + 1;
        self.position = entry.data_offsets.1;
        self.entries.insert(name, entry);
    }

    /// The JSON, without its length before it.
    #[cfg(feature = "compress")]
    pub(super) fn text(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain data is always JSON")
    }

    /// Checks that a file's header is this one, whatever the order of its tensors.
    ///
    /// # Errors
    /// [`Error::Format`] for the first tensor that differs.
    pub(super) fn check(&self, text: &[u8]) -> Result<()> {
        let found: Found =
            serde_json::from_slice(text).map_err(|error| broken("a safetensors header", &error.to_string()))?;
        let end = text.iter().rposition(|byte| *byte == b'}').unwrap_or(0);
        if text[end + 1..].iter().any(|byte| *byte != b' ') {
            return Err(broken("a header padded with spaces", "other bytes"));
        }
        if self.metadata.contains_key(BINDING) && found.metadata != self.metadata {
            let text = |metadata: &Metadata| metadata.get(BINDING).map_or("none", String::as_str).to_owned();
            return Err(broken(
                &format!("the tensors of {MANIFEST}, bound by {}", text(&self.metadata)),
                &text(&found.metadata),
            ));
        }
        // Paddings last: they are wrong wherever something else is.
        let (paddings, others) = self.entries.iter().partition(|(name, _)| name.starts_with(PADDING));
        found.check(&others, false)?;
        found.check(&paddings, true)
    }
}

fn broken(expected: &str, found: &str) -> Error {
    Error::Format(format!("expected {expected} in {TENSORS}, found {found}"))
}

/// A header as it was read.
struct Found {
    metadata: Metadata,
    entries: BTreeMap<String, Entry>,
}

impl Found {
    /// Checks that exactly these tensors are there, of those that are paddings or of the others.
    fn check(&self, expected: &BTreeMap<&String, &Entry>, paddings: bool) -> Result<()> {
        for (name, entry) in expected {
            let Some(found) = self.entries.get(*name) else {
                return Err(broken(&format!("a tensor {name}"), "none"));
            };
            if (found.dtype, &found.shape) != (entry.dtype, &entry.shape) {
                let text = |entry: &Entry| format!("{} {:?}", entry.dtype, entry.shape);
                return Err(broken(&format!("{name} of {}", text(entry)), &text(found)));
            }
        }
        let is_foreign = |name: &&String| name.starts_with(PADDING) == paddings && !expected.contains_key(*name);
        if let Some(name) = self.entries.keys().find(is_foreign) {
            return Err(broken(&format!("only tensors that {MANIFEST} names"), name));
        }
        for (name, entry) in expected {
            let ((first, last), (start, end)) = (entry.data_offsets, self.entries[*name].data_offsets);
            if (start, end) != (first, last) {
                return Err(broken(&format!("{name} in bytes {first} to {last}"), &format!("it in {start} to {end}")));
            }
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Found {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Found;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found, A::Error> {
                let (mut metadata, mut entries) = (Metadata::new(), BTreeMap::new());
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        metadata = map.next_value()?;
                    } else if let Some(before) = entries.insert(name, map.next_value()?) {
                        return Err(de::Error::custom(format_args!("two tensors of one name, one of {before:?}")));
                    }
                }
                Ok(Found { metadata, entries })
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}
