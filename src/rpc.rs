//! The gRPC services over the engine and the registry.
//!
//! A request's way: tonic -> [`wire`] (refusals before a handler) -> a service -> [`call`] (id, deadline, span)
//! -> [`admission`] (checks, template, tokenizer) -> the engine -> [`outcome`] or [`stream`] -> [`convert`] -> tonic.
pub mod adapters;
pub mod admission;
pub mod call;
pub mod convert;
pub mod datasets;
pub mod drain;
pub mod evaluate;
pub mod inference;
pub mod outcome;
mod record;
pub mod server_info;
pub mod stream;
pub mod training;
pub mod upload;
pub mod wire;

/// The messages and stubs that prost and tonic make of `proto/`.
pub mod proto {
    #![allow(missing_docs, clippy::all)]
    tonic::include_proto!("prefixd.v1");
}

use proto::adapter_service_server::AdapterServiceServer;
use proto::inference_service_server::InferenceServiceServer;
use proto::server_service_server::ServerServiceServer;
use proto::training_service_server::TrainingServiceServer;
use tonic::server::NamedService;
use tonic::service::Routes;
use wire::Refusals;

/// The API in the form that reflection serves.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/prefixd.bin"));

/// All services of `prefixd.v1`.
#[derive(Clone)]
pub struct Services {
    /// Generate, score, classify.
    pub inference: inference::Inference,
    /// Load, upload, unload.
    pub adapters: adapters::Adapters,
    /// Train, watch, evaluate.
    pub training: training::Training,
    /// Facts and figures.
    pub server: server_info::ServerInfo,
}

impl Services {
    /// Names of the services, as the health check knows them.
    pub const NAMES: [&'static str; 4] = [
        InferenceServiceServer::<inference::Inference>::NAME,
        AdapterServiceServer::<adapters::Adapters>::NAME,
        TrainingServiceServer::<training::Training>::NAME,
        ServerServiceServer::<server_info::ServerInfo>::NAME,
    ];

    /// The services as routes. Messages from clients may have `max_message_bytes`; answers are bounded by the
    /// limits of what may be asked for.
    pub fn routes(self, max_message_bytes: usize) -> Routes {
        let inference = InferenceServiceServer::new(self.inference)
            .max_decoding_message_size(max_message_bytes)
            .max_encoding_message_size(usize::MAX);
        let adapters = AdapterServiceServer::new(self.adapters)
            .max_decoding_message_size(max_message_bytes)
            .max_encoding_message_size(usize::MAX);
        let training = TrainingServiceServer::new(self.training)
            .max_decoding_message_size(max_message_bytes)
            .max_encoding_message_size(usize::MAX);
        let server = ServerServiceServer::new(self.server).max_decoding_message_size(max_message_bytes);
        Routes::new(Refusals(inference))
            .add_service(Refusals(adapters))
            .add_service(Refusals(training))
            .add_service(Refusals(server))
    }
}
