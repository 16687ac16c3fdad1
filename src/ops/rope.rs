//! `rope`: rotary position embedding of the packed projection `[q heads | k heads | v heads]`.
//!
//! For a head whose first d elements turn and position p, pairs (i, i + d/2) turn by p * f_i (Su et al. 2021, in the
//! half-split layout of transformers' `rotate_half`). d is the head's width, or less (partial rotary). V passes through.
use super::f32_slice;
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// cos and sin of every position and frequency.
pub struct RopeTable {
    /// `[positions, half]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

impl RopeTable {
    /// `inv_freq` `[d / 2]` in radians a position; `scale` multiplies cos and sin (1 unless a scaling says so).
    pub fn new(inv_freq: &[f32], positions: usize, scale: f32) -> Self {
        let angles = || (0..positions).flat_map(|p| inv_freq.iter().map(move |f| p as f32 * f));
        let cos = angles().map(|a| a.cos() * scale).collect();
        let sin = angles().map(|a| a.sin() * scale).collect();
        RopeTable { cos, sin, half: inv_freq.len() }
    }

    /// Number of positions.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half.max(1)
    }
}

#[derive(Clone)]
struct Rope {
    table: Arc<RopeTable>,
    positions: Arc<[u32]>,
    heads: Heads,
    /// The other way round: the gradient of a turn is the turn back.
    back: bool,
}

/// The heads that turn: q and k.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// How many, from the start of a row.
    pub count: usize,
    /// Width of each.
    pub dim: usize,
}

/// Turns the first heads of `qkv` `[m, width]` by `positions` `[m]`; the rest of a row is copied.
pub fn rope(qkv: &Tensor, table: &Arc<RopeTable>, positions: &Arc<[u32]>, heads: Heads) -> Result<Tensor> {
    qkv.apply_op1(Rope { table: table.clone(), positions: positions.clone(), heads, back: false })
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = f32_slice(x, layout, "rope")?;
        let (m, width) = layout.shape().dims2()?;
        let half = self.table.half;
        let Heads { count, dim } = self.heads;
        if m != self.positions.len() || count * dim > width || 2 * half > dim || half == 0 {
            let rows = self.positions.len();
            bail!("rope: x is [{m}, {width}], positions [{rows}], {count} heads of {dim}, {} turn", 2 * half);
        }
        if let Some(p) = self.positions.iter().find(|p| **p as usize >= self.table.positions()) {
            bail!("rope: position {p} is past the table's {}", self.table.positions());
        }
        let mut y = x.to_vec();
        for (row, &p) in y.chunks_exact_mut(width).zip(&*self.positions) {
            let at = p as usize * half;
            let sign = if self.back { -1.0 } else { 1.0 };
            turn(&mut row[..count * dim], dim, &self.table.cos[at..at + half], &self.table.sin[at..at + half], sign);
        }
        Ok((CpuStorage::F32(y), (m, width).into()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(dy.contiguous()?.apply_op1(Rope { back: !self.back, ..self.clone() })?))
    }
}

simd! {
    fn turn(heads: &mut [f32], dim: usize, cos: &[f32], sin: &[f32], sign: f32) {
        for head in heads.chunks_exact_mut(dim) {
            let (a, b) = head[..2 * cos.len()].split_at_mut(cos.len());
            for (((a, b), c), s) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                // By 1 or -1 no bit changes but the sign.
                let s = s * sign;
                (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
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
    fn turns_q_and_k_and_leaves_v() {
        let table = Arc::new(RopeTable::new(&[1.0, 0.1], 8, 1.0));
        let x = Tensor::new(&[[1f32, 2., 3., 4., 5., 6., 7., 8.]], &Device::Cpu).unwrap();
        let y = rope(&x, &table, &vec![3u32].into(), Heads { count: 1, dim: 4 }).unwrap().to_vec2::<f32>().unwrap();
        let (c, s) = (3f32.cos(), 3f32.sin());
        let (c2, s2) = (0.3f32.cos(), 0.3f32.sin());
        let want = [c - 3. * s, 2. * c2 - 4. * s2, 3. * c + s, 4. * c2 + 2. * s2, 5., 6., 7., 8.];
        assert!(y[0].iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6), "{y:?}");
        assert!(rope(&x, &table, &vec![8u32].into(), Heads { count: 1, dim: 4 }).is_err());
        assert!(rope(&x, &table, &vec![3u32].into(), Heads { count: 1, dim: 2 }).is_err());
        // Partial: of a head of 6 the first 4 turn.
        let y = rope(&x, &table, &vec![3u32].into(), Heads { count: 1, dim: 6 }).unwrap().to_vec2::<f32>().unwrap();
        assert!(y[0].iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6), "{y:?}");
    }
}
