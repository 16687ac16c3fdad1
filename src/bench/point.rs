//! One run, measured: the only run there is, or a point of a sweep.
use super::Plan;
use super::driver::Load;
use super::fairness::{self, Fairness, TenantFigures};
use super::measure::{Latencies, Metrics};
use super::record::Record;
use super::timeline::{self, Sample, Seen, ServerCounts};
use super::workload::Workload;

/// What came out of one run.
#[derive(Clone, Debug)]
pub struct Point {
    /// What the sweep set for it: adapters, or requests a second.
    pub swept: Option<f64>,
    /// Adapters that requests could name; the bare base counts where tasks are for it.
    pub tenants: usize,
    /// When requests were sent.
    pub load: Load,
    /// The figures.
    pub metrics: Metrics,
    /// How evenly tenants were served.
    pub fairness: Fairness,
    /// Each tenant that sent something.
    pub of_tenants: Vec<TenantFigures>,
    /// What the server counted.
    pub server: ServerCounts,
    /// The server, look by look.
    pub timeline: Vec<Sample>,
    /// Requests whose output was not as long as drawn, though they were whole. Must be 0.
    pub wrong_length: usize,
    pub(super) latencies: Latencies,
}

impl Point {
    pub(super) fn new(
        plan: &Plan,
        workload: &Workload,
        load: Load,
        swept: Option<f64>,
        records: Vec<Record>,
        seen: Seen,
    ) -> Self {
        let Seen { mut samples, counts } = seen;
        timeline::count_adapters(&mut samples, &records);
        let of_tenants = fairness::tenants(workload.tenants(), &records);
        let short = |r: &&Record| r.outcome == super::Outcome::Done && r.wanted.is_some_and(|n| n != r.output_tokens);
        Point {
            swept,
            tenants: workload.tenants().len(),
            load,
            metrics: Metrics::of(&records, &plan.goodput),
            fairness: Fairness::of(&of_tenants),
            of_tenants,
            server: counts,
            timeline: samples,
            wrong_length: records.iter().filter(short).count(),
            latencies: Latencies::of(&records),
        }
    }

    /// Mean and maximum over the timeline, while anything ran.
    pub(super) fn over_time(&self, value: impl Fn(&Sample) -> f64) -> (f64, f64) {
        let values: Vec<f64> = self.timeline.iter().filter(|s| s.running > 0).map(value).collect();
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        (mean, values.into_iter().fold(0.0, f64::max))
    }
}
