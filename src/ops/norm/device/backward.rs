//! The launches of `kernels/norm_backward.cu`.
use super::super::{HeadNorm, Norm};
use crate::ops::gpu::{Fresh, Gpu, Grid, KernelOp, View};
use candle_core::{Result, Shape, bail};

/// x and dy `[m, hidden]` -> dx.
pub(super) struct Back(pub Norm);

impl KernelOp for Back {
    const NAME: &'static str = "norm_backward";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let (x, dy, Norm { weight, bias, eps, .. }) = (&inputs[0], &inputs[1], &self.0);
        let (m, hidden) = x.dims2()?;
        if hidden != weight.len() || dy.dims2()? != (m, hidden) || dy.dtype() != x.dtype() || weight.buffer().is_none()
        {
            bail!("norm: x is [{m}, {hidden}] of {:?}, dy {:?} of {:?}", x.dtype(), dy.dims2()?, dy.dtype());
        }
        let mut dx = gpu.fresh(x.dtype(), m * hidden)?;
        let call = gpu.call("norm_backward", x.dtype()).view(x).view(dy).optional(weight.buffer()).pointer(0);
        let call = call.fresh(&mut dx).int(hidden).int(hidden).int(hidden).int(hidden);
        let threads = (hidden.next_multiple_of(32) as u32).min(256);
        let grid = Grid { blocks: [m as u32, 1, 1], threads, shared: 0 };
        // SAFETY: the kernel's arguments.
        unsafe { call.int(usize::from(bias.is_some())).float(*eps).launch(grid)? };
        Ok((dx, (m, hidden).into()))
    }
}

/// x and dy `[m, (heads + 2 * kv_heads) * dim]` -> dx, a norm of each head by itself; v heads get dy.
pub(super) struct HeadsBack(pub HeadNorm);

impl KernelOp for HeadsBack {
    const NAME: &'static str = "head_norm_backward";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let (x, dy, HeadNorm { q, k, eps, heads, kv_heads, .. }) = (&inputs[0], &inputs[1], &self.0);
        let ((m, width), dim, all) = (x.dims2()?, q.len(), heads + 2 * kv_heads);
        let fits = width == all * dim && k.len() == dim && q.buffer().is_some() && dim <= 256;
        if !fits || dy.dims2()? != (m, width) || dy.dtype() != x.dtype() {
            bail!("head_norm: x is [{m}, {width}], dy {:?}, {heads} and {kv_heads} heads of {dim}", dy.dims2()?);
        }
        let mut dx = gpu.fresh(x.dtype(), m * width)?;
        let call = gpu.call("head_norm_backward", x.dtype()).view(x).view(dy).optional(q.buffer()).optional(k.buffer());
        let call = call.fresh(&mut dx).int(m).int(*heads).int(*kv_heads).int(dim).float(*eps);
        let grid = Grid { blocks: [(m * all).div_ceil(4) as u32, 1, 1], threads: 128, shared: 0 };
        // SAFETY: the kernel's arguments.
        unsafe { call.launch(grid)? };
        Ok((dx, (m, width).into()))
    }
}

#[cfg(all(test, feature = "emulate"))]
mod tests;
