//! Jobs that were interrupted, and go on.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use meswitch_core::Error;
use meswitch_core::checkpoint::Checkpoint;
use meswitch_core::compress::Job;
use meswitch_core::delta::{Delta, Kind, MANIFEST, Progress, TENSORS, rewrite};
use serde_json::{Value, json};

use crate::family::{Family, IN, OUT, content, plans, save};

/// Compresses what is saved to the end.
fn job(family: &Family, settings: Value) -> meswitch_core::Result<Delta> {
    run(family, settings, &mut |_| true)
}

/// Compresses what is saved, with a callback for progress.
fn run(
    family: &Family,
    settings: Value,
    progress: &mut dyn FnMut(Progress<'_>) -> bool,
) -> meswitch_core::Result<Delta> {
    let open = |name: &str| Checkpoint::open(&family.path(name), &["model.safetensors".to_owned()]).unwrap();
    let (base, finetune) = (open("base"), open("finetune"));
    let job = Job {
        kind: Kind::Delta,
        base: &base,
        finetune: &finetune,
        plans: &plans(),
        out: &family.path("delta"),
        files: &[family.path("finetune").join("config.json")],
        settings,
        base_name: "test base",
    };
    job.run(progress, &mut |_| Ok(None))
}

/// Compresses, but stops before the site of that index. Returns the weights that were done at the first step.
fn stopped_at(family: &Family, index: usize, settings: Value) -> (u64, meswitch_core::Result<Delta>) {
    let mut first = None;
    let outcome = run(family, settings, &mut |step| {
        first.get_or_insert(step.done);
        step.site != plans().get(index).map_or("none", |plan| &plan.name)
    });
    (first.unwrap(), outcome)
}

const WHOLE: usize = usize::MAX;
const EMBEDDING: u64 = ((OUT + 2) * IN) as u64;
const LAYER: u64 = (OUT * IN) as u64;

#[test]
fn an_interrupted_job_goes_on_after_its_last_site() {
    let family = Family::new();
    family.compress().unwrap();
    let (settings, whole) = (json!({"preset": "test"}), content(&family.path("delta")));
    let done = [0, EMBEDDING, EMBEDDING + LAYER, EMBEDDING + LAYER + IN as u64];
    for (index, done) in done.into_iter().enumerate() {
        let (found, stopped) = stopped_at(&family, index, settings.clone());
        assert!(found == 0 && matches!(stopped, Err(Error::Interrupted)));
        assert_eq!(family.path(".delta.incomplete").exists(), index > 0);
        let (found, finished) = stopped_at(&family, WHOLE, settings.clone());
        assert_eq!(found, done);
        finished.unwrap().verify().unwrap();
        assert_eq!(content(&family.path("delta")), whole);
        assert!(!family.path(".delta.incomplete").exists());
    }
    let mut steps = 0;
    while stopped_at(&family, steps + 1, settings.clone()).1.is_err() {
        steps += 1;
    }
    assert_eq!(steps, 3);
    assert_eq!(content(&family.path("delta")), whole);
}

#[test]
fn another_job_starts_anew() {
    let (mut family, settings) = (Family::new(), json!({"preset": "test"}));
    family.compress().unwrap();
    let (whole, config) = (content(&family.path("delta")), family.path("finetune").join("config.json"));
    let interrupt = || stopped_at(&family, 3, settings.clone()).1.err().unwrap();
    interrupt();
    let (found, other) = stopped_at(&family, WHOLE, json!({"preset": "other"}));
    assert_eq!(found, 0);
    other.unwrap().verify().unwrap();
    interrupt();
    fs::write(&config, "{\"tie_word_embeddings\": false }").unwrap();
    assert_eq!(stopped_at(&family, WHOLE, settings.clone()).0, 0);
    fs::write(&config, "{\"tie_word_embeddings\": false}").unwrap();
    interrupt();
    family.compress().unwrap();
    assert_eq!(content(&family.path("delta")), whole, "the same checkpoints, written again");
    interrupt();
    family.finetune.get_mut("same.weight").unwrap().1[OUT * IN / 2] += 1.0;
    save(&family.path("finetune"), &family.finetune);
    assert_eq!(stopped_at(&family, WHOLE, settings.clone()).0, 0);
    stopped_at(&family, 3, settings).1.err().unwrap();
    rewrite(
        &Delta::open(&family.path("delta")).unwrap(),
        &family.path("delta"),
        &HashMap::new(),
        &HashMap::new(),
        &json!({}),
    )
    .unwrap();
    assert_eq!(Delta::open(&family.path("delta")).unwrap().manifest().settings.get(), "{}");
    assert!(!family.path(".delta.incomplete").exists());
}

#[test]
fn a_job_goes_on_from_what_holds() {
    let (family, settings) = (Family::new(), json!({"preset": "test"}));
    family.compress().unwrap();
    let (partial, whole) = (family.path(".delta.incomplete"), content(&family.path("delta")));
    let tensors = |partial: &Path| {
        let whole = Delta::open(&family.path("delta")).unwrap().tensors().unwrap();
        whole.tensor("embed.weight", "u").map(|u| {
            let data = fs::read(partial.join(TENSORS)).unwrap();
            (data.windows(u.len()).position(|window| window == u).unwrap(), data)
        })
    };
    let truncate = |name: &str, less: u64| {
        let file = fs::File::options().write(true).open(partial.join(name)).unwrap();
        file.set_len(file.metadata().unwrap().len() - less).unwrap();
    };
    let damages: [(&dyn Fn(), u64); 8] = [
        (&|| drop(fs::write(partial.join("config.json"), "torn")), EMBEDDING + LAYER),
        (&|| truncate(".journal", 1), EMBEDDING),
        (&|| truncate(".journal", 300), EMBEDDING),
        (&|| truncate(TENSORS, 1), EMBEDDING),
        (&|| fs::remove_file(partial.join(TENSORS)).unwrap(), 0),
        (&|| fs::write(partial.join(".journal"), b"\xff\n").unwrap(), 0),
        (
            &|| {
                let (at, mut data) = tensors(&partial).unwrap();
                data[at] ^= 1;
                fs::write(partial.join(TENSORS), data).unwrap();
            },
            0,
        ),
        (
            &|| {
                let journal = fs::read(partial.join(".journal")).unwrap();
                fs::write(partial.join(".journal"), [&journal[..], b"torn"].concat()).unwrap();
                let data = fs::read(partial.join(TENSORS)).unwrap();
                fs::write(partial.join(TENSORS), [&[1; 64], &data[64..], &[1; 5000]].concat()).unwrap();
                fs::write(partial.join(MANIFEST), "torn").unwrap();
                fs::write(partial.join(".delta.safetensors"), [1; 100_000]).unwrap();
            },
            EMBEDDING + LAYER,
        ),
    ];
    for (number, (damage, expected)) in damages.into_iter().enumerate() {
        stopped_at(&family, 2, settings.clone()).1.err().unwrap();
        damage();
        let (found, stopped) = stopped_at(&family, 3, settings.clone());
        assert!(matches!(stopped, Err(Error::Interrupted)));
        assert_eq!(found, expected, "damage {number}");
        let (found, finished) = stopped_at(&family, WHOLE, settings.clone());
        assert_eq!(found, EMBEDDING + LAYER + IN as u64);
        finished.unwrap().verify().unwrap();
        assert_eq!(content(&family.path("delta")), whole, "damage {number}");
    }
}

#[test]
fn a_job_goes_on_from_its_very_end() {
    let (family, settings) = (Family::new(), json!({"preset": "test"}));
    family.compress().unwrap();
    let (partial, whole) = (family.path(".delta.incomplete"), content(&family.path("delta")));
    stopped_at(&family, 3, settings.clone()).1.err().unwrap();
    let journal = fs::read(partial.join(".journal")).unwrap();
    fs::remove_dir_all(&partial).unwrap();
    fs::rename(family.path("delta"), &partial).unwrap();
    fs::write(partial.join(".journal"), journal).unwrap();
    let (found, finished) = stopped_at(&family, WHOLE, settings);
    assert_eq!(found, EMBEDDING + LAYER + IN as u64);
    finished.unwrap().verify().unwrap();
    assert_eq!(content(&family.path("delta")), whole);
}

#[test]
fn a_job_that_cannot_go_on_leaves_nothing() {
    let mut family = Family::new();
    family.compress().unwrap();
    let before = content(&family.path("delta"));
    family.finetune.get_mut("norm.weight").unwrap().1[0] = f32::NAN;
    save(&family.path("finetune"), &family.finetune);
    stopped_at(&family, 2, json!({})).1.err().unwrap();
    assert!(family.path(".delta.incomplete").exists());
    let (found, refused) = stopped_at(&family, WHOLE, json!({}));
    assert!(found > 0 && matches!(refused, Err(Error::NonFinite(_))));
    assert!(!family.path(".delta.incomplete").exists());
    assert_eq!(content(&family.path("delta")), before);
}

#[test]
fn a_journal_that_cannot_be_read_loses_no_work() {
    let (family, settings) = (Family::new(), json!({"preset": "test"}));
    family.compress().unwrap();
    stopped_at(&family, 2, settings.clone()).1.err().unwrap();
    let (partial, aside) = (family.path(".delta.incomplete"), family.path("journal"));
    fs::rename(partial.join(".journal"), &aside).unwrap();
    let before = content(&partial);
    // Whoever runs this may read any file, so a folder and a link stand for one that cannot be read.
    fs::create_dir(partial.join(".journal")).unwrap();
    assert!(job(&family, settings.clone()).is_err());
    fs::remove_dir(partial.join(".journal")).unwrap();
    std::os::unix::fs::symlink(&aside, partial.join(".journal")).unwrap();
    assert!(job(&family, settings.clone()).is_err());
    fs::remove_file(partial.join(".journal")).unwrap();
    assert_eq!(content(&partial), before);
    fs::rename(&aside, partial.join(".journal")).unwrap();
    assert_eq!(stopped_at(&family, WHOLE, settings).0, EMBEDDING + LAYER);
}

#[test]
fn what_came_to_the_place_meanwhile_costs_no_work() {
    let (family, settings) = (Family::new(), json!({"preset": "test"}));
    family.compress().unwrap();
    fs::remove_dir_all(family.path("delta")).unwrap();
    let outcome = run(&family, settings.clone(), &mut |_| {
        fs::write(family.path("delta"), "a user's file").unwrap();
        true
    });
    assert!(matches!(outcome, Err(Error::Output(_))));
    assert_eq!(fs::read_to_string(family.path("delta")).unwrap(), "a user's file");
    fs::remove_file(family.path("delta")).unwrap();
    assert_eq!(stopped_at(&family, WHOLE, settings).0, EMBEDDING + 2 * LAYER + IN as u64);
}
