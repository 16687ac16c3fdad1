//! `norm`: RMSNorm and LayerNorm over rows, and RMSNorm over the heads of a packed projection.
//!
//! RMSNorm: y = x / sqrt(mean(x^2) + eps) * w (Zhang and Sennrich 2019; `LlamaRMSNorm`).
//! LayerNorm: y = (x - mean) / sqrt(var + eps) * w + b (Ba et al. 2016; `torch.nn.LayerNorm`).
mod device;

use super::gpu::Buffer;
use super::{Machine, Vector, make_rows, slice};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// A norm with frozen weights `[hidden]`.
#[derive(Clone)]
pub struct Norm {
    weight: Vector,
    /// Of a LayerNorm; `None`: RMSNorm.
    bias: Option<Vector>,
    eps: f32,
    machine: Arc<Machine>,
}

impl Norm {
    /// RMSNorm; `weight` is `[hidden]`.
    pub fn rms(weight: Vec<f32>, eps: f64, machine: &Arc<Machine>) -> Result<Self> {
        Ok(Norm { weight: Vector::new(weight, machine)?, bias: None, eps: eps as f32, machine: machine.clone() })
    }

    /// LayerNorm; both are `[hidden]`.
    pub fn layer(weight: Vec<f32>, bias: Vec<f32>, eps: f64, machine: &Arc<Machine>) -> Result<Self> {
        let bias = Some(Vector::new(bias, machine)?);
        Ok(Norm { weight: Vector::new(weight, machine)?, bias, eps: eps as f32, machine: machine.clone() })
    }

    /// x `[m, hidden]` -> `[m, hidden]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self.machine.gpu() {
            Some(gpu) => gpu.apply1(device::OnDevice(self.clone()), x),
            None => x.apply_op1(self.clone()),
        }
    }
}

impl CustomOp1 for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout, "norm")?;
        let (m, hidden) = layout.shape().dims2()?;
        if hidden != self.weight.len() || self.bias.as_ref().is_some_and(|b| b.len() != hidden) {
            bail!("norm: x is [{m}, {hidden}], the weight [{}]", self.weight.len());
        }
        let y = make_rows(&self.machine.pool, m, hidden, |row, y| {
            let x = &x[row * hidden..][..y.len()];
            match &self.bias {
                None => rms_norm(x, &self.weight, self.eps, y),
                Some(bias) => layer_norm(x, &self.weight, bias, self.eps, y),
            }
        });
        Ok((CpuStorage::F32(y), (m, hidden).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(x.contiguous()?.apply_op2(&dy.contiguous()?, Gradient(self.clone()))?))
    }
}

/// x and dy -> dx. With n = (x - mean) s, s = 1 / sqrt(var + eps) and g = dy w:
/// dx = s (g - mean(g) - n mean(g n)); RMSNorm has no mean to take off.
struct Gradient(Norm);

impl CustomOp2 for Gradient {
    fn name(&self) -> &'static str {
        "norm_gradient"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, dy: &CpuStorage, dyl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, dy) = (slice(x, xl, "norm")?, slice(dy, dyl, "norm")?);
        let Norm { weight, bias, eps, machine } = &self.0;
        let (m, hidden) = xl.shape().dims2()?;
        let dx = make_rows(&machine.pool, m, hidden, |row, dx| {
            let own = row * hidden..row * hidden + dx.len();
            norm_gradient(&x[own.clone()], &dy[own], weight, bias.is_some(), *eps, dx);
        });
        Ok((CpuStorage::F32(dx), xl.shape().clone()))
    }
}

/// RMSNorm of each query and key head by itself, before RoPE (Qwen3, Gemma 3).
#[derive(Clone)]
pub struct HeadNorm {
    /// `[head_dim]`
    q: Vector,
    /// `[head_dim]`
    k: Vector,
    eps: f32,
    heads: usize,
    kv_heads: usize,
    machine: Arc<Machine>,
}

impl HeadNorm {
    /// `q` and `k` are `[head_dim]`; a row starts with `heads` query heads, then `kv_heads` key heads.
    pub fn new(
        q: Vec<f32>,
        k: Vec<f32>,
        eps: f64,
        [heads, kv_heads]: [usize; 2],
        machine: &Arc<Machine>,
    ) -> Result<Self> {
        let (q, k) = (Vector::new(q, machine)?, Vector::new(k, machine)?);
        Ok(HeadNorm { q, k, eps: eps as f32, heads, kv_heads, machine: machine.clone() })
    }

    /// `[m, width]`, `[q heads | k heads | v heads]` -> the same with q and k normed.
    pub fn forward(&self, qkv: &Tensor) -> Result<Tensor> {
        match self.machine.gpu() {
            Some(gpu) => gpu.apply1(device::HeadsOnDevice(self.clone()), qkv),
            None => qkv.apply_op1(self.clone()),
        }
    }

    /// Weights of q heads on the device.
    pub(super) fn q_buffer(&self) -> Option<&Buffer> {
        self.q.buffer()
    }

    /// Weights of k heads on the device.
    pub(super) fn k_buffer(&self) -> Option<&Buffer> {
        self.k.buffer()
    }

    /// Added to the mean of squares.
    pub(super) fn eps(&self) -> f32 {
        self.eps
    }
}

impl CustomOp1 for HeadNorm {
    fn name(&self) -> &'static str {
        "head_norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout, "head_norm")?;
        let (m, width) = layout.shape().dims2()?;
        let (q, k) = (self.heads * self.q.len(), self.kv_heads * self.k.len());
        if q + k > width {
            bail!("head_norm: x is [{m}, {width}], {} query and {} key heads", self.heads, self.kv_heads);
        }
        let y = make_rows(&self.machine.pool, m, width, |row, y| {
            for (x, y) in x[row * width..].chunks_exact(width).zip(y.chunks_exact_mut(width)) {
                rms_norm(&x[..q], &self.q, self.eps, &mut y[..q]);
                rms_norm(&x[q..q + k], &self.k, self.eps, &mut y[q..q + k]);
                y[q + k..].copy_from_slice(&x[q + k..]);
            }
        });
        Ok((CpuStorage::F32(y), (m, width).into()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(x.contiguous()?.apply_op2(&dy.contiguous()?, HeadGradient(self.clone()))?))
    }
}

/// x and dy -> dx, a norm of each head by itself.
struct HeadGradient(HeadNorm);

impl CustomOp2 for HeadGradient {
    fn name(&self) -> &'static str {
        "head_norm_gradient"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, dy: &CpuStorage, dyl: &Layout) -> Result<(CpuStorage, Shape)> {
        let (x, dy) = (slice(x, xl, "head_norm")?, slice(dy, dyl, "head_norm")?);
        let HeadNorm { q, k, eps, heads, kv_heads, machine } = &self.0;
        let ((m, width), q_end) = (xl.shape().dims2()?, heads * q.len());
        let k_end = q_end + kv_heads * k.len();
        let dx = make_rows(&machine.pool, m, width, |row, dx| {
            let rows = x[row * width..].chunks_exact(width).zip(dy[row * width..].chunks_exact(width));
            for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
                norm_gradient(&x[..q_end], &dy[..q_end], q, false, *eps, &mut dx[..q_end]);
                norm_gradient(&x[q_end..k_end], &dy[q_end..k_end], k, false, *eps, &mut dx[q_end..k_end]);
                dx[k_end..].copy_from_slice(&dy[k_end..]);
            }
        });
        Ok((CpuStorage::F32(dx), xl.shape().clone()))
    }
}

/// 16 partial sums, folded in one order: the same bits on every instruction set.
#[inline(always)]
fn sum(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut sums = [0f32; 16];
    for chunk in x.chunks(16) {
        for (sum, v) in sums.iter_mut().zip(chunk) {
            *sum += f(*v);
        }
    }
    sums.iter().sum()
}

simd! {
    fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
        let hidden = weight.len();
        for (x, y) in x.chunks_exact(hidden).zip(y.chunks_exact_mut(hidden)) {
            let scale = 1.0 / (sum(x, |v| v * v) / hidden as f32 + eps).sqrt();
            for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
                *y = x * scale * w;
            }
        }
    }
}

simd! {
    fn layer_norm(x: &[f32], weight: &[f32], bias: &[f32], eps: f32, y: &mut [f32]) {
        let hidden = weight.len();
        for (x, y) in x.chunks_exact(hidden).zip(y.chunks_exact_mut(hidden)) {
            let mean = sum(x, |v| v) / hidden as f32;
            let scale = 1.0 / (sum(x, |v| (v - mean) * (v - mean)) / hidden as f32 + eps).sqrt();
            for (((y, x), w), b) in y.iter_mut().zip(x).zip(weight).zip(bias) {
                *y = (x - mean) * scale * w + b;
            }
        }
    }
}

simd! {
    fn norm_gradient(x: &[f32], dy: &[f32], weight: &[f32], centred: bool, eps: f32, dx: &mut [f32]) {
        let hidden = weight.len();
        let count = hidden as f32;
        for ((x, dy), dx) in x.chunks_exact(hidden).zip(dy.chunks_exact(hidden)).zip(dx.chunks_exact_mut(hidden)) {
            let mean = if centred { sum(x, |v| v) / count } else { 0.0 };
            let scale = 1.0 / (sum(x, |v| (v - mean) * (v - mean)) / count + eps).sqrt();
            // g in dx's place.
            dx.iter_mut().zip(dy).zip(weight).for_each(|((d, dy), w)| *d = dy * w);
            let mean_g = if centred { sum(dx, |v| v) / count } else { 0.0 };
            let mut sums = [0f32; 16];
            for (g, x) in dx.chunks(16).zip(x.chunks(16)) {
                for ((sum, g), x) in sums.iter_mut().zip(g).zip(x) {
                    *sum += g * (x - mean);
                }
            }
            let along = sums.iter().sum::<f32>() * scale / count;
            for (d, x) in dx.iter_mut().zip(x) {
                *d = scale * (*d - mean_g - (x - mean) * scale * along);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use candle_core::Device;

    fn rows(width: usize) -> (Vec<f32>, Tensor) {
        let x: Vec<f32> = (0..2 * width).map(|i| (i as f32 * 0.37).sin() * 3.0 + 0.5).collect();
        let t = Tensor::from_slice(&x, (2, width), &Device::Cpu).unwrap();
        (x, t)
    }

    fn weight(n: usize, from: f32) -> Vec<f32> {
        (0..n).map(|i| from + i as f32 / 50.0).collect()
    }

    #[test]
    fn agree_with_f64() {
        let (x, t) = rows(37);
        let (w, b) = (weight(37, 1.0), weight(37, -0.3));
        let rms = Norm::rms(w.clone(), 1e-5, &Machine::new(1)).unwrap().forward(&t).unwrap().to_vec2::<f32>().unwrap();
        let layer = Norm::layer(w.clone(), b.clone(), 1e-5, &Machine::new(1))
            .unwrap()
            .forward(&t)
            .unwrap()
            .to_vec2::<f32>()
            .unwrap();
        for r in 0..2 {
            let row: Vec<f64> = x[r * 37..][..37].iter().map(|v| f64::from(*v)).collect();
            let mean = row.iter().sum::<f64>() / 37.0;
            let square = row.iter().map(|v| v * v).sum::<f64>() / 37.0;
            let var = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 37.0;
            for i in 0..37 {
                let (w, b) = (f64::from(w[i]), f64::from(b[i]));
                assert!((f64::from(rms[r][i]) - row[i] / (square + 1e-5).sqrt() * w).abs() < 1e-6);
                let want = (row[i] - mean) / (var + 1e-5).sqrt() * w + b;
                assert!((f64::from(layer[r][i]) - want).abs() < 1e-6);
            }
        }
    }

    #[test]
    fn head_norm_is_rms_norm_of_each_head_and_leaves_v() {
        // 2 query heads, 1 key head, 1 value head of 5.
        let (x, t) = rows(20);
        let (q, k) = (weight(5, 1.0), weight(5, 2.0));
        let y = HeadNorm::new(q.clone(), k.clone(), 1e-6, [2, 1], &Machine::new(1))
            .unwrap()
            .forward(&t)
            .unwrap()
            .to_vec2::<f32>()
            .unwrap();
        for r in 0..2 {
            for (head, w) in [(0, &q), (1, &q), (2, &k)] {
                let part = &x[r * 20 + head * 5..][..5];
                let t = Tensor::from_slice(part, (1, 5), &Device::Cpu).unwrap();
                let want = Norm::rms(w.clone(), 1e-6, &Machine::new(1))
                    .unwrap()
                    .forward(&t)
                    .unwrap()
                    .to_vec2::<f32>()
                    .unwrap();
                assert_eq!(y[r][head * 5..][..5], want[0]);
            }
            assert_eq!(y[r][15..], x[r * 20 + 15..][..5]);
        }
    }
}
