//! To see inside: log lines and metrics, set up once a process.
//!
//! # Logs
//! `PREFIXD_LOG` holds a filter of `tracing_subscriber::EnvFilter` (default `info`), `PREFIXD_LOG_FORMAT=json` writes
//! one JSON object a line. Lines go to stderr: stdout belongs to the commands' answers.
//!
//! # Metrics
//! Names are vLLM's with `prefixd_` in place of `vllm:` where vLLM has the figure, so that its dashboards need one
//! search and replace; what only prefixd has comes after. Labels are bounded: the one that a client could vary, the
//! adapter's id, is used after the adapter was found loaded.
use crate::error::{Context, Kind, Result};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
use std::io::IsTerminal;
use std::net::SocketAddr;
use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// For people; coloured on a terminal.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Names of the metrics.
pub mod name {
    /// Gauge: sequences in the batch.
    pub const RUNNING: &str = "prefixd_num_requests_running";
    /// Gauge: sequences that wait.
    pub const WAITING: &str = "prefixd_num_requests_waiting";
    /// Gauge: share of the KV pool's pages in use, 0 to 1.
    pub const KV_USAGE: &str = "prefixd_kv_cache_usage_perc";
    /// Counter: prompt tokens computed.
    pub const PROMPT_TOKENS: &str = "prefixd_prompt_tokens_total";
    /// Counter: tokens generated.
    pub const GENERATION_TOKENS: &str = "prefixd_generation_tokens_total";
    /// Counter by `finished_reason` and `adapter_id`: sequences that ended as they should.
    pub const SUCCESS: &str = "prefixd_request_success_total";
    /// Histogram: seconds from arrival to the first token.
    pub const TTFT: &str = "prefixd_time_to_first_token_seconds";
    /// Histogram: mean seconds between the tokens of one sequence after the first.
    pub const TPOT: &str = "prefixd_request_time_per_output_token_seconds";
    /// Histogram: seconds from arrival to the end.
    pub const E2EL: &str = "prefixd_e2e_request_latency_seconds";
    /// Histogram: seconds from arrival to the first scheduling.
    pub const QUEUE_TIME: &str = "prefixd_request_queue_time_seconds";
    /// Counter: preemptions.
    pub const PREEMPTIONS: &str = "prefixd_num_preemptions_total";
    /// Counter: prompt tokens looked up in the cache of equal leading blocks.
    pub const CACHE_QUERIES: &str = "prefixd_prefix_cache_queries_total";
    /// Counter: of those, tokens found.
    pub const CACHE_HITS: &str = "prefixd_prefix_cache_hits_total";

    /// Counter by `code`: calls that ended with an error status.
    pub const FAILED: &str = "prefixd_request_failure_total";
    /// Counter: steps of the engine.
    pub const STEPS: &str = "prefixd_engine_steps_total";
    /// Gauge: adapters registered.
    pub const ADAPTERS_REGISTERED: &str = "prefixd_adapters_registered";
    /// Gauge: adapter prefixes whose pages are in the KV pool.
    pub const ADAPTERS_RESIDENT: &str = "prefixd_adapters_resident";
    /// Counter: sequences that found their adapter's pages in the pool.
    pub const ADAPTER_HITS: &str = "prefixd_adapter_prefix_hits_total";
    /// Counter: sequences whose adapter's pages had to be compiled.
    pub const ADAPTER_MISSES: &str = "prefixd_adapter_prefix_misses_total";
    /// Counter: adapter prefixes that left the pool to make room.
    pub const ADAPTER_EVICTIONS: &str = "prefixd_adapter_prefix_evictions_total";
    /// Counter by `event` (`ready`, `failed`, `unloaded`): what happened to adapters.
    pub const ADAPTER_EVENTS: &str = "prefixd_adapter_events_total";
    /// Histogram: seconds that a load took, compilation included.
    pub const ADAPTER_LOAD: &str = "prefixd_adapter_load_seconds";
}

/// Upper ends of the histograms' buckets in seconds: from a decode step of a small model to a long answer.
const SECONDS: [f64; 17] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0];

/// Starts logging with `default` as the filter where `PREFIXD_LOG` is not set. A second call changes nothing.
///
/// # Errors
/// `InvalidArgument` when `PREFIXD_LOG` is not a filter.
pub fn start_logging(default: &str) -> Result<()> {
    let filter = std::env::var("PREFIXD_LOG").unwrap_or_else(|_| default.to_owned());
    let filter = EnvFilter::try_new(&filter).or_kind(Kind::InvalidArgument, "PREFIXD_LOG")?;
    let format = match std::env::var("PREFIXD_LOG_FORMAT").as_deref() {
        Ok("json") => LogFormat::Json,
        _ => LogFormat::Text,
    };
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // An error here says that a subscriber is there already: tests and embedders bring their own.
    let _ = match format {
        LogFormat::Text => builder.with_ansi(std::io::stderr().is_terminal()).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    Ok(())
}

/// Serves `/metrics` on `listen`; must be called inside a tokio runtime.
///
/// # Errors
/// `InvalidArgument` when the address cannot be bound, `FailedPrecondition` when this process has metrics already.
pub fn start_metrics(listen: SocketAddr) -> Result<()> {
    let place = format!("metrics_listen {listen}");
    let builder = PrometheusBuilder::new().with_http_listener(listen);
    let builder = builder.set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &SECONDS);
    let (recorder, exporter) = builder.and_then(PrometheusBuilder::build).or_kind(Kind::InvalidArgument, &place)?;
    metrics::set_global_recorder(recorder).or_kind(Kind::FailedPrecondition, &place)?;
    tokio::spawn(async move {
        if let Err(e) = exporter.await {
            tracing::error!("metrics server ended: {e:?}");
        }
    });
    describe();
    Ok(())
}

/// The help lines of `/metrics`.
fn describe() {
    use metrics::{describe_counter as counter, describe_gauge as gauge, describe_histogram as histogram};
    gauge!(name::RUNNING, "Sequences in the batch.");
    gauge!(name::WAITING, "Sequences that wait.");
    gauge!(name::KV_USAGE, "Share of the KV pool's pages in use, 0 to 1.");
    counter!(name::PROMPT_TOKENS, "Prompt tokens computed.");
    counter!(name::GENERATION_TOKENS, "Tokens generated.");
    counter!(name::SUCCESS, "Sequences that ended as they should, by reason and adapter.");
    histogram!(name::TTFT, "Seconds from arrival to the first token.");
    histogram!(name::TPOT, "Mean seconds between the tokens of one sequence after the first.");
    histogram!(name::E2EL, "Seconds from arrival to the end.");
    histogram!(name::QUEUE_TIME, "Seconds from arrival to the first scheduling.");
    counter!(name::PREEMPTIONS, "Preemptions.");
    counter!(name::CACHE_QUERIES, "Prompt tokens looked up in the cache of equal leading blocks.");
    counter!(name::CACHE_HITS, "Prompt tokens found in the cache of equal leading blocks.");
    counter!(name::FAILED, "Calls that ended with an error status, by code.");
    counter!(name::STEPS, "Steps of the engine.");
    gauge!(name::ADAPTERS_REGISTERED, "Adapters registered.");
    gauge!(name::ADAPTERS_RESIDENT, "Adapter prefixes whose pages are in the KV pool.");
    counter!(name::ADAPTER_HITS, "Sequences that found their adapter's pages in the pool.");
    counter!(name::ADAPTER_MISSES, "Sequences whose adapter's pages had to be compiled.");
    counter!(name::ADAPTER_EVICTIONS, "Adapter prefixes that left the pool to make room.");
    counter!(name::ADAPTER_EVENTS, "What happened to adapters: ready, failed, unloaded.");
    histogram!(name::ADAPTER_LOAD, "Seconds that a load took, compilation included.");
}
