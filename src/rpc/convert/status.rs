//! Errors to gRPC statuses, by the table of DESIGN §9.
use crate::error::{Error, Kind};
use crate::rpc::wire;
use prost::Message;
use std::time::Duration;
use tonic::metadata::MetadataValue;
use tonic::{Code, Status};

/// `error` as the client sees it. The details of a bug of ours stay in the log, under `request_id`.
pub fn status(error: Error, request_id: &str) -> Status {
    let code = code(error.kind());
    let message = match error.kind() {
        Kind::Internal => format!("internal error; the server's log has the details of request {request_id}"),
        _ => error.to_string(),
    };
    let details = details(code, &message, &error);
    let mut status = Status::with_details(code, message, details.into());
    let metadata = status.metadata_mut();
    if let Ok(id) = MetadataValue::try_from(request_id) {
        metadata.insert("x-request-id", id);
    }
    if error.kind() == Kind::ResourceExhausted
        && let Some(after) = error.retry_after()
    {
        metadata.insert("retry-after-ms", MetadataValue::from(after.as_millis() as u64));
    }
    status
}

/// A status that tonic made while it read a client's stream.
pub fn from_wire(status: &Status) -> Error {
    let kind = match status.code() {
        Code::Cancelled => Kind::Cancelled,
        Code::DeadlineExceeded => Kind::DeadlineExceeded,
        // Whatever else ends a client's stream, the client or its connection is gone.
        _ => Kind::Cancelled,
    };
    match wire::malformed(status) {
        Some(message) => Error::new(Kind::InvalidArgument, message),
        None => Error::new(kind, format!("the upload broke off: {}", status.message())),
    }
}

fn code(kind: Kind) -> Code {
    match kind {
        Kind::InvalidArgument => Code::InvalidArgument,
        Kind::NotFound => Code::NotFound,
        Kind::AlreadyExists => Code::AlreadyExists,
        Kind::FailedPrecondition => Code::FailedPrecondition,
        Kind::ResourceExhausted => Code::ResourceExhausted,
        Kind::DeadlineExceeded => Code::DeadlineExceeded,
        Kind::Cancelled => Code::Cancelled,
        Kind::Unavailable => Code::Unavailable,
        Kind::Internal => Code::Internal,
    }
}

/// What a server answered to a call of our own, led by what was asked for.
pub fn answered(place: impl std::fmt::Display, status: &Status) -> Error {
    let kind = match status.code() {
        Code::InvalidArgument => Kind::InvalidArgument,
        Code::NotFound => Kind::NotFound,
        Code::AlreadyExists => Kind::AlreadyExists,
        Code::FailedPrecondition => Kind::FailedPrecondition,
        Code::ResourceExhausted => Kind::ResourceExhausted,
        Code::DeadlineExceeded => Kind::DeadlineExceeded,
        Code::Cancelled => Kind::Cancelled,
        Code::Unavailable => Kind::Unavailable,
        _ => Kind::Internal,
    };
    Error::new(kind, format!("{place}: {}: {}", status_name(status.code()), status.message()))
}

/// The code's name in gRPC's spelling, for logs and metrics.
pub fn code_name(kind: Kind) -> &'static str {
    status_name(code(kind))
}

/// gRPC's own name of a code.
pub fn status_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// `google.rpc.Status` in bytes: the field at fault as `BadRequest`, the wait as `RetryInfo`. Empty without either.
fn details(code: Code, message: &str, error: &Error) -> Vec<u8> {
    let detail = match (error.field(), error.retry_after()) {
        (Some(field), _) => {
            let violation = FieldViolation { field: field.into(), description: message.into() };
            any("google.rpc.BadRequest", &BadRequest { field_violations: vec![violation] })
        }
        (None, Some(after)) => any("google.rpc.RetryInfo", &RetryInfo { retry_delay: Some(duration(after)) }),
        (None, None) => return Vec::new(),
    };
    RpcStatus { code: code as i32, message: message.into(), details: vec![detail] }.encode_to_vec()
}

fn any(name: &str, message: &impl Message) -> prost_types::Any {
    prost_types::Any { type_url: format!("type.googleapis.com/{name}"), value: message.encode_to_vec() }
}

fn duration(d: Duration) -> prost_types::Duration {
    prost_types::Duration { seconds: d.as_secs() as i64, nanos: d.subsec_nanos() as i32 }
}

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<prost_types::Any>,
}

/// `google.rpc.BadRequest`.
#[derive(Clone, PartialEq, Message)]
struct BadRequest {
    #[prost(message, repeated, tag = "1")]
    field_violations: Vec<FieldViolation>,
}

/// `google.rpc.BadRequest.FieldViolation`.
#[derive(Clone, PartialEq, Message)]
struct FieldViolation {
    #[prost(string, tag = "1")]
    field: String,
    #[prost(string, tag = "2")]
    description: String,
}

/// `google.rpc.RetryInfo`.
#[derive(Clone, PartialEq, Message)]
struct RetryInfo {
    #[prost(message, optional, tag = "1")]
    retry_delay: Option<prost_types::Duration>,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_bug_of_ours_shows_the_request_id_alone() {
        let s = status(Error::internal("page 7 of 3"), "r-1");
        assert_eq!(s.code(), Code::Internal);
        assert!(s.message().contains("r-1") && !s.message().contains("page"), "{}", s.message());
    }

    #[test]
    fn the_field_at_fault_is_in_the_details() {
        let s = status(Error::invalid("sampling.top_p", 2, "must be above 0 to 1"), "r");
        let rpc = RpcStatus::decode(s.details()).unwrap();
        let bad = BadRequest::decode(&*rpc.details[0].value).unwrap();
        assert_eq!(bad.field_violations[0].field, "sampling.top_p");
        assert_eq!(s.code(), Code::InvalidArgument);
    }

    #[test]
    fn a_full_queue_says_when_to_try_again() {
        let s = status(Error::exhausted("full", Some(Duration::from_millis(250))), "r");
        assert_eq!(s.metadata().get("retry-after-ms").unwrap(), "250");
    }
}
