//! `rope`: rotary position embedding of the packed projection `[q heads | k heads | v heads]`.
//!
//! For a head whose first d elements turn and position p, pairs (i, i + d/2) turn by p * f_i (Su et al. 2021, in the
//! half-split layout of transformers' `rotate_half`). d is the head's width, or less (partial rotary). V passes through.
pub mod device;

use super::{Machine, Vector, make_rows, slice};
use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use std::sync::Arc;

/// Rotary frequencies of one kind of layer.
pub struct Frequencies {
    /// `[d / 2]` in radians a position.
    pub inv_freq: Vector,
    /// Multiplies cos and sin (1 unless a scaling says so).
    pub scale: f32,
}

impl Frequencies {
    /// cos and sin of the rows of one pass, for all its layers. There is no table of all positions: a `config.json` may
    /// claim millions of them.
    pub fn at(&self, positions: &[u32]) -> Arc<Turns> {
        let angles = || positions.iter().flat_map(|p| self.inv_freq.iter().map(move |f| *p as f32 * f));
        let cos = angles().map(|a| a.cos() * self.scale).collect();
        let sin = angles().map(|a| a.sin() * self.scale).collect();
        Arc::new(Turns { cos, sin, half: self.inv_freq.len() })
    }
}

/// By how much each row of a pass turns.
pub struct Turns {
    /// `[rows, half]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
    half: usize,
}

#[derive(Clone)]
struct Rope {
    turns: Arc<Turns>,
    heads: Heads,
    /// The other way round: the gradient of a turn is the turn back.
    back: bool,
    machine: Arc<Machine>,
}

/// The heads that turn: q and k.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// How many, from the start of a row.
    pub count: usize,
    /// Width of each.
    pub dim: usize,
}

/// Turns the first heads of `qkv` `[m, width]`, row by row; the rest of a row is copied.
pub fn rope(qkv: &Tensor, turns: &Arc<Turns>, heads: Heads, machine: &Arc<Machine>) -> Result<Tensor> {
    qkv.apply_op1(Rope { turns: turns.clone(), heads, back: false, machine: machine.clone() })
}

impl CustomOp1 for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout, "rope")?;
        let (m, width) = layout.shape().dims2()?;
        let Turns { cos, sin, half } = &*self.turns;
        let (half, Heads { count, dim }) = (*half, self.heads);
        if cos.len() != m * half || count * dim > width || 2 * half > dim || half == 0 {
            let turns = cos.len();
            bail!("rope: x is [{m}, {width}], {turns} turns, {count} heads of {dim}, {} turn", 2 * half);
        }
        let sign = if self.back { -1.0 } else { 1.0 };
        let y = make_rows(&self.machine.pool, m, width, |first, y| {
            y.copy_from_slice(&x[first * width..][..y.len()]);
            let turns = cos[first * half..].chunks_exact(half).zip(sin[first * half..].chunks_exact(half));
            for (row, (cos, sin)) in y.chunks_exact_mut(width).zip(turns) {
                turn(&mut row[..count * dim], dim, cos, sin, sign);
            }
        });
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
        let inv_freq = Vector::new(vec![1.0, 0.1], &Machine::new(1)).unwrap();
        let turns = Frequencies { inv_freq: inv_freq.clone(), scale: 1.0 }.at(&[3]);
        let x = Tensor::new(&[[1f32, 2., 3., 4., 5., 6., 7., 8.]], &Device::Cpu).unwrap();
        let y = rope(&x, &turns, Heads { count: 1, dim: 4 }, &Machine::new(1)).unwrap().to_vec2::<f32>().unwrap();
        let (c, s) = (3f32.cos(), 3f32.sin());
        let (c2, s2) = (0.3f32.cos(), 0.3f32.sin());
        let want = [c - 3. * s, 2. * c2 - 4. * s2, 3. * c + s, 4. * c2 + 2. * s2, 5., 6., 7., 8.];
        assert!(y[0].iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6), "{y:?}");
        let two = Frequencies { inv_freq, scale: 1.0 }.at(&[3, 4]);
        assert!(rope(&x, &two, Heads { count: 1, dim: 4 }, &Machine::new(1)).is_err());
        assert!(rope(&x, &turns, Heads { count: 1, dim: 2 }, &Machine::new(1)).is_err());
        // Partial: of a head of 6 the first 4 turn.
        let y = rope(&x, &turns, Heads { count: 1, dim: 6 }, &Machine::new(1)).unwrap().to_vec2::<f32>().unwrap();
        assert!(y[0].iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-6), "{y:?}");
    }
}
