//! Where bytes come from: a file, as the operating system reads it.

use std::borrow::Borrow;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Reads of one file, each at most one call of the operating system. It may return fewer bytes than are asked for.
pub(crate) trait Source: Sync {
    /// Reads through the page cache.
    fn read(&self, out: &mut [u8], start: u64) -> io::Result<usize>;

    /// Reads past the page cache, as much as fits into the parts. Those, and the start, are aligned to
    /// [`super::fill::DIRECT_ALIGNMENT`].
    fn read_direct(&self, parts: &mut [IoSliceMut<'_>], start: u64) -> io::Result<usize>;

    /// Whether reading through the page cache is the best way to some bytes.
    fn is_cached(&self, extent: Range<u64>) -> bool;
}

/// A file that stays open, owned or borrowed.
pub(crate) struct FileSource<F> {
    file: F,
    #[cfg(target_os = "linux")]
    direct: Option<linux::Direct>,
}

impl<F: Borrow<File>> FileSource<F> {
    /// Reads through the page cache, and past it where the system can and it does not hold the bytes.
    pub(crate) fn new(file: F) -> Self {
        Self {
            #[cfg(target_os = "linux")]
            direct: linux::Direct::of(file.borrow()).ok(),
            file,
        }
    }

    /// Reads through the page cache alone: better for little.
    pub(crate) fn cached(file: F) -> Self {
        Self {
            file,
            #[cfg(target_os = "linux")]
            direct: None,
        }
    }
}

impl<F: Borrow<File> + Sync> Source for FileSource<F> {
    fn read(&self, out: &mut [u8], start: u64) -> io::Result<usize> {
        self.file.borrow().read_at(out, start)
    }

    #[cfg(target_os = "linux")]
    fn read_direct(&self, parts: &mut [IoSliceMut<'_>], start: u64) -> io::Result<usize> {
        self.direct.as_ref().map_or(Ok(0), |direct| direct.read(parts, start))
    }

    #[cfg(target_os = "linux")]
    fn is_cached(&self, extent: Range<u64>) -> bool {
        self.direct.as_ref().is_none_or(|direct| direct.is_cached(extent))
    }

    #[cfg(not(target_os = "linux"))]
    fn read_direct(&self, _parts: &mut [IoSliceMut<'_>], _start: u64) -> io::Result<usize> {
        Ok(0)
    }

    #[cfg(not(target_os = "linux"))]
    fn is_cached(&self, _extent: Range<u64>) -> bool {
        true
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::{File, OpenOptions};
    use std::io::{self, IoSliceMut};
    use std::ops::Range;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;

    use memmap2::{MmapOptions, MmapRaw};

    /// A file opened once more, for reads past the page cache.
    pub(super) struct Direct {
        file: File,
        /// The file's addresses, at which the system says what the page cache holds. Nothing is read from them.
        map: MmapRaw,
        page: usize,
    }

    impl Direct {
        /// Fails where there is no `/proc`, or the file system has no such reads.
        pub(super) fn of(file: &File) -> io::Result<Self> {
            // The name of the open file itself: what it was opened by may be another's by now.
            let name = format!("/proc/self/fd/{}", file.as_raw_fd());
            let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(name)?;
            let map = MmapOptions::new().map_raw_read_only(file)?;
            Ok(Self { file: direct, map, page: rustix::param::page_size() })
        }

        pub(super) fn read(&self, parts: &mut [IoSliceMut<'_>], start: u64) -> io::Result<usize> {
            Ok(rustix::io::preadv(&self.file, parts, start)?)
        }

        /// Whether the page cache holds the first and the last of some bytes, and so probably all. Where the system
        /// does not tell (the file is another user's), it says so.
        pub(super) fn is_cached(&self, extent: Range<u64>) -> bool {
            self.has_page_of(extent.start) && self.has_page_of(extent.end.saturating_sub(1).max(extent.start))
        }

        fn has_page_of(&self, position: u64) -> bool {
            let mut resident = 0u8;
            if position >= self.map.len() as u64 {
                return true; // the file has grown since
            }
            let page = self.map.as_mut_ptr().wrapping_add(position as usize / self.page * self.page);
            // SAFETY: a page of the mapping, about which one byte is written; its own bytes are not touched.
            let asked = unsafe { libc::mincore(page.cast(), 1, &raw mut resident) };
            asked != 0 || resident & 1 == 1
        }
    }
}
