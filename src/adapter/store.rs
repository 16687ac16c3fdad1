//! Adapters on disk: one folder an id, and each is either whole or absent.
//!
//! An upload grows in a hidden folder ([`Staging`]) and takes its name by a rename once its bytes are on
//! the disk. A folder that is replaced first moves to a hidden name, since a rename cannot replace a full
//! folder: readers of this process are kept out between the two renames by a lock, and after a crash there
//! [`Store::open`] moves the old folder back.
//!
//! Hidden names: `.staging-<unique>-<id>`, `.displaced-<unique>-<id>`, `.lock`.
mod staging;

use super::AdapterId;
use crate::error::{Error, Kind, Result};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

pub use staging::Staging;

const STAGING: &str = ".staging-";
const DISPLACED: &str = ".displaced-";

/// The adapter folder. Cheap to clone; clones share one lock.
#[derive(Clone, Debug)]
pub struct Store {
    dir: Arc<PathBuf>,
    max_bytes: u64,
    /// Writers move folders, readers look at them.
    moving: Arc<RwLock<()>>,
    /// Shared file lock while the store is open: whoever gets it alone may clean up.
    _lock: Option<Arc<File>>,
}

impl Store {
    /// Most bytes of one upload unless [`Store::with_max_bytes`] says otherwise: 1 GiB.
    pub const DEFAULT_MAX_BYTES: u64 = 1 << 30;

    /// Opens the store in `dir`, made if absent, and mends what a crash left. Another process that has it
    /// open may be publishing, so then the hidden folders are left alone.
    ///
    /// # Errors
    /// `Internal` with the path if `dir` cannot be read or written.
    pub fn open(dir: impl AsRef<Path>) -> Result<Store> {
        let dir = dir.as_ref();
        fs::create_dir_all(dir).map_err(|e| disk_error(dir, &e))?;
        let lock = match lock_shared(dir) {
            // A store that is only read (a mounted image) has nothing to mend.
            Err(e) if matches!(e.kind(), io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied) => {
                tracing::warn!("{}: read only: {e}", dir.display());
                None
            }
            lock => Some(Arc::new(lock.map_err(|e| disk_error(dir, &e))?)),
        };
        Ok(Store {
            dir: Arc::new(dir.to_owned()),
            max_bytes: Self::DEFAULT_MAX_BYTES,
            moving: Arc::default(),
            _lock: lock,
        })
    }

    /// The same store with another limit for the bytes of one upload.
    pub fn with_max_bytes(self, max_bytes: u64) -> Self {
        Store { max_bytes, ..self }
    }

    /// The store's own folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Every adapter in the store, sorted. Folders whose names are no ids are skipped with a warning.
    pub fn ids(&self) -> Result<Vec<AdapterId>> {
        let _still = self.moving.read().unwrap_or_else(PoisonError::into_inner);
        let mut ids = Vec::new();
        for entry in fs::read_dir(&*self.dir).map_err(|e| disk_error(&self.dir, &e))? {
            let entry = entry.map_err(|e| disk_error(&self.dir, &e))?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with('.') || !entry.path().is_dir() {
                continue;
            }
            match AdapterId::parse(&name) {
                Ok(id) => ids.push(id),
                Err(e) => tracing::warn!(folder = %name, "skipped: {e}"),
            }
        }
        ids.sort();
        Ok(ids)
    }

    /// Where the adapter's folder is, whether or not it exists. To read more than one file of it use
    /// [`Store::read`].
    pub fn path(&self, id: &AdapterId) -> PathBuf {
        self.dir.join(id.as_str())
    }

    /// Whether the adapter is in the store.
    pub fn contains(&self, id: &AdapterId) -> bool {
        let _still = self.moving.read().unwrap_or_else(PoisonError::into_inner);
        self.path(id).is_dir()
    }

    /// Runs `read` on the adapter's folder while no publish or remove of this process can swap it: all
    /// files seen are of one version. Blocks for as long as a folder is being moved.
    ///
    /// # Errors
    /// `NotFound` naming the id, or what `read` returns.
    pub fn read<T>(&self, id: &AdapterId, read: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        let _still = self.moving.read().unwrap_or_else(PoisonError::into_inner);
        let path = self.path(id);
        if !path.is_dir() {
            return Err(Error::not_found(format!("adapter `{id}` is not in the store")));
        }
        read(&path)
    }

    /// Starts an upload of `id` in a hidden folder.
    pub fn stage(&self, id: &AdapterId) -> Result<Staging> {
        Staging::create(self.clone(), id.clone())
    }

    /// Deletes the adapter's folder. After a crash it is there whole, or not at all.
    ///
    /// # Errors
    /// `NotFound` naming the id.
    pub fn remove(&self, id: &AdapterId) -> Result<()> {
        // A staging name, so that a crash before the deletion is finished by `open`.
        let aside = self.dir.join(hidden_name(STAGING, id));
        {
            let _alone = self.moving.write().unwrap_or_else(PoisonError::into_inner);
            match fs::rename(self.path(id), &aside) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    return Err(Error::not_found(format!("adapter `{id}` is not in the store")));
                }
                moved => moved.map_err(|e| disk_error(&self.path(id), &e))?,
            }
            sync_dir(&self.dir)?;
        }
        discard(&aside);
        Ok(())
    }

    /// Gives the finished folder `from` the name of `id`, in place of what has it.
    fn move_in(&self, from: &Path, id: &AdapterId) -> Result<()> {
        let path = self.path(id);
        let mut displaced = Vec::new();
        let alone = self.moving.write().unwrap_or_else(PoisonError::into_inner);
        // Once round, unless another process puts a folder back between the two renames.
        for attempt in 0.. {
            let aside = self.dir.join(hidden_name(DISPLACED, id));
            match fs::rename(&path, &aside) {
                Ok(()) => displaced.push(aside),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(disk_error(&path, &e)),
            }
            let Err(e) = fs::rename(from, &path) else { break };
            let taken = matches!(e.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists);
            if !taken || attempt == 100 {
                if let Some(aside) = displaced.last() {
                    let back = fs::rename(aside, &path);
                    back.unwrap_or_else(|e| tracing::warn!(%id, "old version at {}: {e}", aside.display()));
                }
                return Err(disk_error(&path, &e));
            }
        }
        sync_dir(&self.dir)?;
        drop(alone);
        displaced.iter().for_each(|aside| discard(aside));
        Ok(())
    }
}

/// Takes the file lock that lasts while the store is open; mends the store if no one else has it open.
fn lock_shared(dir: &Path) -> io::Result<File> {
    let lock = File::options().create(true).truncate(false).write(true).open(dir.join(".lock"))?;
    if lock.try_lock().is_ok() {
        recover(dir)?;
        lock.unlock()?;
    }
    // Waits only while another process mends.
    lock.lock_shared()?;
    Ok(lock)
}

/// Puts displaced versions back where their replacement never arrived, deletes all else that is hidden.
fn recover(dir: &Path) -> io::Result<()> {
    let mut hidden = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        hidden.extend(name.to_str().filter(|n| n.starts_with('.')).map(str::to_owned));
    }
    // Unique parts sort by time: of several versions the newest goes back.
    hidden.sort();
    for name in hidden.iter().rev() {
        let path = dir.join(name);
        if let Some(id) = name.strip_prefix(DISPLACED).and_then(|rest| rest.split_once('-')).map(|(_, id)| id) {
            let home = dir.join(id);
            if AdapterId::parse(id).is_ok() && !home.exists() {
                fs::rename(&path, &home)?;
                tracing::warn!(id, "restored: its replacement was never finished");
                continue;
            }
        }
        if name.starts_with(STAGING) || name.starts_with(DISPLACED) {
            discard(&path);
        }
    }
    File::open(dir)?.sync_all()
}

/// `.<kind>-<unique>-<id>`; the unique part has no `-` and sorts by time.
fn hidden_name(kind: &str, id: &AdapterId) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("{kind}{:020}x{:08x}x{count:08x}-{id}", now.as_nanos(), std::process::id())
}

/// Deletes a hidden folder; what cannot be deleted now goes at the next [`Store::open`].
fn discard(path: &Path) {
    let deleted = match path.symlink_metadata() {
        Ok(m) if m.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    if let Err(e) = deleted.or_else(|e| if e.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(e) }) {
        tracing::warn!("{}: not deleted: {e}", path.display());
    }
}

/// Makes the folder's own entries (new files, renames) durable.
fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| disk_error(dir, &e))
}

fn disk_error(path: &Path, e: &io::Error) -> Error {
    let kind = match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Kind::ResourceExhausted,
        _ => Kind::Internal,
    };
    Error::new(kind, format!("{}: {e}", path.display()))
}

#[cfg(test)]
mod tests;
