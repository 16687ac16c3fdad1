//! The launches of `kernels/activation.cu`.
use super::Activation;
use crate::ops::gpu::{Fresh, Gpu, Grid, KernelOp, View};
use candle_core::{DType, Result, Shape, Tensor, bail};

/// [`Activation`] on the device, in the type of x.
pub(super) struct OnDevice(pub Activation);

impl Activation {
    /// Width of y for an x `[m, width]`.
    fn out_width(&self, m: usize, width: usize) -> Result<usize> {
        if self.gated && !width.is_multiple_of(2) {
            bail!("activation: x is [{m}, {width}], the width of [gate | up] must be even");
        }
        Ok(if self.gated { width / 2 } else { width })
    }
}

/// 256 threads of 16 bytes each.
fn grid(rows: usize, width: usize, dtype: DType) -> Grid {
    let columns = 256 * 16 / dtype.size_in_bytes();
    Grid { blocks: [rows as u32, width.div_ceil(columns) as u32, 1], threads: 256, shared: 0 }
}

impl KernelOp for OnDevice {
    const NAME: &'static str = "activation";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let (x, Activation { function, gated, .. }) = (&inputs[0], &self.0);
        let (m, width) = x.dims2()?;
        let out = self.0.out_width(m, width)?;
        let mut y = gpu.fresh(x.dtype(), m * out)?;
        let call = gpu.call("activation", x.dtype()).view(x).fresh(&mut y);
        let call = call.int(out).int(*function as usize).int(usize::from(*gated));
        // SAFETY: the kernel's arguments.
        unsafe { call.launch(grid(m, out, x.dtype()))? };
        Ok((y, (m, out).into()))
    }

    fn gradients(&self, gpu: &Gpu, inputs: &[&Tensor], _: &Tensor, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(gpu.apply2(Back(self.0.clone()), &inputs[0].detach(), dy)?)])
    }
}

/// x and dy -> dx.
struct Back(Activation);

impl KernelOp for Back {
    const NAME: &'static str = "activation_backward";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let (x, dy, Activation { function, gated, .. }) = (&inputs[0], &inputs[1], &self.0);
        let (m, width) = x.dims2()?;
        let out = self.0.out_width(m, width)?;
        if dy.dims2()? != (m, out) || dy.dtype() != x.dtype() {
            bail!("activation: x is [{m}, {width}] of {:?}, dy {:?} of {:?}", x.dtype(), dy.dims2()?, dy.dtype());
        }
        let mut dx = gpu.fresh(x.dtype(), m * width)?;
        let call = gpu.call("activation_backward", x.dtype()).view(x).view(dy).fresh(&mut dx);
        let call = call.int(out).int(*function as usize).int(usize::from(*gated));
        // SAFETY: the kernel's arguments.
        unsafe { call.launch(grid(m, out, x.dtype()))? };
        Ok((dx, (m, width).into()))
    }
}

#[cfg(all(test, feature = "emulate"))]
mod tests;
