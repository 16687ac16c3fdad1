//! The error policy, then the error type.
//!
//! # Policy
//!
//! * Whoever caused an error must be able to mend it from the message alone: a message names the
//!   field or file, the value found and the limit or rule it broke.
//! * [`Kind`] says whose turn it is, nothing more. `rpc::convert` maps it to a gRPC status in one place.
//! * [`Kind::Internal`] is a bug of ours or a fault of the machine: the client sees the request id,
//!   the details go to the log only.
//! * Nothing that a client, a file or a device can cause may panic; `expect` is for broken invariants of
//!   our own and says which.
use std::fmt::{self, Display};
use std::time::Duration;

/// Result with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whose turn it is after an error (one gRPC status each).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A field of the request or a value in a file is malformed or out of range.
    InvalidArgument,
    /// No adapter of that id.
    NotFound,
    /// The id exists already and replacing it was not asked for.
    AlreadyExists,
    /// The adapter does not fit this base model, or the generation is another one.
    FailedPrecondition,
    /// Queue, quota, KV pool or the memory of a GPU is full; see [`Error::retry_after`].
    ResourceExhausted,
    /// The request's deadline passed.
    DeadlineExceeded,
    /// The client went away.
    Cancelled,
    /// The server is loading or draining.
    Unavailable,
    /// A bug of ours or a fault of the machine.
    Internal,
}

/// An error with a [`Kind`] and a message fit for the one who caused it.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: Kind,
    message: String,
    field: Option<&'static str>,
    retry_after: Option<Duration>,
    too_long: bool,
}

impl Error {
    /// An error of `kind` with a finished message.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Error { kind, message: message.into(), field: None, retry_after: None, too_long: false }
    }

    /// `field` holds `value`, which breaks `rule`: "`sampling.temperature` is -1, must be 0 to 100".
    pub fn invalid(field: &'static str, value: impl Display, rule: impl Display) -> Self {
        let message = format!("`{field}` is {}, {rule}", shorten(&value.to_string()));
        Error { field: Some(field), ..Self::new(Kind::InvalidArgument, message) }
    }

    /// [`Error::invalid`] where a sequence does not fit into the context: of a dataset, it can be left out.
    pub fn too_long(field: &'static str, value: impl Display, rule: impl Display) -> Self {
        Error { too_long: true, ..Self::invalid(field, value, rule) }
    }

    /// No such thing: "adapter `x` is not loaded".
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    /// The state of the server or the base model forbids it.
    pub fn precondition(message: impl Into<String>) -> Self {
        Self::new(Kind::FailedPrecondition, message)
    }

    /// Something is full. The client may try again after `retry_after`, if given.
    pub fn exhausted(message: impl Into<String>, retry_after: Option<Duration>) -> Self {
        Error { retry_after, ..Self::new(Kind::ResourceExhausted, message) }
    }

    /// The server is loading or draining.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(Kind::Unavailable, message)
    }

    /// A bug of ours or a fault of the machine.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }

    /// Whose turn it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The request field that is at fault, for [`Kind::InvalidArgument`].
    pub fn field(&self) -> Option<&'static str> {
        self.field
    }

    /// Whether a sequence does not fit into the context.
    pub fn is_too_long(&self) -> bool {
        self.too_long
    }

    /// When a retry has a chance, for [`Kind::ResourceExhausted`].
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// The same error, its message led by where it happened: "adapters/x: ...".
    pub fn context(mut self, place: impl Display) -> Self {
        self.message = format!("{place}: {}", self.message);
        self
    }
}

/// Values quoted in messages are cut at 80 characters: a 10 MB prompt does not come back.
fn shorten(value: &str) -> String {
    match value.char_indices().nth(80) {
        Some((cut, _)) => format!("{}... ({} bytes)", &value[..cut], value.len()),
        None => value.to_owned(),
    }
}

impl From<candle_core::Error> for Error {
    fn from(e: candle_core::Error) -> Self {
        let text = without_trace(e).to_string();
        match lacks_memory(&text) {
            true => Error::exhausted(format!("the GPU has no memory left for this: {text}"), None),
            false => Error::internal(format!("tensor: {text}")),
        }
    }
}

/// Whether a GPU says that it has no memory left: the one error of a device that its users can do something about.
pub fn lacks_memory(text: &str) -> bool {
    text.contains("CUDA_ERROR_OUT_OF_MEMORY")
}

/// The error itself: with RUST_BACKTRACE candle appends a trace of its own frames, which no client is to read.
pub fn without_trace(e: candle_core::Error) -> candle_core::Error {
    match e {
        candle_core::Error::WithBacktrace { inner, backtrace } => {
            tracing::debug!(%inner, %backtrace);
            without_trace(*inner)
        }
        other => other,
    }
}

/// Adds the place (a path, a field) to foreign errors while they become ours.
pub trait Context<T> {
    /// The error as [`Error`] of `kind`: "place: what the library said".
    fn or_kind(self, kind: Kind, place: impl Display) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn or_kind(self, kind: Kind, place: impl Display) -> Result<T> {
        self.map_err(|e| Error::new(kind, format!("{place}: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_names_field_value_and_rule() {
        let e = Error::invalid("sampling.temperature", -1.0, "must be 0 to 100");
        assert_eq!(e.to_string(), "`sampling.temperature` is -1, must be 0 to 100");
        assert_eq!((e.kind(), e.field()), (Kind::InvalidArgument, Some("sampling.temperature")));
    }

    #[test]
    fn clients_read_no_traces() {
        let inner = Box::new(candle_core::Error::Msg("no room".into()));
        let backtrace = Box::new(std::backtrace::Backtrace::force_capture());
        let traced = candle_core::Error::WithBacktrace { inner, backtrace };
        assert_eq!(Error::from(traced).to_string(), "tensor: no room");
    }

    #[test]
    fn long_values_are_cut_at_a_character() {
        let e = Error::invalid("prompt", "ü".repeat(1_000), "too long");
        assert!(e.to_string().len() < 250, "{e}");
        assert!(e.to_string().contains("2000 bytes"));
    }
}
