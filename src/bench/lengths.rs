//! How long prompts, outputs and prefixes are.
use crate::error::{Error, Result};
use rand::Rng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, LogNormal, Normal};
use std::fmt;
use std::str::FromStr;

/// No length is longer, whatever is asked for: 2^20 tokens.
const MOST: usize = 1 << 20;

/// A distribution of lengths in tokens. No draw is below 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lengths {
    /// `64`: always that.
    Fixed(usize),
    /// `uniform:16:128`: both ends included.
    Uniform {
        /// Shortest.
        low: usize,
        /// Longest.
        high: usize,
    },
    /// `normal:64:16`: rounded, and cut at 1.
    Normal {
        /// Mean.
        mean: f64,
        /// Standard deviation.
        deviation: f64,
    },
    /// `lognormal:64:48`: the mean and standard deviation are those of the lengths, not of their logarithms.
    LogNormal {
        /// Mean.
        mean: f64,
        /// Standard deviation.
        deviation: f64,
    },
}

impl Lengths {
    /// One length.
    pub fn draw(&self, rng: &mut StdRng) -> usize {
        let drawn = match *self {
            Lengths::Fixed(n) => return n,
            Lengths::Uniform { low, high } => return rng.random_range(low..=high),
            Lengths::Normal { mean, deviation } => Normal::new(mean, deviation).map(|d| d.sample(rng)),
            Lengths::LogNormal { mean, deviation } => {
                let variance = (1.0 + (deviation / mean).powi(2)).ln();
                LogNormal::new(mean.ln() - variance / 2.0, variance.sqrt()).map(|d| d.sample(rng))
            }
        };
        // Parsed values are finite and not negative: a distribution of them exists.
        drawn.unwrap_or(1.0).round().clamp(1.0, MOST as f64) as usize
    }

    /// The longest that can be drawn, where there is one.
    pub fn most(&self) -> Option<usize> {
        match *self {
            Lengths::Fixed(n) => Some(n),
            Lengths::Uniform { high, .. } => Some(high),
            Lengths::Normal { .. } | Lengths::LogNormal { .. } => None,
        }
    }
}

impl FromStr for Lengths {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |rule: &str| Error::invalid("length", format!("{text:?}"), rule);
        let whole = |part: &str| match part.parse::<usize>() {
            Ok(n) if (1..=MOST).contains(&n) => Ok(n),
            _ => Err(wrong(&format!("{part:?} must be a whole number from 1 to {MOST}"))),
        };
        let real = |part: &str, least: f64| match part.parse::<f64>() {
            Ok(x) if (least..=MOST as f64).contains(&x) => Ok(x),
            _ => Err(wrong(&format!("{part:?} must be a number from {least} to {MOST}"))),
        };
        match text.split(':').collect::<Vec<_>>()[..] {
            [n] => Ok(Lengths::Fixed(whole(n)?)),
            ["uniform", low, high] => match (whole(low)?, whole(high)?) {
                (low, high) if low <= high => Ok(Lengths::Uniform { low, high }),
                _ => Err(wrong("the second number must be at least the first")),
            },
            ["normal", mean, deviation] => {
                Ok(Lengths::Normal { mean: real(mean, 1.0)?, deviation: real(deviation, 0.0)? })
            }
            ["lognormal", mean, deviation] => {
                Ok(Lengths::LogNormal { mean: real(mean, 1.0)?, deviation: real(deviation, 0.0)? })
            }
            _ => Err(wrong("must be N, uniform:LOW:HIGH, normal:MEAN:SD or lognormal:MEAN:SD")),
        }
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lengths::Fixed(n) => write!(f, "{n}"),
            Lengths::Uniform { low, high } => write!(f, "uniform:{low}:{high}"),
            Lengths::Normal { mean, deviation } => write!(f, "normal:{mean}:{deviation}"),
            Lengths::LogNormal { mean, deviation } => write!(f, "lognormal:{mean}:{deviation}"),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn forms_come_back_as_they_were_given() {
        for text in ["64", "uniform:16:128", "normal:64:16", "lognormal:64.5:48"] {
            assert_eq!(text.parse::<Lengths>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn errors_name_the_value_and_the_limit() {
        for (text, part) in [
            ("0", "from 1 to 1048576"),
            ("uniform:8", "uniform:LOW:HIGH"),
            ("uniform:9:8", "at least the first"),
            ("normal:64:-1", "\"-1\" must be a number from 0"),
            ("normal:NaN:1", "\"NaN\""),
            ("lognormal:0:1", "from 1 to"),
            ("gamma:1:2", "must be N"),
        ] {
            let message = text.parse::<Lengths>().unwrap_err().to_string();
            assert!(message.contains(part) && message.contains(text), "{text}: {message}");
        }
    }

    #[test]
    fn draws_have_the_mean_and_deviation_asked_for() {
        let mut rng = StdRng::seed_from_u64(1);
        for (text, mean, deviation) in [
            ("40", 40.0, 0.0),
            ("uniform:11:29", 20.0, 5.477),
            ("normal:64:16", 64.0, 16.0),
            ("lognormal:64:48", 64.0, 48.0),
        ] {
            let lengths: Lengths = text.parse().unwrap();
            let drawn: Vec<f64> = (0..40_000).map(|_| lengths.draw(&mut rng) as f64).collect();
            let m = drawn.iter().sum::<f64>() / drawn.len() as f64;
            let d = (drawn.iter().map(|x| (x - m).powi(2)).sum::<f64>() / drawn.len() as f64).sqrt();
            assert!((m - mean).abs() < 0.02 * mean && (d - deviation).abs() <= 0.05 * deviation, "{text}: {m} {d}");
            assert!(drawn.iter().all(|x| *x >= 1.0 && lengths.most().is_none_or(|most| *x <= most as f64)));
        }
    }
}
