//! One read, whatever the operating system makes of it: past the page cache where it does not hold the bytes.

use std::io::{self, ErrorKind, IoSliceMut};

use super::source::Source;
use crate::memory::Region;

/// What reads past the page cache are aligned to, in the file and in memory: no disk has larger blocks.
pub(crate) const DIRECT_ALIGNMENT: usize = 4096;

/// Memory of a thread for the two blocks of a read that are only partly wanted.
#[derive(Default)]
pub(super) struct Scratch(Option<Region>);

impl Scratch {
    fn blocks(&mut self) -> io::Result<(&mut [u8], &mut [u8])> {
        if self.0.is_none() {
            let region = Region::new(2 * DIRECT_ALIGNMENT)?;
            region.set_inherited(false);
            self.0 = Some(region);
        }
        Ok(self.0.as_mut().expect("it was just made").split_at_mut(DIRECT_ALIGNMENT))
    }
}

/// Reads bytes of the file.
///
/// # Errors
/// `UnexpectedEof` where the file is too short, and the operating system's.
pub(super) fn fill(source: &dyn Source, out: &mut [u8], start: u64, scratch: &mut Scratch) -> io::Result<()> {
    let mut done = if source.is_cached(start..start + out.len() as u64) {
        0
    } else {
        retried(|| fill_direct(source, out, start, scratch))?
    };
    while done < out.len() {
        match retried(|| source.read(&mut out[done..], start + done as u64))? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            count => done += count,
        }
    }
    Ok(())
}

/// Calls until no signal interrupts.
fn retried(mut read: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match read() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Reads past the page cache what can be read so. Returns how many of the first bytes it was.
fn fill_direct(source: &dyn Source, out: &mut [u8], start: u64, scratch: &mut Scratch) -> io::Result<usize> {
    // Whole blocks go where they belong, in one read with the two that are partly wanted.
    let skipped = (start % DIRECT_ALIGNMENT as u64) as usize;
    if out.as_ptr().addr() % DIRECT_ALIGNMENT != skipped || skipped + out.len() < 2 * DIRECT_ALIGNMENT {
        return Ok(0);
    }
    let (first, last) = scratch.blocks()?;
    let head = (DIRECT_ALIGNMENT - skipped) % DIRECT_ALIGNMENT;
    let tail = (skipped + out.len()) % DIRECT_ALIGNMENT;
    let blocks = head..out.len() - tail;
    let mut parts = Vec::with_capacity(3);
    if head > 0 {
        parts.push(IoSliceMut::new(first));
    }
    parts.push(IoSliceMut::new(&mut out[blocks.clone()]));
    if tail > 0 {
        parts.push(IoSliceMut::new(last));
    }
    let count = match source.read_direct(&mut parts, start - skipped as u64) {
        Err(error) if is_unsupported(&error) => 0,
        count => count?.saturating_sub(skipped).min(out.len()),
    };
    let (head, tail) = (head.min(count), count.saturating_sub(blocks.end));
    out[..head].copy_from_slice(&first[skipped..][..head]);
    out[blocks.end..][..tail].copy_from_slice(&last[..tail]);
    Ok(count)
}

/// Whether the file system, or the disk below it, reads only through the page cache.
fn is_unsupported(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    code == Some(libc::EINVAL) || code == Some(libc::EOPNOTSUPP)
}
