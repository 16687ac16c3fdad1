//! The way of an adapter into service: store -> memory -> KV pages -> registry, and out again.
//!
//! Requests never wait for it: the generation that serves goes on until the new one is READY. What fails on the
//! way leaves the store and the serving generation as they were.
use super::EngineHandle;
use crate::adapter::{
    Adapter, AdapterId, BaseShape, Digest, Generation, Loaded, Prefix, Registry, Staging, State, Store, Ticket,
    load_folder,
};
use crate::blocking;
use crate::error::{Error, Kind, Result};
use crate::telemetry::name;
use crate::tokenizer::Tokenizer;
use dashmap::DashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};
use tokio::sync::Semaphore;

/// Loads at once: each may hold the bytes of a whole adapter beside those that serve.
const LOADS: usize = 2;

/// Brings adapters in and out. Cheap to clone.
#[derive(Clone)]
pub struct AdapterLoader {
    inner: Arc<Inner>,
}

/// What a loader works with.
pub struct Parts {
    /// Adapters on disk.
    pub store: Store,
    /// Adapters in service.
    pub registry: Arc<Registry>,
    /// Holds their compiled pages.
    pub engine: EngineHandle,
    /// What they must fit.
    pub shape: BaseShape,
    /// Tokenises their texts.
    pub tokenizer: Tokenizer,
}

struct Inner {
    parts: Parts,
    loads: Semaphore,
    /// Held while a folder takes its name, so that disk and registry agree on which upload is the last.
    naming: Mutex<()>,
    known: DashMap<AdapterId, Known>,
}

/// What is remembered of an id beside its registry entry.
#[derive(Clone, Debug, Default)]
struct Known {
    pinned: bool,
    /// The files that serve, to tell a change made by hand from our own.
    files: Fingerprint,
}

/// Name, length and time of each file of a folder, sorted.
type Fingerprint = Vec<(String, u64, Option<SystemTime>)>;

/// Whether a load compiles the prefix into pages before the adapter serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compile {
    /// Resident when READY.
    Now,
    /// With its first request.
    OnDemand,
}

/// How many adapters of the store came into service.
#[derive(Clone, Debug, Default)]
pub struct LoadedAll {
    /// READY.
    pub ready: usize,
    /// FAILED, and why.
    pub failed: Vec<(AdapterId, Error)>,
}

impl AdapterLoader {
    /// A loader over its parts.
    pub fn new(parts: Parts) -> Self {
        let loads = Semaphore::new(LOADS);
        AdapterLoader { inner: Arc::new(Inner { parts, loads, naming: Mutex::default(), known: DashMap::new() }) }
    }

    /// Whether there is an adapter of that id, on disk or in service.
    pub fn holds(&self, id: &AdapterId) -> bool {
        self.store().contains(id) || self.registry().resolve(id).is_ok()
    }

    /// The adapters in service.
    pub fn registry(&self) -> &Arc<Registry> {
        &self.inner.parts.registry
    }

    /// The adapters on disk.
    pub fn store(&self) -> &Store {
        &self.inner.parts.store
    }

    /// Whether `id` was loaded to stay in the KV pool.
    pub fn is_pinned(&self, id: &AdapterId) -> bool {
        self.inner.known.get(id).is_some_and(|known| known.pinned)
    }

    /// Whether the pages of that digest are in the KV pool now.
    pub fn is_resident(&self, digest: Option<Digest>) -> bool {
        digest.is_some_and(|digest| self.inner.parts.engine.is_resident(digest))
    }

    /// Loads `id` from the store as a new generation; returns once it serves. A caller that goes away does not
    /// stop the load.
    ///
    /// # Errors
    /// `NotFound` when the store has no such id; otherwise why it cannot serve, and its state is FAILED.
    pub async fn load(&self, id: &AdapterId, pinned: bool) -> Result<Arc<Adapter>> {
        let (this, id) = (self.clone(), id.clone());
        detached(async move { this.load_from_store(&id, pinned, Compile::Now).await }).await
    }

    /// Loads all adapters of the store, one after the other; `progress` hears of each. One that fails does not
    /// stop the rest.
    ///
    /// # Errors
    /// When the store cannot be listed.
    pub async fn load_all(&self, mut progress: impl FnMut(&AdapterId, &Result<Arc<Adapter>>)) -> Result<LoadedAll> {
        let store = self.store().clone();
        let ids = blocking::run("adapter load", move || store.ids()).await?;
        let mut all = LoadedAll::default();
        for id in ids {
            // Once a prefix had to leave for another, compiling the rest would only push out more.
            let full = self.inner.parts.engine.stats().prefix_evictions > 0;
            let compile = if full { Compile::OnDemand } else { Compile::Now };
            let result = self.load_from_store(&id, false, compile).await;
            progress(&id, &result);
            match result {
                Ok(_) => all.ready += 1,
                Err(e) => all.failed.push((id, e)),
            }
        }
        Ok(all)
    }

    /// Loads `id` again if its files are not those that serve: for a change made by hand.
    pub async fn refresh(&self, id: &AdapterId) -> Result<()> {
        let (store, folder) = (self.store().clone(), id.clone());
        let files = blocking::run("adapter load", move || store.read(&folder, |dir| Ok(fingerprint(dir)))).await?;
        let known = self.inner.known.get(id).map(|known| known.value().clone()).unwrap_or_default();
        if known.files == files {
            return Ok(());
        }
        self.load(id, known.pinned).await.map(drop)
    }

    /// Checks a finished upload, compiles it, gives its folder the id's name and puts it in service. Whatever fails,
    /// the store and the serving generation stay as they were.
    pub async fn publish(&self, id: &AdapterId, staging: Staging, pinned: bool) -> Result<Arc<Adapter>> {
        let (this, id) = (self.clone(), id.clone());
        detached(async move { this.publish_staging(&id, staging, pinned).await }).await
    }

    /// Takes `id` out of service and, with `delete`, out of the store. Requests that run on it finish. `None`: it
    /// was not in service and has been deleted.
    ///
    /// # Errors
    /// `NotFound`, or `FailedPrecondition` when another generation than the one asked for serves.
    pub async fn unload(
        &self,
        id: &AdapterId,
        generation: Option<Generation>,
        delete: bool,
    ) -> Result<Option<Arc<Adapter>>> {
        let removed = match self.registry().unload(id, generation) {
            Ok(adapter) => Some(adapter),
            // A folder that failed to load can still be deleted.
            Err(e) if !(delete && generation.is_none() && e.kind() == Kind::NotFound) => return Err(e),
            Err(_) => None,
        };
        self.inner.known.remove(id);
        if let Some(adapter) = &removed {
            metrics::counter!(name::ADAPTER_EVENTS, "event" => "unloaded").increment(1);
            self.retire(digest(adapter));
        }
        if delete {
            let (store, folder) = (self.store().clone(), id.clone());
            match blocking::run("adapter load", move || store.remove(&folder)).await {
                // It was in service alone, or someone deleted it by hand.
                Err(e) if e.kind() == Kind::NotFound && removed.is_some() => {}
                deleted => deleted?,
            }
        }
        Ok(removed)
    }

    async fn load_from_store(&self, id: &AdapterId, pinned: bool, compile: Compile) -> Result<Arc<Adapter>> {
        let started = Instant::now();
        let (store, folder) = (self.store().clone(), id.clone());
        // Before a generation is given out: a typing mistake leaves no trace in the registry.
        blocking::run("adapter load", move || store.read(&folder, |_| Ok(()))).await?;
        let ticket = self.registry().begin_load(id)?;
        let (this, folder) = (self.clone(), id.clone());
        let read = blocking::run("adapter load", move || this.store().read(&folder, |dir| this.read(dir)));
        let ready = async {
            let _permit = self.permit().await?;
            let (loaded, files) = read.await?;
            self.compile(&loaded.prefix, pinned, compile).await?;
            Ok((loaded, files))
        };
        match ready.await {
            Ok((loaded, files)) => Ok(self.serve(ticket, loaded, Known { pinned, files }, started)),
            Err(e) => Err(failed(ticket, e)),
        }
    }

    async fn publish_staging(&self, id: &AdapterId, staging: Staging, pinned: bool) -> Result<Arc<Adapter>> {
        let started = Instant::now();
        let _permit = self.permit().await?;
        let this = self.clone();
        // Checked before it counts as a load: a bad upload leaves no trace at all.
        let (staging, loaded) = blocking::run("adapter load", move || match this.read(staging.dir()) {
            Ok((loaded, _)) => Ok((staging, loaded)),
            // What is missing from an upload is the uploader's to add.
            Err(e) if e.kind() == Kind::NotFound => Err(Error::new(Kind::InvalidArgument, e.to_string())),
            Err(e) => Err(e),
        })
        .await?;
        let ticket = self.registry().begin_load(id)?;
        if let Err(e) = self.compile(&loaded.prefix, pinned, Compile::Now).await {
            return Err(failed(ticket, e));
        }
        let this = self.clone();
        blocking::run("adapter load", move || this.name_and_serve(ticket, staging, loaded, pinned, started)).await
    }

    /// Gives an upload its name on disk and in the registry, unless a later load got there first. Blocks.
    fn name_and_serve(
        &self,
        ticket: Ticket,
        staging: Staging,
        loaded: Loaded,
        pinned: bool,
        started: Instant,
    ) -> Result<Arc<Adapter>> {
        let _one = self.inner.naming.lock().unwrap_or_else(PoisonError::into_inner);
        let (id, ours) = (ticket.id().clone(), ticket.generation());
        let serving = self.registry().resolve(&id).map(|adapter| adapter.generation);
        let named = match serving {
            Ok(newer) if newer > ours => Err(Error::precondition(format!(
                "adapter `{id}`: generation {} was published before generation {} was ready",
                newer.0, ours.0
            ))),
            _ => staging.publish(),
        };
        match named {
            Ok(()) => {
                let files = fingerprint(&self.store().path(&id));
                Ok(self.serve(ticket, loaded, Known { pinned, files }, started))
            }
            Err(e) => {
                self.retire(loaded.prefix.map(|p| p.digest));
                Err(failed(ticket, e))
            }
        }
    }

    /// Publishes in the registry; what served before gives its pages back.
    fn serve(&self, ticket: Ticket, loaded: Loaded, known: Known, started: Instant) -> Arc<Adapter> {
        let id = ticket.id().clone();
        let before = self.registry().resolve(&id).ok().map(|adapter| digest(&adapter));
        let generation = ticket.generation();
        let adapter = ticket.publish(loaded.into_adapter(id.clone(), generation));
        self.inner.known.insert(id, known);
        if let Some(before) = before.filter(|before| *before != digest(&adapter)) {
            self.retire(before);
        }
        metrics::counter!(name::ADAPTER_EVENTS, "event" => "ready").increment(1);
        metrics::histogram!(name::ADAPTER_LOAD).record(started.elapsed());
        adapter
    }

    /// The engine may give the pages back, unless another adapter in service has the same content.
    fn retire(&self, digest: Option<Digest>) {
        let Some(digest) = digest else { return };
        let serves = |status: &crate::adapter::Status| {
            status.state != State::Unloading && status.serving.as_ref().is_some_and(|d| d.digest == Some(digest))
        };
        if !self.registry().list().iter().any(serves) {
            self.inner.parts.engine.forget(digest);
        }
    }

    async fn compile(&self, prefix: &Option<Arc<Prefix>>, pinned: bool, compile: Compile) -> Result<()> {
        let (Some(prefix), Compile::Now) = (prefix, compile) else { return Ok(()) };
        match self.inner.parts.engine.prepare(Arc::clone(prefix), pinned).await {
            // Busy is not full: without the promise of pinning the first request finds room. A prefix that can
            // never fit comes without a time to try again.
            Err(e) if e.kind() == Kind::ResourceExhausted && e.retry_after().is_some() && !pinned => {
                tracing::info!(digest = %prefix.digest, "compiled with its first request: {e}");
                Ok(())
            }
            compiled => compiled,
        }
    }

    /// Reads and checks a folder. Blocks.
    fn read(&self, dir: &Path) -> Result<(Loaded, Fingerprint)> {
        // Before the files: one that changes while it is read looks changed afterwards.
        let files = fingerprint(dir);
        let loaded = load_folder(dir, &self.inner.parts.shape, &self.inner.parts.tokenizer)?;
        Ok((loaded, files))
    }

    async fn permit(&self) -> Result<tokio::sync::SemaphorePermit<'_>> {
        // Never closed while `self` lives.
        self.inner.loads.acquire().await.map_err(|e| Error::internal(format!("loads: {e}")))
    }
}

fn failed(ticket: Ticket, error: Error) -> Error {
    metrics::counter!(name::ADAPTER_EVENTS, "event" => "failed").increment(1);
    ticket.fail(error.clone());
    error
}

fn digest(adapter: &Adapter) -> Option<Digest> {
    adapter.prefix.as_ref().map(|prefix| prefix.digest)
}

fn fingerprint(dir: &Path) -> Fingerprint {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut files: Fingerprint = entries
        .filter_map(|entry| {
            let meta = entry.metadata().ok()?;
            Some((entry.file_name().to_string_lossy().into_owned(), meta.len(), meta.modified().ok()))
        })
        .collect();
    files.sort();
    files
}

/// Runs `work` to its end even when the caller goes away.
async fn detached<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|e| Err(Error::internal(format!("adapter load: {e}"))))
}
