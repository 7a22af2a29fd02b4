//! What is done with hostile bytes: each function must return, whatever it is given.
//!
//! `cargo +nightly fuzz run manifest` (or `directory`, `checkpoint`, `journal`) looks for bytes with which one panics,
//! hangs or takes too much memory. The tests of meswitch-core call the same functions with the corpus and changes of it.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use meswitch_core::Delta;
use meswitch_core::checkpoint::Checkpoint;
use meswitch_core::codec::Settings;
use meswitch_core::compress::{Job, Plan};
use meswitch_core::delta::{MANIFEST, Manifest, TENSORS, VERSION, checksum};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

const WEIGHTS: &str = "model.safetensors";

/// A body with the first line of a manifest, its checksum, before it.
fn with_checksum(body: &[u8]) -> Vec<u8> {
    [format!("{{\"checksum\": \"{}\",\n", checksum(body)).as_bytes(), body].concat()
}

/// Binds a manifest to its sites. Returns the binding; `None` where it has none, as before version 4.
fn bind(manifest: &mut Map<String, Value>) -> Option<String> {
    let binding = checksum(manifest.get("sites")?.to_string().as_bytes()).to_string();
    *manifest.get_mut("binding")? = json!(binding);
    Some(binding)
}

/// Parses bytes as the body of a manifest whose checksum and binding are right. What is accepted in today's version
/// survives being written again.
pub fn manifest(body: &[u8]) {
    let body = match serde_json::from_slice(&[b"{", body].concat()) {
        Ok(Value::Object(mut manifest)) => {
            bind(&mut manifest);
            Value::Object(manifest).to_string().into_bytes()[1..].to_vec()
        }
        _ => body.to_vec(),
    };
    let parsed = Manifest::parse(&with_checksum(&body));
    if let Some(manifest) = parsed.ok().filter(|manifest| manifest.format_version == VERSION) {
        let text = manifest.to_text();
        let again = Manifest::parse(text.as_bytes()).expect("what was read is written as it can be read");
        assert_eq!(again.to_text(), text);
    }
}

/// The parts of an input of [`directory`]: the manifest's body, whose length is in the first four bytes, and the
/// tensors' file.
fn split(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_le_bytes(*length) as usize)
}

/// An input of [`directory`].
pub fn join(body: &[u8], tensors: &[u8]) -> Vec<u8> {
    [&(body.len() as u32).to_le_bytes()[..], body, tensors].concat()
}

/// Opens and verifies a delta directory, and reads its matrices. Where manifest and header are JSON, sizes and checksums
/// are made right, as whoever writes a hostile directory would.
pub fn directory(data: &[u8]) {
    let Some((body, tensors)) = split(data) else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut tensors = tensors.to_vec();
    fs::write(folder.path().join(MANIFEST), with_checksum(&corrected(body, &mut tensors))).expect("written");
    fs::write(folder.path().join(TENSORS), tensors).expect("written");
    fs::write(folder.path().join("config.json"), "{}").expect("written");
    let Ok(delta) = Delta::open(folder.path()) else { return };
    let _ = delta.verify();
    let Ok(tensors) = delta.tensors() else { return };
    for site in &delta.manifest().sites {
        let _ = tensors.matrix(&site.name);
    }
}

/// The manifest's body with the sizes and checksums of these tensors, which are bound to it.
fn corrected(body: &[u8], tensors: &mut [u8]) -> Vec<u8> {
    let object = [b"{", body].concat();
    let Ok(Value::Object(mut manifest)) = serde_json::from_slice(&object) else { return body.to_vec() };
    let length = tensors.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
    let start = usize::try_from(length).unwrap_or(usize::MAX).saturating_add(8).min(tensors.len());
    let header: Value = serde_json::from_slice(tensors.get(8..start).unwrap_or_default()).unwrap_or_default();
    for site in manifest.get_mut("sites").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(name) = site["name"].as_str().map(str::to_owned) else { continue };
        for (role, stated) in site.get_mut("tensors").and_then(Value::as_object_mut).into_iter().flatten() {
            let offset = |index: usize| header[format!("{name}/{role}")]["data_offsets"][index].as_u64();
            let range = offset(0).zip(offset(1)).and_then(|(from, to)| {
                let place = |offset: u64| usize::try_from(offset).ok()?.checked_add(start);
                tensors.get(place(from)?..place(to)?)
            });
            *stated = json!(checksum(range.unwrap_or_default()).to_string());
        }
    }
    let field = b"\"binding\":\"";
    let stated = tensors[..start].windows(field.len()).position(|window| window == field).map(|at| at + field.len());
    if let (Some(binding), Some(at)) = (bind(&mut manifest), stated)
        && let Some(place) = tensors.get_mut(at..at + binding.len())
    {
        place.copy_from_slice(binding.as_bytes());
    }
    let file = json!({"bytes": tensors.len(), "checksum": checksum(&tensors[..start]).to_string()});
    if let Some(files) = manifest.get_mut("files").and_then(Value::as_object_mut) {
        files.insert(TENSORS.into(), file);
    }
    Value::Object(manifest).to_string().into_bytes()[1..].to_vec()
}

/// Opens a checkpoint of one file and reads all of it.
pub fn checkpoint(data: &[u8]) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::write(folder.path().join(WEIGHTS), data).expect("written");
    let Ok(checkpoint) = Checkpoint::open(folder.path(), &[WEIGHTS.to_owned()]) else { return };
    let _ = checkpoint.sample();
    for name in checkpoint.names() {
        let _ = checkpoint.view(name);
    }
}

/// Base and fine-tune of the job that [`journal`] resumes.
struct Family {
    root: TempDir,
    /// The journal's first line, which says that it is of that job.
    head: Vec<u8>,
    /// The tensors' file of the job when it was interrupted.
    tensors: Vec<u8>,
}

impl Family {
    fn new() -> Self {
        let root = tempfile::tempdir().expect("a temporary folder");
        for (name, value) in [("base", 0f32), ("finetune", 1.0)] {
            let data: Vec<u8> = (0..64u8).flat_map(|i| (value * f32::from(i)).to_le_bytes()).collect();
            let header = r#"{"a.weight":{"dtype":"F32","shape":[4,8],"data_offsets":[0,128]},
                "b.weight":{"dtype":"F32","shape":[4,8],"data_offsets":[128,256]}}"#;
            let file = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
            fs::create_dir(root.path().join(name)).expect("created");
            fs::write(root.path().join(name).join(WEIGHTS), file).expect("written");
        }
        let mut family = Self { root, head: Vec::new(), tensors: Vec::new() };
        family.run(1);
        let journal = fs::read(family.partial().join(".journal")).expect("the interrupted job's");
        family.head = journal.split_inclusive(|byte| *byte == b'\n').next().expect("a line").to_vec();
        family.tensors = fs::read(family.partial().join(TENSORS)).expect("the interrupted job's");
        family
    }

    fn partial(&self) -> PathBuf {
        self.root.path().join(".delta.incomplete")
    }

    /// Runs the job up to the site of that index.
    fn run(&self, sites: usize) {
        let open = |name: &str| Checkpoint::open(&self.root.path().join(name), &[WEIGHTS.to_owned()]);
        let (base, finetune) = (open("base").expect("sound"), open("finetune").expect("sound"));
        let plan = |name: &str| Plan {
            name: name.into(),
            transposed: false,
            owner: None,
            quantize: Some(Settings::default()),
            moments: None,
        };
        let job = Job {
            kind: meswitch_core::delta::Kind::Delta,
            base: &base,
            finetune: &finetune,
            plans: &["a.weight", "b.weight"].map(plan),
            out: &self.root.path().join("delta"),
            files: &[],
            settings: json!({}),
            base_name: "base",
        };
        let mut steps = 0..sites;
        let _ = job.run(&mut |_| steps.next().is_some(), &mut |_| Ok(None));
    }
}

/// Resumes a job with a journal whose lines, after the first, have right checksums.
pub fn journal(data: &[u8]) {
    static FAMILY: OnceLock<Family> = OnceLock::new();
    let family = FAMILY.get_or_init(Family::new);
    let lines = data
        .split(|byte| *byte == b'\n')
        .flat_map(|line| [checksum(line).to_string().as_bytes(), b" ", line, b"\n"].concat());
    let text: Vec<u8> = family.head.iter().copied().chain(lines).collect();
    put(&family.partial(), ".journal", &text);
    put(&family.partial(), TENSORS, &family.tensors);
    family.run(0);
}

fn put(folder: &Path, name: &str, bytes: &[u8]) {
    fs::create_dir_all(folder).expect("created");
    fs::write(folder.join(name), bytes).expect("written");
}
