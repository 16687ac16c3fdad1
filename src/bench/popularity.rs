//! Which adapter the next request names.
use super::workload::Tenant;
use crate::error::{Context, Error, Kind, Result};
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand::rngs::StdRng;
use std::fmt;
use std::str::FromStr;

/// How requests spread over adapters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Popularity {
    /// All name the first.
    Identical,
    /// Each names another, in turn.
    Distinct,
    /// Each names any, with equal chances.
    Uniform,
    /// `zipf:A`: the one of rank r has a share in proportion to r^-A.
    Zipf(f64),
}

impl Popularity {
    /// The expected share of each of `n` adapters.
    pub fn shares(self, n: usize) -> Vec<f64> {
        let weight = |rank: usize| match self {
            Popularity::Identical => f64::from(u8::from(rank == 1)),
            Popularity::Distinct | Popularity::Uniform => 1.0,
            Popularity::Zipf(a) => (rank as f64).powf(-a),
        };
        let weights: Vec<f64> = (1..=n).map(weight).collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / sum).collect()
    }
}

impl FromStr for Popularity {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |rule| Error::invalid("popularity", format!("{text:?}"), rule);
        match (text, text.strip_prefix("zipf:").map(str::parse::<f64>)) {
            ("identical", _) => Ok(Popularity::Identical),
            ("distinct", _) => Ok(Popularity::Distinct),
            ("uniform", _) => Ok(Popularity::Uniform),
            (_, Some(Ok(a))) if (0.0..=10.0).contains(&a) => Ok(Popularity::Zipf(a)),
            (_, Some(_)) => Err(wrong("the exponent must be a number from 0 to 10")),
            _ => Err(wrong("must be identical, distinct, uniform or zipf:A")),
        }
    }
}

impl fmt::Display for Popularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Popularity::Identical => f.write_str("identical"),
            Popularity::Distinct => f.write_str("distinct"),
            Popularity::Uniform => f.write_str("uniform"),
            Popularity::Zipf(a) => write!(f, "zipf:{a}"),
        }
    }
}

/// A popularity over so many adapters, ready to draw from.
#[derive(Debug)]
pub(super) enum Chooser {
    InTurn(u64),
    Drawn(WeightedIndex<f64>),
}

impl Chooser {
    /// Over `n` adapters, at least one.
    pub fn new(popularity: Popularity, n: usize) -> Result<Self> {
        Ok(match popularity {
            Popularity::Distinct => Chooser::InTurn(n.max(1) as u64),
            _ => Chooser::Drawn(
                WeightedIndex::new(popularity.shares(n.max(1))).or_kind(Kind::InvalidArgument, "popularity")?,
            ),
        })
    }

    /// For request number `index`.
    pub fn choose(&self, index: u64, rng: &mut StdRng) -> Tenant {
        match self {
            Chooser::InTurn(n) => Tenant((index % n) as usize),
            Chooser::Drawn(weights) => Tenant(weights.sample(rng)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rand::SeedableRng;

    fn counts(text: &str, n: usize, draws: u64) -> Vec<f64> {
        let chooser = Chooser::new(text.parse().unwrap(), n).unwrap();
        let mut rng = StdRng::seed_from_u64(3);
        let mut counts = vec![0.0; n];
        (0..draws).for_each(|i| counts[chooser.choose(i, &mut rng).0] += 1.0 / draws as f64);
        counts
    }

    #[test]
    fn zipf_shares_fall_as_the_power_of_the_rank() {
        let shares = Popularity::Zipf(1.0).shares(100);
        assert!((shares[0] / shares[9] - 10.0).abs() < 1e-9 && (shares.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        let seen = counts("zipf:1", 100, 200_000);
        for rank in [0, 1, 4, 20] {
            assert!((seen[rank] / shares[rank] - 1.0).abs() < 0.06, "{rank}: {} of {}", seen[rank], shares[rank]);
        }
        // Exponent 0 is uniform.
        assert_eq!(Popularity::Zipf(0.0).shares(4), [0.25; 4]);
    }

    #[test]
    fn the_others_are_what_they_say() {
        assert!((counts("identical", 4, 100)[0] - 1.0).abs() < 1e-9);
        assert!(counts("distinct", 4, 100).iter().all(|share| (share - 0.25).abs() < 1e-9));
        assert!(counts("uniform", 4, 40_000).iter().all(|share| (share - 0.25).abs() < 0.02));
    }

    #[test]
    fn errors_say_what_there_is() {
        for text in ["zip", "zipf", "zipf:x", "zipf:-1", "zipf:inf"] {
            let message = text.parse::<Popularity>().unwrap_err().to_string();
            assert!(message.contains("popularity") && message.contains(text), "{message}");
        }
    }
}
