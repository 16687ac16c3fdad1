//! Messages as JSON, in the API's own field names.
use crate::rpc::proto;
use serde_json::{Value, json};

/// Without the enum's prefix, in lower case: `stop_sequence`.
pub(super) fn finish_reason(choice: &proto::Choice) -> String {
    choice.finish_reason().as_str_name().trim_start_matches("FINISH_REASON_").to_ascii_lowercase()
}

/// Without the enum's prefix: `READY`.
pub(super) fn state(adapter: &proto::Adapter) -> &'static str {
    adapter.state().as_str_name().trim_start_matches("ADAPTER_STATE_")
}

pub(super) fn generated(r: &proto::GenerateResponse) -> Value {
    json!({
        "request_id": r.request_id,
        "choices": r.choices.iter().map(choice).collect::<Vec<_>>(),
        "input_logprobs": logprobs(&r.input_logprobs),
        "usage": usage(&r.usage),
        "timings": r.timings.as_ref().map(|t| json!({
            "queue_ms": t.queue_ms,
            "ttft_ms": t.ttft_ms,
            "e2el_ms": t.e2el_ms,
            "batch_max_sequences": t.batch_max_sequences,
            "batch_max_adapters": t.batch_max_adapters,
            "preemptions": t.preemptions,
        })),
        "adapter": adapter_ref(&r.adapter),
        "prefix_adapters": adapter_refs(&r.prefix_adapters),
    })
}

fn choice(c: &proto::Choice) -> Value {
    json!({
        "index": c.index,
        "text": c.text,
        "token_ids": c.token_ids,
        "logprobs": logprobs(&c.logprobs),
        "finish_reason": finish_reason(c),
        "stop_sequence": c.stop_sequence,
    })
}

pub(super) fn scored(r: &proto::ScoreResponse) -> Value {
    let score = |s: &proto::ContinuationScore| json!({ "logprob": s.logprob, "perplexity": s.perplexity, "tokens": logprobs(&s.tokens) });
    json!({
        "request_id": r.request_id,
        "scores": r.scores.iter().map(score).collect::<Vec<_>>(),
        "usage": usage(&r.usage),
        "adapter": adapter_ref(&r.adapter),
        "prefix_adapters": adapter_refs(&r.prefix_adapters),
    })
}

pub(super) fn classified(r: &proto::ClassifyResponse) -> Value {
    let score = |s: &proto::LabelScore| json!({ "label": s.label, "probability": s.probability, "logprob": s.logprob });
    json!({
        "request_id": r.request_id,
        "label": r.label,
        "scores": r.scores.iter().map(score).collect::<Vec<_>>(),
        "usage": usage(&r.usage),
        "adapter": adapter_ref(&r.adapter),
        "prefix_adapters": adapter_refs(&r.prefix_adapters),
    })
}

pub(super) fn tokenized(r: &proto::TokenizeResponse) -> Value {
    json!({ "token_ids": r.token_ids, "tokens": r.tokens, "text": r.text, "prefix_tokens": r.prefix_tokens,
        "virtual_tokens": r.virtual_tokens })
}

pub(super) fn adapter(a: &proto::Adapter) -> Value {
    json!({
        "adapter_id": a.adapter_id,
        "state": state(a),
        "generation": a.generation,
        "method": a.method,
        "description": a.description,
        "num_virtual_tokens": a.num_virtual_tokens,
        "prefix_tokens": a.prefix_tokens,
        "digest": a.digest,
        "pinned": a.pinned,
        "resident": a.resident,
        "error": a.error,
        "loaded_at_unix": a.loaded_at.as_ref().map(|t| t.seconds as f64 + f64::from(t.nanos) * 1e-9),
        "labels": a.labels,
    })
}

pub(super) fn facts(r: &proto::GetServerInfoResponse) -> Value {
    json!({
        "version": r.version,
        "model": r.model.as_ref().map(|m| json!({
            "name": m.name,
            "family": m.family,
            "num_parameters": m.num_parameters,
            "num_layers": m.num_layers,
            "hidden_size": m.hidden_size,
            "num_attention_heads": m.num_attention_heads,
            "num_key_value_heads": m.num_key_value_heads,
            "head_dim": m.head_dim,
            "vocab_size": m.vocab_size,
            "dtype": m.dtype,
            "kv_cache_dtype": m.kv_cache_dtype,
            "device": m.device,
            "encoder": m.encoder,
            "labels": m.labels,
        })),
        "limits": r.limits.as_ref().map(|l| json!({
            "max_model_len": l.max_model_len,
            "max_prompt_bytes": l.max_prompt_bytes,
            "max_n": l.max_n,
            "max_continuations": l.max_continuations,
            "kv_tokens": l.kv_tokens,
            "max_sequences": l.max_sequences,
            "max_batch_tokens": l.max_batch_tokens,
            "max_queue": l.max_queue,
            "max_adapters": l.max_adapters,
        })),
    })
}

pub(super) fn stats(s: &proto::GetStatsResponse) -> Value {
    json!({
        "running": s.running,
        "waiting": s.waiting,
        "kv_pages_total": s.kv_pages_total,
        "kv_pages_available": s.kv_pages_available,
        "adapters_resident": s.adapters_resident,
        "adapters_registered": s.adapters_registered,
        "steps": s.steps,
        "prompt_tokens": s.prompt_tokens,
        "cached_tokens": s.cached_tokens,
        "generated_tokens": s.generated_tokens,
        "preemptions": s.preemptions,
        "prefix_hits": s.prefix_hits,
        "prefix_misses": s.prefix_misses,
        "prefix_evictions": s.prefix_evictions,
        "uptime_seconds": s.uptime_seconds,
        "step_seconds": s.step_seconds,
        "forward_seconds": s.forward_seconds,
    })
}

fn logprobs(tokens: &[proto::TokenLogprob]) -> Value {
    let top = |t: &proto::TopLogprob| json!({ "token_id": t.token_id, "text": t.text, "logprob": t.logprob });
    let token = |t: &proto::TokenLogprob| {
        json!({
            "token_id": t.token_id,
            "text": t.text,
            "logprob": t.logprob,
            "top": t.top.iter().map(top).collect::<Vec<_>>(),
        })
    };
    tokens.iter().map(token).collect()
}

fn usage(usage: &Option<proto::Usage>) -> Value {
    let Some(u) = usage else { return Value::Null };
    json!({
        "prompt_tokens": u.prompt_tokens,
        "prefix_tokens": u.prefix_tokens,
        "cached_tokens": u.cached_tokens,
        "generated_tokens": u.generated_tokens,
    })
}

fn adapter_ref(adapter: &Option<proto::AdapterRef>) -> Value {
    let Some(a) = adapter else { return Value::Null };
    json!({ "adapter_id": a.adapter_id, "generation": a.generation })
}

fn adapter_refs(adapters: &[proto::AdapterRef]) -> Value {
    adapters.iter().map(|a| json!({ "adapter_id": a.adapter_id, "generation": a.generation })).collect()
}
