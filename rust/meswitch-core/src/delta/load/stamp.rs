//! Whether a file is as it was.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How coarse the times of a file may be. A write within the same tick as the one before it changes no time.
const TICK: Duration = Duration::from_secs(2);

/// What the operating system says of a file; a write changes it, unless it comes in the same tick of the clock as the
/// one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    device: u64,
    inode: u64,
    bytes: u64,
    /// When the content was last written, and the content or anything else of the file: seconds and nanoseconds.
    times: [(i64, i64); 2],
}

impl Stamp {
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        let times = [(found.mtime(), found.mtime_nsec()), (found.ctime(), found.ctime_nsec())];
        Ok(Self { device: found.dev(), inode: found.ino(), bytes: found.size(), times })
    }

    /// Whether a write from `now` on is sure to change the stamp.
    pub(crate) fn is_settled(&self, now: SystemTime) -> bool {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().saturating_sub(TICK);
        self.times.iter().all(|time| *time < (now.as_secs() as i64, i64::from(now.subsec_nanos())))
    }
}

#[cfg(not(shuttle))] // only the store of MoE experts asks
impl Stamp {
    /// The size of the file.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether the file of another stamp had the same content, as far as its size and its last write tell.
    pub(crate) fn has_content_of(&self, other: &Self) -> bool {
        let content = |stamp: &Self| (stamp.device, stamp.inode, stamp.bytes, stamp.times[0]);
        content(self) == content(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_counts_once_its_times_are_past() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        let stamp = |content, rest| Stamp { device: 1, inode: 2, bytes: 3, times: [(content, 0), (rest, 5)] };
        assert!(stamp(100, 100).is_settled(at(103)));
        assert!(!stamp(100, 100).is_settled(at(102)), "within a tick");
        assert!(!stamp(50, 102).is_settled(at(103)), "something else was changed");
        assert!(!stamp(200, 100).is_settled(at(103)), "from the future");
        assert!(!stamp(100, 100).is_settled(UNIX_EPOCH));
    }
}
