//! Rotary frequencies and what is done to them: transformers' `modeling_rope_utils`, in its old and new keys.
use super::{Keys, bad, unserved};
use crate::error::Result;
use serde_json::Value;
use std::f64::consts::PI;

/// The frequencies of one kind of layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric series.
    pub theta: f64,
    /// Elements of a head that turn; even.
    pub dim: usize,
    /// What is done to the series.
    pub scaling: RopeScaling,
}

/// transformers' `rope_type`.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum RopeScaling {
    Default,
    /// Positions divided by `factor`.
    Linear {
        factor: f64,
    },
    /// A larger base for sequences longer than `original`. transformers takes a new base for every length, which no
    /// cache of keys can follow; here the longest sequence that is served decides, once.
    Dynamic {
        factor: f64,
        original: f64,
    },
    /// Peng et al. 2023: low frequencies divided by `factor`, high ones kept, a ramp between; cos and sin times `scale`.
    Yarn {
        factor: f64,
        original: f64,
        beta_fast: f64,
        beta_slow: f64,
        truncate: bool,
        scale: f64,
    },
    /// Llama 3.1: as yarn, with a ramp over wavelengths.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original: f64,
    },
    /// Ding et al. 2024 (Phi-3): each frequency has its own factor, another one where sequences longer than `original`
    /// are served; cos and sin times `scale`.
    LongRope {
        short: Vec<f64>,
        long: Vec<f64>,
        original: f64,
        scale: f64,
    },
}

impl Rope {
    /// Reads the parameters. `own` are those of a layer type, if the family has several.
    pub(super) fn parse(v: Keys<'_>, own: Option<&Value>, default: Defaults) -> Result<Self> {
        let number = |key: &str| own.and_then(|p| p.get(key)).and_then(Value::as_f64);
        let theta = number("rope_theta").unwrap_or(default.theta);
        if !(theta.is_finite() && theta > 0.0) {
            return Err(bad("rope_theta", theta, "must be above 0"));
        }
        let share = number("partial_rotary_factor").unwrap_or(default.share);
        let dim = (default.head_dim as f64 * share) as usize;
        if dim == 0 || dim > default.head_dim || !dim.is_multiple_of(2) {
            let rule = format!("must leave an even number of {} elements to turn, not {dim}", default.head_dim);
            return Err(bad("partial_rotary_factor", share, rule));
        }
        let kind = own.and_then(|p| p.get("rope_type").or_else(|| p.get("type"))).and_then(Value::as_str);
        let positive = |key: &'static str| {
            let valid = number(key).filter(|f| *f > 0.0 && f.is_finite());
            valid.ok_or_else(|| bad(key, own.map_or(&Value::Null, |p| &p[key]), "must be a number above 0"))
        };
        let positions = default.positions as f64;
        let original = || {
            let key = "original_max_position_embeddings";
            // Phi-3 has it beside the parameters, and there it wins.
            let outside = v.0.get(key).and_then(Value::as_f64);
            let original = outside.or_else(|| number(key)).unwrap_or(positions);
            if original > 1.0 { Ok(original) } else { Err(bad(key, original, "must be above 1")) }
        };
        let scaling = match kind.unwrap_or("default") {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: positive("factor")? },
            "dynamic" => RopeScaling::Dynamic { factor: positive("factor")?, original: positions },
            // Early Phi-3 configs say `su`, and `yarn` for the same.
            "longrope" | "su" => long_rope(own, dim, positions, original()?)?,
            "yarn" if own.is_some_and(|p| p.get("short_factor").is_some()) => {
                long_rope(own, dim, positions, original()?)?
            }
            "yarn" => {
                let original = original()?;
                let factor = if number("factor").is_some() { positive("factor")? } else { positions / original };
                let mscale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
                let nonzero = |key| number(key).filter(|v| *v != 0.0);
                let scale = number("attention_factor").unwrap_or_else(|| {
                    match (nonzero("mscale"), nonzero("mscale_all_dim")) {
                        (Some(m), Some(all)) => mscale(m) / mscale(all),
                        _ => mscale(1.0),
                    }
                });
                let truncate = own.and_then(|p| p.get("truncate")).and_then(Value::as_bool).unwrap_or(true);
                let (beta_fast, beta_slow) =
                    (nonzero("beta_fast").unwrap_or(32.0), nonzero("beta_slow").unwrap_or(1.0));
                RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, scale }
            }
            "llama3" => RopeScaling::Llama3 {
                factor: positive("factor")?,
                low_freq_factor: positive("low_freq_factor")?,
                high_freq_factor: positive("high_freq_factor")?,
                original: original()?,
            },
            other => {
                let served = "served are default, linear, dynamic, yarn, llama3, longrope";
                return Err(unserved("rope_type", &other.into(), served));
            }
        };
        Ok(Rope { theta, dim, scaling })
    }

    /// Positions that the scaling reaches, if more than `max_position_embeddings` says, and those that it is exact for
    /// by default, if fewer.
    pub(super) fn reach(&self, positions: usize) -> (usize, usize) {
        match self.scaling {
            RopeScaling::Dynamic { factor, original } => (positions.max((original * factor) as usize), positions),
            RopeScaling::Yarn { factor, original, .. } => (positions.max((original * factor) as usize), positions),
            RopeScaling::LongRope { original, .. } => (positions, positions.min(original as usize)),
            _ => (positions, positions),
        }
    }

    /// Frequencies in radians a position `[dim / 2]`, and the factor of cos and sin, where sequences of up to `longest`
    /// tokens are served.
    pub fn frequencies(&self, longest: usize) -> (Vec<f32>, f32) {
        let dim = self.dim as f64;
        let power = |theta: f64| move |i: usize| (theta as f32).powf(2.0 * i as f32 / dim as f32);
        let half = 0..self.dim / 2;
        let base = half.clone().map(power(self.theta)).map(|f| 1.0 / f);
        match &self.scaling {
            RopeScaling::Default => (base.collect(), 1.0),
            RopeScaling::Linear { factor } => (base.map(|f| f / *factor as f32).collect(), 1.0),
            RopeScaling::Dynamic { factor, original } => {
                let length = (longest as f64).max(*original);
                let grown = self.theta * (factor * length / original - (factor - 1.0)).powf(dim / (dim - 2.0));
                (half.map(power(grown)).map(|f| 1.0 / f).collect(), 1.0)
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, truncate, scale } => {
                let turns = |n: f64| dim * (original / (n * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (turns(*beta_fast), turns(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
                if low == high {
                    high += 0.001;
                }
                let mix = |(i, f): (usize, f32)| {
                    let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
                    f / *factor as f32 * ramp + f * (1.0 - ramp)
                };
                (base.enumerate().map(mix).collect(), *scale as f32)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let (low, high) = (original / low_freq_factor, original / high_freq_factor);
                let mix = |f: f32| {
                    let wavelength = 2.0 * PI / f64::from(f);
                    if wavelength < high {
                        return f;
                    }
                    if wavelength > low {
                        return f / *factor as f32;
                    }
                    let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    ((1.0 - smooth) * f64::from(f) / factor + smooth * f64::from(f)) as f32
                };
                (base.map(mix).collect(), 1.0)
            }
            RopeScaling::LongRope { short, long, original, scale } => {
                let factors = if longest as f64 > *original { long } else { short };
                (base.zip(factors).map(|(f, by)| f / *by as f32).collect(), *scale as f32)
            }
        }
    }
}

/// What holds where the parameters say nothing.
#[derive(Clone, Copy)]
pub(super) struct Defaults {
    pub theta: f64,
    /// Share of a head that turns.
    pub share: f64,
    pub head_dim: usize,
    pub positions: usize,
}

fn long_rope(own: Option<&Value>, dim: usize, positions: f64, original: f64) -> Result<RopeScaling> {
    let list = |key: &'static str| {
        let values = own.and_then(|p| p.get(key)).and_then(Value::as_array);
        let values: Vec<f64> = values.into_iter().flatten().filter_map(Value::as_f64).filter(|f| *f > 0.0).collect();
        if values.len() == dim / 2 {
            return Ok(values);
        }
        Err(bad(key, format!("{} numbers above 0", values.len()), format!("must be {} of them", dim / 2)))
    };
    let number = |key: &str| own.and_then(|p| p.get(key)).and_then(Value::as_f64);
    let factor = number("factor").unwrap_or(positions / original);
    let scale = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
    let scale = number("attention_factor").unwrap_or(scale);
    Ok(RopeScaling::LongRope { short: list("short_factor")?, long: list("long_factor")?, original, scale })
}
