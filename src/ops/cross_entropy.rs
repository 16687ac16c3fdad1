//! `cross_entropy`: the loss of a language model's head, in chunks: `[tokens, vocab]` never exists at once.
//!
//! For hidden rows h_i and targets t_i, loss = sum_i (log sum_j e^(z_ij) - z_i,t_i) over the logits z_i = head(h_i), capped
//! as the model caps them. The gradient of z_i is softmax(z_i) - onehot(t_i), times the slope of the cap; logits are
//! computed again for it.
use super::{Linear, f32_slice};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, Var, bail};
use std::sync::Arc;

/// Rows whose logits are held at once.
const CHUNK: usize = 64;

#[derive(Clone)]
struct CrossEntropy {
    head: Linear,
    cap: Option<f64>,
    targets: Arc<[u32]>,
}

/// `hidden` `[n, hidden]`, one target token each -> the sum of their negative log-likelihoods, `[]`. `cap`: logits z become
/// c tanh(z / c).
pub fn cross_entropy(hidden: &Tensor, targets: &[u32], head: &Linear, cap: Option<f64>) -> Result<Tensor> {
    hidden.apply_op1(CrossEntropy { head: head.clone(), cap, targets: targets.into() })
}

impl CrossEntropy {
    /// Calls `f` with each chunk's first row and its logits `[rows, vocab]`, capped.
    fn chunks(&self, hidden: &Tensor, mut f: impl FnMut(usize, &Tensor, Vec<Vec<f32>>) -> Result<()>) -> Result<()> {
        let n = hidden.dim(0)?;
        for start in (0..n).step_by(CHUNK) {
            let rows = hidden.narrow(0, start, CHUNK.min(n - start))?.contiguous()?;
            let logits = self.head.forward(&rows)?;
            let logits = match self.cap {
                None => logits,
                Some(cap) => ((logits / cap)?.tanh()? * cap)?,
            };
            f(start, &rows, logits.to_vec2()?)?;
        }
        Ok(())
    }

    fn target(&self, row: usize, vocab: usize) -> Result<usize> {
        match self.targets.get(row) {
            Some(t) if (*t as usize) < vocab => Ok(*t as usize),
            other => bail!("cross_entropy: target {other:?} of row {row}, the vocabulary has {vocab}"),
        }
    }
}

/// max and log of the sum of exponentials, in f64: a sum over the vocabulary.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    most + logits.iter().map(|z| (f64::from(*z) - most).exp()).sum::<f64>().ln()
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, hidden: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (n, width) = layout.shape().dims2()?;
        if n != self.targets.len() {
            bail!("cross_entropy: {n} rows, {} targets", self.targets.len());
        }
        let rows = f32_slice(hidden, layout, "cross_entropy")?;
        let hidden = Tensor::from_slice(rows, (n, width), &candle_core::Device::Cpu)?;
        let mut loss = 0f64;
        self.chunks(&hidden, |start, _, logits| {
            for (i, logits) in logits.iter().enumerate() {
                let target = self.target(start + i, logits.len())?;
                loss += log_sum_exp(logits) - f64::from(logits[target]);
            }
            Ok(())
        })?;
        Ok((CpuStorage::F32(vec![loss as f32]), Shape::from(())))
    }

    fn bwd(&self, hidden: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let scale = grad.to_scalar::<f32>()?;
        let mut parts = Vec::new();
        self.chunks(hidden, |start, rows, mut logits| {
            for (i, logits) in logits.iter_mut().enumerate() {
                let (target, norm) = (self.target(start + i, logits.len())?, log_sum_exp(logits));
                for (j, z) in logits.iter_mut().enumerate() {
                    let p = (f64::from(*z) - norm).exp() as f32 - if j == target { 1.0 } else { 0.0 };
                    let slope = self.cap.map_or(1.0, |c| 1.0 - (*z / c as f32).powi(2));
                    *z = p * slope * scale;
                }
            }
            // The head's own gradient takes it to the hidden rows.
            let rows = Var::from_tensor(rows)?;
            let by = Tensor::new(logits, rows.device())?;
            let gradients = (self.head.forward(&rows)? * by)?.sum_all()?.backward()?;
            parts.push(
                gradients.get(&rows).cloned().ok_or_else(|| candle_core::Error::msg("the head has no gradient"))?,
            );
            Ok(())
        })?;
        Ok(Some(Tensor::cat(&parts, 0)?))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::linear::Cpu;
    use candle_core::Device;

    /// Loss and gradient against f64, over more rows than a chunk.
    #[test]
    fn agrees_with_f64() {
        let (n, width, vocab) = (70, 5, 11);
        let noise = |seed: usize, n: usize| -> Vec<f32> {
            (0..n).map(|i| (((i + 17 * seed) as f64 * 12.9898).sin() * 43758.547).fract() as f32 * 2.0).collect()
        };
        let (x, w) = (noise(1, n * width), noise(2, vocab * width));
        let targets: Vec<u32> = (0..n as u32).map(|i| i * 7 % vocab as u32).collect();
        let tensor = |v: &[f32], rows: usize| Tensor::from_slice(v, (rows, width), &Device::Cpu).unwrap();
        let head = Linear::new(&[tensor(&w, vocab)], &[None], &Cpu::new(1)).unwrap();
        for cap in [None, Some(1.5)] {
            let loss = |x: &[f32]| -> f64 {
                let row = |x: &[f32], target: u32| {
                    let dot = |j: usize| -> f64 {
                        x.iter().zip(&w[j * width..]).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
                    };
                    let z: Vec<f64> = (0..vocab).map(dot).map(|z| cap.map_or(z, |c: f64| c * (z / c).tanh())).collect();
                    z.iter().map(|z| z.exp()).sum::<f64>().ln() - z[target as usize]
                };
                x.chunks(width).zip(&targets).map(|(x, t)| row(x, *t)).sum()
            };
            let hidden = Var::from_tensor(&tensor(&x, n)).unwrap();
            let got = cross_entropy(&hidden, &targets, &head, cap).unwrap();
            assert!((f64::from(got.to_scalar::<f32>().unwrap()) - loss(&x)).abs() < 1e-4 * loss(&x));
            let gradients = (got * 0.5).unwrap().backward().unwrap();
            let got = gradients.get(&hidden).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for i in (0..x.len()).step_by(3) {
                let mut moved = x.clone();
                moved[i] = x[i] + 1e-3;
                let (above, up) = (loss(&moved), moved[i]);
                moved[i] = x[i] - 1e-3;
                let want = 0.5 * (above - loss(&moved)) / f64::from(up - moved[i]);
                assert!((f64::from(got[i]) - want).abs() < 1e-4 * want.abs().max(1.0), "{i}: {} {want}", got[i]);
            }
        }
    }
}
