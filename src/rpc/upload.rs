//! An upload: a header, then chunks of files, into a hidden folder of the store.
//!
//! Bounded in every direction: bytes of a message, of an adapter, uploads at once, and the wait for a client that
//! says nothing. Nothing is locked while a client sends.
use super::convert;
use super::proto::{self, upload_adapter_request::Part};
use crate::adapter::{Adapter, AdapterId, Staging};
use crate::blocking;
use crate::engine::loader::AdapterLoader;
use crate::error::{Error, Kind, Result};
use crate::training::jobs::Jobs;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tonic::Streaming;

/// Uploads in progress at once: each holds a few files open and a message in memory.
const UPLOADS: usize = 16;

/// A client that sends nothing for so long has stalled.
const STALLED: Duration = Duration::from_secs(30);

/// Bytes of a file in one message of ours: well below any server's limit.
const CHUNK: usize = 1 << 20;

/// Takes uploads in. Cheap to clone.
#[derive(Clone)]
pub struct Uploads {
    slots: Arc<Semaphore>,
}

impl Default for Uploads {
    fn default() -> Self {
        Uploads { slots: Arc::new(Semaphore::new(UPLOADS)) }
    }
}

impl Uploads {
    /// Reads an upload to its end and puts the adapter in service. `jobs`: whose adapters are on their way.
    pub async fn take(
        &self,
        mut parts: Streaming<proto::UploadAdapterRequest>,
        loader: &AdapterLoader,
        jobs: Option<&Jobs>,
    ) -> Result<Arc<Adapter>> {
        let _slot = self.slots.try_acquire().map_err(|_| {
            Error::exhausted(format!("{UPLOADS} uploads are in progress"), Some(Duration::from_secs(1)))
        })?;
        let header = match next(&mut parts).await? {
            Some(Part::Header(header)) => header,
            _ => return Err(Error::invalid("part", "not a header", "the first message must hold `header`")),
        };
        let id = AdapterId::parse(&header.adapter_id)?;
        // Before the bytes travel, and when they are here.
        let free = || if header.replace { Ok(()) } else { free(loader, jobs, &id) };
        free()?;
        let (store, folder) = (loader.store().clone(), id.clone());
        let mut staging = blocking::run("upload", move || store.stage(&folder)).await?;
        while let Some(part) = next(&mut parts).await? {
            let Part::Chunk(chunk) = part else {
                return Err(Error::invalid("part", "a second header", "only `chunk` may follow the header"));
            };
            staging = append(staging, chunk).await?;
        }
        free()?;
        loader.publish(&id, staging, header.pinned).await
    }
}

async fn append(mut staging: Staging, chunk: proto::FileChunk) -> Result<Staging> {
    blocking::run("upload", move || staging.append(&chunk.name, &chunk.data).map(|()| staging)).await
}

/// The next part; `None` at the end of the stream.
async fn next(parts: &mut Streaming<proto::UploadAdapterRequest>) -> Result<Option<Part>> {
    let Ok(message) = tokio::time::timeout(STALLED, parts.message()).await else {
        let seconds = STALLED.as_secs();
        return Err(Error::new(Kind::DeadlineExceeded, format!("the upload stalled: nothing came for {seconds} s")));
    };
    match message.map_err(|status| convert::from_wire(&status))? {
        None => Ok(None),
        Some(proto::UploadAdapterRequest { part: Some(part) }) => Ok(Some(part)),
        Some(_) => Err(Error::invalid("part", "missing", "give `header` or `chunk`")),
    }
}

/// Whether an adapter of that id replaces nothing, and nothing replaces it.
fn free(loader: &AdapterLoader, jobs: Option<&Jobs>, id: &AdapterId) -> Result<()> {
    let taken = |message: String| Err(Error::new(Kind::AlreadyExists, message));
    if loader.holds(id) {
        return taken(format!("adapter `{id}` exists; set `header.replace` to replace it"));
    }
    match jobs.and_then(|jobs| jobs.making(id)) {
        None => Ok(()),
        Some(job) => {
            taken(format!("training job `{job}` makes adapter `{id}`; with `header.replace` it serves till then"))
        }
    }
}

/// The client's side of it: the messages of an upload.
pub fn parts(
    header: proto::UploadHeader,
    files: Vec<(String, Vec<u8>)>,
) -> impl Iterator<Item = proto::UploadAdapterRequest> {
    let chunks = files.into_iter().flat_map(|(name, data)| {
        let chunk = |data: &[u8]| Part::Chunk(proto::FileChunk { name: name.clone(), data: data.to_vec() });
        data.chunks(CHUNK).map(chunk).collect::<Vec<_>>()
    });
    let parts = std::iter::once(Part::Header(header)).chain(chunks);
    parts.map(|part| proto::UploadAdapterRequest { part: Some(part) })
}
