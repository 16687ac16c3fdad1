//! A frozen layer on a GPU: the weight as it is in the checkpoint, `[n, k]`. Products of few rows are our own, others cuBLAS's.
use super::Linear;
use super::rows::{MOST_ROWS, Rows};
use crate::ops::gpu::{Buffer, Fresh, Gemm, Gpu, Grid, KernelOp, Side, View};
use candle_core::{DType, Result, Shape, Tensor, bail};

/// W `[n, k]` on the device.
pub struct Matrix {
    buffer: Buffer,
    dtype: DType,
    n: usize,
    k: usize,
}

impl Matrix {
    /// A copy of `weight` `[n, k]`, f32, bf16 or f16.
    pub fn new(gpu: &Gpu, weight: &Tensor) -> Result<Self> {
        let ((n, k), flat) = (weight.dims2()?, weight.flatten_all()?);
        let buffer = match weight.dtype() {
            DType::F32 => Buffer::new(gpu, &flat.to_vec1::<f32>()?)?,
            DType::BF16 => Buffer::new(gpu, &flat.to_vec1::<half::bf16>()?)?,
            DType::F16 => Buffer::new(gpu, &flat.to_vec1::<half::f16>()?)?,
            other => bail!("linear: weights of type {other:?} are not supported"),
        };
        Ok(Matrix { buffer, dtype: weight.dtype(), n, k })
    }

    /// Rows.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Columns.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Type of the elements, and of the activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The elements.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }
}

/// x `[m, k]` (and residual `[m, n]`) -> x W^T + bias + residual, of type `out`.
pub(super) struct Product {
    pub linear: Linear,
    pub out: DType,
}

impl KernelOp for Product {
    const NAME: &'static str = "linear";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let (x, residual) = (&inputs[0], inputs.get(1));
        let Some(w) = self.linear.matrix() else { bail!("linear: the weight is not on the device") };
        let ((m, k), n) = (x.dims2()?, w.n);
        if k != w.k || x.dtype() != w.dtype {
            bail!("linear: x is [{m}, {k}] of {:?}, the weight [{n}, {}] of {:?}", x.dtype(), w.k, w.dtype);
        }
        if let Some(residual) = residual {
            let (rows, width) = residual.dims2()?;
            // Kernels read it in the type of the weight.
            if (rows, width, residual.dtype(), self.out) != (m, n, w.dtype, w.dtype) {
                let (given, want) = (residual.dtype(), w.dtype);
                bail!(
                    "linear: the residual is [{rows}, {width}] of {given:?} for {:?}; m {m}, n {n}, {want:?}",
                    self.out
                );
            }
        }
        let mut y = gpu.fresh(self.out, m * n)?;
        let bias = self.linear.bias.as_ref().and_then(|b| b.buffer());
        if m <= MOST_ROWS {
            let rows = Rows { x, w: &w.buffer, bias, residual, shape: [m, n, k] };
            // SAFETY: the shapes and types were checked.
            unsafe { rows.launch(gpu, &mut y, self.out)? };
            return Ok((y, (m, n).into()));
        }
        let add = bias.is_some() || residual.is_some();
        if add {
            let call = gpu.call("add", self.out);
            let call = match residual {
                Some(residual) => call.view(residual),
                None => call.pointer(0),
            };
            let grid = Grid { blocks: [m as u32, n.div_ceil(256) as u32, 1], threads: 256, shared: 0 };
            // SAFETY: the kernel's arguments.
            unsafe { call.optional(bias).fresh(&mut y).int(n).launch(grid)? };
        }
        let beta = if add { 1.0 } else { 0.0 };
        let product = Gemm::new([m, n, k], (x, &w.buffer, w.dtype, Side::Transposed), &mut y, self.out, beta);
        // SAFETY: the shapes were checked, and y is fresh.
        unsafe { product.run(gpu)? };
        Ok((y, (m, n).into()))
    }

    /// The weight and the bias are frozen: they have no gradient to lose.
    fn gradients(&self, gpu: &Gpu, inputs: &[&Tensor], _: &Tensor, dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let dx = gpu.apply1(InputGradient(self.linear.clone()), dy)?;
        Ok(std::iter::once(Some(dx)).chain(inputs.get(1).map(|_| Some(dy.clone()))).collect())
    }
}

/// dy `[m, n]` -> dy W `[m, k]`, from the weight that serves.
pub(super) struct InputGradient(pub Linear);

impl KernelOp for InputGradient {
    const NAME: &'static str = "linear_input_gradient";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let dy = &inputs[0];
        let Some(w) = self.0.matrix() else { bail!("linear: the weight is not on the device") };
        let (m, n) = dy.dims2()?;
        if n != w.n || dy.dtype() != w.dtype {
            bail!("linear: dy is [{m}, {n}] of {:?}, the weight [{}, {}] of {:?}", dy.dtype(), w.n, w.k, w.dtype);
        }
        let mut dx = gpu.fresh(w.dtype, m * w.k)?;
        let product = Gemm::new([m, w.k, n], (dy, &w.buffer, w.dtype, Side::Plain), &mut dx, w.dtype, 0.0);
        // SAFETY: the shapes were checked, and dx is fresh.
        unsafe { product.run(gpu)? };
        Ok((dx, (m, w.k).into()))
    }
}
