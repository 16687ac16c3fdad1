//! `linear`: y = x W^T (+ bias) (+ residual) with a frozen weight that is packed once, at load.
//!
//! candle's matmul computes the gradient of both operands, widens bf16 at each call and sums in an order that
//! depends on the number of rows. This op has none of that: the weight is not a tensor of the graph at all.
mod buffer;
mod matrix;
mod pack;
mod packed;
mod product;
mod rows;
mod tile;
mod transposed;

pub use buffer::Arena;
pub(super) use buffer::Buffer;
pub use matrix::Matrix;
pub use packed::Packed;
pub(super) use product::bench_tile;
pub use product::{Addends, Scratch};
pub use tile::{Isa, Kind};

use super::{Machine, Vector, slice};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Storage, Tensor, bail};
use matrix::Product;
use std::sync::Arc;

/// A frozen layer W `[n, k]` with an optional bias `[n]`. Cheap to clone.
#[derive(Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Vector>,
    machine: Arc<Machine>,
}

/// Where the weight lies.
#[derive(Clone)]
enum Weight {
    /// On the processor, in panels.
    Packed(Arc<Packed>),
    /// On the GPU.
    Matrix(Arc<Matrix>),
}

impl Linear {
    /// Packs rows that lie one tensor after the other (`q`, `k`, `v`; `gate`, `up`): each `[n_i, k]`, one dtype of f32,
    /// bf16, f16. f16 is held as f32, which is exact. Each bias is `[n_i]` or missing (zeros, if another is there).
    ///
    /// # Errors
    /// A shape that differs, or a dtype that is none of the three.
    pub fn new(weights: &[Tensor], biases: &[Option<Tensor>], machine: &Arc<Machine>) -> Result<Self> {
        let weight = Tensor::cat(weights, 0)?;
        let (n, k) = weight.dims2()?;
        if let Some(gpu) = machine.gpu() {
            return Self::with(Weight::Matrix(Arc::new(Matrix::new(gpu, &weight)?)), weights, biases, machine);
        }
        let packed = match weight.dtype() {
            DType::BF16 => {
                Packed::bf16(&weight.flatten_all()?.to_vec1::<half::bf16>()?, n, k, Isa::Auto, machine.arena())
            }
            DType::F16 | DType::F32 => Packed::f32(
                &weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?,
                n,
                k,
                Isa::Auto,
                machine.arena(),
            ),
            other => bail!("linear: weights of type {other:?} are not supported"),
        };
        Self::with(Weight::Packed(Arc::new(packed)), weights, biases, machine)
    }

    /// The same with the weights rounded to int8; see [`Packed::int8`].
    pub fn int8(weights: &[Tensor], biases: &[Option<Tensor>], machine: &Arc<Machine>) -> Result<Self> {
        if machine.gpu().is_some() {
            bail!("linear: int8 weights are for the CPU");
        }
        let weight = Tensor::cat(weights, 0)?.to_dtype(DType::F32)?;
        let (n, k) = weight.dims2()?;
        let packed = Packed::int8(&weight.flatten_all()?.to_vec1::<f32>()?, n, k, Isa::Auto, machine.arena());
        Self::with(Weight::Packed(Arc::new(packed)), weights, biases, machine)
    }

    fn with(weight: Weight, weights: &[Tensor], biases: &[Option<Tensor>], machine: &Arc<Machine>) -> Result<Self> {
        let rows = weights.iter().map(|w| w.dim(0)).sum::<Result<usize>>()?;
        let mut bias = vec![0f32; rows];
        let mut row = 0;
        for (w, b) in weights.iter().zip(biases) {
            let rows = w.dim(0)?;
            if let Some(b) = b {
                let b = b.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                if b.len() != rows {
                    bail!("linear: a bias of {} for {rows} rows", b.len());
                }
                bias[row..row + rows].copy_from_slice(&b);
            }
            row += rows;
        }
        let bias = biases.iter().any(Option::is_some).then(|| Vector::new(bias, machine)).transpose()?;
        Ok(Linear { weight, bias, machine: machine.clone() })
    }

    /// The packed weight, if it lies on the processor: a tied embedding reads its rows.
    pub fn packed(&self) -> Option<&Packed> {
        if let Weight::Packed(packed) = &self.weight { Some(packed) } else { None }
    }

    /// The weight, if it lies on the GPU.
    pub fn matrix(&self) -> Option<&Matrix> {
        if let Weight::Matrix(matrix) = &self.weight { Some(matrix) } else { None }
    }

    /// Width of what comes out.
    pub fn n(&self) -> usize {
        match &self.weight {
            Weight::Packed(w) => w.n(),
            Weight::Matrix(w) => w.n(),
        }
    }

    /// Width of what goes in.
    pub fn k(&self) -> usize {
        match &self.weight {
            Weight::Packed(w) => w.k(),
            Weight::Matrix(w) => w.k(),
        }
    }

    /// x `[m, k]` -> `[m, n]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match (self.machine.gpu(), self.matrix()) {
            (Some(gpu), Some(w)) => gpu.apply1(Product { linear: self.clone(), out: w.dtype() }, x),
            _ => x.apply_op1(self.clone()),
        }
    }

    /// The same in f32, whatever the type of the weights: logits are not rounded to it.
    pub fn forward_f32(&self, x: &Tensor) -> Result<Tensor> {
        match self.machine.gpu() {
            Some(gpu) => gpu.apply1(Product { linear: self.clone(), out: DType::F32 }, x),
            None => x.apply_op1(self.clone()),
        }
    }

    /// x `[m, k]`, residual `[m, n]` -> residual + x W^T + bias.
    pub fn forward_add(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        match (self.machine.gpu(), self.matrix()) {
            (Some(gpu), Some(w)) => gpu.apply2(Product { linear: self.clone(), out: w.dtype() }, x, residual),
            _ => x.apply_op2(residual, self.clone()),
        }
    }

    /// dy `[m, n]` -> dx `[m, k]`, from the panels that serve.
    pub fn input_gradient(&self, dy: &Tensor) -> Result<Tensor> {
        match self.machine.gpu() {
            Some(gpu) => gpu.apply1(matrix::InputGradient(self.clone()), &dy.contiguous()?),
            None => dy.contiguous()?.apply_op1(InputGradient(self.clone())),
        }
    }

    /// What its ops share.
    pub(super) fn machine(&self) -> &Machine {
        &self.machine
    }

    /// x `[m, k]` -> the elements of `[m, n]`, on the host, outside of any graph.
    pub(super) fn values(&self, x: &Tensor) -> Result<Vec<f32>> {
        let (storage, layout) = x.storage_and_layout();
        let Storage::Cpu(x) = &*storage else { bail!("linear: x is not on the CPU") };
        self.product(x, layout, None)
    }

    fn run(&self, x: &CpuStorage, layout: &Layout, residual: Option<&[f32]>) -> Result<(CpuStorage, Shape)> {
        let y = self.product(x, layout, residual)?;
        Ok((CpuStorage::F32(y), (layout.shape().dims2()?.0, self.n()).into()))
    }

    fn product(&self, x: &CpuStorage, layout: &Layout, residual: Option<&[f32]>) -> Result<Vec<f32>> {
        self.rows(slice(x, layout, "linear")?, layout.shape().dims2()?, residual)
    }

    /// x `[m, k]` -> `[m, n]`, the residual's shape, as plain elements.
    pub(super) fn rows(&self, x: &[f32], (m, k): (usize, usize), residual: Option<&[f32]>) -> Result<Vec<f32>> {
        let weight = self.on_host()?;
        if k != weight.k() {
            bail!("linear: x is [{m}, {k}], the weight [{}, {}]", weight.n(), weight.k());
        }
        let add = Addends { bias: self.bias.as_deref(), residual };
        Ok(weight.forward(x, m, add, &mut self.machine.scratch(), &self.machine.pool))
    }

    /// dy `[m, n]` -> dx `[m, k]`, as plain elements.
    pub(super) fn row_gradients(&self, dy: &[f32], (m, n): (usize, usize)) -> Result<Vec<f32>> {
        let weight = self.on_host()?;
        if n != weight.n() {
            bail!("linear: dy is [{m}, {n}], the weight [{}, {}]", weight.n(), weight.k());
        }
        Ok(weight.backward(dy, m, &mut self.machine.scratch(), &self.machine.pool))
    }

    fn on_host(&self) -> Result<&Packed> {
        let Some(weight) = self.packed() else { bail!("linear: the weight is not on the CPU") };
        Ok(weight)
    }
}

impl CustomOp1 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(x, layout, None)
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(Some(self.input_gradient(dy)?))
    }
}

/// dy `[m, n]` -> dx `[m, k]`. The weight and the bias are frozen: they have no gradient to lose.
struct InputGradient(Linear);

impl CustomOp1 for InputGradient {
    fn name(&self) -> &'static str {
        "linear_input_gradient"
    }

    fn cpu_fwd(&self, dy: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let shape = layout.shape().dims2()?;
        let dx = self.0.row_gradients(slice(dy, layout, "linear")?, shape)?;
        Ok((CpuStorage::F32(dx), (shape.0, self.0.k()).into()))
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear_add"
    }

    fn cpu_fwd(&self, x: &CpuStorage, xl: &Layout, r: &CpuStorage, rl: &Layout) -> Result<(CpuStorage, Shape)> {
        if rl.shape().dims2()? != (xl.shape().dims2()?.0, self.n()) {
            bail!("linear_add: residual is {:?}, x {:?}, n {}", rl.shape(), xl.shape(), self.n());
        }
        self.run(x, xl, Some(slice(r, rl, "linear_add")?))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(self.input_gradient(dy)?), Some(dy.clone())))
    }
}

#[cfg(test)]
mod tests;
