//! Two residencies: one over the memory of a device, whose sources lease from one over the memory of the host.

use std::sync::{Arc, atomic::AtomicBool};
use std::thread;

use super::desk::Desk;
use super::{Meter, Script, Taken};
use crate::error::Error;
use crate::residency::{Room, Unit};

/// Counted bytes.
struct Bytes {
    bytes: Vec<u8>,
    _taken: Taken,
}

impl Bytes {
    fn new(meter: &Arc<Meter>, bytes: impl ExactSizeIterator<Item = u8>) -> Self {
        let taken = meter.take(bytes.len() as u64);
        Self { bytes: bytes.collect(), _taken: taken }
    }
}

const UNITS: u8 = 6;
const BYTES: u64 = 100;

/// Units of a device, of which each is a copy of one of the host.
fn copies(host: &Arc<Desk<Bytes>>, on_host: &[Unit], device: &Desk<Bytes>, meter: &Arc<Meter>) -> Vec<Unit> {
    let units = on_host.iter().map(|unit| {
        let (host, unit, meter) = (host.clone(), *unit, meter.clone());
        let load = move |_: Room, _: &AtomicBool| {
            let lease = host.lease(unit).map_err(Error::Argument)?;
            Ok(Bytes::new(&meter, lease.bytes.iter().copied()))
        };
        device.add(Script { bytes: BYTES, load }).unwrap()
    });
    units.collect()
}

fn check(bytes: &Bytes, pattern: u8) {
    assert_eq!(bytes.bytes.len() as u64, BYTES);
    assert!(bytes.bytes.iter().all(|byte| *byte == pattern));
}

#[test]
fn a_device_keeps_what_the_host_evicts() {
    let meters = [BYTES, 3 * BYTES].map(Meter::new);
    let [host, device] = [BYTES, 3 * BYTES].map(Desk::<Bytes>::new);
    let of = |pattern| {
        let meter = meters[0].clone();
        let load = move |_: Room, _: &AtomicBool| Ok(Bytes::new(&meter, vec![pattern; BYTES as usize].into_iter()));
        host.add(Script { bytes: BYTES, load }).unwrap()
    };
    let on_host: Vec<_> = (0..UNITS).map(of).collect();
    let on_device = copies(&host, &on_host, &device, &meters[1]);

    let leases: Vec<_> = (0..3).map(|i| device.lease(on_device[i]).unwrap()).collect();
    assert_eq!(host.residency.snapshot().counters.evictions, 2); // it has room for one
    leases.iter().zip(0..).for_each(|(lease, pattern)| check(lease, pattern));
    drop(leases);
    thread::scope(|scope| {
        for first in 0..4 {
            let (device, on_device) = (&device, &on_device);
            scope.spawn(move || {
                for step in 0..if cfg!(miri) { 4 } else { 40 } {
                    let pattern = (first + step * (first + 1)) % UNITS;
                    check(&device.lease(on_device[pattern as usize]).unwrap(), pattern);
                }
            });
        }
    });
    let snapshots = [&host, &device].map(|desk| desk.residency.snapshot());
    assert_eq!(snapshots.map(|snapshot| snapshot.counters.failed), [0, 0]);
    device.end(); // and its sources, which have the host's
    host.end();
    meters.iter().for_each(|meter| meter.check());
}
