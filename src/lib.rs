//! Serve many tasks from one frozen language model.
//!
//! Every task is an adapter that ends as a read-only KV prefix, so a batch of different tasks is one batch of
//! different block tables. `ARCHITECTURE.md` says why; this is the map of the house. A module imports only from
//! layers below its own.
//!
//! | layer | modules | own |
//! |---|---|---|
//! | 0 | [`error`], [`config`], [`telemetry`], [`blocking`] | error policy; validated settings; logs and metric names; threads that may block |
//! | 1 | [`ops`] | every tensor op of the decoder, and all `unsafe` |
//! | 2 | [`kv`], [`adapter`], [`tokenizer`] | KV pages; adapter formats, store and registry; text and ids |
//! | 3 | [`model`] | one decoder for all families |
//! | 4 | [`engine`] | continuous batching on one thread; the way of an adapter into service |
//! | 5 | [`training`] | adapters trained on the weights that serve; evaluation figures |
//! | 6 | [`rpc`] | the gRPC services; the only code that knows protobuf and our types both |
//! | 7 | [`server`], [`cli`], [`bench`](mod@bench) | wiring, the commands, the load generator |
//!
//! Start reading at [`server::Server::start`] (how it is put together), then
//! [`rpc::inference`] (a request's way in) and [`engine`] (what becomes of it).
pub mod adapter;
pub mod bench;
pub mod blocking;
pub mod cli;
pub mod config;
pub mod engine;
pub mod error;
pub mod kv;
pub mod model;
pub mod ops;
pub mod rpc;
pub mod server;
pub mod telemetry;
pub mod tokenizer;
pub mod training;
