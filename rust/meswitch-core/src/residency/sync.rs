//! What threads share. Built with `--cfg shuttle`, a checker takes the place of the standard library, and runs
//! them in many orders.

pub(super) use std::sync::PoisonError;
#[cfg(not(shuttle))]
pub(super) use std::{
    sync::{Condvar, Mutex, MutexGuard, atomic::AtomicBool, atomic::Ordering},
    thread,
};

#[cfg(shuttle)]
pub(super) use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, atomic::AtomicBool, atomic::Ordering},
    thread,
};
