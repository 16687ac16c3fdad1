//! Why a command failed, for people and for scripts.
use crate::error::{Error, Kind};
use serde_json::{Value, json};
use std::fmt;
use tonic::Status;

/// Whose turn it is, as an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The command failed.
    Failed = 1,
    /// The command was asked wrongly.
    Usage = 2,
}

/// Why a command failed.
#[derive(Debug)]
pub enum Failure {
    /// The server refused or failed.
    Server(Box<Status>),
    /// It never got to a server, or this process failed by itself.
    Local(Error),
    /// The command line or the settings.
    Usage(Error),
    /// The server cannot be reached.
    Connect {
        /// Where it was sought.
        server: String,
        /// What the transport says.
        source: tonic::transport::Error,
    },
}

impl Failure {
    /// A failure of this process.
    pub fn local(message: impl Into<String>) -> Self {
        Failure::Local(Error::internal(message))
    }

    /// A wrong argument.
    pub fn usage(message: impl Into<String>) -> Self {
        Failure::Usage(Error::new(Kind::InvalidArgument, message))
    }

    /// The exit code.
    pub fn code(&self) -> Code {
        match self {
            Failure::Usage(_) => Code::Usage,
            _ => Code::Failed,
        }
    }

    /// One stable object.
    pub fn to_json(&self) -> Value {
        let metadata = |key: &str| match self {
            Failure::Server(s) => s.metadata().get(key).and_then(|v| v.to_str().ok()).map(str::to_owned),
            _ => None,
        };
        json!({ "error": {
            "code": self.code_name(),
            "message": self.message(),
            "request_id": metadata("x-request-id"),
            "retry_after_ms": metadata("retry-after-ms").and_then(|ms| ms.parse::<u64>().ok()),
        }})
    }

    /// gRPC's name of the code; the same names for errors that never got to a server.
    fn code_name(&self) -> &'static str {
        match self {
            Failure::Server(status) => crate::rpc::convert::status_name(status.code()),
            Failure::Local(e) | Failure::Usage(e) => crate::rpc::convert::code_name(e.kind()),
            Failure::Connect { .. } => "UNAVAILABLE",
        }
    }

    fn message(&self) -> String {
        match self {
            Failure::Server(status) => status.message().to_owned(),
            Failure::Local(e) | Failure::Usage(e) => e.to_string(),
            Failure::Connect { server, source } => {
                let mut causes = vec![format!("no server answers at {server}")];
                let mut cause: Option<&dyn std::error::Error> = Some(source);
                while let Some(e) = cause {
                    causes.push(e.to_string());
                    cause = e.source();
                }
                causes.join(": ")
            }
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Server(_) => write!(f, "{}: {}", self.code_name(), self.message()),
            Failure::Connect { .. } => write!(f, "{}; `prefixd serve` starts one", self.message()),
            _ => f.write_str(&self.message()),
        }
    }
}

impl std::error::Error for Failure {}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Failure::Server(Box::new(status))
    }
}

impl From<Error> for Failure {
    fn from(e: Error) -> Self {
        Failure::Local(e)
    }
}
