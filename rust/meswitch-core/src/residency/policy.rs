//! Which unit leaves first.

/// A unit of one residency: a small number that is used again once the unit is gone.
pub type UnitId = u32;

/// Decides which resident unit is evicted next.
///
/// A policy knows the resident units and when they were asked for. It is called under a lock: no operation may do I/O,
/// and each costs the same however many units there are, or grows with their logarithm.
pub trait Policy: Send {
    /// A unit of so many bytes became resident. It is none that is resident already.
    fn admitted(&mut self, unit: UnitId, bytes: u64);

    /// A request asked for a resident unit.
    fn touched(&mut self, unit: UnitId);

    /// A unit is resident no more: it was this policy's victim, or it was taken away.
    fn removed(&mut self, unit: UnitId);

    /// The unit to evict, of those that `may` be. It stays resident until [`Policy::removed`].
    fn victim(&mut self, may: &mut dyn FnMut(UnitId) -> bool) -> Option<UnitId>;
}
