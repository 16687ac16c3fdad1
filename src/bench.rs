//! The load generator behind `prefixd bench`: requests drawn from a seed, sent over gRPC to any prefixd server, and
//! measured in the words of vLLM's serving benchmark.
//!
//! ```text
//! workload (popularity, lengths | tasks) ──> driver (arrivals) ──> records ──> measure, fairness ──┐
//! pool (adapters made for the base)            server ──> timeline (GetStats) ─────────────────────┴──> report
//! ```
//!
//! Everything up to the driver is a pure function of the [`Plan`]: request number i is the same request whatever the
//! server does. Everything after it is a pure function of the records. Only `driver`, `pool` and `timeline` talk to
//! the server.
mod arrivals;
mod driver;
mod fairness;
mod host;
mod lengths;
mod measure;
mod point;
mod pool;
mod popularity;
mod record;
mod report;
mod schedule;
mod stop;
mod sweep;
mod tasks;
mod timeline;
mod workload;

use crate::error::{Error, Result};
use crate::rpc::convert;
use crate::rpc::proto::server_service_client::ServerServiceClient;
use crate::rpc::proto::{self, GetServerInfoRequest};
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::Channel;

pub use arrivals::Arrivals;
pub use driver::{Load, Until};
pub use fairness::{Fairness, TenantFigures};
pub use host::describe as describe_host;
pub use lengths::Lengths;
pub use measure::{Metrics, Summary};
pub use point::Point;
pub use pool::{Method, Recipe};
pub use popularity::Popularity;
pub use record::{INCOMPLETE, Limits, Outcome, Record};
pub use report::{Report, Setup};
pub use stop::{Stop, Stopper};
pub use sweep::{RateSearch, Sweep};
pub use tasks::Tasks;
pub use timeline::{Level, Occupancy, Sample, ServerCounts};
pub use workload::{Phase, Planned, Synthetic, Tenant, Workload};

use driver::Driver;
use pool::Pool;

/// Of the requests that a rate asks for, sent or not, so many must be within the limits for the rate to hold.
pub const HOLDS: f64 = 0.9;

/// What to do to a server.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What the requests say.
    pub requests: Requests,
    /// Which adapter the next request names. None: the order of the tasks file, or uniform.
    pub popularity: Option<Popularity>,
    /// When requests are sent.
    pub load: Load,
    /// When sending ends.
    pub until: Until,
    /// Requests before the run that are not counted, of each point of a sweep.
    pub warmup: u64,
    /// Where every draw comes from. A server that has seen a seed's random prompts answers them from its cache; so each
    /// run of a sweep has prompts of its own, in the same sizes and for the same tenants.
    pub seed: u64,
    /// How tokens are drawn, each request by a seed of its own; `None`: as the adapter's card has it, greedily without one.
    pub sampling: Option<proto::Sampling>,
    /// A request that takes longer has failed.
    pub timeout: Duration,
    /// What a request must keep to count as goodput.
    pub goodput: Limits,
    /// What to change from run to run.
    pub sweep: Option<Sweep>,
    /// Between two looks at the server's figures.
    pub sample_every: Duration,
    /// What the report says of where it was made.
    pub setup: Setup,
}

/// What the requests say.
#[derive(Clone, Debug)]
pub enum Requests {
    /// Random prompts for adapters that are made for the run.
    Synthetic {
        /// Adapters to make; 0: the bare base.
        adapters: usize,
        /// How they are made.
        recipe: Recipe,
        /// Prompt and output lengths.
        synthetic: Synthetic,
    },
    /// Lines of a file, for adapters that the server has.
    Tasks(Tasks),
}

/// How far it has got.
#[derive(Clone, Debug)]
pub enum Progress {
    /// Adapters are being made and uploaded.
    Adapters {
        /// So many are there.
        done: usize,
        /// So many are wanted.
        total: usize,
    },
    /// A run of a sweep starts.
    Point(String),
    /// Requests that are not counted.
    WarmUp {
        /// So many have ended.
        done: u64,
        /// Of so many.
        total: u64,
    },
    /// Requests that are counted.
    Running {
        /// So many have ended.
        done: u64,
        /// Of so many; none where the time ends the run.
        total: Option<u64>,
        /// So many of them failed.
        failed: u64,
        /// Output tokens so far.
        tokens: u64,
        /// Since the first request.
        elapsed: Duration,
    },
    /// A run of a sweep is done.
    Measured(Box<Point>),
    /// The adapters are being removed.
    Removing,
}

/// Runs `plan` against the server behind `channels`, until it is done or `stop` says so; then the report is about what
/// there is. Adapters that were made are removed again, however it ends.
///
/// # Errors
/// When the plan does not fit the server, the server cannot be asked, or an adapter cannot be uploaded. A request that
/// fails is no error: it is counted.
pub async fn run(channels: &[Channel], plan: &Plan, stop: &Stop, watch: &mut dyn FnMut(Progress)) -> Result<Report> {
    let channel = channels.first().ok_or_else(|| Error::internal("no channel to the server"))?;
    let facts = ServerServiceClient::new(channel.clone()).get_server_info(GetServerInfoRequest {}).await;
    let facts = facts.map_err(|status| convert::answered("GetServerInfo", &status))?.into_inner();
    plan.check(&facts)?;
    let pool = match &plan.requests {
        Requests::Synthetic { recipe, .. } => Some(Pool::new(channel.clone(), recipe.clone(), &facts, plan.seed)?),
        Requests::Tasks(_) => None,
    };
    let mut bench = Bench { channels, plan, facts, pool, stop };
    let points = bench.points(watch).await;
    if let Some(pool) = bench.pool.filter(|pool| !pool.is_empty()) {
        watch(Progress::Removing);
        let removed = pool.remove().await;
        // What went wrong first is what to tell.
        if points.is_ok() {
            removed?;
        }
    }
    Ok(Report::new(plan, bench.facts, points?, stop.is_stopped()))
}

/// One command's runs.
struct Bench<'a> {
    channels: &'a [Channel],
    plan: &'a Plan,
    facts: proto::GetServerInfoResponse,
    pool: Option<Pool>,
    stop: &'a Stop,
}

impl Bench<'_> {
    async fn points(&mut self, watch: &mut dyn FnMut(Progress)) -> Result<Vec<Point>> {
        let mut points = Vec::new();
        let made = match self.plan.requests {
            Requests::Synthetic { adapters, .. } => adapters,
            Requests::Tasks(_) => 0,
        };
        match &self.plan.sweep {
            None => points.extend(self.point(0, made, self.plan.load, None, watch).await?),
            Some(Sweep::Adapters(counts)) => {
                for (number, &count) in counts.iter().enumerate() {
                    watch(Progress::Point(format!("{count} adapters")));
                    points.extend(self.point(number, count, self.plan.load, Some(count as f64), watch).await?);
                }
            }
            Some(Sweep::Rate { from, to }) => {
                let mut search = RateSearch::new(*from, *to);
                while let Some(rate) = search.next_rate().filter(|_| !self.stop.is_stopped()) {
                    watch(Progress::Point(format!("{rate:.4} requests/s")));
                    let load = Load::Rate { rate, cv: self.plan.load.cv() };
                    let Some(point) = self.point(points.len(), made, load, Some(rate), watch).await? else { break };
                    search.tell(point.metrics.holds());
                    points.push(point);
                }
            }
        }
        Ok(points)
    }

    /// The run of that number, from 0: adapters, warm-up, requests. `None`: stopped before the first request.
    async fn point(
        &mut self,
        number: usize,
        adapters: usize,
        load: Load,
        swept: Option<f64>,
        watch: &mut dyn FnMut(Progress),
    ) -> Result<Option<Point>> {
        if let Some(pool) = &mut self.pool {
            pool.grow(adapters, self.stop, watch).await?;
        }
        if self.stop.is_stopped() {
            return Ok(None);
        }
        let workload = Arc::new(self.workload(number, adapters)?);
        let driver = Driver {
            channels: self.channels,
            workload: Arc::clone(&workload),
            timeout: self.plan.timeout,
            stop: self.stop,
        };
        if self.plan.warmup > 0 {
            let total = self.plan.warmup;
            let until = Until::Requests(total);
            let mut warm = |done: u64, _: &Record, _: Duration| watch(Progress::WarmUp { done, total });
            driver.run(Load::Concurrency(load.warm_up()), until, Phase::WarmUp, self.plan.seed, &mut warm).await?;
        }
        let sampler = timeline::Sampler::start(self.channels[0].clone(), self.plan.sample_every).await?;
        let total = match self.plan.until {
            Until::Requests(n) => Some(n),
            Until::Elapsed(_) => None,
        };
        let (mut failed, mut tokens) = (0, 0);
        let mut running = |done: u64, record: &Record, elapsed: Duration| {
            failed += u64::from(matches!(record.outcome, Outcome::Failed(_)));
            tokens += record.output_tokens as u64;
            watch(Progress::Running { done, total, failed, tokens, elapsed });
        };
        let ran = driver.run(load, self.plan.until, Phase::Measured, self.plan.seed, &mut running).await?;
        let seen = sampler.finish(ran.epoch).await;
        let point = Point::new(self.plan, &workload, load, swept, ran, seen);
        if swept.is_some() {
            watch(Progress::Measured(Box::new(point.clone())));
        }
        Ok(Some(point))
    }

    fn workload(&self, number: usize, adapters: usize) -> Result<Workload> {
        let (seed, popularity) = (self.plan.seed, self.plan.popularity);
        let workload = match (&self.plan.requests, &self.pool) {
            (Requests::Tasks(tasks), _) => Workload::of_tasks(tasks.clone(), popularity, seed),
            (Requests::Synthetic { synthetic, .. }, Some(pool)) => {
                let popularity = popularity.unwrap_or(Popularity::Uniform);
                let tenants = pool.tenants(adapters);
                Ok(Workload::synthetic(synthetic.clone(), tenants, popularity, seed, &self.facts)?.of_point(number))
            }
            (Requests::Synthetic { .. }, None) => Err(Error::internal("a synthetic run has no pool")),
        };
        Ok(workload?.sampled(self.plan.sampling))
    }
}

impl Plan {
    /// Refuses what cannot work on that server, before anything is uploaded.
    fn check(&self, facts: &proto::GetServerInfoResponse) -> Result<()> {
        if facts.model.as_ref().is_some_and(|m| m.encoder) {
            let name = facts.model.as_ref().map_or("", |m| m.name.as_str());
            return Err(Error::precondition(format!("the base {name} is an encoder: it generates nothing to measure")));
        }
        if let (Some(Sweep::Rate { .. }), true) = (&self.sweep, self.goodput.is_empty()) {
            let rule = "needs --goodput: a rate is raised until too few requests are within those limits";
            return Err(Error::invalid("sweep", "over rates", rule));
        }
        let Requests::Synthetic { adapters, recipe, synthetic } = &self.requests else {
            return match &self.sweep {
                Some(Sweep::Adapters(_)) => {
                    Err(Error::invalid("sweep", "over adapters", "makes its adapters itself: leave --tasks out"))
                }
                _ => Ok(()),
            };
        };
        let most = match &self.sweep {
            Some(Sweep::Adapters(counts)) => counts.iter().copied().max().unwrap_or(0),
            _ => *adapters,
        };
        let limits = facts.limits.unwrap_or_default();
        if most > limits.max_adapters as usize {
            let rule = format!("the server registers at most {} (max_adapters)", limits.max_adapters);
            return Err(Error::invalid("num_adapters", most, rule));
        }
        let prefix = if most > 0 { recipe.prefix_len.most() } else { Some(0) };
        let parts = [prefix, synthetic.prompt_len.most(), synthetic.output_len.most()];
        // Of an open-ended distribution what does not fit is cut, draw by draw.
        let sum: usize = parts.iter().map(|part| part.unwrap_or(1)).sum();
        if sum > limits.max_model_len as usize {
            let rule = format!("the server's longest sequence is {} (max_model_len)", limits.max_model_len);
            return Err(Error::invalid("prefix_len + prompt_len + output_len", format!("up to {sum} tokens"), rule));
        }
        Ok(())
    }
}
