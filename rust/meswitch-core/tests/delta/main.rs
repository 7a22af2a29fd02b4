//! Whole delta directories: written, read, damaged.
#![cfg(not(miri))] // maps files

mod damage;
mod family;
mod loading;
mod resuming;
mod rewriting;
mod sparse;
mod writing;
