//! Folders that appear complete or not at all: where they may be written, who may write, what is replaced.
#![cfg(not(miri))] // locks files

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use meswitch_core::folder::{Folder, Lock, Target};
use meswitch_core::{Error, Result};
use tempfile::TempDir;

const MARKER: &str = "marker";

fn target(path: &Path) -> Result<Target> {
    Target::resolve(path, Some(MARKER))
}

fn lock(path: &Path) -> Result<Arc<Lock>> {
    Lock::take(target(path)?)
}

/// Writes a folder with a marker of that text.
fn write(path: &Path, text: &str) -> Result<PathBuf> {
    let folder = Folder::create(lock(path)?)?;
    fs::write(folder.path().join(MARKER), text).unwrap();
    folder.commit()
}

fn marker(path: &Path) -> String {
    fs::read_to_string(path.join(MARKER)).unwrap()
}

fn names(folder: &Path) -> BTreeSet<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[track_caller]
fn assert_refused(path: &Path, expected: &str) {
    match target(path) {
        Err(Error::Output(message)) => assert!(message.contains(expected), "{message}"),
        Err(other) => panic!("expected an output error, found {other:?}"),
        Ok(_) => panic!("{} was accepted", path.display()),
    }
}

#[test]
fn a_folder_is_written_and_replaced_and_nothing_is_left_beside_it() {
    let root = TempDir::new().unwrap();
    let path = root.path().join("deep/er/folder");
    for text in ["one", "two"] {
        assert_eq!(write(&path, text).unwrap(), path);
        assert_eq!(marker(&path), text);
        assert_eq!(names(path.parent().unwrap()), ["folder".to_owned()].into());
    }
    drop(Folder::create(lock(&path).unwrap()).unwrap());
    assert_eq!((marker(&path), names(path.parent().unwrap())), ("two".to_owned(), ["folder".to_owned()].into()));
}

#[test]
fn places_that_hold_something_else_are_refused() {
    let root = TempDir::new().unwrap();
    let place = |name: &str| root.path().join(name);
    fs::write(place("file"), "x").unwrap();
    fs::create_dir(place("full")).unwrap();
    fs::write(place("full/thesis"), "x").unwrap();
    fs::create_dir(place("marked-by-a-folder")).unwrap();
    fs::create_dir(place("marked-by-a-folder/marker")).unwrap();
    for name in ["file", "full", "marked-by-a-folder"] {
        assert_refused(&place(name), "found something else at");
    }
    for unnamed in [".", "..", "/"] {
        assert_refused(Path::new(unnamed), "by its name");
    }
    fs::create_dir(place("empty")).unwrap();
    target(&place("empty")).unwrap();
    target(&place("empty/.")).unwrap();
    assert!(matches!(Target::resolve(&place("full"), None), Err(Error::Output(_))));
}

#[test]
fn a_link_leads_to_the_place() {
    let root = TempDir::new().unwrap();
    let place = |name: &str| root.path().canonicalize().unwrap().join(name);
    fs::create_dir_all(place("disk/folder")).unwrap();
    symlink(place("disk/folder"), place("link")).unwrap();
    symlink("link", place("chain")).unwrap();
    for (path, text) in [("link", "one"), ("chain", "two"), ("chain/", "three")] {
        assert_eq!(write(&place(path), text).unwrap(), place("disk/folder"));
        assert_eq!(marker(&place("disk/folder")), text);
        assert!(place("link").is_symlink() && place("chain").is_symlink());
    }
    assert_eq!(names(&place("disk")), ["folder".to_owned()].into());
    symlink("nowhere", place("dangling")).unwrap();
    assert_refused(&place("dangling"), "a link to nothing");
    symlink("loop", place("loop")).unwrap();
    assert!(target(&place("loop")).is_err());
    symlink(place("disk"), place("to-something-else")).unwrap();
    assert_refused(&place("to-something-else"), "found something else");
}

#[test]
fn what_is_no_folder_in_the_place_of_the_unfinished_one_is_refused_and_kept() {
    let root = TempDir::new().unwrap();
    let precious = root.path().join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("thesis"), "x").unwrap();
    let path = root.path().join("folder");
    for hidden in [".folder.incomplete", ".folder.replaced", ".folder.lock"] {
        let hidden = root.path().join(hidden);
        symlink(&precious, &hidden).unwrap();
        assert_refused(&path, "where the unfinished work is kept");
        fs::remove_file(&hidden).unwrap();
    }
    let hidden = root.path().join(".folder.incomplete");
    fs::write(&hidden, "x").unwrap();
    assert_refused(&path, "where the unfinished work is kept");
    fs::remove_file(&hidden).unwrap();
    assert_eq!(names(&precious), ["thesis".to_owned()].into());
    // A link that is planted after the check is not followed either.
    let checked = target(&path).unwrap();
    symlink(&precious, &hidden).unwrap();
    assert!(Folder::create(Lock::take(checked).unwrap()).is_err());
    assert_eq!(names(&precious), ["thesis".to_owned()].into());
}

#[test]
fn whatever_an_interrupted_writer_left_is_removed_without_following_links() {
    let root = TempDir::new().unwrap();
    let precious = root.path().join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("thesis"), "x").unwrap();
    let hidden = root.path().join(".folder.incomplete");
    fs::create_dir_all(hidden.join(".cache/deep")).unwrap();
    fs::write(hidden.join(".cache/deep/file"), "x").unwrap();
    symlink(&precious, hidden.join("link")).unwrap();
    symlink(precious.join("thesis"), hidden.join(MARKER)).unwrap();
    write(&root.path().join("folder"), "new").unwrap();
    assert_eq!(names(&root.path().join("folder")), [MARKER.to_owned()].into());
    assert_eq!(fs::read_to_string(precious.join("thesis")).unwrap(), "x");
}

#[test]
fn two_writers_exclude_each_other_until_the_old_folder_is_gone() {
    let root = TempDir::new().unwrap();
    let path = root.path().join("folder");
    write(&path, "old").unwrap();
    let first = Folder::create(lock(&path).unwrap()).unwrap();
    assert!(matches!(lock(&path), Err(Error::Output(message)) if message.contains("another writer")));
    // Who only looked has not taken the first one's lock away.
    assert!(lock(&path).is_err());
    fs::write(first.path().join(MARKER), "first").unwrap();
    first.commit().unwrap();
    assert_eq!(write(&path, "second").map(|_| marker(&path)).unwrap(), "second");
}

#[test]
fn a_lock_lasts_longer_than_the_folder_that_is_written_under_it() {
    let root = TempDir::new().unwrap();
    let path = root.path().join("folder");
    let held = lock(&path).unwrap();
    for _ in 0..2 {
        let folder = Folder::create(held.clone()).unwrap();
        fs::write(folder.path().join(MARKER), "new").unwrap();
        folder.commit().unwrap();
        assert!(matches!(write(&path, "another's"), Err(Error::Output(_))));
    }
    drop(held);
    assert_eq!(names(root.path()), ["folder".to_owned()].into());
    write(&path, "another's").unwrap();
}

#[test]
fn what_came_to_the_place_meanwhile_is_kept() {
    let root = TempDir::new().unwrap();
    let path = root.path().join("folder");
    let folder = Folder::create(lock(&path).unwrap()).unwrap();
    fs::write(folder.path().join(MARKER), "new").unwrap();
    fs::write(&path, "a user's file").unwrap();
    assert!(matches!(folder.commit(), Err(Error::Output(_))));
    assert_eq!(fs::read_to_string(&path).unwrap(), "a user's file");
}

#[test]
fn an_old_folder_that_was_moved_away_comes_back() {
    let root = TempDir::new().unwrap();
    let (path, replaced) = (root.path().join("folder"), root.path().join(".folder.replaced"));
    write(&path, "old").unwrap();
    fs::rename(&path, &replaced).unwrap();
    drop(Folder::create(lock(&path).unwrap()).unwrap());
    assert_eq!(marker(&path), "old");
    fs::create_dir(&replaced).unwrap();
    fs::write(replaced.join("left over"), "x").unwrap();
    drop(Folder::create(lock(&path).unwrap()).unwrap());
    assert_eq!((marker(&path), names(root.path())), ("old".to_owned(), ["folder".to_owned()].into()));
}
