//! The launch of `kernels/cross_entropy.cu`.
use super::CrossEntropy;
use crate::ops::Linear;
use crate::ops::gpu::{Buffer, Gpu, Grid};
use candle_core::{DType, Result, Tensor, bail};

/// Rows whose logits are held at once: more than there are multiprocessors, as a row is one block.
const CHUNK: usize = 256;

/// Losses of a chunk of rows.
pub struct Losses {
    /// Negative log-likelihood of each target.
    pub nll: Vec<f32>,
    /// Whether greedy decoding would choose the target.
    pub greedy: Vec<bool>,
    /// Of the sum of `factors * nll`, `[n, vocab]`, if a type was asked for.
    pub gradient: Option<Tensor>,
}

/// From logits `[n, vocab]` f32. `factors`: of each row in the gradient, or 1 for all.
///
/// # Errors
/// For a target beyond the vocabulary, and for lists that are not as many as rows.
pub fn losses(
    gpu: &Gpu,
    logits: &Tensor,
    targets: &[u32],
    factors: Option<&[f32]>,
    cap: Option<f64>,
    gradient: Option<DType>,
) -> Result<Losses> {
    let (n, vocab) = logits.dims2()?;
    if n != targets.len() || factors.is_some_and(|f| f.len() != n) || logits.dtype() != DType::F32 {
        bail!("cross_entropy: {n} rows of {:?}, {} targets", logits.dtype(), targets.len());
    }
    if let Some(target) = targets.iter().find(|t| **t as usize >= vocab) {
        bail!("cross_entropy: target {target}, the vocabulary has {vocab}");
    }
    let on_device = Buffer::new(gpu, targets)?;
    let factors = factors.map(|f| Buffer::new(gpu, f)).transpose()?;
    // `[nll | greedy]`, 4 bytes each.
    let results = Buffer::poisoned(gpu, 8 * n)?;
    let dtype = gradient.unwrap_or(DType::F32);
    let mut made = gradient.map(|dtype| gpu.fresh(dtype, n * vocab)).transpose()?;
    gpu.with("cross_entropy", &[logits], |views| {
        let call =
            gpu.call("cross_entropy", dtype).view(&views[0]).optional(Some(&on_device)).optional(factors.as_ref());
        let call = call.buffer(&results, 0, 4).buffer(&results, n, 4);
        let call = match &mut made {
            Some(made) => call.fresh(made),
            None => call.pointer(0),
        };
        let grid = Grid { blocks: [n as u32, 1, 1], threads: 1024, shared: 0 };
        // SAFETY: the kernel's arguments; every target was checked.
        unsafe { call.int(vocab).int(vocab).float(cap.map_or(0.0, |c| c as f32)).launch(grid) }
    })?;
    Ok(Losses {
        nll: results.read(0, n)?,
        greedy: results.read::<u32>(n, n)?.into_iter().map(|g| g == 1).collect(),
        gradient: made.map(|made| made.tensor((n, vocab))),
    })
}

/// As [`super::cross_entropy`], of rows on the device.
pub(super) fn cross_entropy(
    gpu: &Gpu,
    hidden: &Tensor,
    targets: &[u32],
    head: &Linear,
    cap: Option<f64>,
    gradient: bool,
) -> Result<CrossEntropy> {
    let n = targets.len();
    let mut all = CrossEntropy { nll: Vec::with_capacity(n), greedy: Vec::with_capacity(n), gradient: None };
    let mut gradients = Vec::new();
    for (start, targets) in (0..n).step_by(CHUNK).zip(targets.chunks(CHUNK)) {
        let rows = hidden.narrow(0, start, targets.len())?.contiguous()?.detach();
        let logits = head.forward_f32(&rows)?;
        let made = losses(gpu, &logits, targets, None, cap, gradient.then(|| rows.dtype()))?;
        all.nll.extend(made.nll.iter().map(|nll| f64::from(*nll)));
        all.greedy.extend(made.greedy);
        if let Some(by) = made.gradient {
            gradients.push(head.input_gradient(&by)?);
        }
    }
    if !gradients.is_empty() {
        all.gradient = Some(Tensor::cat(&gradients, 0)?);
    }
    Ok(all)
}

#[cfg(all(test, feature = "emulate"))]
mod tests;
