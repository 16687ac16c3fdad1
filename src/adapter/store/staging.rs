//! An upload in progress: a hidden folder that becomes the adapter, or goes without a trace.
use super::{STAGING, Store, discard, disk_error, hidden_name, sync_dir};
use crate::adapter::AdapterId;
use crate::error::{Error, Kind, Result};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// All that an adapter folder may hold by upload.
const FILE_NAMES: [&str; 5] =
    ["adapter_config.json", "adapter_model.safetensors", "task.toml", "README.md", "examples.jsonl"];

/// One upload. Dropped without [`Staging::publish`], it deletes its folder.
#[derive(Debug)]
pub struct Staging {
    store: Store,
    id: AdapterId,
    dir: PathBuf,
    /// Open until published, so that each chunk costs one write.
    files: Vec<(&'static str, File)>,
    bytes: u64,
}

impl Staging {
    pub(super) fn create(store: Store, id: AdapterId) -> Result<Self> {
        let dir = store.dir.join(hidden_name(STAGING, &id));
        fs::create_dir(&dir).map_err(|e| disk_error(&dir, &e))?;
        Ok(Staging { store, id, dir, files: Vec::new(), bytes: 0 })
    }

    /// Adds `bytes` to the end of a file, made by its first chunk. Chunks of files may come mixed.
    ///
    /// # Errors
    /// `InvalidArgument` with field `file.name` for a name that no adapter has; `ResourceExhausted` naming
    /// the store's limit when all files together pass it.
    pub fn append(&mut self, file_name: &str, bytes: &[u8]) -> Result<()> {
        let Some(name) = FILE_NAMES.into_iter().find(|&name| name == file_name) else {
            let rule = format!("must be one of {}", FILE_NAMES.join(", "));
            return Err(Error::invalid("file.name", format!("{file_name:?}"), rule));
        };
        let (total, max) = (self.bytes.saturating_add(bytes.len() as u64), self.store.max_bytes);
        if total > max {
            let message = format!("adapter `{}`: its files pass {max} bytes, the limit of one upload", self.id);
            return Err(Error::exhausted(message, None));
        }
        let path = self.dir.join(name);
        let at = match self.files.iter().position(|(open, _)| *open == name) {
            Some(at) => at,
            None => {
                let file = File::create_new(&path).map_err(|e| disk_error(&path, &e))?;
                self.files.push((name, file));
                self.files.len() - 1
            }
        };
        self.files[at].1.write_all(bytes).map_err(|e| disk_error(&path, &e))?;
        self.bytes = total;
        Ok(())
    }

    /// The folder, to be validated before it is published.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes of all files so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes the folder durable and gives it its name, replacing what has it. Blocks on the disk.
    ///
    /// # Errors
    /// `InvalidArgument` without a single file; disk faults as `Internal`. Then nothing has changed.
    pub fn publish(mut self) -> Result<()> {
        if self.files.is_empty() {
            let message = format!("adapter `{}`: the upload has no files", self.id);
            return Err(Error::new(Kind::InvalidArgument, message));
        }
        for (name, file) in self.files.drain(..) {
            file.sync_all().map_err(|e| disk_error(&self.dir.join(name), &e))?;
        }
        sync_dir(&self.dir)?;
        self.store.move_in(&self.dir, &self.id)
        // The drop that follows finds no folder to delete.
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        discard(&self.dir);
    }
}
