//! The server's data folder: `NAME.jsonl` files that jobs and evaluations name, and uploads into it.
use super::convert;
use super::proto::{self, upload_dataset_request::Part};
use crate::adapter::AdapterId;
use crate::blocking;
use crate::error::{Context, Error, Kind, Result};
use crate::training::dataset::{self, Record};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tonic::Streaming;

/// A client that sends nothing for so long has stalled.
const STALLED: Duration = Duration::from_secs(30);

/// Uploads at once: each is in memory until it is whole and checked.
const UPLOADS: usize = 4;

/// The folder. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Datasets {
    dir: Arc<PathBuf>,
    max_bytes: u64,
    max_examples: usize,
    slots: Arc<Semaphore>,
}

impl Datasets {
    /// Over `dir`, which an upload makes if it is absent.
    pub fn new(dir: PathBuf, max_bytes: u64, max_examples: usize) -> Self {
        Datasets { dir: Arc::new(dir), max_bytes, max_examples, slots: Arc::new(Semaphore::new(UPLOADS)) }
    }

    /// The records of a dataset.
    ///
    /// # Errors
    /// `NotFound` for a name that is not there; `InvalidArgument` naming the field, or the lines that are no examples.
    pub async fn read(&self, field: &'static str, data: Option<proto::Dataset>) -> Result<Vec<Record>> {
        use proto::dataset::Source;
        match data.and_then(|d| d.source) {
            None => Err(Error::invalid(field, "missing", "give `inline` or `dataset_id`")),
            Some(Source::Inline(list)) => {
                let records = list.examples.into_iter().map(convert::record).collect::<Result<_>>()?;
                dataset::check(records, self.max_examples)
            }
            Some(Source::DatasetId(name)) => {
                let (path, max) = (self.path(&name)?, self.max_bytes);
                let examples = self.max_examples;
                blocking::run("dataset", move || {
                    let meta = path.metadata().ok().filter(|m| m.is_file());
                    let meta = meta.ok_or_else(|| Error::not_found(format!("dataset `{name}` is not there")))?;
                    if meta.len() > max {
                        let rule = format!("at most {max} are read (training.max_data_bytes)");
                        return Err(Error::invalid("dataset_id", format!("{} bytes", meta.len()), rule));
                    }
                    let text = std::fs::read_to_string(&path).or_kind(Kind::InvalidArgument, format!("`{name}`"))?;
                    dataset::parse(&text, examples)
                })
                .await
            }
        }
    }

    /// Takes an upload in; whole or not at all.
    pub async fn take(
        &self,
        mut parts: Streaming<proto::UploadDatasetRequest>,
    ) -> Result<proto::UploadDatasetResponse> {
        let _slot = self.slots.try_acquire().map_err(|_| {
            Error::exhausted(format!("{UPLOADS} datasets are being uploaded"), Some(Duration::from_secs(1)))
        })?;
        let Some(Part::DatasetId(name)) = next(&mut parts).await? else {
            return Err(Error::invalid("part", "no name", "the first message must hold `dataset_id`"));
        };
        let (path, dir) = (self.path(&name)?, Arc::clone(&self.dir));
        let mut text = Vec::new();
        while let Some(part) = next(&mut parts).await? {
            let Part::Chunk(chunk) = part else {
                return Err(Error::invalid("part", "a second name", "only `chunk` may follow the first message"));
            };
            if (text.len() + chunk.len()) as u64 > self.max_bytes {
                let max = self.max_bytes;
                return Err(Error::exhausted(format!("dataset `{name}` passes {max} bytes, the limit"), None));
            }
            text.extend_from_slice(&chunk);
        }
        let max = self.max_examples;
        blocking::run("dataset", move || {
            let text = String::from_utf8(text).or_kind(Kind::InvalidArgument, "`chunk`")?;
            let examples = dataset::parse(&text, max)?.len() as u32;
            write(&dir, &path, text.as_bytes()).map_err(|e| match e.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                    Error::exhausted(format!("dataset `{name}`: {e}"), None)
                }
                _ => Error::internal(format!("{}: {e}", path.display())),
            })?;
            Ok(proto::UploadDatasetResponse { dataset_id: name, examples })
        })
        .await
    }

    fn path(&self, name: &str) -> Result<PathBuf> {
        // The same names as adapters have: never a path.
        let id = AdapterId::parse(name).map_err(|_| {
            let rule = "must match [A-Za-z0-9][A-Za-z0-9._-]* and have at most 128 bytes";
            Error::invalid("dataset_id", format!("{name:?}"), rule)
        })?;
        Ok(self.dir.join(format!("{id}.jsonl")))
    }
}

/// Aside, to the disk, then renamed.
fn write(dir: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    let mut file = tempfile::Builder::new().prefix(".upload-").tempfile_in(dir)?;
    file.write_all(bytes)?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    std::fs::File::open(dir)?.sync_all()
}

/// The next part; `None` at the end of the stream.
async fn next(parts: &mut Streaming<proto::UploadDatasetRequest>) -> Result<Option<Part>> {
    let Ok(message) = tokio::time::timeout(STALLED, parts.message()).await else {
        let seconds = STALLED.as_secs();
        return Err(Error::new(Kind::DeadlineExceeded, format!("the upload stalled: nothing came for {seconds} s")));
    };
    match message.map_err(|status| convert::from_wire(&status))? {
        None => Ok(None),
        Some(proto::UploadDatasetRequest { part: Some(part) }) => Ok(Some(part)),
        Some(_) => Err(Error::invalid("part", "missing", "give `dataset_id` or `chunk`")),
    }
}
