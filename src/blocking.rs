//! Work that may block, off the threads of the service: files, parsing, start-up.
use crate::error::{Error, Result};

/// Runs `work` on a thread where it may block. `what` it is for stands in the error if it panics.
pub async fn run<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|e| Err(Error::internal(format!("{what}: {e}"))))
}
