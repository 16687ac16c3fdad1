//! The only code that knows both sides: protobuf messages and our own types, our errors and gRPC's statuses.
mod adapters;
mod answers;
mod requests;
mod status;
mod training;

pub use adapters::{adapter, adapter_ref, adapter_refs, status_of};
pub use answers::{Vocabulary, finish_reason, timings, usage};
pub use requests::{Chat, Prompt, Room, Target, choices, content, sampling, stopping, token_ids};
pub use status::{answered, code_name, from_wire, status, status_name};
pub use training::{record, report, settings, status_of_job};
