//! Points at which a test ends the process as a crash would.

/// Ends the process here in the test that asks for it; nothing outside tests.
macro_rules! crash_point {
    ($name:literal) => {
        #[cfg(test)]
        $crate::crash::pass($name);
    };
}
pub(crate) use crash_point;

/// How many points the process passes before the one at which it is killed.
#[cfg(test)]
pub(crate) const LIMIT: &str = "MESWITCH_TEST_CRASH_POINTS";

/// Kills the process where as many points as the environment variable [`LIMIT`] says were passed before.
#[cfg(test)]
pub(crate) fn pass(name: &str) {
    use std::sync::atomic::{AtomicUsize, Ordering};

    static PASSED: AtomicUsize = AtomicUsize::new(0);
    let Some(limit) = std::env::var(LIMIT).ok().and_then(|limit| limit.parse::<usize>().ok()) else { return };
    if PASSED.fetch_add(1, Ordering::Relaxed) == limit {
        println!("killed: {name}");
        // SAFETY: ends this process at once, without unwinding or exit handlers.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use std::collections::{BTreeMap, HashMap};
    use std::fs;
    use std::os::unix::process::ExitStatusExt;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
    use serde_json::json;

    use super::LIMIT;
    use crate::checkpoint::Checkpoint;
    use crate::codec::Settings;
    use crate::compress::{Job, Plan};
    use crate::delta::{Delta, Kind, rewrite};
    use crate::error::Result;

    const ROOT: &str = "MESWITCH_TEST_CRASH_ROOT";
    const WORK: &str = "MESWITCH_TEST_CRASH_WORK";
    const NAMES: [&str; 3] = ["a.weight", "b.weight", "c.weight"];

    /// Saves a checkpoint of drawn weights; `c.weight` is the same in all.
    fn save(folder: &Path, seed: usize) {
        fs::create_dir_all(folder).unwrap();
        let tensors = NAMES.map(|name| {
            let seed = if name == NAMES[2] { 0 } else { seed };
            let values = (0..16 * 24).map(|i| ((i * 37 + seed * 131) % 101) as f32 / 16.0);
            (name, values.flat_map(f32::to_le_bytes).collect::<Vec<u8>>())
        });
        let views =
            tensors.iter().map(|(name, data)| (*name, TensorView::new(Dtype::F32, vec![16, 24], data).unwrap()));
        serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
        fs::write(folder.join("config.json"), "{\"tie_word_embeddings\": false}").unwrap();
    }

    fn compress(root: &Path, finetune: &str) -> Result<()> {
        let open = |name: &str| Checkpoint::open(&root.join(name), &["model.safetensors".to_owned()]);
        let (base, finetune) = (open("base")?, open(finetune)?);
        let plan = |name: &str| Plan {
            name: name.into(),
            transposed: false,
            owner: None,
            quantize: (name != NAMES[1]).then(Settings::default),
            moments: None,
        };
        let job = Job {
            kind: Kind::Delta,
            base: &base,
            finetune: &finetune,
            plans: &NAMES.map(plan),
            out: &root.join("out/delta"),
            files: &[root.join("base/config.json")],
            settings: json!({}),
            base_name: "base",
        };
        job.run(&mut |_| true, &mut |_| Ok(None)).map(drop)
    }

    /// What is done to `out/delta`: by the name that a child gets it under.
    fn work(root: &Path, name: &str) -> Result<()> {
        match name {
            "rewrite" => {
                let out = root.join("out/delta");
                rewrite(&Delta::open(&out)?, &out, &HashMap::new(), &HashMap::new(), &json!({"distilled": true}))
            }
            finetune => compress(root, finetune),
        }
    }

    /// Every file of a folder; `None` where there is none.
    fn content(folder: &Path) -> Option<BTreeMap<String, Vec<u8>>> {
        let files = fs::read_dir(folder).ok()?.map(|file| file.unwrap().path());
        Some(files.map(|path| (path.file_name().unwrap().to_str().unwrap().into(), fs::read(path).unwrap())).collect())
    }

    fn out(root: &Path) -> PathBuf {
        root.join("out/delta")
    }

    /// Does the work in a child that is killed at each of its points in turn. After each, the old directory is there or
    /// the new one, and the next writer makes the new one and leaves nothing beside it.
    fn killed_everywhere(before: Option<&str>, name: &str) {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        for (seed, folder) in ["base", "first", "second"].into_iter().enumerate() {
            save(&root.join(folder), seed);
        }
        let reset = || {
            let _ = fs::remove_dir_all(root.join("out"));
            if let Some(before) = before {
                work(root, before).unwrap();
            }
        };
        reset();
        let old = content(&out(root));
        work(root, name).unwrap();
        let new = content(&out(root));
        assert_ne!(old, new);
        for limit in 0.. {
            reset();
            let child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "crash::tests::child", "--nocapture"])
                .envs([(LIMIT, limit.to_string()), (WORK, name.into()), (ROOT, root.to_str().unwrap().into())])
                .output()
                .unwrap();
            let point = String::from_utf8_lossy(&child.stdout).into_owned();
            let found = content(&out(root));
            assert!(found == old || found == new, "{name}: neither old nor new after {point}");
            if found.is_some() {
                Delta::open(&out(root)).unwrap().verify().unwrap();
            }
            if child.status.success() {
                assert!(limit > 10, "only {limit} points were passed");
                assert_eq!(found, new);
                return;
            }
            assert_eq!(child.status.signal(), Some(libc::SIGKILL), "{point}");
            work(root, name).unwrap();
            assert_eq!(content(&out(root)), new, "{point}");
            let beside: Vec<_> =
                fs::read_dir(root.join("out")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            assert_eq!(beside, ["delta"], "{point}");
        }
    }

    /// The child: nothing in an ordinary run of the tests.
    #[test]
    fn child() {
        if let (Ok(root), Ok(name)) = (std::env::var(ROOT), std::env::var(WORK)) {
            work(Path::new(&root), &name).unwrap();
        }
    }

    #[test]
    fn a_killed_compress_leaves_nothing_or_the_new_directory() {
        killed_everywhere(None, "first");
    }

    #[test]
    fn a_killed_replacement_leaves_the_old_directory_or_the_new() {
        killed_everywhere(Some("first"), "second");
    }

    #[test]
    fn a_killed_rewrite_leaves_the_old_directory_or_the_new() {
        killed_everywhere(Some("first"), "rewrite");
    }
}
