//! The launches of `kernels/norm.cu` and of the head norms in `kernels/rope.cu`.
mod backward;

use super::{HeadNorm, Norm};
use crate::ops::gpu::{Fresh, Gpu, Grid, KernelOp, View};
use candle_core::{Result, Shape, Tensor, bail};

/// [`Norm`] on the device: x `[m, hidden]` -> `[m, hidden]`, in the type of x.
pub(super) struct OnDevice(pub Norm);

impl KernelOp for OnDevice {
    const NAME: &'static str = "norm";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let (x, Norm { weight, bias, eps, .. }) = (&inputs[0], &self.0);
        let (m, hidden) = x.dims2()?;
        if hidden != weight.len() || bias.as_ref().is_some_and(|b| b.len() != hidden) || weight.buffer().is_none() {
            bail!("norm: x is [{m}, {hidden}], the weight [{}]", weight.len());
        }
        let mut y = gpu.fresh(x.dtype(), m * hidden)?;
        let bias = bias.as_ref().and_then(|b| b.buffer());
        let call = gpu.call("norm", x.dtype()).view(x).optional(weight.buffer()).optional(bias);
        // A thread for each element of a short row; 8 warps hide the loads of a long one.
        let threads = (hidden.next_multiple_of(32) as u32).min(256);
        let grid = Grid { blocks: [m as u32, 1, 1], threads, shared: 4 * hidden as u32 };
        // SAFETY: the kernel's arguments.
        unsafe { call.fresh(&mut y).int(hidden).float(*eps).launch(grid)? };
        Ok((y, (m, hidden).into()))
    }

    fn gradients(&self, gpu: &Gpu, inputs: &[&Tensor], _: &Tensor, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(gpu.apply2(backward::Back(self.0.clone()), &inputs[0].detach(), dy)?)])
    }
}

/// [`HeadNorm`] on the device.
pub(super) struct HeadsOnDevice(pub HeadNorm);

impl KernelOp for HeadsOnDevice {
    const NAME: &'static str = "head_norm";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let (x, HeadNorm { q, k, eps, heads, kv_heads, .. }) = (&inputs[0], &self.0);
        let ((m, width), dim, all) = (x.dims2()?, q.len(), heads + 2 * kv_heads);
        if width != all * dim || k.len() != dim || q.buffer().is_none() || dim > 256 {
            bail!("head_norm: x is [{m}, {width}], {heads} query and {kv_heads} key heads of {dim}");
        }
        let mut y = gpu.fresh(x.dtype(), m * width)?;
        let call = gpu.call("head_norm", x.dtype()).view(x).optional(q.buffer()).optional(k.buffer()).fresh(&mut y);
        let call = call.int(m).int(*heads).int(*kv_heads).int(dim).float(*eps);
        let grid = Grid { blocks: [(m * all).div_ceil(4) as u32, 1, 1], threads: 128, shared: 0 };
        // SAFETY: the kernel's arguments.
        unsafe { call.launch(grid)? };
        Ok((y, (m, width).into()))
    }

    fn gradients(&self, gpu: &Gpu, inputs: &[&Tensor], _: &Tensor, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(gpu.apply2(backward::HeadsBack(self.0.clone()), &inputs[0].detach(), dy)?)])
    }
}
