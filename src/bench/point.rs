//! One run, measured: the only run there is, or a point of a sweep.
use super::Plan;
use super::driver::{Load, Ran};
use super::fairness::{self, Fairness, TenantFigures};
use super::measure::{Latencies, Metrics};
use super::record::Record;
use super::timeline::{self, Occupancy, Sample, Seen, ServerCounts};
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
    /// How full the server was.
    pub occupancy: Occupancy,
    /// The server, look by look; thinned out where there were many.
    pub timeline: Vec<Sample>,
    /// Requests whose output was not as long as drawn, though they were whole. Must be 0.
    pub wrong_length: usize,
    pub(super) latencies: Latencies,
}

impl Point {
    pub(super) fn new(plan: &Plan, workload: &Workload, load: Load, swept: Option<f64>, ran: Ran, seen: Seen) -> Self {
        let (Ran { records, unsent, .. }, Seen { mut samples, counts }) = (ran, seen);
        timeline::count_adapters(&mut samples, &records);
        let of_tenants = fairness::tenants(workload.tenants(), &records);
        let short = |r: &&Record| r.outcome == super::Outcome::Done && r.wanted.is_some_and(|n| n != r.output_tokens);
        Point {
            swept,
            tenants: workload.tenants().len(),
            load,
            metrics: Metrics::of(&records, unsent, &plan.goodput),
            fairness: Fairness::of(&of_tenants),
            of_tenants,
            server: counts,
            occupancy: Occupancy::of(&samples),
            timeline: timeline::thinned(&samples),
            wrong_length: records.iter().filter(short).count(),
            latencies: Latencies::of(&records),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::record::tests::record;
    use super::*;
    use crate::bench::{Limits, Requests, Setup, Sweep, Tasks, Until};
    use std::time::{Duration, Instant};

    /// For a tenant of that name, within 500 ms.
    pub(in crate::bench) fn plan(tenant: &str, sweep: Option<Sweep>) -> Plan {
        let line = serde_json::json!({ "adapter": tenant, "prompt": "x" }).to_string();
        Plan {
            requests: Requests::Tasks(Tasks::parse(&line, None, false).unwrap()),
            popularity: None,
            load: Load::Concurrency(1),
            until: Until::Requests(400),
            warmup: 0,
            seed: 0,
            sampling: None,
            timeout: Duration::from_secs(1),
            goodput: Limits { e2el: Some(Duration::from_millis(500)), ..Limits::default() },
            sweep,
            sample_every: Duration::from_millis(50),
            setup: Setup::default(),
        }
    }

    /// What `plan` measures where requests became `records`.
    pub(in crate::bench) fn point(plan: &Plan, swept: Option<f64>, records: Vec<Record>) -> Point {
        let Requests::Tasks(tasks) = &plan.requests else { panic!("tasks alone") };
        let workload = Workload::of_tasks(tasks.clone(), None, 0).unwrap();
        let look = |ms| Sample { at: Duration::from_millis(ms), running: 1, kv_use: 0.5, ..Sample::default() };
        let seen = Seen { samples: vec![look(0), look(60), look(5000)], counts: ServerCounts::default() };
        let load = swept.map_or(plan.load, |rate| Load::Rate { rate, cv: 0.0 });
        Point::new(plan, &workload, load, swept, Ran { records, unsent: 0, epoch: Instant::now() }, seen)
    }

    #[test]
    fn a_point_counts_who_runs_at_every_look() {
        let point = point(&plan("a", None), None, vec![record(0, 0, 50, &[20])]);
        assert_eq!(point.timeline.iter().map(|s| s.adapters).collect::<Vec<_>>(), [1, 1, 0]);
        assert_eq!((point.occupancy.adapters.peak, point.occupancy.kv_use.peak), (1.0, 0.5));
        assert!((point.occupancy.adapters.mean - 2.0 / 3.0).abs() < 1e-9);
        assert_eq!((point.metrics.good_share, point.wrong_length), (Some(1.0), 0));
    }
}
