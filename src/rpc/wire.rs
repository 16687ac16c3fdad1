//! What tonic refuses before a handler runs, put in the API's own words.
//!
//! A message that is not valid protobuf (a string that is not UTF-8, say) is INTERNAL to tonic, and one over the
//! size limit OUT_OF_RANGE. Both are the client's to mend, so here they become INVALID_ARGUMENT. No handler of
//! ours answers with either of these texts.
use crate::telemetry::name;
use std::task::{Context, Poll};
use tonic::codegen::http::{HeaderValue, Request, Response};
use tonic::codegen::{BoxFuture, Service};
use tonic::server::NamedService;
use tonic::{Code, Status};

/// A service whose refusals of malformed messages are INVALID_ARGUMENT.
#[derive(Clone, Debug)]
pub struct Refusals<S>(pub S);

impl<S: NamedService> NamedService for Refusals<S> {
    const NAME: &'static str = S::NAME;
}

impl<S, A, B> Service<Request<A>> for Refusals<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BoxFuture<S::Response, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request<A>) -> Self::Future {
        let response = self.0.call(request);
        Box::pin(async move {
            let mut response = response.await?;
            // An error before the first message travels in the headers.
            let refusal = Status::from_header_map(response.headers()).and_then(|status| malformed(&status));
            if let Some(message) = refusal {
                metrics::counter!(name::FAILED, "code" => "INVALID_ARGUMENT").increment(1);
                tracing::info!(code = "INVALID_ARGUMENT", "refused: {message}");
                let headers = response.headers_mut();
                headers.insert("grpc-status", HeaderValue::from(Code::InvalidArgument as i32));
                // The texts are tonic's and prost's: ASCII, but field names of ours may follow.
                let message: String = message.chars().filter(|c| c.is_ascii() && !c.is_control()).collect();
                if let Ok(value) = HeaderValue::from_str(&message.replace('%', "%25")) {
                    headers.insert("grpc-message", value);
                }
            }
            Ok(response)
        })
    }
}

/// The message for a client whose message could not be read; `None` for any other status.
pub fn malformed(status: &Status) -> Option<String> {
    match (status.code(), status.message()) {
        (Code::OutOfRange, text) if text.contains("message length too large") => {
            // "... found 10 bytes, the limit is: 5 bytes"
            let mut numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|digits| !digits.is_empty());
            let (found, limit) = (numbers.next().unwrap_or("?"), numbers.next().unwrap_or("?"));
            Some(format!("`request` is {found} bytes long, must have at most {limit} (max_message_bytes)"))
        }
        (Code::Internal, text) if text.contains("failed to decode Protobuf message") => {
            Some(format!("`request` is malformed: {text}"))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::rpc::proto::GenerateRequest;
    use prost::Message;

    #[test]
    fn what_tonic_and_prost_say_is_recognised() {
        let long = "Error, decoded message length too large: found 10 bytes, the limit is: 5 bytes";
        let said = malformed(&Status::out_of_range(long)).unwrap();
        assert!(said.contains("10 bytes long") && said.contains("at most 5"), "{said}");
        // Field 1 is a string: 0xff is not UTF-8.
        let e = GenerateRequest::decode(&[0x0a, 1, 0xff][..]).unwrap_err();
        let said = malformed(&Status::internal(e.to_string())).unwrap();
        assert!(said.contains("malformed") && said.contains("adapter_id"), "{said}");
        assert_eq!(malformed(&Status::internal("internal error; the server's log has the details")), None);
    }
}
