//! Adapters that appear in the store's folder, change there or vanish.
use crate::adapter::watch::{Change, Watcher, watch};
use crate::engine::loader::AdapterLoader;
use crate::error::{Kind, Result};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Changes that may wait while an adapter loads; the watcher keeps the rest.
const CHANGES: usize = 64;

/// Watches until dropped.
pub(super) struct Watching {
    _watcher: Watcher,
    task: JoinHandle<()>,
}

impl Drop for Watching {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Follows the store's folder. Changes are taken one at a time, in their order.
pub(super) fn start(loader: AdapterLoader) -> Result<Watching> {
    let (sender, mut changes) = mpsc::channel(CHANGES);
    let _watcher = watch(loader.store().dir(), sender)?;
    let task = tokio::spawn(async move {
        while let Some(change) = changes.recv().await {
            follow(&loader, change).await;
        }
    });
    Ok(Watching { _watcher, task })
}

async fn follow(loader: &AdapterLoader, change: Change) {
    let (id, followed) = match &change {
        Change::Present(id) => (id, loader.refresh(id).await),
        Change::Gone(id) => (id, loader.unload(id, None, false).await.map(drop)),
    };
    match followed {
        Ok(()) => {}
        // Deleted through the API a moment ago, or gone again before it was read.
        Err(e) if e.kind() == Kind::NotFound => tracing::debug!(%id, "watched folder: {e}"),
        Err(e) => tracing::warn!(%id, "watched folder: {e}"),
    }
}
