#![allow(clippy::unwrap_used)]
use super::*;
use std::process::{Command, Stdio};

fn id(text: &str) -> AdapterId {
    AdapterId::parse(text).unwrap()
}

fn publish(store: &Store, name: &str, version: u64) -> Result<()> {
    let mut staging = store.stage(&id(name))?;
    // Two files of several chunks, so that a torn version shows.
    for _ in 0..8 {
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            staging.append(file, version.to_le_bytes().repeat(512).as_slice())?;
        }
    }
    staging.publish()
}

/// The version of a whole folder.
fn version(dir: &Path) -> u64 {
    let mut versions = Vec::new();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let bytes = fs::read(dir.join(file)).unwrap();
        assert_eq!(bytes.len(), 8 * 512 * 8, "{file} is cut");
        versions.extend(bytes.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())));
    }
    assert!(versions.iter().all(|&v| v == versions[0]), "two versions in one folder");
    versions[0]
}

fn hidden(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.') && name != ".lock").collect()
}

#[test]
fn publishes_lists_replaces_and_removes() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("new/store")).unwrap();
    assert!(store.ids().unwrap().is_empty());
    publish(&store, "b", 1).unwrap();
    publish(&store, "a", 2).unwrap();
    publish(&store, "b", 3).unwrap();
    fs::create_dir(store.dir().join("not an id")).unwrap();
    fs::write(store.dir().join("file"), "x").unwrap();
    assert_eq!(store.ids().unwrap(), [id("a"), id("b")]);
    assert_eq!(store.read(&id("b"), |dir| Ok(version(dir))).unwrap(), 3);
    assert_eq!(hidden(store.dir()), [""; 0]);

    store.remove(&id("b")).unwrap();
    assert!(!store.contains(&id("b")) && store.contains(&id("a")));
    assert_eq!(hidden(store.dir()), [""; 0]);
    for e in [store.remove(&id("b")).unwrap_err(), store.read(&id("b"), |_| Ok(())).unwrap_err()] {
        assert_eq!((e.kind(), e.to_string().as_str()), (Kind::NotFound, "adapter `b` is not in the store"));
    }
}

#[test]
fn file_names_come_from_a_list() {
    let dir = tempfile::tempdir().unwrap();
    let mut staging = Store::open(dir.path()).unwrap().stage(&id("a")).unwrap();
    for name in ["../task.toml", "/etc/passwd", "a/task.toml", "adapter_model.bin", "", "TASK.TOML", "task.toml\0"] {
        let e = staging.append(name, b"x").unwrap_err();
        assert_eq!((e.kind(), e.field()), (Kind::InvalidArgument, Some("file.name")), "{name}");
    }
    let e = staging.publish().unwrap_err();
    assert!(e.to_string().contains("has no files"), "{e}");
}

#[test]
fn an_upload_is_bounded_and_leaves_nothing_when_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap().with_max_bytes(10);
    let mut staging = store.stage(&id("a")).unwrap();
    staging.append("task.toml", b"12345").unwrap();
    staging.append("README.md", b"12345").unwrap();
    let e = staging.append("task.toml", b"1").unwrap_err();
    assert_eq!(e.kind(), Kind::ResourceExhausted);
    assert!(e.to_string().contains("10 bytes"), "{e}");
    assert_eq!((staging.bytes(), hidden(dir.path()).len()), (10, 1));
    assert!(store.ids().unwrap().is_empty());
    drop(staging);
    assert_eq!(hidden(dir.path()), [""; 0]);
}

#[test]
fn open_mends_what_a_crash_left() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str| {
        fs::create_dir(dir.path().join(name)).unwrap();
        fs::write(dir.path().join(name).join("task.toml"), name).unwrap();
    };
    make(".staging-001-lost");
    make(".displaced-001-lost-id");
    make(".displaced-002-lost-id");
    make(".displaced-003-kept");
    make("kept");
    let open = Store::open(dir.path()).unwrap();
    let text = |id: &str| fs::read_to_string(dir.path().join(id).join("task.toml")).unwrap();
    assert_eq!(open.ids().unwrap(), [id("kept"), id("lost-id")]);
    assert_eq!((text("kept"), text("lost-id")), ("kept".into(), ".displaced-002-lost-id".into()));
    assert_eq!(hidden(dir.path()), [""; 0]);

    // A second opener leaves an upload of the first alone.
    let staging = open.stage(&id("x")).unwrap();
    Store::open(dir.path()).unwrap();
    assert!(staging.dir().is_dir());
}

#[test]
fn readers_see_one_version_while_two_threads_replace_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    publish(&store, "a", 0).unwrap();
    std::thread::scope(|scope| {
        let writers: Vec<_> = (1..3u64)
            .map(|w| {
                let store = &store;
                scope.spawn(move || (0..20).for_each(|i| publish(store, "a", w * 100 + i).unwrap()))
            })
            .collect();
        while writers.iter().any(|w| !w.is_finished()) {
            assert!(store.contains(&id("a")));
            assert_eq!(store.ids().unwrap().len(), 1);
            store.read(&id("a"), |dir| Ok(version(dir))).unwrap();
        }
    });
    assert_eq!(hidden(dir.path()), [""; 0]);
}

/// Folder of the store for the child process below; unset in an ordinary test run.
const CHILD: &str = "PREFIXD_STORE_TEST_CHILD";

#[test]
fn child_publishes_until_killed() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let store = Store::open(PathBuf::from(dir)).unwrap();
    for version in std::process::id() as u64 * 1_000_000.. {
        publish(&store, "a", version).unwrap();
    }
}

#[test]
fn a_killed_publisher_leaves_a_whole_version() {
    let dir = tempfile::tempdir().unwrap();
    publish(&Store::open(dir.path()).unwrap(), "a", 0).unwrap();
    let (mut restored, mut replaced, mut last) = (0, 0, 0);
    for round in 0..25 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "adapter::store::tests::child_publishes_until_killed"])
            .env(CHILD, dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // From process start to many versions later.
        std::thread::sleep(Duration::from_micros(2_000 + rand::random_range(0..60_000)));
        child.kill().unwrap();
        child.wait().unwrap();
        restored += usize::from(!dir.path().join("a").exists());
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.ids().unwrap(), [id("a")], "round {round}");
        let now = store.read(&id("a"), |dir| Ok(version(dir))).unwrap();
        replaced += usize::from(now != last);
        last = now;
        assert_eq!(hidden(dir.path()), [""; 0], "round {round}");
    }
    println!("25 kills: {replaced} after a new version, {restored} between the two renames");
    assert!(replaced > 0, "no child lived long enough to publish");
}
