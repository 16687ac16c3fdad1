//! `feed_forward`: y = W_down f(W_up x) (+ residual), one op of the graph.
//!
//! Its parts are `linear` and `activation`, and the bits are theirs. As one op, what lies between them, three and more times as
//! wide as x, is no tensor of candle's graph, which would clear and add up a gradient of each on one thread; and only what
//! the way back reads is kept of it.
use super::activation::Activation;
use super::linear::Linear;
use super::slice;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Storage, Tensor, bail};
use std::ops::Range;
use std::sync::OnceLock;

/// x `[m, hidden]`, residual `[m, hidden]` -> `[m, hidden]`, differentiable in both.
pub fn feed_forward(
    x: &Tensor,
    residual: Option<&Tensor>,
    up: &Linear,
    activation: &Activation,
    down: &Linear,
) -> Result<Tensor> {
    if up.matrix().is_some() {
        let x = activation.forward(&up.forward(x)?)?;
        return match residual {
            Some(residual) => down.forward_add(&x, residual),
            None => down.forward(&x),
        };
    }
    let op = FeedForward {
        up: up.clone(),
        activation: activation.clone(),
        down: down.clone(),
        keep: x.track_op() || residual.is_some_and(Tensor::track_op),
        between: OnceLock::new(),
    };
    match residual {
        Some(residual) => x.apply_op2(residual, op),
        None => x.apply_op1(op),
    }
}

struct FeedForward {
    up: Linear,
    activation: Activation,
    down: Linear,
    /// Whether there is a way back.
    keep: bool,
    /// What enters the activation, of each block of rows.
    between: OnceLock<Vec<Vec<f32>>>,
}

/// Rows that go through all parts before the next ones: what lies between the parts stays in the last cache.
const BLOCK_ROWS: usize = 256;

/// The rows of each block of `m`, of nearly equal size.
fn blocks(m: usize) -> impl Iterator<Item = Range<usize>> {
    let count = m.div_ceil(BLOCK_ROWS);
    (0..count).map(move |i| i * m / count..(i + 1) * m / count)
}

impl FeedForward {
    fn run(&self, x: &CpuStorage, layout: &Layout, residual: Option<&[f32]>) -> Result<(CpuStorage, Shape)> {
        let ((m, k), (width, n)) = (layout.shape().dims2()?, (self.up.n(), self.down.n()));
        let x = slice(x, layout, "feed_forward")?;
        let (mut all, mut kept) = (Vec::with_capacity(m * n), Vec::new());
        for rows in blocks(m) {
            let between = self.up.rows(&x[rows.start * k..rows.end * k], (rows.len(), k), None)?;
            let (active, inner) = self.activation.rows(&between, (rows.len(), width))?;
            if self.keep {
                kept.push(between);
            } else {
                drop(between);
            }
            let residual = residual.map(|r| &r[rows.start * n..rows.end * n]);
            all.extend_from_slice(&self.down.rows(&active, (rows.len(), inner), residual)?);
        }
        if self.keep {
            // A second run has the same bits.
            let _ = self.between.set(kept);
        }
        Ok((CpuStorage::F32(all), (m, n).into()))
    }

    fn gradient(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let Some(between) = self.between.get() else { bail!("feed_forward: a way back where none was expected") };
        let dy = dy.contiguous()?;
        let (storage, layout) = dy.storage_and_layout();
        let Storage::Cpu(dy) = &*storage else { bail!("feed_forward: dy is not on the CPU") };
        let (dy, (m, n), width) = (slice(dy, layout, "feed_forward")?, layout.shape().dims2()?, self.up.n());
        let mut all = Vec::with_capacity(x.elem_count());
        for (rows, between) in blocks(m).zip(between) {
            let d_active = self.down.row_gradients(&dy[rows.start * n..rows.end * n], (rows.len(), n))?;
            let d_between = self.activation.row_gradients(between, (rows.len(), width), &d_active);
            drop(d_active);
            all.extend_from_slice(&self.up.row_gradients(&d_between, (rows.len(), width))?);
        }
        Tensor::from_vec(all, x.shape(), x.device())
    }
}

impl CustomOp1 for FeedForward {
    fn name(&self) -> &'static str {
        "feed_forward"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(x, layout, None)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.gradient(x, dy)?))
    }
}

impl CustomOp2 for FeedForward {
    fn name(&self) -> &'static str {
        "feed_forward_add"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, r: &CpuStorage, rl: &Layout) -> Result<(CpuStorage, Shape)> {
        if rl.shape().dims2()? != (xl.shape().dims2()?.0, self.down.n()) {
            bail!("feed_forward: residual is {:?}, x {:?}, n {}", rl.shape(), xl.shape(), self.down.n());
        }
        self.run(x, xl, Some(slice(r, rl, "feed_forward")?))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(self.gradient(x, dy)?), Some(dy.clone())))
    }
}
