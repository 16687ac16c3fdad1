//! `ServerService`: what the server is and how it does.
use super::call::Call;
use super::proto::{self, server_service_server::ServerService};
use crate::adapter::Registry;
use crate::engine::EngineHandle;
use std::sync::Arc;
use std::time::Instant;
use tonic::{Request, Response, Status};

/// Facts and figures.
#[derive(Clone)]
pub struct ServerInfo {
    /// Fixed at the start.
    pub facts: Arc<proto::GetServerInfoResponse>,
    /// Has the figures.
    pub engine: EngineHandle,
    /// Has the adapters.
    pub registry: Arc<Registry>,
    /// When the server started.
    pub started: Instant,
}

#[tonic::async_trait]
impl ServerService for ServerInfo {
    async fn get_server_info(
        &self,
        request: Request<proto::GetServerInfoRequest>,
    ) -> Result<Response<proto::GetServerInfoResponse>, Status> {
        Call::new("GetServerInfo", request.metadata()).finish(Ok((*self.facts).clone()))
    }

    async fn get_stats(
        &self,
        request: Request<proto::GetStatsRequest>,
    ) -> Result<Response<proto::GetStatsResponse>, Status> {
        let s = self.engine.stats();
        let stats = proto::GetStatsResponse {
            running: s.running as u32,
            waiting: s.waiting as u32,
            kv_pages_total: s.kv_pages_total as u32,
            kv_pages_available: s.kv_pages_available as u32,
            adapters_resident: s.prefixes_resident as u32,
            adapters_registered: self.registry.list().len() as u32,
            steps: s.steps,
            prompt_tokens: s.prompt_tokens,
            cached_tokens: s.cached_tokens,
            generated_tokens: s.generated_tokens,
            preemptions: s.preemptions,
            prefix_hits: s.prefix_hits,
            prefix_misses: s.prefix_misses,
            prefix_evictions: s.prefix_evictions,
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            step_seconds: s.step_time.as_secs_f64(),
            forward_seconds: s.forward_time.as_secs_f64(),
        };
        Call::new("GetStats", request.metadata()).finish(Ok(stats))
    }
}
