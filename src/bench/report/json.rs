//! The report for programs. Names are those of vLLM's result files, so that what reads those reads these.
use super::Report;
use crate::bench::measure::Summary;
use crate::bench::{Occupancy, Point, Sweep, TenantFigures};
use serde_json::{Map, Value, json};

impl Report {
    /// One object: a run's figures beside what was run; of a sweep, `points` with a run's figures each.
    pub fn to_json(&self) -> Value {
        let m = &self.model;
        let mut all = json!({
            "command": self.setup.command,
            "date": self.date,
            "server": self.setup.server,
            "host": self.setup.host,
            "version": self.version,
            "model": {
                "name": m.name, "family": m.family, "num_parameters": m.num_parameters, "dtype": m.dtype, "device": m.device,
            },
            "limits": {
                "max_model_len": self.limits.max_model_len, "kv_tokens": self.limits.kv_tokens,
                "max_sequences": self.limits.max_sequences, "max_batch_tokens": self.limits.max_batch_tokens,
            },
            "seed": self.seed,
            "requests": self.requests,
            "popularity": self.popularity,
            "load": self.load.describe(),
            "goodput_limits": self.goodput,
            "interrupted": self.interrupted,
        });
        match &self.sweep {
            None => {
                let point = self.points.first().map(point).unwrap_or_default();
                if let Some(all) = all.as_object_mut() {
                    all.extend(point);
                }
            }
            Some(sweep) => {
                all["sweep"] = json!(sweep.to_string());
                all["highest_rate"] = json!(self.highest_rate().and_then(|p| p.swept));
                let name = match sweep {
                    Sweep::Adapters(_) => "adapters",
                    Sweep::Rate { .. } => "rate",
                };
                let points = self.points.iter().map(|p| {
                    let mut object = point(p);
                    object.insert(name.into(), json!(p.swept));
                    Value::Object(object)
                });
                all["points"] = points.collect();
            }
        }
        all
    }
}

fn point(p: &Point) -> Map<String, Value> {
    let (m, s) = (&p.metrics, &p.server);
    let Occupancy { running, adapters, kv_use } = p.occupancy;
    let Value::Object(mut object) = json!({
        "duration": m.duration,
        "num_prompts": m.sent,
        "completed": m.completed,
        "failed": m.failures(),
        "failures": m.failed,
        "interrupted_requests": m.interrupted,
        "unsent": m.unsent,
        "wrong_length": p.wrong_length,
        "total_input_tokens": m.input_tokens,
        "total_output_tokens": m.output_tokens,
        "cached_input_tokens": m.cached_tokens,
        "request_throughput": m.request_throughput,
        "request_goodput": m.request_goodput,
        "good_share": m.good_share,
        "output_throughput": m.output_throughput,
        "total_token_throughput": m.total_token_throughput,
        "max_send_delay_ms": m.max_send_delay,
        "num_tenants": p.tenants,
        "fairness": { "tenants": p.fairness.tenants, "jain": p.fairness.jain, "ttft_max_over_min": p.fairness.ttft_ratio },
        "prefix": {
            "hits": s.prefix_hits, "misses": s.prefix_misses, "evictions": s.prefix_evictions, "hit_rate": s.prefix_hit_rate(),
        },
        "kv": { "pages": s.kv_pages_total, "mean_use": kv_use.mean, "peak_use": kv_use.peak },
        "batch": {
            "steps": s.steps, "tokens_a_step": s.tokens_a_step(), "preemptions": s.preemptions,
            "mean_sequences": running.mean, "peak_sequences": running.peak,
            "mean_adapters": adapters.mean, "peak_adapters": adapters.peak,
        },
        "tenants": p.of_tenants.iter().map(tenant).collect::<Vec<_>>(),
        "timeline": p.timeline.iter().map(|t| json!({
            "seconds": t.at.as_secs_f64(), "running": t.running, "waiting": t.waiting, "adapters": t.adapters,
            "resident": t.resident, "kv_use": t.kv_use,
        })).collect::<Vec<_>>(),
    }) else {
        return Map::new();
    };
    for (name, summary) in [("ttft", m.ttft), ("tpot", m.tpot), ("itl", m.itl), ("e2el", m.e2el), ("queued", m.queued)]
    {
        times(&mut object, name, &summary);
    }
    object
}

fn times(object: &mut Map<String, Value>, name: &str, s: &Summary) {
    let parts =
        [("mean", s.mean), ("median", s.median), ("std", s.std), ("p90", s.p90), ("p99", s.p99), ("max", s.max)];
    parts.into_iter().for_each(|(part, value)| {
        object.insert(format!("{part}_{name}_ms"), json!(value));
    });
}

fn tenant(t: &TenantFigures) -> Value {
    json!({
        "adapter": t.name,
        "num_prompts": t.sent,
        "completed": t.completed,
        "output_tokens": t.output_tokens,
        "mean_ttft_ms": t.ttft.map(|(mean, ..)| mean),
        "median_ttft_ms": t.ttft.map(|(_, median, _)| median),
        "p99_ttft_ms": t.ttft.map(|(.., p99)| p99),
        "mean_e2el_ms": t.e2el,
        "tokens_a_second_of_demand": t.service,
    })
}
