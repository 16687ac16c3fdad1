//! All integration tests in one binary: what we did not write judges what we did.
#![allow(clippy::unwrap_used, missing_docs)]

mod api;
mod bad_input;
mod bench;
mod candle_peer;
mod chat;
#[cfg(feature = "cuda")]
mod cuda;
mod drain;
mod fuzz;
mod gguf;
mod hot_load;
mod invariance;
mod jobs;
mod kinds;
mod layers;
mod model_files;
mod mutations;
mod oracle;
mod quantized;
mod readme;
mod sampling;
mod served;
mod stacks;
mod stories;
mod support;
mod third_party;
mod training;
