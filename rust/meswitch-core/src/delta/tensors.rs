//! The tensors of a delta in memory.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::load::{Convert, Item, Loader};
use super::manifest::TENSORS;
use super::reader::Contents;
use super::site::{PartEntry, SiteEntry};
use super::tensor::{Role, TensorSpec};
use super::{ALIGNMENT, Delta};
use crate::error::{Error, Result};
use crate::layout::legacy::{Order, current_codes, current_scales};
use crate::memory::Region;

/// The tensors of one site or of all, in memory of their own.
///
/// They are in the order of today's format, whatever the version that was read. Each starts at a multiple of 64 bytes.
pub struct Tensors {
    contents: Arc<Contents>,
    /// The sites that are there, by position in the manifest.
    sites: Range<usize>,
    /// Where the tensors of each of them start, not yet aligned.
    starts: Vec<usize>,
    region: Arc<Region>,
}

impl Tensors {
    /// Reads the tensors of some sites into memory, which is asked for by its size and where it should start in a page.
    pub(super) fn read(
        delta: &Delta,
        sites: Range<usize>,
        memory: impl FnOnce(usize, usize) -> io::Result<Region>,
        loader: &Loader<'_>,
    ) -> Result<Self> {
        let entries = &delta.manifest().sites[sites.clone()];
        let (starts, size) = places(entries)?;
        let mut region = memory(delta.page_offset(sites.start), size).map_err(Error::io(loader.path))?;
        let (mut items, mut names, mut end) = (Vec::new(), Vec::new(), 0usize);
        for (index, entry) in sites.clone().zip(entries) {
            let current = entry.clone().into_current()?.tensor_specs()?;
            for ((start, spec), current) in delta.file_tensors(index)?.into_iter().zip(current) {
                let place = end.next_multiple_of(ALIGNMENT);
                end = place + current.size();
                let (extent, convert) = (start..start + spec.size() as u64, conversion(entry, &spec));
                items.push(Item { extent, place: place..end, convert });
                names.push((entry, spec));
            }
        }
        region.set_inherited(false);
        let found = loader.load(&items, &mut region)?;
        region.set_inherited(true);
        let expected = entries.iter().flat_map(|entry| &entry.checksums);
        for ((expected, found), (entry, spec)) in expected.zip(found).zip(names) {
            if *expected != found {
                let name = format!("{}/{}", entry.name, spec.name);
                return Err(Error::Checksum(format!(
                    "expected checksum {expected} of {name} in {TENSORS}, found {found}"
                )));
            }
        }
        Ok(Self { contents: delta.contents.clone(), sites, starts, region: Arc::new(region) })
    }

    /// A tensor's bytes; `None` where there is no such tensor.
    #[must_use]
    pub fn tensor(&self, site: &str, role: &str) -> Option<&[u8]> {
        self.extent(site, role).map(|range| &self.region[range])
    }

    /// Where a tensor lies in the region; `None` where there is no such tensor.
    #[must_use]
    pub fn extent(&self, site: &str, role: &str) -> Option<Range<usize>> {
        let index = self.contents.position(site).filter(|index| self.sites.contains(index))?;
        let entry = self.contents.manifest.sites[index].clone().into_current().ok()?;
        let mut end = self.starts[index - self.sites.start];
        for spec in entry.tensor_specs().ok()? {
            let start = end.next_multiple_of(ALIGNMENT);
            end = start + spec.size();
            if spec.name == role {
                return Some(start..end);
            }
        }
        None
    }

    /// The memory that all of them lie in.
    #[must_use]
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// The memory, for others; `None` where somebody else uses it too.
    pub(super) fn into_region(self) -> Option<Region> {
        Arc::into_inner(self.region)
    }

    /// The entry of a site that is there.
    pub(super) fn site(&self, name: &str) -> Option<&SiteEntry> {
        let index = self.contents.position(name).filter(|index| self.sites.contains(index))?;
        Some(&self.contents.manifest.sites[index])
    }
}

/// Where the tensors of each site start in memory, not yet aligned, and the size of all.
pub(super) fn places(entries: &[SiteEntry]) -> Result<(Vec<usize>, usize)> {
    let (mut starts, mut position) = (Vec::with_capacity(entries.len()), 0usize);
    for entry in entries {
        starts.push(position);
        for spec in entry.clone().into_current()?.tensor_specs()? {
            position = position.next_multiple_of(ALIGNMENT) + spec.size();
        }
    }
    Ok((starts, position))
}

/// How codes and scales that lie in the order of an older version become those of today's.
fn conversion<'a>(entry: &'a SiteEntry, spec: &TensorSpec) -> Option<Convert<'a>> {
    let (Role::Codes(index) | Role::Scales(index)) = spec.role else { return None };
    let part: &PartEntry = entry.parts().get(index).filter(|part| part.order != Order::Current)?;
    let (rows, columns) = entry.matrix_shape()?;
    let (rows, order, bits) = (part.rows.unwrap_or(rows), part.order, part.bits);
    Some(match spec.role {
        Role::Codes(_) => Box::new(move |bytes| current_codes(bytes, order, bits, rows, columns)),
        _ => Box::new(move |bytes: Vec<u8>| current_scales(&bytes, rows)),
    })
}
