//! Delta directories that were written once and must be read by every later version.

use std::fs;
use std::path::Path;

use meswitch_core::checkpoint::Checkpoint;
use meswitch_core::delta::{Delta, Kind, MANIFEST};

#[test]
fn golden_directories_are_read() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let mut read = 0;
    for version in fs::read_dir(golden).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()) {
        let base = Checkpoint::open(&version.join("base")).unwrap();
        for folder in fs::read_dir(&version).unwrap().map(|entry| entry.unwrap().path()) {
            if !folder.join(MANIFEST).is_file() {
                continue;
            }
            let delta = Delta::open(&folder).unwrap();
            delta.verify().unwrap();
            delta.check_base(&base, true).unwrap();
            let shared = delta.manifest().sites.iter().filter(|site| site.kind == Kind::Shared).count();
            assert_eq!(shared, 1, "{}", folder.display());
            read += 1;
        }
    }
    assert!(read >= 4);
}
