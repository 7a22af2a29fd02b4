//! The journal: one line for every site that a writer has finished, so that an interrupted job can be resumed.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::checksum;
use super::manifest::{VERSION, json};
use super::site::{SiteEntry, SiteFields};
use crate::crash::crash_point;
use crate::directory::Directory;
use crate::error::{Error, Result};
use crate::fingerprint::Digest;

/// The journal's file name.
pub(super) const JOURNAL: &str = ".journal";

/// A site whose tensors are completely written.
#[derive(Serialize, Deserialize)]
#[serde(try_from = "FinishedFields")]
pub(super) struct Finished {
    /// The site's entry.
    pub(super) entry: SiteEntry,
    /// The digest of the base's tensor of that name; `None` where the base has none of its own.
    pub(super) digest: Option<Digest>,
}

/// A site as the journal's JSON has it.
#[derive(Deserialize)]
struct FinishedFields {
    entry: SiteFields,
    digest: Option<Digest>,
}

impl TryFrom<FinishedFields> for Finished {
    type Error = Error;

    fn try_from(fields: FinishedFields) -> Result<Self> {
        Ok(Self { entry: fields.entry.entry(VERSION)?, digest: fields.digest })
    }
}

/// The journal: a line with a key, which identifies the job, then a line for every finished site. A line is a checksum
/// and JSON.
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    /// The end of each line that was read, that of the key first.
    ends: Vec<usize>,
}

impl Journal {
    /// Opens a folder's journal. Returns the sites that an earlier job with the same key has finished, up to the first
    /// incomplete line. Where the journal has another key, or there is none, the folder is emptied.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Output`] where the journal cannot be read; the folder stays as it is.
    pub(super) fn open(folder: &Directory, key: &str) -> Result<(Self, Vec<Finished>)> {
        let path = folder.path().join(JOURNAL);
        let text = folder.read_file(JOURNAL)?.unwrap_or_default();
        let mut lines = text.split_inclusive(|byte| *byte == b'\n');
        let head = lines.next().filter(|line| read::<String>(line).is_some_and(|other| other == key));
        if head.is_none() {
            folder.clear()?;
        }
        let file = folder.open_file(JOURNAL)?;
        let mut journal = Self { path, file, ends: Vec::new() };
        let Some(head) = head else {
            let length = journal.write(&key)?;
            journal.ends.push(length);
            return Ok((journal, Vec::new()));
        };
        let mut end = head.len();
        journal.ends.push(end);
        let finished = lines.map_while(|line| {
            end += line.len();
            journal.ends.push(end);
            read(line)
        });
        let finished = finished.collect();
        Ok((journal, finished))
    }

    /// Removes all but the first `count` of the sites that were read; sites are added after them.
    pub(super) fn truncate(&mut self, count: usize) -> Result<()> {
        let end = self.ends[count] as u64;
        let cut = self.file.set_len(end).and_then(|()| self.file.seek(SeekFrom::Start(end)));
        cut.map(drop).map_err(Error::io(&self.path))
    }

    /// Adds a site. Its tensors must have been passed to the operating system before.
    pub(super) fn add(&mut self, site: &Finished) -> Result<()> {
        self.write(site).map(drop)
    }

    fn write<T: Serialize>(&mut self, value: &T) -> Result<usize> {
        let text = json(value);
        let line = format!("{} {text}\n", checksum(text.as_bytes()));
        self.file.write_all(line.as_bytes()).map_err(Error::io(&self.path))?;
        crash_point!("journal");
        Ok(line.len())
    }
}

/// The value of a line; `None` where the line is incomplete or damaged.
fn read<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    let line = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (stated, text) = line.split_once(' ')?;
    if stated == checksum(text.as_bytes()).to_string() { serde_json::from_str(text).ok() } else { None }
}
