//! Tells when an adapter folder was copied in, changed or deleted by hand.
//!
//! One change on disk is many events, and a copy in progress is not an adapter yet: an id is reported
//! once nothing happened to it for [`QUIET`].
use super::AdapterId;
use crate::error::{Context, Kind, Result};
use notify::event::{AccessKind, AccessMode};
use notify::{Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::Sender;

/// How long a folder must be left alone before it is reported.
pub const QUIET: Duration = Duration::from_millis(300);

/// What became of one adapter folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// New or changed.
    Present(AdapterId),
    /// Deleted or renamed away.
    Gone(AdapterId),
}

/// Watches until dropped; changes not yet reported are then lost.
#[derive(Debug)]
pub struct Watcher {
    /// Its drop closes the channel that the reporting thread reads, which ends that thread.
    _notify: RecommendedWatcher,
}

/// Reports changes of the folders in the store folder `dir` to `changed`. Hidden folders (uploads in
/// progress) and names that are no ids are left out. A slow receiver delays reports, it loses none.
///
/// # Errors
/// `Internal` if the system refuses the watch.
pub fn watch(dir: &Path, changed: Sender<Change>) -> Result<Watcher> {
    // Event paths start with what is watched, so both must be the same text.
    let dir = dir.canonicalize().or_kind(Kind::Internal, dir.display())?;
    let (events, incoming) = std::sync::mpsc::channel();
    let forward = move |event| events.send(event).unwrap_or_default(); // no reader: we are closing
    let mut notify = notify::recommended_watcher(forward).or_kind(Kind::Internal, dir.display())?;
    notify.watch(&dir, RecursiveMode::Recursive).or_kind(Kind::Internal, dir.display())?;
    let reporter = Reporter { dir, due: HashMap::new(), reported: HashSet::new(), changed };
    let thread = std::thread::Builder::new().name("adapter-watch".into());
    thread.spawn(move || reporter.run(&incoming)).or_kind(Kind::Internal, "adapter-watch")?;
    Ok(Watcher { _notify: notify })
}

struct Reporter {
    dir: PathBuf,
    /// When each changed id counts as quiet.
    due: HashMap<AdapterId, Instant>,
    /// Ids last reported present: after an overflow their absence must be noticed.
    reported: HashSet<AdapterId>,
    changed: Sender<Change>,
}

impl Reporter {
    fn run(mut self, incoming: &Receiver<notify::Result<Event>>) {
        loop {
            let next = self.due.values().min().copied();
            let event = match next {
                Some(due) => incoming.recv_timeout(due.saturating_duration_since(Instant::now())),
                None => incoming.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            match event {
                Ok(Ok(event)) => self.note(&event),
                Ok(Err(e)) => {
                    tracing::warn!("watching {}: {e}", self.dir.display());
                    self.note_all();
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if !self.report() {
                return;
            }
        }
    }

    fn note(&mut self, event: &Event) {
        if event.need_rescan() {
            return self.note_all();
        }
        match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => {}
            // Reading a folder, as loading does, is no change of it.
            EventKind::Access(_) => return,
            _ => {}
        }
        for path in &event.paths {
            let name = path.strip_prefix(&self.dir).ok().and_then(|inner| inner.components().next());
            if let Some(id) = name.and_then(|name| AdapterId::parse(name.as_os_str().to_str()?).ok()) {
                self.due.insert(id, Instant::now() + QUIET);
            }
        }
    }

    /// Events were lost: everything may have changed.
    fn note_all(&mut self) {
        let due = Instant::now() + QUIET;
        let entries = self.dir.read_dir().into_iter().flatten().flatten();
        let there = entries.filter_map(|entry| AdapterId::parse(entry.file_name().to_str()?).ok());
        self.due.extend(there.chain(self.reported.iter().cloned()).map(|id| (id, due)));
    }

    /// Sends what is due; false once no one receives.
    fn report(&mut self) -> bool {
        let now = Instant::now();
        let quiet: Vec<_> = self.due.extract_if(|_, due| *due <= now).map(|(id, _)| id).collect();
        quiet.into_iter().all(|id| {
            let path = self.dir.join(id.as_str());
            let change = if path.is_dir() {
                self.reported.insert(id.clone());
                Change::Present(id)
            } else if path.exists() {
                return true; // a plain file beside the adapters
            } else {
                self.reported.remove(&id);
                Change::Gone(id)
            };
            self.changed.blocking_send(change).is_ok()
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::fs;
    use tokio::sync::mpsc::{Receiver, channel};

    fn next(changes: &mut Receiver<Change>) -> Option<Change> {
        let end = Instant::now() + Duration::from_secs(5);
        while Instant::now() < end {
            if let Ok(change) = changes.try_recv() {
                return Some(change);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    }

    #[test]
    fn reports_once_quiet_and_leaves_out_what_is_no_adapter() {
        let dir = tempfile::tempdir().unwrap();
        let (send, mut changes) = channel(8);
        let watcher = watch(dir.path(), send).unwrap();
        let id = AdapterId::parse("a").unwrap();

        // A slow copy: events for longer than QUIET, one report after the last.
        fs::create_dir(dir.path().join(".staging-1")).unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        let started = Instant::now();
        for i in 0..6 {
            fs::write(dir.path().join("a/task.toml"), format!("# {i}")).unwrap();
            fs::write(dir.path().join(".staging-1/task.toml"), "x").unwrap();
            std::thread::sleep(QUIET / 3);
        }
        assert_eq!(next(&mut changes), Some(Change::Present(id.clone())));
        assert!(started.elapsed() >= QUIET * 2, "reported before it was quiet");

        // Reading is no change; a plain file is no adapter.
        fs::read(dir.path().join("a/task.toml")).unwrap();
        fs::write(dir.path().join("notes"), "x").unwrap();
        std::thread::sleep(QUIET * 2);
        assert!(changes.try_recv().is_err());

        // An upload arrives by a rename.
        fs::rename(dir.path().join(".staging-1"), dir.path().join("b")).unwrap();
        assert_eq!(next(&mut changes), Some(Change::Present(AdapterId::parse("b").unwrap())));
        fs::remove_dir_all(dir.path().join("a")).unwrap();
        assert_eq!(next(&mut changes), Some(Change::Gone(id)));

        drop(watcher);
        let end = Instant::now() + Duration::from_secs(5);
        while !changes.is_closed() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(changes.is_closed(), "the thread outlives its watcher");
    }

    #[test]
    fn a_missing_folder_is_an_error() {
        let (send, _changes) = channel(1);
        let e = watch(Path::new("no/such/store"), send).unwrap_err();
        assert!(e.to_string().contains("no/such/store"), "{e}");
    }
}
