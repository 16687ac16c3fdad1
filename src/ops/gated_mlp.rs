//! `gated_mlp`: silu(gate) * up, of a fused projection `[gate | up]` (SwiGLU, Shazeer 2020).
use super::{Pool, Shared, f32_slice, float, linear::Cpu};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// Rows in one unit of work.
const ROWS: usize = 8;

/// The op; it has no weights.
#[derive(Clone)]
pub struct GatedMlp(Arc<Cpu>);

impl GatedMlp {
    /// Runs on the model's threads.
    pub fn new(cpu: &Arc<Cpu>) -> Self {
        GatedMlp(cpu.clone())
    }

    /// x `[m, 2 * intermediate]` -> `[m, intermediate]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        x.apply_op1(self.clone())
    }
}

impl CustomOp1 for GatedMlp {
    fn name(&self) -> &'static str {
        "gated_mlp"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice(x, layout, "gated_mlp")?;
        let (m, width) = layout.shape().dims2()?;
        if width % 2 != 0 {
            bail!("gated_mlp: x is [{m}, {width}], the width must be even");
        }
        let mut y = vec![0f32; m * width / 2];
        rows(&self.0.pool, x, width, &mut y);
        Ok((CpuStorage::F32(y), (m, width / 2).into()))
    }
}

fn rows(pool: &Pool, x: &[f32], width: usize, y: &mut [f32]) {
    let (m, out) = (x.len() / width.max(1), Shared(y.as_mut_ptr()));
    pool.for_each(m.div_ceil(ROWS), |i| {
        for r in i * ROWS..m.min((i + 1) * ROWS) {
            let (gate, up) = x[r * width..(r + 1) * width].split_at(width / 2);
            // SAFETY: each row of y belongs to one unit of work.
            let y = unsafe { std::slice::from_raw_parts_mut(out.get().add(r * width / 2), width / 2) };
            silu_times(gate, up, y);
        }
    });
}

simd! {
    fn silu_times(gate: &[f32], up: &[f32], y: &mut [f32]) {
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            *y = float::silu(*g) * u;
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
        let (m, n) = (19, 21);
        let x: Vec<f32> = (0..m * 2 * n).map(|i| (i as f32 * 0.7).sin() * 12.0).collect();
        let t = Tensor::from_slice(&x, (m, 2 * n), &Device::Cpu).unwrap();
        let y = GatedMlp::new(&Cpu::new(2)).forward(&t).unwrap().to_vec2::<f32>().unwrap();
        for (i, row) in x.chunks(2 * n).enumerate() {
            for j in 0..n {
                let g = f64::from(row[j]);
                let want = g / (1.0 + (-g).exp()) * f64::from(row[n + j]);
                assert!((f64::from(y[i][j]) - want).abs() <= 1e-6 * want.abs() + 1e-9);
            }
        }
    }
}
