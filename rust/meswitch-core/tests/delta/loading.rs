//! Tensors that are read into memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use meswitch_core::Error;
use meswitch_core::delta::Delta;

use crate::family::Family;

#[test]
fn a_load_that_is_stopped_gives_everything_back() {
    let delta = Family::new().compress().unwrap();
    let (stop, token) = (AtomicBool::new(true), Arc::new(()));
    let stopped = delta.load(Some(Box::new(token.clone())), &stop);
    assert!(matches!(stopped, Err(Error::Interrupted)));
    assert_eq!(Arc::strong_count(&token), 1);

    stop.store(false, Ordering::Relaxed);
    let tensors = delta.load(Some(Box::new(token.clone())), &stop).unwrap();
    let region = tensors.region().clone();
    assert_eq!(region[..], delta.tensors().unwrap().region()[..]);
    drop(tensors);
    assert_eq!(Arc::strong_count(&token), 2, "dropped while the memory had a user");
    drop(region);
    assert_eq!(Arc::strong_count(&token), 1);
}

#[test]
fn threads_share_a_delta_and_its_tensors() {
    fn shared<T: Send + Sync>() {}
    shared::<Delta>();
    shared::<meswitch_core::delta::Tensors>();
}
