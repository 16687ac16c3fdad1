//! The adapters that are part of the executable.
use crate::adapter::{AdapterId, Store};
use crate::error::Result;
use include_dir::{Dir, include_dir};

static ADAPTERS: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/adapters");

/// A folder with one of these is an adapter; scripts and read-me files lie beside them.
const MARKS: [&str; 2] = ["task.toml", "adapter_config.json"];

/// The shipped adapter of that id.
pub fn adapter_folder(id: &str) -> Option<&'static Dir<'static>> {
    folders().find(|(name, _)| *name == id).map(|(_, dir)| dir)
}

/// Writes all of them through `store`.
pub(super) fn write(store: &Store) -> Result<()> {
    for (name, dir) in folders() {
        let mut staging = store.stage(&AdapterId::parse(name)?)?;
        for file in dir.files() {
            if let Some(name) = file.path().file_name().and_then(|name| name.to_str()) {
                staging.append(name, file.contents())?;
            }
        }
        staging.publish()?;
    }
    Ok(())
}

fn folders() -> impl Iterator<Item = (&'static str, &'static Dir<'static>)> {
    ADAPTERS.dirs().filter_map(|dir| {
        let is_adapter = MARKS.iter().any(|mark| dir.contains(dir.path().join(mark)));
        let name = dir.path().file_name().and_then(|name| name.to_str())?;
        is_adapter.then_some((name, dir))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn shipped_adapters_land_in_a_store() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        write(&store).unwrap();
        assert!(store.contains(&AdapterId::parse("sentiment").unwrap()));
        assert!(adapter_folder("sentiment").is_some() && adapter_folder("nonesuch").is_none());
    }
}
