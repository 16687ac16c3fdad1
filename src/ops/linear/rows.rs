//! The launch of `kernels/linear.cu`: products with few rows, which read W once.
use crate::ops::gpu::{Buffer, Fresh, Gpu, Grid, View};
use candle_core::{DType, Result, bail};

/// The most rows of one product. With more, W is used often enough for cuBLAS to do better.
pub(super) const MOST_ROWS: usize = 16;
/// Warps of a block, which share its columns or, in their turns, its k.
const WARPS: usize = 8;

/// x `[m, k]`, W `[n, k]` -> x W^T + bias + residual.
pub(super) struct Rows<'a> {
    /// `[m, k]`
    pub x: &'a View<'a>,
    /// `[n, k]`, of x's type.
    pub w: &'a Buffer,
    /// `[n]`, f32.
    pub bias: Option<&'a Buffer>,
    /// `[m, n]`, of x's type.
    pub residual: Option<&'a View<'a>>,
    /// Rows, columns of the result, and what is summed over.
    pub shape: [usize; 3],
}

impl Rows<'_> {
    /// Fills y `[m, n]`, of x's type or f32.
    ///
    /// # Safety
    /// All have the shapes and types they say, y too.
    pub unsafe fn launch(&self, gpu: &Gpu, y: &mut Fresh, out: DType) -> Result<()> {
        // 4 make the most of x, which each block reads; with a small n 1 keeps all multiprocessors busy.
        let wide = self.shape[1].div_ceil(WARPS * 4) >= 2 * gpu.multiprocessors();
        // SAFETY: the caller's.
        unsafe { self.launch_tiles(gpu, y, out, if wide { 4 } else { 1 }) }
    }

    /// The same with a given number of tiles, 1 or 4.
    ///
    /// # Safety
    /// As of [`Self::launch`].
    unsafe fn launch_tiles(&self, gpu: &Gpu, y: &mut Fresh, out: DType, tiles: usize) -> Result<()> {
        let (dtype, [m, n, k]) = (self.x.dtype(), self.shape);
        if m > MOST_ROWS {
            bail!("linear: {m} rows, at most {MOST_ROWS} at once");
        }
        let kernel = match out {
            out if out == dtype => "linear_rows",
            DType::F32 => "linear_logits",
            other => bail!("linear: x is {dtype:?}, the result cannot be {other:?}"),
        };
        let columns = WARPS * tiles;
        // Sums of the warps, padded so that lanes write to different banks.
        let shared = if dtype == DType::F32 { 0 } else { WARPS * MOST_ROWS * (columns + 8) * 4 };
        let grid =
            Grid { blocks: [n.div_ceil(columns) as u32, 1, 1], threads: 32 * WARPS as u32, shared: shared as u32 };
        let call = gpu.call(kernel, dtype).view(self.x).buffer(self.w, 0, 1).optional(self.bias);
        let call = match self.residual {
            Some(residual) => call.view(residual),
            None => call.pointer(0),
        };
        // SAFETY: the kernel's arguments, and the caller's word for what they span.
        unsafe { call.fresh(y).int(m).int(n).int(k).int(tiles).launch(grid) }
    }
}

#[cfg(all(test, feature = "emulate"))]
mod tests;
