//! Memory of tensors: page-aligned, owned by Rust, given back to the operating system as a whole.

use std::any::Any;
use std::io;
use std::ops::{Deref, DerefMut};

#[cfg(target_os = "linux")]
use memmap2::Advice;
use memmap2::MmapMut;

/// Memory is taken in multiples of this many bytes.
const PAGE_BYTES: usize = 4096;

/// A value that lives as long as some memory: it is dropped after the memory was given back.
pub type KeepAlive = Box<dyn Any + Send + Sync>;

/// Anonymous memory. It belongs to no file, so nobody else can change or cut it; dropping it gives it back.
pub struct Region {
    // In this order: fields are dropped from the first to the last.
    map: MmapMut,
    _keep_alive: Option<KeepAlive>,
    /// Where its first byte lies in the first page.
    offset: usize,
}

impl Region {
    /// Zeroed memory that starts at a page. Pages take space from when they are first written to.
    ///
    /// # Errors
    /// The operating system's, where there is no memory.
    pub fn new(bytes: usize) -> io::Result<Self> {
        Self::with_keep_alive(bytes, None)
    }

    /// [`Region::new`] with a value that is dropped once the operating system has the memory back; without memory, at
    /// once.
    ///
    /// # Errors
    /// The operating system's, where there is no memory.
    pub fn with_keep_alive(bytes: usize, keep_alive: Option<KeepAlive>) -> io::Result<Self> {
        Self::with_offset(0, bytes, keep_alive)
    }

    /// [`Region::with_keep_alive`] that starts `offset` bytes after a page.
    pub(crate) fn with_offset(offset: usize, bytes: usize, keep_alive: Option<KeepAlive>) -> io::Result<Self> {
        let map = MmapMut::map_anon(offset.saturating_add(bytes.max(1)))?;
        #[cfg(target_os = "linux")]
        let _ = map.advise(Advice::HugePage); // a kernel without huge pages refuses
        Ok(Self { map, _keep_alive: keep_alive, offset })
    }

    /// The memory that a region of `bytes` takes when it is full.
    pub(crate) fn size_of(offset: usize, bytes: usize) -> usize {
        offset.saturating_add(bytes.max(1)).next_multiple_of(PAGE_BYTES)
    }

    /// Sets whether processes that are forked from now on have the memory too.
    ///
    /// None should while a disk writes to it: the two processes share pages until one of them writes, which then gets a
    /// copy, and the disk may go on with the other's.
    pub(crate) fn set_inherited(&self, inherited: bool) {
        #[cfg(target_os = "linux")]
        let _ = self.map.advise(if inherited { Advice::DoFork } else { Advice::DontFork });
        #[cfg(not(target_os = "linux"))]
        let _ = inherited;
    }
}

impl Deref for Region {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.offset..]
    }
}

impl AsRef<[u8]> for Region {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl DerefMut for Region {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.offset..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether memory is mapped at an address.
    #[cfg(target_os = "linux")]
    fn is_mapped(address: usize) -> bool {
        let mut resident = 0u8;
        // SAFETY: the call only asks about the address; it writes one byte, for one page.
        unsafe { libc::mincore(address as *mut libc::c_void, 1, &raw mut resident) == 0 }
    }

    #[cfg(target_os = "linux")]
    #[cfg(not(miri))] // asks the operating system
    #[test]
    fn a_keep_alive_is_dropped_after_the_memory() {
        use std::sync::Arc;
        use std::sync::atomic::{AtomicUsize, Ordering};

        /// Looks, when it is dropped, at whether an address is still mapped.
        struct Witness(usize, Arc<AtomicUsize>);
        impl Drop for Witness {
            fn drop(&mut self) {
                self.1.store(1 + usize::from(is_mapped(self.0)), Ordering::Relaxed);
            }
        }

        let (seen, size) = (Arc::new(AtomicUsize::new(0)), 64 << 20);
        let mut region = Region::new(size).unwrap();
        let address = region.as_ptr() as usize;
        region[0] = 1;
        region._keep_alive = Some(Box::new(Witness(address, seen.clone())));
        assert!(is_mapped(address));
        assert_eq!(seen.load(Ordering::Relaxed), 0);
        drop(region);
        assert_eq!(seen.load(Ordering::Relaxed), 1, "dropped while the memory was mapped");
    }

    #[test]
    fn without_memory_the_keep_alive_is_dropped_at_once() {
        let token = std::sync::Arc::new(());
        assert!(Region::with_offset(0, isize::MAX as usize - 4096, Some(Box::new(token.clone()))).is_err());
        assert_eq!(std::sync::Arc::strong_count(&token), 1);
    }
}
