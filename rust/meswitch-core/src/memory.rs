//! Memory of tensors: page-aligned, owned by Rust, given back to the operating system as a whole.

use std::io;
use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;

/// Memory is taken in multiples of this many bytes.
const PAGE_BYTES: usize = 4096;

/// Anonymous memory that starts at a page. It belongs to no file, so nobody else can change or cut it; dropping it
/// gives it back.
pub struct Region(MmapMut);

impl Region {
    /// Zeroed memory. Pages take space from when they are first written to.
    ///
    /// # Errors
    /// The operating system's, where there is no memory.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let map = MmapMut::map_anon(bytes.max(1))?;
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage); // a kernel without huge pages refuses
        Ok(Self(map))
    }

    /// The bytes of memory that a region of `bytes` takes when it is full.
    #[must_use]
    pub fn size_of(bytes: usize) -> usize {
        bytes.max(1).next_multiple_of(PAGE_BYTES)
    }
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Region {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
