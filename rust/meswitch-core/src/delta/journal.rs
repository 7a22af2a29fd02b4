//! What an interrupted writer leaves for the next one: a line for every finished site, beside the tensors so far.

use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::manifest::{SiteEntry, json};
use super::{Folder, checksum};
use crate::error::{Error, Result};
use crate::fingerprint::Digest;

/// Its file name, which no file of a delta directory may have.
pub(super) const JOURNAL: &str = ".journal";

/// A site that is whole in the tensors' file.
#[derive(Serialize, Deserialize)]
pub(super) struct Finished {
    /// What the manifest will say of it.
    pub entry: SiteEntry,
    /// What the base's parameter adds to the fingerprint; none of one that is not on disk under that name.
    pub digest: Option<Digest>,
}

/// The file: a key, which says what is being written, then the finished sites. Each is a line of JSON after its checksum.
pub(super) struct Journal {
    path: PathBuf,
    file: File,
    // Where the lines that were found end, the key's first.
    ends: Vec<usize>,
}

impl Journal {
    /// Opens a folder's journal. Returns the sites that a writer of the same key finished, up to a torn line; what one of
    /// another key left in the folder is removed.
    pub fn open(folder: &Folder, key: &str) -> Result<(Self, Vec<Finished>)> {
        let path = folder.path().join(JOURNAL);
        let text = fs::read(&path).unwrap_or_default();
        let mut lines = text.split_inclusive(|byte| *byte == b'\n');
        let head = lines.next().filter(|line| read::<String>(line).is_some_and(|found| found == key));
        if head.is_none() {
            folder.empty()?;
        }
        let file = File::options().create(true).append(true).open(&path).map_err(Error::io(&path))?;
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

    /// Forgets all but the first `count` of the sites that were found.
    pub fn keep(&self, count: usize) -> Result<()> {
        self.file.set_len(self.ends[count] as u64).map_err(Error::io(&self.path))
    }

    /// Adds a site, whose tensors the operating system must have by now.
    pub fn add(&mut self, site: &Finished) -> Result<()> {
        self.write(site).map(drop)
    }

    fn write<T: Serialize>(&mut self, value: &T) -> Result<usize> {
        let text = json(value);
        let line = format!("{} {text}\n", checksum(text.as_bytes()));
        self.file.write_all(line.as_bytes()).map_err(Error::io(&self.path))?;
        Ok(line.len())
    }
}

/// What a line says; nothing where it is torn.
fn read<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    let line = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (stated, text) = line.split_once(' ')?;
    if stated == checksum(text.as_bytes()) { serde_json::from_str(text).ok() } else { None }
}
