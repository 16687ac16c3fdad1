//! `cross_entropy`: the loss of a language model's head and its gradient in one go, in chunks of rows: `[tokens, vocab]`
//! never exists at once.
//!
//! For hidden rows h_i and targets t_i, nll_i = log sum_j e^(z_ij) - z_i,t_i over the logits z_i = head(h_i), capped as the
//! model caps them. The gradient of z_i is softmax(z_i) - onehot(t_i), times the slope of the cap; the head's transpose
//! takes it to h_i. No graph: the logits of a chunk are used for both and then gone.
pub mod device;

use super::{Linear, Shared, float};
use candle_core::{Result, Tensor, bail};

/// Rows whose logits are held at once.
pub const CHUNK: usize = 128;

/// What the head makes of hidden rows that have targets.
pub struct CrossEntropy {
    /// Negative log-likelihood of each target.
    pub nll: Vec<f64>,
    /// Whether the target is the most likely token, which is what greedy decoding would choose; the lower id wins a tie.
    pub greedy: Vec<bool>,
    /// Of the sum of `nll`, `[n, hidden]`, if it was asked for.
    pub gradient: Option<Tensor>,
}

/// `hidden` `[n, hidden]`, one target token each. `cap`: logits z become c tanh(z / c). `gradient`: return the gradient of
/// the sum of all losses too.
///
/// # Errors
/// For a target beyond the vocabulary, and for targets that are not as many as rows.
pub fn cross_entropy(
    hidden: &Tensor,
    targets: &[u32],
    head: &Linear,
    cap: Option<f64>,
    gradient: bool,
) -> Result<CrossEntropy> {
    let n = hidden.dim(0)?;
    if n != targets.len() {
        bail!("cross_entropy: {n} rows, {} targets", targets.len());
    }
    if let Some(gpu) = head.machine().gpu() {
        return device::cross_entropy(gpu, hidden, targets, head, cap, gradient);
    }
    let mut all = CrossEntropy { nll: Vec::with_capacity(n), greedy: Vec::with_capacity(n), gradient: None };
    let mut gradients = Vec::new();
    for (start, targets) in (0..n).step_by(CHUNK).zip(targets.chunks(CHUNK)) {
        let rows = hidden.narrow(0, start, targets.len())?.contiguous()?.detach();
        let mut logits = head.values(&rows)?;
        let vocab = logits.len() / targets.len();
        if let Some(target) = targets.iter().find(|t| **t as usize >= vocab) {
            bail!("cross_entropy: target {target}, the vocabulary has {vocab}");
        }
        let mut losses = vec![Loss::default(); targets.len()];
        let (rows, out) = (Shared(logits.as_mut_ptr()), Shared(losses.as_mut_ptr()));
        head.machine().pool.for_each(targets.len(), |r| {
            // SAFETY: a row and its loss belong to one unit of work.
            let (row, loss) =
                unsafe { (std::slice::from_raw_parts_mut(rows.get().add(r * vocab), vocab), &mut *out.get().add(r)) };
            of_row(row, targets[r] as usize, cap.map(|c| c as f32), gradient, loss);
        });
        all.nll.extend(losses.iter().map(|l| l.nll));
        all.greedy.extend(losses.iter().map(|l| l.greedy));
        if gradient {
            let by = Tensor::from_vec(logits, (targets.len(), vocab), hidden.device())?;
            gradients.push(head.input_gradient(&by)?);
        }
    }
    if gradient && !gradients.is_empty() {
        all.gradient = Some(Tensor::cat(&gradients, 0)?);
    }
    Ok(all)
}

#[derive(Clone, Copy, Default)]
struct Loss {
    nll: f64,
    greedy: bool,
}

simd! {
    /// The loss of one row of logits, which become their own gradient. Exponentials are summed in 16 sums of f32 for each 4096
    /// logits, and those in f64.
    fn of_row(logits: &mut [f32], target: usize, cap: Option<f32>, gradient: bool, loss: &mut Loss) {
        if let Some(cap) = cap {
            logits.iter_mut().for_each(|z| *z = float::tanh(*z / cap) * cap);
        }
        let mut most = [f32::NEG_INFINITY; 16];
        for chunk in logits.chunks(16) {
            most.iter_mut().zip(chunk).for_each(|(m, z)| *m = if *z > *m { *z } else { *m });
        }
        let most = most.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        let mut sum = 0f64;
        for part in logits.chunks(4096) {
            let mut sums = [0f32; 16];
            for chunk in part.chunks(16) {
                sums.iter_mut().zip(chunk).for_each(|(s, z)| *s += float::exp(*z - most));
            }
            sum += sums.iter().map(|s| f64::from(*s)).sum::<f64>();
        }
        let log = sum.ln();
        *loss = Loss {
            nll: f64::from(most) + log - f64::from(logits[target]),
            // The lower id wins a tie, as in greedy decoding.
            greedy: logits[target] == most && logits[..target].iter().all(|z| *z < most),
        };
        if gradient {
            let log = log as f32;
            let at = logits[target];
            for z in logits.iter_mut() {
                let slope = if let Some(cap) = cap { 1.0 - (*z / cap) * (*z / cap) } else { 1.0 };
                *z = float::exp(*z - most - log) * slope;
            }
            let slope = if let Some(cap) = cap { 1.0 - (at / cap) * (at / cap) } else { 1.0 };
            logits[target] = (float::exp(at - most - log) - 1.0) * slope;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::Machine;
    use candle_core::Device;

    #[test]
    fn greedy_says_what_decoding_would_choose() {
        let w = Tensor::new(&[[1f32], [2.0], [2.0]], &Device::Cpu).unwrap();
        let head = Linear::new(&[w], &[None], &Machine::new(1)).unwrap();
        let x = Tensor::new(&[[1f32], [1.0], [-1.0]], &Device::Cpu).unwrap();
        let got = cross_entropy(&x, &[1, 2, 0], &head, None, false).unwrap();
        assert_eq!(got.greedy, [true, false, true]);
        assert!(got.gradient.is_none() && (got.nll[1] - (2.0 + (-1f64).exp()).ln()).abs() < 1e-6, "{:?}", got.nll);
        let e = cross_entropy(&x, &[1, 3, 0], &head, None, false).err().unwrap().to_string();
        assert!(e.contains("target 3") && e.contains('3'), "{e}");
    }

    /// Loss and gradient against f64, over more rows than a chunk.
    #[test]
    fn agrees_with_f64() {
        let (n, width, vocab) = (CHUNK + 70, 5, 11);
        let noise = |seed: usize, n: usize| -> Vec<f32> {
            (0..n).map(|i| (((i + 17 * seed) as f64 * 12.9898).sin() * 43758.547).fract() as f32 * 2.0).collect()
        };
        let (x, w) = (noise(1, n * width), noise(2, vocab * width));
        let targets: Vec<u32> = (0..n as u32).map(|i| i * 7 % vocab as u32).collect();
        let tensor = |v: &[f32], rows: usize| Tensor::from_slice(v, (rows, width), &Device::Cpu).unwrap();
        let head = Linear::new(&[tensor(&w, vocab)], &[None], &Machine::new(1)).unwrap();
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
            let got = cross_entropy(&tensor(&x, n), &targets, &head, cap, true).unwrap();
            let sum: f64 = got.nll.iter().sum();
            assert!((sum - loss(&x)).abs() < 1e-5 * loss(&x), "{sum} {}", loss(&x));
            let got = got.gradient.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            for i in (0..x.len()).step_by(3) {
                let mut moved = x.clone();
                moved[i] = x[i] + 1e-3;
                let (above, up) = (loss(&moved), moved[i]);
                moved[i] = x[i] - 1e-3;
                let want = (above - loss(&moved)) / f64::from(up - moved[i]);
                assert!((f64::from(got[i]) - want).abs() < 1e-4 * want.abs().max(1.0), "{i}: {} {want}", got[i]);
            }
        }
    }
}
