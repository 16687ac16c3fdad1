//! `norm`: RMSNorm over rows, y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich 2019; `LlamaRMSNorm`).
use super::f32_slice;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// RMSNorm with a frozen weight `[hidden]`.
#[derive(Clone)]
pub struct RmsNorm {
    weight: Arc<[f32]>,
    eps: f32,
}

impl RmsNorm {
    /// `weight` is `[hidden]`.
    pub fn new(weight: Vec<f32>, eps: f64) -> Self {
        RmsNorm { weight: weight.into(), eps: eps as f32 }
    }

    /// x `[m, hidden]` -> `[m, hidden]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1(self.clone())
    }
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice(x, layout, "rms_norm")?;
        let (m, hidden) = layout.shape().dims2()?;
        if hidden != self.weight.len() {
            bail!("rms_norm: x is [{m}, {hidden}], the weight [{}]", self.weight.len());
        }
        let mut y = vec![0f32; x.len()];
        rms_norm(x, &self.weight, self.eps, &mut y);
        Ok((CpuStorage::F32(y), (m, hidden).into()))
    }
}

simd! {
    fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        let hidden = weight.len();
        for (x, y) in x.chunks_exact(hidden).zip(y.chunks_exact_mut(hidden)) {
            // 16 partial sums, folded in one order: the same bits on every instruction set.
            let mut sums = [0f32; 16];
            for chunk in x.chunks(16) {
                for (sum, v) in sums.iter_mut().zip(chunk) {
                    *sum += v * v;
                }
            }
            let mean = sums.iter().sum::<f32>() / hidden as f32;
            let scale = 1.0 / (mean + eps).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * scale * w;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use candle_core::Device;

    #[test]
    fn agrees_with_f64() {
        let x: Vec<f32> = (0..2 * 37).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let w: Vec<f32> = (0..37).map(|i| 1.0 + i as f32 / 50.0).collect();
        let t = Tensor::from_slice(&x, (2, 37), &Device::Cpu).unwrap();
        let y = RmsNorm::new(w.clone(), 1e-5).forward(&t).unwrap().to_vec2::<f32>().unwrap();
        for r in 0..2 {
            let row = &x[r * 37..][..37];
            let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 37.0;
            for i in 0..37 {
                let want = f64::from(row[i]) / (mean + 1e-5).sqrt() * f64::from(w[i]);
                assert!((f64::from(y[r][i]) - want).abs() < 1e-6);
            }
        }
    }
}
