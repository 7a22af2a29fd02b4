//! Writing of traces, without waiting for the disk.

use std::fs::File;
use std::io::{self, Write};
use std::mem;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{Event, Line, VERSION};
use crate::error::{Error, Result};

/// How long an event waits at most before it is written.
const DELAY: Duration = Duration::from_secs(1);
/// The bytes at which the buffer is written before that.
const ENOUGH: usize = 1 << 16;
/// The bytes at which the disk is too slow.
const MOST: usize = 1 << 26;

/// A trace that is being written.
///
/// Any thread may write to it, also under a lock: an event is put into memory, and a thread of the writer's own brings
/// it to the file within a second. The first error ends the trace; events after it are dropped. Dropping the writer
/// writes what is left, except in a forked child, where the trace stays its parent's.
pub struct TraceWriter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    start: Instant,
    process: u32,
}

struct Shared {
    path: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    buffer: Vec<u8>,
    /// No event is taken any more.
    ended: bool,
    error: Option<Error>,
}

impl TraceWriter {
    /// Begins a trace in a new file, or in place of one that is there. `budget` and `policy` are those of the residency
    /// that it will be about.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where the file or the thread cannot be made.
    pub fn create(path: &Path, budget: Option<u64>, policy: &str) -> Result<Self> {
        let file = File::create(path).map_err(Error::io(path))?;
        let shared = Arc::new(Shared { path: path.to_owned(), state: Mutex::default(), changed: Condvar::new() });
        let writing = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("meswitch-trace".to_owned())
            .spawn(move || writing.bring_to(file))
            .map_err(Error::io(path))?;
        let writer = Self { shared, thread: Some(thread), start: Instant::now(), process: process::id() };
        writer.write(&Event::Start { version: VERSION, budget, policy: policy.into() });
        Ok(writer)
    }

    /// Adds an event, which happens now.
    pub fn write(&self, event: &Event<'_>) {
        let mut state = self.shared.lock();
        if state.ended {
            return;
        }
        // The time is taken under the lock, so that lines are in its order.
        let t = self.start.elapsed().as_micros() as f64 / 1e6;
        let line = Line { t, event: event.clone() };
        let written = serde_json::to_writer(&mut state.buffer, &line).map_err(io::Error::from);
        state.buffer.push(b'\n');
        let slow = || io::Error::other(format!("{} MiB wait to be written", MOST >> 20));
        let written = written.and_then(|()| if state.buffer.len() > MOST { Err(slow()) } else { Ok(()) });
        if let Err(error) = written {
            state.end(Error::io(&self.shared.path)(error));
        }
        if state.ended || state.buffer.len() >= ENOUGH {
            self.shared.changed.notify_one();
        }
    }

    /// The error that ended the trace, once.
    pub fn take_error(&self) -> Option<Error> {
        self.shared.lock().error.take()
    }

    /// Writes what is left.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], the one that ended the trace, where it was not taken yet.
    pub fn finish(mut self) -> Result<()> {
        self.close();
        self.take_error().map_or(Ok(()), Err)
    }

    fn close(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if self.process != process::id() {
            mem::forget(thread); // it does not exist in a forked child
            return;
        }
        self.shared.lock().ended = true;
        self.shared.changed.notify_one();
        // A panic of the thread was its bug, and was printed.
        let _ = thread.join();
    }
}

impl Drop for TraceWriter {
    fn drop(&mut self) {
        self.close();
    }
}

impl State {
    fn end(&mut self, error: Error) {
        self.ended = true;
        self.buffer = Vec::new();
        self.error = Some(error);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes the buffer to the file whenever there is enough in it or it has waited long enough, until the end.
    fn bring_to(&self, mut file: File) {
        let mut piece = Vec::new();
        loop {
            let state = self.lock();
            let waits = |state: &mut State| !state.ended && state.buffer.len() < ENOUGH;
            let (mut state, _) =
                self.changed.wait_timeout_while(state, DELAY, waits).unwrap_or_else(PoisonError::into_inner);
            mem::swap(&mut piece, &mut state.buffer);
            let last = state.ended;
            drop(state);
            if let Err(error) = file.write_all(&piece) {
                return self.lock().end(Error::io(&self.path)(error));
            }
            if last {
                return;
            }
            piece.clear();
        }
    }
}
