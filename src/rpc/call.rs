//! What every call has, whatever its method: an id, a deadline, a span, one log line at its end.
use super::convert::{self, code_name};
use super::drain::{Drain, Work};
use crate::error::{Error, Kind, Result};
use crate::telemetry::name;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tonic::metadata::{MetadataMap, MetadataValue};
use tonic::{Response, Status};
use tracing::{Instrument, Span, field};

/// Longest request id taken from a client.
const MAX_ID_BYTES: usize = 128;

/// The server's own deadline is so much earlier than the client's: tonic drops a handler when the client's
/// deadline passes and answers CANCELLED, and ours is to answer DEADLINE_EXCEEDED before that.
const DEADLINE_MARGIN: Duration = Duration::from_millis(2);

/// One call from a client.
pub struct Call {
    /// Names the call in logs and in the answer.
    pub id: Arc<str>,
    /// When it came.
    pub arrival: Instant,
    /// When it must have ended.
    pub deadline: Option<Instant>,
    /// Log lines about the call stand in this span.
    pub span: Span,
    /// Keeps a drain waiting.
    #[allow(dead_code)] // held for its drop
    work: Option<Work>,
    ended: bool,
}

impl Call {
    /// Reads the call's metadata. `method` is the RPC's name.
    pub fn new(method: &'static str, metadata: &MetadataMap) -> Self {
        let arrival = Instant::now();
        let id = request_id(metadata);
        let timeout = metadata.get("grpc-timeout").and_then(|v| v.to_str().ok()).and_then(timeout);
        let deadline = timeout.and_then(|t| arrival.checked_add(t.saturating_sub(DEADLINE_MARGIN)));
        let span = tracing::info_span!(
            "request", id = %id, method, adapter = field::Empty, generation = field::Empty
        );
        Call { id, arrival, deadline, span, work: None, ended: false }
    }

    /// The same for work that a drain waits for.
    ///
    /// # Errors
    /// UNAVAILABLE while draining.
    pub fn work(method: &'static str, metadata: &MetadataMap, drain: &Drain) -> Result<Self, Status> {
        let mut call = Call::new(method, metadata);
        match drain.enter() {
            Ok(work) => call.work = Some(work),
            Err(e) => return Err(call.fail(e)),
        }
        Ok(call)
    }

    /// For a part of this call's work that runs by itself: the same id, arrival and deadline, no log line of its own.
    pub fn part(&self) -> Call {
        let (id, span) = (Arc::clone(&self.id), self.span.clone());
        Call { id, arrival: Instant::now(), deadline: self.deadline, span, work: None, ended: true }
    }

    /// Ends a unary call with its answer or its error.
    pub fn finish<T>(mut self, result: Result<T>) -> Result<Response<T>, Status> {
        match result {
            Ok(message) => {
                self.ended = true;
                Ok(self.response(message))
            }
            Err(e) => Err(self.fail(e)),
        }
    }

    /// Runs `work` within the call's deadline and span.
    pub async fn within<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        let work = work.instrument(self.span.clone());
        match self.deadline {
            None => work.await,
            Some(deadline) => match tokio::time::timeout_at(deadline.into(), work).await {
                Ok(result) => result,
                Err(_) => Err(self.too_late()),
            },
        }
    }

    /// The error of a deadline that passed.
    pub fn too_late(&self) -> Error {
        let after = self.arrival.elapsed().as_millis();
        Error::new(Kind::DeadlineExceeded, format!("the deadline passed after {after} ms"))
    }

    /// `message` with the request id in its metadata.
    pub fn response<T>(&self, message: T) -> Response<T> {
        let mut response = Response::new(message);
        if let Ok(id) = MetadataValue::try_from(&*self.id) {
            response.metadata_mut().insert("x-request-id", id);
        }
        response
    }

    /// Ends the call with `error`: one log line, one count, the status for the client.
    pub fn fail(&mut self, error: Error) -> Status {
        self.ended = true;
        let code = code_name(error.kind());
        metrics::counter!(name::FAILED, "code" => code).increment(1);
        self.span.in_scope(|| match error.kind() {
            Kind::Internal => tracing::error!(code, "failed: {error}"),
            _ => tracing::info!(code, ms = self.arrival.elapsed().as_millis(), "refused: {error}"),
        });
        convert::status(error, &self.id)
    }

    /// The call ended as it should; its log line has been written.
    pub fn done(&mut self) {
        self.ended = true;
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.ended {
            metrics::counter!(name::FAILED, "code" => code_name(Kind::Cancelled)).increment(1);
            let ms = self.arrival.elapsed().as_millis();
            self.span.in_scope(|| tracing::info!(code = "CANCELLED", ms, "the client went away"));
        }
    }
}

/// The client's `x-request-id` where it is printable ASCII of a sane length, else a made-up one.
fn request_id(metadata: &MetadataMap) -> Arc<str> {
    let given = metadata.get("x-request-id").and_then(|v| v.to_str().ok());
    match given {
        Some(id) if (1..=MAX_ID_BYTES).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic()) => id.into(),
        _ => format!("{:016x}", rand::random::<u64>()).into(),
    }
}

/// A `grpc-timeout`: at most 8 digits and a unit.
fn timeout(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    let n: u64 = (digits.len() <= 8).then(|| digits.parse().ok())??;
    Some(match unit {
        "H" => Duration::from_secs(n * 3600),
        "M" => Duration::from_secs(n * 60),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn timeouts_of_the_grpc_specification() {
        assert_eq!(timeout("250m"), Some(Duration::from_millis(250)));
        assert_eq!(timeout("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "5", "5x", "123456789S", "-1S", "1\u{fc}"] {
            assert_eq!(timeout(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn ids_that_would_spoil_a_log_are_replaced() {
        let id = |v: &str| {
            let mut m = MetadataMap::new();
            m.insert("x-request-id", v.parse().unwrap());
            request_id(&m).to_string()
        };
        assert_eq!(id("job-7/3"), "job-7/3");
        assert_ne!(id("two words"), "two words");
        assert_eq!(id(&"x".repeat(129)).len(), 16);
    }
}
