//! Many threads, real memory, and sources that fail in turn.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use super::Meter;
use super::desk::Desk;
use crate::error::{Error, Result};
use crate::memory::Region;
use crate::residency::{Room, Source, Unit};

const THREADS: u64 = 16;
const STEPS: u64 = 400;
const UNITS: u64 = 24;
const PAGE: u64 = 4096;
const BUDGET: u64 = 64 * PAGE;

/// Draws numbers.
struct Draws(u64);

impl Draws {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// A region that is full of one byte. Its bytes are counted, and its room is kept, until its memory is given back.
fn fill(pattern: u8, bytes: u64, meter: &Arc<Meter>, room: Room) -> Arc<Region> {
    let keep_alive = Box::new((meter.take(bytes), room));
    let mut region = Region::with_keep_alive(bytes as usize, Some(keep_alive)).unwrap();
    region.fill(pattern);
    Arc::new(region)
}

/// A source whose loads go well, fail, panic, or take their time to stop, in turn.
struct Moody {
    pattern: u8,
    bytes: u64,
    meter: Arc<Meter>,
    loads: AtomicU64,
}

impl Source<Arc<Region>> for Moody {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn load(&self, room: Room, stop: &AtomicBool) -> Result<Arc<Region>> {
        let load = self.loads.fetch_add(1, Ordering::Relaxed) + u64::from(self.pattern);
        if load % 7 == 1 {
            return Err(Error::Checksum("before it took memory".into()));
        }
        let region = fill(self.pattern, self.bytes, &self.meter, room);
        match load % 7 {
            2 => Err(Error::Checksum("after it took memory".into())),
            3 => resume_unwind(Box::new("after it took memory")),
            4 => {
                (0..100).for_each(|_| thread::yield_now()); // hears of nothing
                Ok(region)
            }
            5 => {
                for _ in 0..100 {
                    thread::yield_now();
                    if stop.load(Ordering::Relaxed) {
                        return Err(Error::Interrupted);
                    }
                }
                Ok(region)
            }
            _ => Ok(region),
        }
    }
}

/// A unit that is replaced now and then, and the byte that it is full of.
type Slot = Mutex<(Unit, u8)>;

fn add(desk: &Desk<Arc<Region>>, meter: &Arc<Meter>, draws: &mut Draws) -> Result<(Unit, u8)> {
    let (pattern, bytes) = (draws.below(256) as u8, (1 + draws.below(20)) * PAGE);
    let source = Moody { pattern, bytes, meter: meter.clone(), loads: AtomicU64::new(0) };
    Ok((desk.add(source)?, pattern))
}

/// What one thread does. Memory that it keeps is let go of before it waits for more.
fn work(desk: &Desk<Arc<Region>>, slots: &[Slot], meter: &Arc<Meter>, draws: &mut Draws) {
    let mut kept = None;
    for _ in 0..STEPS {
        let slot = &slots[draws.below(UNITS) as usize];
        let (unit, pattern) = *slot.lock().unwrap();
        match draws.below(12) {
            0 => {
                let Ok(next) = add(desk, meter, draws) else { continue }; // too large for the moment
                let (old, _) = std::mem::replace(&mut *slot.lock().unwrap(), next);
                desk.retire(old);
            }
            1..=3 => desk.residency.prefetch(unit),
            4 => drop(desk.residency.pin(unit)),
            5 => {
                desk.residency.set_budget(Some(BUDGET / 4)); // some units are larger than that
                desk.residency.set_budget(Some(BUDGET));
            }
            _ => {
                drop(kept.take());
                let Ok(lease) = desk.lease(unit) else { continue }; // it failed, or was replaced meanwhile
                assert!(lease.iter().all(|byte| *byte == pattern), "expected the value of its own unit");
                kept = (draws.below(3) == 0).then(|| Arc::clone(&lease));
            }
        }
        if let Some(region) = &kept {
            assert!(region.windows(2).all(|pair| pair[0] == pair[1]), "expected memory that is kept to stay");
        }
    }
}

#[test]
#[cfg_attr(miri, ignore)] // maps memory
fn memory_never_exceeds_the_budget() {
    let (desk, meter) = (Desk::new(BUDGET), Meter::new(BUDGET));
    let mut draws = Draws(0x9e37_79b9_7f4a_7c15);
    let slots: Vec<Slot> = (0..UNITS).map(|_| Mutex::new(add(&desk, &meter, &mut draws).unwrap())).collect();
    thread::scope(|scope| {
        for _ in 0..THREADS {
            let (desk, slots, meter, seed) = (&desk, &slots, &meter, draws.below(u64::MAX) | 1);
            scope.spawn(move || work(desk, slots, meter, &mut Draws(seed)));
        }
    });
    let counters = desk.residency.snapshot().counters;
    assert!(counters.loads > UNITS && counters.failed > 0 && counters.evictions > 0, "{counters:?}");
    desk.end();
    meter.check();
}
