//! AdamW, the schedule of its learning rate, and clipping: torch's formulas, to the bit of a rounding.
use crate::error::Result;
use candle_core::{Tensor, Var};
use serde::{Deserialize, Serialize};

/// AdamW's constants (Loshchilov and Hutter 2019; `torch.optim.AdamW`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Added to the root of the latter.
    pub eps: f64,
    /// Weights shrink by this times the learning rate.
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm, taken over all weights of a job; 0: they are not.
    pub max_gradient_norm: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, max_gradient_norm: 1.0 }
    }
}

/// The optimiser of one job.
pub struct AdamW {
    config: AdamWConfig,
    /// Mean of gradients, mean of squares, of each weight.
    moments: Vec<(Tensor, Tensor)>,
    /// Steps taken.
    steps: i32,
}

impl AdamW {
    /// For `weights`, in the order in which [`AdamW::step`] will get them.
    pub fn new<'a>(weights: impl Iterator<Item = &'a Var>, config: AdamWConfig) -> Result<Self> {
        let moments = weights.map(|w| Ok((w.zeros_like()?, w.zeros_like()?))).collect::<Result<_>>()?;
        Ok(AdamW { config, moments, steps: 0 })
    }

    /// Mean of gradients and mean of squares of each weight, and the steps taken: all that a later run needs to go on.
    pub fn state(&self) -> (&[(Tensor, Tensor)], i32) {
        (&self.moments, self.steps)
    }

    /// Goes on from [`AdamW::state`].
    pub fn resume(&mut self, moments: Vec<(Tensor, Tensor)>, steps: i32) {
        (self.moments, self.steps) = (moments, steps);
    }

    /// One step: clips the gradients, moves the weights. Returns the gradients' norm before clipping.
    pub fn step(&mut self, weights: &[(&Var, &Tensor)], learning_rate: f64) -> Result<f64> {
        let c = self.config;
        let mut squares = 0f64;
        for (_, gradient) in weights {
            squares += f64::from(gradient.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
        let norm = squares.sqrt();
        let clip = if c.max_gradient_norm > 0.0 { (c.max_gradient_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        self.steps += 1;
        let (first, second) = (1.0 - c.beta1.powi(self.steps), 1.0 - c.beta2.powi(self.steps));
        for ((weight, gradient), (mean, square)) in weights.iter().zip(&mut self.moments) {
            let gradient = (*gradient * clip)?;
            *mean = ((&*mean * c.beta1)? + (&gradient * (1.0 - c.beta1))?)?;
            *square = ((&*square * c.beta2)? + (gradient.sqr()? * (1.0 - c.beta2))?)?;
            let root = ((square.sqrt()? / second.sqrt())? + c.eps)?;
            let decayed = (weight.as_tensor() * (1.0 - learning_rate * c.weight_decay))?;
            weight.set(&(decayed - ((&*mean / root)? * (learning_rate / first))?)?)?;
        }
        Ok(norm)
    }
}

/// How the learning rate goes over the steps of a job, as transformers' `get_scheduler` has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Up in a line, then constant.
    Constant,
    /// Up in a line, then down to 0 in a line.
    #[default]
    Linear,
    /// Up in a line, then down to 0 in half a cosine.
    Cosine,
}

impl Schedule {
    /// The share of the full rate at `step`, counted from 0, of `total` with `warmup` steps at the start. Step 0 of a warm-up
    /// has the rate 0.
    pub fn share(self, step: usize, warmup: usize, total: usize) -> f64 {
        if step < warmup {
            return step as f64 / warmup.max(1) as f64;
        }
        let done = (step - warmup) as f64 / (total.saturating_sub(warmup)).max(1) as f64;
        match self {
            Schedule::Constant => 1.0,
            Schedule::Linear => (1.0 - done).max(0.0),
            Schedule::Cosine => (0.5 * (1.0 + (std::f64::consts::PI * done).cos())).max(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use candle_core::Device;

    #[test]
    fn schedules_warm_up_and_come_down() {
        let of = |s: Schedule, step| s.share(step, 4, 40);
        assert_eq!((of(Schedule::Linear, 0), of(Schedule::Linear, 1), of(Schedule::Linear, 4)), (0.0, 0.25, 1.0));
        assert_eq!((of(Schedule::Linear, 22), of(Schedule::Linear, 40)), (0.5, 0.0));
        assert!((of(Schedule::Cosine, 22) - 0.5).abs() < 1e-12 && of(Schedule::Constant, 39) == 1.0);
        assert_eq!(Schedule::Linear.share(0, 0, 10), 1.0);
    }

    /// One weight, by hand: the first step moves by the learning rate against the gradient's sign.
    #[test]
    fn the_first_step_is_known() {
        let w = Var::new(&[2f32, -1.0], &Device::Cpu).unwrap();
        let config = AdamWConfig { weight_decay: 0.5, max_gradient_norm: 0.0, ..AdamWConfig::default() };
        let mut adam = AdamW::new([&w].into_iter(), config).unwrap();
        let gradient = Tensor::new(&[3f32, -4.0], &Device::Cpu).unwrap();
        assert_eq!(adam.step(&[(&w, &gradient)], 0.1).unwrap(), 5.0);
        let got = w.to_vec1::<f32>().unwrap();
        // w (1 - 0.1 * 0.5) - 0.1 sign(g)
        assert!((got[0] - 1.8).abs() < 1e-6 && (got[1] + 0.85).abs() < 1e-6, "{got:?}");
    }
}
