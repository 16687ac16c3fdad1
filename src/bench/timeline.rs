//! The server's figures while requests run: who runs, who waits, what the pool holds.
use super::record::Record;
use super::workload::Tenant;
use crate::error::{Error, Result};
use crate::rpc::convert;
use crate::rpc::proto::server_service_client::ServerServiceClient;
use crate::rpc::proto::{GetStatsRequest, GetStatsResponse};
use std::collections::HashMap;
use std::time::{Duration, Instant};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::transport::Channel;

/// Points of a timeline at most: longer runs are thinned out.
const POINTS: usize = 600;

/// Looks for a moment when nothing runs, at most.
const LOOKS: usize = 25;

/// One look at the server. Times count from the run's start.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// When.
    pub at: Duration,
    /// Sequences in the batch.
    pub running: u32,
    /// Sequences that wait.
    pub waiting: u32,
    /// Different adapters among the running ones, bare base included; from the records.
    pub adapters: u32,
    /// Adapters whose pages are in the pool.
    pub resident: u32,
    /// Of the pool's pages, those in use by prefixes and sequences.
    pub kv_use: f64,
}

/// What the server counted during the run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct ServerCounts {
    pub steps: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub generated_tokens: u64,
    pub preemptions: u64,
    pub prefix_hits: u64,
    pub prefix_misses: u64,
    pub prefix_evictions: u64,
    pub kv_pages_total: u32,
}

impl ServerCounts {
    fn between(first: &GetStatsResponse, last: &GetStatsResponse) -> Self {
        // A server that was restarted in between counts from 0 again.
        let grown = |count: fn(&GetStatsResponse) -> u64| count(last).saturating_sub(count(first));
        ServerCounts {
            steps: grown(|s| s.steps),
            prompt_tokens: grown(|s| s.prompt_tokens),
            cached_tokens: grown(|s| s.cached_tokens),
            generated_tokens: grown(|s| s.generated_tokens),
            preemptions: grown(|s| s.preemptions),
            prefix_hits: grown(|s| s.prefix_hits),
            prefix_misses: grown(|s| s.prefix_misses),
            prefix_evictions: grown(|s| s.prefix_evictions),
            kv_pages_total: last.kv_pages_total,
        }
    }

    /// Of the requests with an adapter, those whose prefix pages were in the pool; none where there were none.
    pub fn prefix_hit_rate(&self) -> Option<f64> {
        let all = self.prefix_hits + self.prefix_misses;
        (all > 0).then(|| self.prefix_hits as f64 / all as f64)
    }

    /// Tokens that a step generated, on average.
    pub fn tokens_a_step(&self) -> f64 {
        self.generated_tokens as f64 / self.steps.max(1) as f64
    }
}

/// A figure over all looks at the server while anything ran.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Level {
    /// Over the looks.
    pub mean: f64,
    /// At the look that had the most.
    pub peak: f64,
}

/// How full the server was. Of every look: a peak stays one where the timeline is thinned out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Occupancy {
    /// Sequences in the batch.
    pub running: Level,
    /// Different adapters among them.
    pub adapters: Level,
    /// Of the pool's pages, those in use.
    pub kv_use: Level,
}

impl Occupancy {
    pub(super) fn of(samples: &[Sample]) -> Self {
        let level = |value: fn(&Sample) -> f64| {
            let values: Vec<f64> = samples.iter().filter(|s| s.running > 0).map(value).collect();
            let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
            Level { mean, peak: values.into_iter().fold(0.0, f64::max) }
        };
        Occupancy {
            running: level(|s| f64::from(s.running)),
            adapters: level(|s| f64::from(s.adapters)),
            kv_use: level(|s| s.kv_use),
        }
    }
}

/// Evenly chosen samples: few enough for a chart.
pub(super) fn thinned(samples: &[Sample]) -> Vec<Sample> {
    let stride = samples.len().div_ceil(POINTS).max(1);
    samples.iter().step_by(stride).copied().collect()
}

/// What was seen of the server.
pub(super) struct Seen {
    /// Every look, in the order of time.
    pub samples: Vec<Sample>,
    pub counts: ServerCounts,
}

/// Looks at the server again and again.
pub(super) struct Sampler {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Vec<(Instant, GetStatsResponse)>>,
}

impl Sampler {
    /// Starts with a first look.
    pub async fn start(channel: Channel, every: Duration) -> Result<Self> {
        let mut client = ServerServiceClient::new(channel);
        let first = settled(&mut client).await.map_err(|status| convert::answered("GetStats", &status))?;
        let (stop, mut stopped) = oneshot::channel();
        let task = tokio::spawn(async move {
            let mut seen = vec![(Instant::now(), first)];
            let mut ticks = tokio::time::interval(every.max(Duration::from_millis(1)));
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                let over = tokio::select! {
                    _ = &mut stopped => true,
                    _ = ticks.tick() => false,
                };
                let look = match over {
                    true => settled(&mut client).await,
                    false => client.get_stats(GetStatsRequest {}).await.map(tonic::Response::into_inner),
                };
                // A look that fails is a gap in the picture, no more: the requests tell of a server that is gone.
                seen.extend(look.map(|stats| (Instant::now(), stats)));
                if over {
                    return seen;
                }
            }
        });
        Ok(Sampler { stop, task })
    }

    /// Ends with a last look; times count from `epoch`.
    pub async fn finish(self, epoch: Instant) -> Seen {
        // A task that is gone needs no telling.
        let _ = self.stop.send(());
        let seen = self.task.await.map_err(|e| Error::internal(format!("sampler: {e}"))).unwrap_or_default();
        let counts = match (seen.first(), seen.last()) {
            (Some((_, first)), Some((_, last))) => ServerCounts::between(first, last),
            _ => ServerCounts::default(),
        };
        let samples = seen.iter().map(|(at, s)| Sample {
            at: at.saturating_duration_since(epoch),
            running: s.running,
            waiting: s.waiting,
            adapters: 0,
            resident: s.adapters_resident,
            kv_use: 1.0 - f64::from(s.kv_pages_available) / f64::from(s.kv_pages_total.max(1)),
        });
        Seen { samples: samples.collect(), counts }
    }
}

/// A look when nothing runs: a server counts a step just after its answers are out. Where others send too, that time
/// may not come, and a late look has to do.
async fn settled(client: &mut ServerServiceClient<Channel>) -> std::result::Result<GetStatsResponse, Status> {
    let mut stats = client.get_stats(GetStatsRequest {}).await?.into_inner();
    for _ in 0..LOOKS {
        if stats.running == 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
        stats = client.get_stats(GetStatsRequest {}).await?.into_inner();
    }
    Ok(stats)
}

/// Counts the adapters that run at each of `samples`, which are in the order of time: a request runs from its scheduling,
/// as the server timed it, to its end.
pub(super) fn count_adapters(samples: &mut [Sample], records: &[Record]) {
    let mut changes: Vec<(Duration, Tenant, bool)> = Vec::with_capacity(2 * records.len());
    for record in records {
        if let Some(start) = record.scheduled().filter(|start| *start < record.ended) {
            changes.extend([(start, record.tenant, true), (record.ended, record.tenant, false)]);
        }
    }
    changes.sort_unstable_by_key(|(at, ..)| *at);
    let (mut changes, mut running) = (changes.into_iter().peekable(), HashMap::<Tenant, usize>::new());
    for sample in samples {
        while let Some((_, tenant, starts)) = changes.next_if(|(at, ..)| *at <= sample.at) {
            let requests = running.entry(tenant).or_default();
            // A start is before its end, so there is one to take off.
            *requests = if starts { *requests + 1 } else { *requests - 1 };
            if *requests == 0 {
                running.remove(&tenant);
            }
        }
        // The end of a request reaches us after the server has let it go.
        sample.adapters = (running.len() as u32).min(sample.running);
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::record;
    use super::*;

    #[test]
    fn adapters_count_while_their_requests_run() {
        let at = |ms| Sample { at: Duration::from_millis(ms), running: 3, ..Sample::default() };
        let mut samples = [at(0), at(120), at(160), at(500)];
        let late = Record { queued: Some(Duration::from_millis(50)), ..record(1, 100, 60, &[10, 10]) };
        count_adapters(&mut samples, &[record(0, 0, 100, &[100]), record(0, 0, 100, &[100]), late]);
        assert_eq!(samples.map(|s| s.adapters), [1, 1, 2, 0]);
    }

    #[test]
    fn peaks_are_of_all_looks_also_those_that_the_timeline_leaves_out() {
        let look = |i: u64| Sample { at: Duration::from_millis(i), running: 2, kv_use: 0.25, ..Sample::default() };
        let mut samples: Vec<Sample> = (0..3 * POINTS as u64).map(look).collect();
        // Between two that are kept.
        samples[301] = Sample { running: 9, kv_use: 0.75, ..samples[301] };
        // While nothing runs, prefixes still hold pages: that is no work.
        samples[302] = Sample { running: 0, kv_use: 0.875, ..samples[302] };
        let kept = thinned(&samples);
        assert_eq!((kept.len(), kept.iter().map(|s| s.running).max()), (POINTS, Some(2)));
        let all = Occupancy::of(&samples);
        assert_eq!((all.running.peak, all.kv_use.peak), (9.0, 0.75));
        let mean = (2.0 * (3 * POINTS - 2) as f64 + 9.0) / (3 * POINTS - 1) as f64;
        assert!((all.running.mean - mean).abs() < 1e-9, "{}", all.running.mean);
        assert_eq!(Occupancy::of(&[]), Occupancy::default());
        assert_eq!(thinned(&samples[..5]), samples[..5]);
    }

    #[test]
    fn counts_are_differences() {
        let stats = |hits, misses, steps| GetStatsResponse {
            prefix_hits: hits,
            prefix_misses: misses,
            steps,
            generated_tokens: 10 * steps,
            ..GetStatsResponse::default()
        };
        let counts = ServerCounts::between(&stats(5, 5, 10), &stats(35, 15, 20));
        assert_eq!((counts.prefix_hits, counts.steps), (30, 10));
        assert_eq!((counts.prefix_hit_rate(), counts.tokens_a_step()), (Some(0.75), 10.0));
        assert_eq!(ServerCounts::default().prefix_hit_rate(), None);
    }
}
