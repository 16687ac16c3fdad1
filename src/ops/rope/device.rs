//! The launch of `kernels/rope.cu`.
use super::Frequencies;
use crate::ops::gpu::{DeviceRows, Fresh, Gpu, Grid, KernelOp, View};
use crate::ops::prefix_attention::{KvLayout, MAX_HEAD_DIM};
use candle_core::{Result, Shape, Tensor, bail};
use std::sync::Arc;

#[derive(Clone)]
struct OnDevice {
    rows: Arc<DeviceRows>,
    frequencies: Arc<Frequencies>,
    heads: usize,
    layout: KvLayout,
    back: bool,
}

/// As [`super::rope`]: `qkv` `[m, (heads + 2 * kv_heads) * head_dim]` with the positions of `rows`.
pub fn rope(
    gpu: &Gpu,
    qkv: &Tensor,
    rows: &Arc<DeviceRows>,
    frequencies: &Arc<Frequencies>,
    heads: usize,
    layout: KvLayout,
) -> Result<Tensor> {
    gpu.apply1(OnDevice { rows: rows.clone(), frequencies: frequencies.clone(), heads, layout, back: false }, qkv)
}

impl KernelOp for OnDevice {
    const NAME: &'static str = "rope";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let (x, KvLayout { kv_heads, head_dim }) = (&inputs[0], self.layout);
        let ((m, width), all) = (x.dims2()?, self.heads + 2 * kv_heads);
        let half = self.frequencies.inv_freq.len();
        let Some(frequencies) = self.frequencies.inv_freq.buffer() else { bail!("rope: no frequencies on the device") };
        if m != self.rows.len()
            || width != all * head_dim
            || 2 * half > head_dim
            || half == 0
            || head_dim > MAX_HEAD_DIM
        {
            bail!("rope: x is [{m}, {width}], {} rows, {all} heads of {head_dim}, {} turn", self.rows.len(), 2 * half);
        }
        let mut y = gpu.fresh(x.dtype(), m * width)?;
        let position = self.rows.position();
        let call = gpu.call("rope", x.dtype()).view(x).buffer(position.0, position.1, 4).optional(Some(frequencies));
        let call = call.fresh(&mut y).int(m).int(self.heads).int(kv_heads).int(head_dim).int(half);
        let call = call.float(self.frequencies.scale).float(if self.back { -1.0 } else { 1.0 });
        let grid = Grid { blocks: [(m * all).div_ceil(4) as u32, 1, 1], threads: 128, shared: 0 };
        // SAFETY: the kernel's arguments.
        unsafe { call.launch(grid)? };
        Ok((y, (m, width).into()))
    }

    /// The turn back.
    fn gradients(&self, gpu: &Gpu, _: &[&Tensor], _: &Tensor, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(gpu.apply1(OnDevice { back: !self.back, ..self.clone() }, dy)?)])
    }
}
