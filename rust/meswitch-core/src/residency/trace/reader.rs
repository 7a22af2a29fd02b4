//! Reading of traces.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use super::{Event, Line, VERSION};
use crate::error::{Error, Result};

/// The longest line that is read, so that a file which is no trace does not fill memory.
const LONGEST_LINE: u64 = 1 << 16;

/// A trace, read line by line.
///
/// A last line without its end was cut off as it was written, by a full disk or because it is being written, and counts
/// only if it is whole.
pub struct TraceReader {
    path: PathBuf,
    file: BufReader<File>,
    line: Vec<u8>,
    number: u64,
    budget: Option<u64>,
    policy: String,
}

impl TraceReader {
    /// Opens a trace and reads its first line.
    ///
    /// # Errors
    ///
    /// [`Error::Data`] where that is not the start of a trace of this version, [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = BufReader::new(File::open(path).map_err(Error::io(path))?);
        let mut reader =
            Self { path: path.to_owned(), file, line: Vec::new(), number: 0, budget: None, policy: String::new() };
        let start = match reader.next()? {
            Some(Line { event: Event::Start { version, budget, policy }, .. }) => {
                Some((version, budget, policy.into_owned()))
            }
            _ => None,
        };
        let Some((version, budget, policy)) = start else {
            return Err(reader.broken("expected the start of a trace"));
        };
        if version != VERSION {
            return Err(reader.broken(&format!("expected a trace of version {VERSION}, found version {version}")));
        }
        Ok(Self { budget, policy, ..reader })
    }

    /// The budget under which the trace was written.
    pub fn budget(&self) -> Option<u64> {
        self.budget
    }

    /// The policy under which the trace was written.
    pub fn policy(&self) -> &str {
        &self.policy
    }

    /// The next event, with when it happened; `None` at the end.
    ///
    /// # Errors
    ///
    /// [`Error::Data`], naming the line, where it is no event, [`Error::Io`].
    #[allow(clippy::should_implement_trait)] // what it returns borrows from it, which no iterator's may
    pub fn next(&mut self) -> Result<Option<Line<'_>>> {
        self.line.clear();
        self.number += 1;
        let mut limited = (&mut self.file).take(LONGEST_LINE);
        limited.read_until(b'\n', &mut self.line).map_err(Error::io(&self.path))?;
        let whole = self.line.last() == Some(&b'\n');
        if self.line.len() as u64 == LONGEST_LINE && !whole {
            return Err(self.broken(&format!("expected at most {LONGEST_LINE} bytes")));
        }
        if self.line.is_empty() {
            return Ok(None);
        }
        match serde_json::from_slice(&self.line) {
            Ok(Line { event: Event::Start { .. }, .. }) if self.number > 1 => {
                Err(self.broken("expected one start of a trace, found another"))
            }
            Ok(line) => Ok(Some(line)),
            Err(_) if !whole => Ok(None),
            Err(error) => {
                let text = error.to_string();
                Err(self.broken(text.split(" at line ").next().unwrap_or_default()))
            }
        }
    }

    fn broken(&self, what: &str) -> Error {
        Error::Data(format!("{}, line {}: {what}", self.path.display(), self.number))
    }
}
