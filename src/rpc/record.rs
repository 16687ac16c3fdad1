//! The end of a sequence, written down: one log line, its metrics.
use crate::adapter::Adapter;
use crate::engine::request::{Finish, FinishReason};
use crate::telemetry::name;
use std::sync::Arc;
use std::time::Duration;

/// Writes down that a sequence ended. Call it inside the request's span.
pub fn finished(adapter: &Option<Arc<Adapter>>, choice: usize, finish: &Finish) {
    let Finish { usage, timings, .. } = finish;
    // In whole microseconds: no tails of binary fractions in the log.
    let ms = |d: Duration| d.as_micros() as f64 / 1e3;
    tracing::info!(
        choice,
        finish_reason = finish.reason.as_str(),
        prompt_tokens = usage.prompt,
        prefix_tokens = usage.prefix,
        cached_tokens = usage.cached,
        generated_tokens = usage.generated,
        queue_ms = ms(timings.queue),
        ttft_ms = ms(timings.ttft),
        e2el_ms = ms(timings.e2el),
        batch_max_sequences = timings.batch_max_sequences,
        batch_max_adapters = timings.batch_max_adapters,
        preemptions = timings.preemptions,
        "finished"
    );
    if matches!(finish.reason, FinishReason::Cancelled | FinishReason::Deadline) {
        return;
    }
    let adapter_id = adapter.as_ref().map_or_else(String::new, |a| a.id.to_string());
    let reason = finish.reason.as_str();
    metrics::counter!(name::SUCCESS, "finished_reason" => reason, "adapter_id" => adapter_id).increment(1);
    metrics::histogram!(name::QUEUE_TIME).record(timings.queue);
    metrics::histogram!(name::E2EL).record(timings.e2el);
    if usage.generated > 0 {
        metrics::histogram!(name::TTFT).record(timings.ttft);
    }
    if usage.generated > 1 {
        let gaps = (usage.generated - 1) as f64;
        let decoding = timings.e2el.saturating_sub(timings.ttft);
        metrics::histogram!(name::TPOT).record(decoding.as_secs_f64() / gaps);
    }
}
