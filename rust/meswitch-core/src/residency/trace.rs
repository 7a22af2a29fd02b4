//! What was asked for and what was done about it, written down as it happens: a trace.
//!
//! A trace is a file of JSON lines, one [`Event`] a line. Its first line is a [`Event::Start`]. `t` is the time in
//! seconds since then.
//!
//! ```text
//! {"t":0.0,"event":"start","version":1,"budget":2000000000,"policy":"lru"}
//! {"t":0.51,"event":"request","expert":"math","bytes":814000000}
//! {"t":1.02,"event":"load","expert":"math","bytes":814000000,"ms":507.2}
//! ```

mod reader;
mod writer;

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

pub use reader::TraceReader;
pub use writer::TraceWriter;

/// The version of the form of traces that is written, and the only one that is read.
pub const VERSION: u32 = 1;

/// A line of a trace. `expert` is the name of a unit, whatever that is; `bytes` is the memory that it takes while it is
/// resident, known before it is loaded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event<'a> {
    /// The trace begins.
    Start {
        /// [`VERSION`].
        version: u32,
        /// The bytes that experts may take; `None` where there is no limit.
        budget: Option<u64>,
        /// The name of the eviction policy.
        #[serde(borrow)]
        policy: Cow<'a, str>,
    },
    /// One request asks for an expert, resident or not.
    Request {
        /// The expert's name.
        #[serde(borrow)]
        expert: Cow<'a, str>,
        /// Its memory.
        bytes: u64,
    },
    /// An expert became resident.
    Load {
        /// The expert's name.
        #[serde(borrow)]
        expert: Cow<'a, str>,
        /// Its memory.
        bytes: u64,
        /// How long the load took, in milliseconds.
        ms: f64,
    },
    /// An expert was let go to make room.
    Evict {
        /// The expert's name.
        #[serde(borrow)]
        expert: Cow<'a, str>,
        /// Its memory.
        bytes: u64,
    },
    /// An expert is gone for good. One of its name that is asked for later is another.
    Retire {
        /// The expert's name.
        #[serde(borrow)]
        expert: Cow<'a, str>,
        /// Its memory.
        bytes: u64,
    },
    /// A load failed.
    Fail {
        /// The expert's name.
        #[serde(borrow)]
        expert: Cow<'a, str>,
        /// Its memory.
        bytes: u64,
        /// What was wrong.
        #[serde(borrow)]
        error: Cow<'a, str>,
    },
}

/// An event and when it happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line<'a> {
    /// Seconds since the start.
    #[serde(default)]
    pub t: f64,
    /// What happened.
    #[serde(flatten, borrow)]
    pub event: Event<'a>,
}
