//! `feed_forward`: y = W_down f(W_up x) (+ residual), one op of the graph.
//!
//! Its parts are `linear` and `activation`, and the bits are theirs. As one op, what lies between them, three and more times as
//! wide as x, is no tensor of candle's graph, which would clear and add up a gradient of each on one thread; and only what
//! the way back reads is kept of it.
use super::activation::Activation;
use super::linear::Linear;
use super::slice;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Storage, Tensor, bail};
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
    /// What enters the activation.
    between: OnceLock<Vec<f32>>,
}

impl FeedForward {
    fn run(&self, x: &CpuStorage, layout: &Layout, residual: Option<&[f32]>) -> Result<(CpuStorage, Shape)> {
        let (m, k) = layout.shape().dims2()?;
        let between = self.up.rows(slice(x, layout, "feed_forward")?, (m, k), None)?;
        let (active, width) = self.activation.rows(&between, (m, self.up.n()))?;
        if self.keep {
            // A second run has the same bits.
            let _ = self.between.set(between);
        } else {
            drop(between);
        }
        let y = self.down.rows(&active, (m, width), residual)?;
        Ok((CpuStorage::F32(y), (m, self.down.n()).into()))
    }

    fn gradient(&self, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let Some(between) = self.between.get() else { bail!("feed_forward: a way back where none was expected") };
        let (dy, m) = (dy.contiguous()?, x.dim(0)?);
        let (storage, layout) = dy.storage_and_layout();
        let Storage::Cpu(dy) = &*storage else { bail!("feed_forward: dy is not on the CPU") };
        let d_active = self.down.row_gradients(slice(dy, layout, "feed_forward")?, layout.shape().dims2()?)?;
        let shape = (m, self.up.n());
        let d_between = self.activation.row_gradients(between, shape, &d_active);
        drop(d_active);
        Tensor::from_vec(self.up.row_gradients(&d_between, shape)?, x.shape(), x.device())
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
