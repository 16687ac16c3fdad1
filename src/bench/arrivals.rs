//! When requests of an open loop are sent.
use crate::error::{Context, Kind, Result};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Gamma};
use std::time::Duration;

/// Times since the start, one a request: gaps are gamma distributed with mean 1/rate and the given coefficient of
/// variation. 1 is Poisson, 0 a metronome, above 1 are bursts. Never ends.
#[derive(Debug)]
pub struct Arrivals {
    gap: Gap,
    rng: StdRng,
    /// Seconds.
    next: f64,
}

#[derive(Debug)]
enum Gap {
    Constant(f64),
    Drawn(Gamma<f64>),
}

impl Arrivals {
    /// `rate` requests a second.
    ///
    /// # Errors
    /// `InvalidArgument` where no such distribution exists.
    pub fn new(rate: f64, cv: f64, seed: u64) -> Result<Self> {
        let gap = if cv == 0.0 {
            Gap::Constant(1.0 / rate)
        } else {
            let (shape, scale) = (1.0 / (cv * cv), cv * cv / rate);
            Gap::Drawn(Gamma::new(shape, scale).or_kind(Kind::InvalidArgument, format!("rate {rate}, cv {cv}"))?)
        };
        // Its own stream: the requests of a seed are the same however they arrive.
        Ok(Arrivals { gap, rng: StdRng::seed_from_u64(seed ^ 0x6172_7269_7661_6c73), next: 0.0 })
    }
}

impl Iterator for Arrivals {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let now = self.next;
        self.next += match &self.gap {
            Gap::Constant(gap) => *gap,
            Gap::Drawn(gamma) => gamma.sample(&mut self.rng),
        };
        Some(Duration::try_from_secs_f64(now).unwrap_or(Duration::MAX))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn gaps(rate: f64, cv: f64, n: usize) -> Vec<f64> {
        let times: Vec<f64> = Arrivals::new(rate, cv, 5).unwrap().take(n + 1).map(|t| t.as_secs_f64()).collect();
        times.windows(2).map(|w| w[1] - w[0]).collect()
    }

    #[test]
    fn gaps_have_the_mean_and_variation_asked_for() {
        for (rate, cv) in [(10.0, 0.0), (10.0, 0.5), (2.0, 1.0), (50.0, 3.0)] {
            let gaps = gaps(rate, cv, 100_000);
            let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
            let deviation = (gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
            assert!((mean * rate - 1.0).abs() < 0.03, "rate {rate} cv {cv}: mean {mean}");
            assert!((deviation / mean - cv).abs() < 0.03 * cv.max(0.01), "rate {rate} cv {cv}: {}", deviation / mean);
        }
    }

    #[test]
    fn a_seed_gives_the_same_times() {
        let take = |seed| Arrivals::new(3.0, 1.0, seed).unwrap().take(50).collect::<Vec<_>>();
        assert_eq!(take(7), take(7));
        assert_ne!(take(7), take(8));
        assert_eq!(take(7)[0], Duration::ZERO);
    }
}
