//! Traces: what is written is read, errors end a trace and nothing else, broken ones are refused by line.
#![cfg(not(miri))] // writes files

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use meswitch_core::residency::trace::{Event, Line, TraceReader, TraceWriter};
use meswitch_core::{Error, Result};
use tempfile::TempDir;

const START: &str = "{\"event\":\"start\",\"version\":1,\"budget\":null,\"policy\":\"lru\"}\n";
const REQUEST: &str = "{\"event\":\"request\",\"expert\":\"math\",\"bytes\":7}\n";

fn request(expert: &str) -> Event<'_> {
    Event::Request { expert: expert.into(), bytes: 7 }
}

/// All lines after the first; for texts that live as long as the test.
fn read(path: &Path) -> Result<Vec<(f64, String)>> {
    let mut reader = TraceReader::open(path)?;
    let mut lines = Vec::new();
    while let Some(Line { t, event }) = reader.next()? {
        lines.push((t, format!("{event:?}")));
    }
    Ok(lines)
}

fn read_text(text: impl AsRef<[u8]>) -> Result<Vec<(f64, String)>> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("trace.jsonl");
    fs::write(&path, text).unwrap();
    read(&path)
}

#[test]
fn what_is_written_is_read() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("trace.jsonl");
    let events = [
        request("math"),
        Event::Load { expert: "math".into(), bytes: 7, ms: 0.25 },
        Event::Evict { expert: "ma\"th \u{e4}".into(), bytes: u64::MAX },
        Event::Retire { expert: "math".into(), bytes: 0 },
        Event::Fail { expert: "math".into(), bytes: 7, error: "a\nb".into() },
    ];
    let writer = TraceWriter::create(&path, Some(100), "lru").unwrap();
    for event in &events {
        writer.write(event);
    }
    writer.finish().unwrap();

    let reader = TraceReader::open(&path).unwrap();
    assert_eq!((reader.budget(), reader.policy()), (Some(100), "lru"));
    let lines = read(&path).unwrap();
    assert!(lines.is_sorted_by_key(|(t, _)| *t) && lines[0].0 >= 0.0);
    assert!(lines.iter().map(|(_, event)| event).eq(&events.map(|event| format!("{event:?}"))));
    assert!(fs::read_to_string(&path).unwrap().lines().nth(1).unwrap().ends_with(&REQUEST.trim()[1..]));
}

#[test]
fn events_of_many_threads_are_whole_lines() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("trace.jsonl");
    let writer = TraceWriter::create(&path, None, "lru").unwrap();
    thread::scope(|scope| {
        for name in ["a", "b", "c"] {
            let writer = &writer;
            scope.spawn(move || (0..5000).for_each(|_| writer.write(&request(name))));
        }
    });
    drop(writer);
    let lines = read(&path).unwrap();
    assert!(lines.len() == 15000 && lines.is_sorted_by_key(|(t, _)| *t));
}

#[test]
fn events_come_to_the_file_while_the_trace_goes_on() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("trace.jsonl");
    let writer = TraceWriter::create(&path, None, "lru").unwrap();
    writer.write(&request("math"));
    while fs::read(&path).unwrap().iter().filter(|byte| **byte == b'\n').count() < 2 {
        thread::sleep(Duration::from_millis(10));
    }
    drop(writer);
}

#[test]
#[cfg(target_os = "linux")] // has a file on a disk that is always full
fn an_error_ends_the_trace_and_is_told_once() {
    let writer = TraceWriter::create(Path::new("/dev/full"), None, "lru").unwrap();
    let error = loop {
        writer.write(&request("math"));
        match writer.take_error() {
            Some(error) => break error,
            None => thread::sleep(Duration::from_millis(10)),
        }
    };
    assert!(error.to_string().starts_with("/dev/full: No space left"), "{error}");
    writer.write(&request("math"));
    assert!(writer.take_error().is_none());
    writer.finish().unwrap();

    let writer = TraceWriter::create(Path::new("/dev/full"), None, "lru").unwrap();
    assert!(matches!(writer.finish(), Err(Error::Io { .. })));
    assert!(matches!(TraceWriter::create(Path::new("/none/trace"), None, "lru"), Err(Error::Io { .. })));
}

#[test]
fn a_forked_child_leaves_the_trace_to_its_parent() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("trace.jsonl");
    let writer = TraceWriter::create(&path, None, "lru").unwrap();
    writer.write(&request("math"));
    // SAFETY: the child drops the writer, which takes no lock there, and ends at once; the alarm ends a child that waits.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above.
        unsafe { libc::alarm(10) };
        drop(writer);
        // SAFETY: as above.
        unsafe { libc::_exit(0) };
    }
    let mut status = -1;
    // SAFETY: the child is this process's own, and the status has a place.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
    writer.finish().unwrap();
    assert_eq!(read(&path).unwrap().len(), 1);
}

#[test]
fn a_last_line_that_is_cut_off_does_not_count() {
    let cut = &REQUEST[..20];
    assert_eq!(read_text(format!("{START}{REQUEST}{cut}")).unwrap().len(), 1);
    assert_eq!(read_text(format!("{START}{REQUEST}{}", REQUEST.trim())).unwrap().len(), 2);
}

#[test]
fn broken_traces_are_refused_by_line() {
    let after_start = |line: String| format!("{START}{line}").into_bytes();
    let cases = [
        (Vec::new(), "line 1: expected the start of a trace"),
        (REQUEST.into(), "line 1: expected the start of a trace"),
        (b"\x7fELF\n".to_vec(), "line 1: expected value"),
        (START[..30].into(), "line 1: expected the start of a trace"),
        (START.replace(":1", ":2").into(), "line 1: expected a trace of version 1, found version 2"),
        (after_start(format!("{REQUEST}{}", REQUEST.replace("bytes", "size"))), "line 3: missing field `bytes`"),
        (after_start(REQUEST.replace('7', "-7")), "line 2: invalid value: integer `-7`"),
        (after_start(REQUEST.replace("request", "reqest")), "line 2: unknown variant `reqest`"),
        (after_start(START.to_owned()), "line 2: expected one start of a trace"),
        (after_start("x".repeat(1 << 17)), "line 2: expected at most 65536 bytes"),
    ];
    for (text, expected) in cases {
        match read_text(text) {
            Err(Error::Data(message)) => assert!(message.contains(expected), "{message}"),
            other => panic!("expected {expected:?}, found {other:?}"),
        }
    }
    assert!(matches!(TraceReader::open(Path::new("/none/trace")), Err(Error::Io { .. })));
}
