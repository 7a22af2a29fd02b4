//! The manifest: what every site is, and the checksum of every byte.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::checksum;
use crate::error::{Error, Result};
use crate::layout::{BITS, old, part_bytes};

/// The manifest's file name.
pub const MANIFEST: &str = "meswitch.json";
/// The tensors' file name.
pub const TENSORS: &str = "delta.safetensors";
/// The format this crate writes.
pub const VERSION: u32 = 3;
/// The oldest format that it reads.
const OLDEST: u32 = 1;

/// What a site is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Bit-equal to the base.
    Shared,
    /// Stored whole, at its own dtype.
    Replaced,
    /// Codes, scales, salient channels, a low-rank part; or sparse entries.
    Quantized,
    /// A low-rank part alone.
    LowRank,
}

/// The manifest.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The format's version.
    pub format_version: u32,
    /// What wrote it.
    pub writer: String,
    /// The base it belongs to.
    pub base: BaseEntry,
    /// What the writer was asked for.
    pub settings: Value,
    /// Every file of the directory but the manifest.
    pub files: BTreeMap<String, FileEntry>,
    /// Every parameter of the fine-tune, in execution order.
    pub sites: Vec<SiteEntry>,
}

/// The base that a delta belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseEntry {
    /// Hash of names, shapes, dtypes and all content.
    pub fingerprint: String,
    /// Hash of names, shapes, dtypes and a few bytes of each tensor: quick to check.
    pub sample: String,
    /// The name the base had, for people.
    pub name: String,
}

/// A file of the directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its size.
    pub bytes: u64,
    /// Of its content; of the header alone for `delta.safetensors`, whose tensors have their own.
    pub checksum: String,
}

/// A site.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SiteEntry {
    /// The parameter's name in the checkpoint.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// The fine-tune's shape.
    pub shape: Vec<usize>,
    /// The fine-tune's dtype, as safetensors names it.
    pub dtype: String,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// Bits a weight.
    pub bpw: f64,
    /// `‖Δ − Δ̂‖ / ‖Δ‖`.
    pub relative_error: f64,
    /// Whether the delta's matrix is the parameter transposed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub transposed: bool,
    /// Scales, salient values, `u` and sparse values are in units of `2^exponent`.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub exponent: i32,
    /// Rows by bit width.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<PartEntry>,
    /// Whether there are column scales.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub column_scales: bool,
    /// Salient channels.
    #[serde(default, skip_serializing_if = "is_none")]
    pub salient: usize,
    /// Rank of the low-rank part.
    #[serde(default, skip_serializing_if = "is_none")]
    pub rank: usize,
    /// The changed weights one by one, in place of all other terms. Since version 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparse: Option<SparseEntry>,
    /// Rows of a grown vocabulary, stored whole.
    #[serde(default, skip_serializing_if = "is_none")]
    pub added: usize,
    /// The checksum of each tensor, by role.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tensors: BTreeMap<String, String>,
}

/// The rows of a site that share a bit width.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartEntry {
    /// Bits a code.
    pub bits: u32,
    /// The code value that means zero.
    pub zero: f32,
    /// Input channels that share a scale; the whole row where none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_size: Option<usize>,
    /// How many rows, where not all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rows: Option<usize>,
    /// Whether codes lie in blocks; else row by row, as before version 3.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tiled: bool,
}

/// A delta that is mostly zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SparseEntry {
    /// Entries of its tensors.
    pub entries: usize,
    /// Weights that they change, for people.
    pub changed: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde calls these with references
fn is_zero(value: &i32) -> bool {
    *value == 0
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_none(value: &usize) -> bool {
    *value == 0
}

/// A tensor that a site must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its role, the part of its name after the site's.
    pub role: String,
    /// Its dtype, as safetensors names it.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Its bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        let element = match self.dtype.as_str() {
            "F64" | "I64" | "U64" => 8,
            "F32" | "I32" | "U32" => 4,
            "F16" | "BF16" | "I16" | "U16" => 2,
            _ => 1,
        };
        self.shape.iter().product::<usize>() * element
    }
}

impl SiteEntry {
    /// Output and input channels of the delta's matrix, without added rows. None where the numbers do not allow it.
    #[must_use]
    pub fn matrix(&self) -> Option<(usize, usize)> {
        let (rows, columns) = match self.shape.as_slice() {
            [] => (1, 1),
            [n] => (1, *n),
            [outer @ .., last] => (outer.iter().try_fold(1usize, |all, n| all.checked_mul(*n))?, *last),
        };
        let (rows, columns) = if self.transposed { (columns, rows) } else { (rows, columns) };
        rows.checked_mul(columns)?;
        Some((rows.checked_sub(self.added)?, columns))
    }

    /// The number of weights, none where it overflows.
    #[must_use]
    pub fn parameters(&self) -> Option<u64> {
        self.shape.iter().try_fold(1u64, |all, n| all.checked_mul(*n as u64))
    }

    /// The tensors that the entry promises, in file order.
    ///
    /// # Errors
    /// [`Error::Format`] where its fields contradict each other.
    pub fn specs(&self) -> Result<Vec<TensorSpec>> {
        let broken =
            |what: &str| Error::Format(format!("expected {what} in {MANIFEST}, found otherwise at site {}", self.name));
        let (rows, columns) = self.matrix().ok_or_else(|| broken("a shape that can be"))?;
        let spec = |role: &str, dtype: &str, shape: &[usize]| TensorSpec {
            role: role.into(),
            dtype: dtype.into(),
            shape: shape.to_vec(),
        };
        let terms = !self.parts.is_empty() || self.column_scales || self.salient > 0 || self.rank > 0;
        match self.kind {
            Kind::Shared | Kind::Replaced if terms || self.sparse.is_some() || self.added > 0 => {
                return Err(broken("no codec fields"));
            }
            Kind::Shared => return Ok(Vec::new()),
            Kind::Replaced => return Ok(vec![spec("whole", &self.dtype, &self.shape)]),
            Kind::LowRank if !self.parts.is_empty() || self.rank == 0 => return Err(broken("a rank and no codes")),
            _ if self.sparse.is_some() && terms => return Err(broken("sparse entries alone")),
            Kind::Quantized | Kind::LowRank => {}
        }
        let mut specs = Vec::new();
        for (at, part) in self.parts.iter().enumerate() {
            let in_range =
                BITS.contains(&part.bits) && part.group_size != Some(0) && (0.0..=255.0).contains(&part.zero);
            let own = part.rows.unwrap_or(rows);
            if !in_range || own > rows {
                return Err(broken("bits of 1, 2, 3, 4 or 8, a positive group size and no more rows than there are"));
            }
            let groups = part.group_size.map_or(1, |size| columns.div_ceil(size));
            let codes = if part.tiled {
                vec![part_bytes(part.bits, own, columns) / 4]
            } else {
                vec![own, old::row_bytes(part.bits, columns) / 4]
            };
            specs.push(spec(&format!("codes.{at}"), "I32", &codes));
            specs.push(spec(&format!("scales.{at}"), "F16", &[own, groups]));
            if part.rows.is_some() {
                specs.push(spec(&format!("rows.{at}"), "I32", &[own]));
            }
        }
        if self.column_scales {
            specs.push(spec("column_scales", "F16", &[columns]));
        }
        if self.salient > 0 {
            specs.push(spec("salient_index", "I32", &[self.salient]));
            specs.push(spec("salient", "F16", &[rows, self.salient]));
        }
        if self.rank > 0 {
            specs.push(spec("u", "F16", &[rows, self.rank]));
            specs.push(spec("v", "F16", &[self.rank, columns]));
        }
        if let Some(SparseEntry { entries, .. }) = self.sparse {
            let ends = rows.checked_add(1).filter(|_| i32::try_from(entries).is_ok());
            let ends = ends.ok_or_else(|| broken("sparse entries below 2^31"))?;
            specs.push(spec("sparse_starts", "I32", &[ends]));
            specs.push(spec("sparse_gaps", "U8", &[entries]));
            specs.push(spec("sparse_values", "F8_E5M2", &[entries]));
        }
        if self.added > 0 {
            specs.push(spec("added", &self.dtype, &[self.added, columns]));
        }
        Ok(specs)
    }
}

impl Manifest {
    /// The file's text: one line with the checksum of all that follows, then a site a line.
    ///
    /// # Panics
    /// Never: the fields are plain data.
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
    /// [`Error::Checksum`] where its bytes changed, [`Error::Format`] where it is none, or of a newer version.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let broken = |what: String| Error::Format(format!("expected {what} in {MANIFEST}"));
        let end = text.iter().position(|byte| *byte == b'\n').ok_or_else(|| broken("a first line".into()))?;
        let (first, body) = (&text[..end], &text[end + 1..]);
        let stated = first
            .strip_prefix(b"{\"checksum\": \"")
            .and_then(|rest| rest.strip_suffix(b"\","))
            .ok_or_else(|| broken("a first line with its checksum, found another".into()))?;
        let found = checksum(body);
        if stated != found.as_bytes() {
            return Err(Error::Checksum(format!(
                "expected checksum {} in {MANIFEST}, found {found}",
                String::from_utf8_lossy(stated)
            )));
        }
        let mut whole = Vec::with_capacity(body.len() + 1);
        whole.push(b'{');
        whole.extend_from_slice(body);
        let version: Value = serde_json::from_slice(&whole).map_err(|error| broken(format!("JSON, found {error}")))?;
        let found = version.get("format_version").and_then(Value::as_u64);
        let Some(known) = found.filter(|found| (u64::from(OLDEST)..=u64::from(VERSION)).contains(found)) else {
            let found = found.map_or("none".into(), |v| v.to_string());
            return Err(broken(format!("format version {OLDEST} to {VERSION}, found {found}")));
        };
        let manifest: Self = serde_json::from_value(version)
            .map_err(|error| broken(format!("the fields of version {known}, found {error}")))?;
        let newer = manifest.sites.iter().find_map(|site| match site {
            _ if known < 2 && site.sparse.is_some() => Some("sparse"),
            _ if known < 3 && site.parts.iter().any(|part| part.tiled) => Some("tiled"),
            _ => None,
        });
        if let Some(field) = newer {
            return Err(broken(format!("the fields of version {known}, found {field}")));
        }
        Ok(manifest)
    }

    /// The number of weights of the fine-tune.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.sites.iter().filter_map(SiteEntry::parameters).sum()
    }
}

pub(super) fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("plain data is always JSON")
}
