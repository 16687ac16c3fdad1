//! The engine's figures, copied to the metrics once a second.
use crate::adapter::Registry;
use crate::engine::{EngineHandle, Stats};
use crate::telemetry::name;
use metrics::{counter, gauge};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// Copies until dropped.
pub(super) struct Gauges(JoinHandle<()>);

impl Drop for Gauges {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Starts copying.
pub(super) fn start(engine: EngineHandle, registry: Arc<Registry>) -> Gauges {
    Gauges(tokio::spawn(async move {
        let mut every = tokio::time::interval(Duration::from_secs(1));
        loop {
            every.tick().await;
            copy(&engine.stats());
            gauge!(name::ADAPTERS_REGISTERED).set(registry.list().len() as f64);
        }
    }))
}

fn copy(s: &Stats) {
    let used = s.kv_pages_total.saturating_sub(s.kv_pages_available);
    gauge!(name::RUNNING).set(s.running as f64);
    gauge!(name::WAITING).set(s.waiting as f64);
    gauge!(name::KV_USAGE).set(used as f64 / s.kv_pages_total.max(1) as f64);
    gauge!(name::ADAPTERS_RESIDENT).set(s.prefixes_resident as f64);
    counter!(name::STEPS).absolute(s.steps);
    counter!(name::PROMPT_TOKENS).absolute(s.prompt_tokens);
    counter!(name::GENERATION_TOKENS).absolute(s.generated_tokens);
    counter!(name::PREEMPTIONS).absolute(s.preemptions);
    counter!(name::CACHE_QUERIES).absolute(s.prompt_tokens + s.cached_tokens);
    counter!(name::CACHE_HITS).absolute(s.cached_tokens);
    counter!(name::ADAPTER_HITS).absolute(s.prefix_hits);
    counter!(name::ADAPTER_MISSES).absolute(s.prefix_misses);
    counter!(name::ADAPTER_EVICTIONS).absolute(s.prefix_evictions);
}
