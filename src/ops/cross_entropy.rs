//! `cross_entropy`: the loss of a language model's head and its gradient in one go, in chunks of rows: `[tokens, vocab]`
//! never exists at once.
//!
//! For hidden rows h_i and targets t_i, nll_i = log sum_j e^(z_ij) - z_i,t_i over the logits z_i = head(h_i), capped as the
//! model caps them. The gradient of z_i is softmax(z_i) - onehot(t_i), times the slope of the cap; the head's transpose
//! takes it to h_i. No graph: the logits of a chunk are used for both and then gone.
use super::Linear;
use candle_core::{CpuStorage, Result, Storage, Tensor, bail};

/// Rows whose logits are held at once.
pub const CHUNK: usize = 64;

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
    let mut all = CrossEntropy { nll: Vec::with_capacity(n), greedy: Vec::with_capacity(n), gradient: None };
    let mut gradients = Vec::new();
    for (start, targets) in (0..n).step_by(CHUNK).zip(targets.chunks(CHUNK)) {
        let rows = hidden.narrow(0, start, targets.len())?.contiguous()?.detach();
        let mut logits = floats(&head.forward(&rows)?)?;
        let vocab = logits.len() / targets.len();
        for (row, target) in logits.chunks_exact_mut(vocab).zip(targets) {
            if *target as usize >= vocab {
                bail!("cross_entropy: target {target}, the vocabulary has {vocab}");
            }
            let (nll, greedy) = of_row(row, *target as usize, cap, gradient);
            all.nll.push(nll);
            all.greedy.push(greedy);
        }
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

/// The loss of one row of logits, which become their own gradient.
fn of_row(logits: &mut [f32], target: usize, cap: Option<f64>, gradient: bool) -> (f64, bool) {
    if let Some(cap) = cap {
        logits.iter_mut().for_each(|z| *z = (f64::from(*z / cap as f32).tanh() * cap) as f32);
    }
    let norm = log_sum_exp(logits);
    let best = logits.iter().enumerate().fold(0, |best, (i, z)| if *z > logits[best] { i } else { best });
    let nll = norm - f64::from(logits[target]);
    if gradient {
        for (j, z) in logits.iter_mut().enumerate() {
            let p = super::float::exp((f64::from(*z) - norm) as f32) - if j == target { 1.0 } else { 0.0 };
            let slope = cap.map_or(1.0, |c| 1.0 - (*z / c as f32).powi(2));
            *z = p * slope;
        }
    }
    (nll, best == target)
}

/// log of the sum of exponentials: terms in f32, summed in f64 over the vocabulary.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|z| f64::from(super::float::exp(z - most))).sum();
    f64::from(most) + sum.ln()
}

/// The values of a contiguous f32 tensor that nobody else holds.
fn floats(t: &Tensor) -> Result<Vec<f32>> {
    let (storage, layout) = t.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(all)), Some((start, end))) => Ok(all[start..end].to_vec()),
        _ => bail!("cross_entropy: logits are not contiguous f32 on the CPU"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ops::linear::Cpu;
    use candle_core::Device;

    #[test]
    fn greedy_says_what_decoding_would_choose() {
        let w = Tensor::new(&[[1f32], [2.0], [2.0]], &Device::Cpu).unwrap();
        let head = Linear::new(&[w], &[None], &Cpu::new(1)).unwrap();
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
