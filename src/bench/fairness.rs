//! Whether some tenants are served better than others.
use super::measure::{ms, percentile};
use super::record::{Outcome, Record};

/// How evenly a run served its tenants.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fairness {
    /// Tenants that sent something.
    pub tenants: usize,
    /// Jain's index over [`TenantFigures::service`]: 1 is even, 1/n is all for one of n.
    pub jain: f64,
    /// Largest mean ttft of a tenant over the smallest.
    pub ttft_ratio: f64,
}

/// What one tenant got.
#[derive(Clone, Debug, PartialEq)]
pub struct TenantFigures {
    /// The adapter.
    pub name: String,
    /// Requests sent.
    pub sent: usize,
    /// Whole answers.
    pub completed: usize,
    /// Tokens received, also those of answers that broke off.
    pub output_tokens: usize,
    /// Mean, median and p99 of ttft in milliseconds; none where no token came.
    pub ttft: Option<(f64, f64, f64)>,
    /// Mean of e2el in milliseconds; none where nothing was completed.
    pub e2el: Option<f64>,
    /// Throughput normalised by demand: output tokens for each second that one of its requests was open. A tenant
    /// that asks for twice as much at once has to get twice the tokens for the same figure.
    pub service: f64,
}

/// The tenants that sent something, in the order of their numbers.
pub(super) fn tenants(names: &[String], records: &[Record]) -> Vec<TenantFigures> {
    let mut of_tenant = vec![Vec::new(); names.len()];
    records.iter().for_each(|record| of_tenant[record.tenant.0].push(record));
    let figures = |(name, records): (&String, Vec<&Record>)| {
        let mut ttft: Vec<f64> = records.iter().filter_map(|r| r.ttft).map(ms).collect();
        ttft.sort_by(f64::total_cmp);
        let mean = |values: &[f64]| (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64);
        let done: Vec<f64> = records.iter().filter(|r| r.outcome == Outcome::Done).map(|r| ms(r.e2el())).collect();
        let output_tokens = records.iter().map(|r| r.output_tokens).sum();
        let open: f64 = records.iter().map(|r| r.e2el().as_secs_f64()).sum();
        TenantFigures {
            name: name.clone(),
            sent: records.len(),
            completed: done.len(),
            output_tokens,
            ttft: mean(&ttft).map(|mean| (mean, percentile(&ttft, 0.5), percentile(&ttft, 0.99))),
            e2el: mean(&done),
            service: if open > 0.0 { output_tokens as f64 / open } else { 0.0 },
        }
    };
    names.iter().zip(of_tenant).filter(|(_, records)| !records.is_empty()).map(figures).collect()
}

impl Fairness {
    /// Over tenants that sent something.
    pub fn of(tenants: &[TenantFigures]) -> Self {
        let means = || tenants.iter().filter_map(|t| t.ttft).map(|(mean, ..)| mean);
        let (most, least) = (means().fold(0.0, f64::max), means().fold(f64::INFINITY, f64::min));
        let service: Vec<f64> = tenants.iter().map(|t| t.service).collect();
        Fairness {
            tenants: tenants.len(),
            jain: jain(&service),
            ttft_ratio: if least.is_finite() && least > 0.0 { most / least } else { 1.0 },
        }
    }
}

/// (Σx)² / (n Σx²) (Jain, Chiu, Hawe 1984); 1 where there is nothing to share.
fn jain(x: &[f64]) -> f64 {
    let (sum, squares) = (x.iter().sum::<f64>(), x.iter().map(|x| x * x).sum::<f64>());
    if squares > 0.0 { sum * sum / (x.len() as f64 * squares) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::record;
    use super::*;

    #[test]
    fn jain_is_one_for_equals_and_a_share_for_one() {
        assert!((jain(&[3.0; 7]) - 1.0).abs() < 1e-12);
        assert!((jain(&[1.0, 0.0, 0.0, 0.0]) - 0.25).abs() < 1e-12);
        assert_eq!(jain(&[]), 1.0);
    }

    #[test]
    fn more_demand_for_more_tokens_is_fair() {
        let names: Vec<String> = ["a", "b", "c"].map(str::to_owned).into();
        // Tenant 0 sends twice as much and gets twice as much.
        let even = [record(0, 0, 100, &[100]), record(0, 5, 100, &[100]), record(1, 0, 100, &[100])];
        let figures = tenants(&names, &even);
        assert_eq!(figures.len(), 2, "who sent nothing is no tenant");
        let fairness = Fairness::of(&figures);
        assert!((fairness.jain - 1.0).abs() < 1e-12 && (fairness.ttft_ratio - 1.0).abs() < 1e-12);
        // One that waits three times as long for the same is not served evenly.
        let uneven = [record(0, 0, 100, &[100]), record(1, 0, 500, &[100])];
        let fairness = Fairness::of(&tenants(&names, &uneven));
        assert!(fairness.jain < 0.81 && (fairness.ttft_ratio - 5.0).abs() < 1e-12, "{fairness:?}");
    }
}
