//! Ops of kernels as ops of candle: tensors in, one new tensor out, with a gradient or a loud error.
use super::{Gpu, Plain};
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Error, Layout, Result, Shape, Storage, Tensor,
    WithDType, bail,
};
use std::marker::PhantomData;

/// An op that launches kernels.
pub trait KernelOp: Send + Sync + 'static {
    /// For error messages.
    const NAME: &'static str;

    /// Launches; returns what is made and its shape.
    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)>;

    /// Gradients of the inputs, given the result and its gradient. Where there is none, that is an error.
    fn gradients(&self, _gpu: &Gpu, _inputs: &[&Tensor], _y: &Tensor, _dy: &Tensor) -> Result<Vec<Option<Tensor>>> {
        Err(Error::BackwardNotSupported { op: Self::NAME })
    }
}

/// A contiguous tensor on the device.
pub struct View<'a> {
    pointer: u64,
    dtype: DType,
    dims: &'a [usize],
    /// The storage stays where it is for as long as the view.
    storage: PhantomData<&'a ()>,
}

impl View<'_> {
    pub(super) fn pointer(&self) -> u64 {
        self.pointer
    }

    /// Its type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Rows and columns.
    ///
    /// # Errors
    /// If it has not two dimensions.
    pub fn dims2(&self) -> Result<(usize, usize)> {
        match *self.dims {
            [rows, columns] => Ok((rows, columns)),
            ref dims => bail!("a tensor of {dims:?} where [rows, columns] is wanted"),
        }
    }
}

/// Memory for the elements of a tensor. A kernel must write all of them: the emulation starts them as NaN.
pub enum Fresh {
    /// On a CUDA device.
    #[cfg(feature = "cuda")]
    Cuda(CudaStorage),
    /// In the emulation.
    Emulated(CpuStorage),
}

impl Fresh {
    /// Where it starts.
    pub(super) fn pointer(&mut self) -> u64 {
        match *self {
            #[cfg(feature = "cuda")]
            Fresh::Cuda(ref storage) => super::cuda::pointer(storage),
            Fresh::Emulated(ref mut storage) => super::emulated::pointer_mut(storage),
        }
    }

    /// As a tensor outside of any graph.
    pub fn tensor(self, shape: impl Into<Shape>) -> Tensor {
        let storage = match self {
            #[cfg(feature = "cuda")]
            Fresh::Cuda(storage) => Storage::Cuda(storage),
            Fresh::Emulated(storage) => Storage::Cpu(storage),
        };
        Tensor::from_storage(storage, shape, candle_core::op::BackpropOp::none(), false)
    }
}

impl Gpu {
    /// Room for `len` elements.
    pub fn fresh(&self, dtype: DType, len: usize) -> Result<Fresh> {
        match *self {
            #[cfg(feature = "cuda")]
            Gpu::Cuda(ref cuda) => Ok(Fresh::Cuda(cuda.fresh(dtype, len)?)),
            Gpu::Emulated(_) => Ok(Fresh::Emulated(super::emulated::fresh(dtype, len)?)),
        }
    }

    /// `values` as a tensor outside of any graph, after all work before; nobody waits for that.
    pub fn upload<T: Plain + WithDType>(&self, values: &[T], shape: impl Into<Shape>) -> Result<Tensor> {
        let made = match *self {
            #[cfg(feature = "cuda")]
            Gpu::Cuda(ref cuda) => Fresh::Cuda(cuda.upload(T::DTYPE, super::buffer::bytes(values))?),
            Gpu::Emulated(_) => Fresh::Emulated(T::to_cpu_storage(values)),
        };
        Ok(made.tensor(shape))
    }

    /// Calls `f` with views of `tensors`, which stay where they are meanwhile: for what is no op of a graph, with more inputs
    /// than three or more than one result.
    ///
    /// # Errors
    /// If one of them is not on this device, or not contiguous.
    pub fn with<R>(&self, op: &str, tensors: &[&Tensor], f: impl FnOnce(&[View<'_>]) -> Result<R>) -> Result<R> {
        let guards: Vec<_> = tensors.iter().map(|t| t.storage_and_layout()).collect();
        let views = guards.iter().map(|(storage, layout)| match (self, &**storage) {
            (Gpu::Emulated(_), Storage::Cpu(s)) => view(super::emulated::pointer(s), s.dtype(), layout, op),
            #[cfg(feature = "cuda")]
            (Gpu::Cuda(_), Storage::Cuda(s)) => view(super::cuda::pointer(s), s.dtype(), layout, op),
            _ => bail!("{op}: a tensor {layout:?} is not on the device"),
        });
        f(&views.collect::<Result<Vec<_>>>()?)
    }

    /// Runs an op of one input.
    pub fn apply1(&self, op: impl KernelOp, x: &Tensor) -> Result<Tensor> {
        x.apply_op1(OnGpu { gpu: self.clone(), op })
    }

    /// Runs an op of two inputs.
    pub fn apply2(&self, op: impl KernelOp, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        a.apply_op2(b, OnGpu { gpu: self.clone(), op })
    }

    /// Runs an op of three inputs.
    pub fn apply3(&self, op: impl KernelOp, a: &Tensor, b: &Tensor, c: &Tensor) -> Result<Tensor> {
        a.apply_op3(b, c, OnGpu { gpu: self.clone(), op })
    }
}

struct OnGpu<O> {
    gpu: Gpu,
    op: O,
}

impl<O: KernelOp> OnGpu<O> {
    /// Inputs in the memory of the emulation.
    fn on_cpu(&self, inputs: &[(&CpuStorage, &Layout)]) -> Result<(CpuStorage, Shape)> {
        match self.gpu {
            #[cfg(feature = "cuda")]
            Gpu::Cuda(_) => bail!("{}: an input is not on the device", O::NAME),
            Gpu::Emulated(_) => {
                let views = inputs.iter().map(|(s, l)| view(super::emulated::pointer(s), s.dtype(), l, O::NAME));
                match self.op.run(&self.gpu, &views.collect::<Result<Vec<_>>>()?)? {
                    (Fresh::Emulated(storage), shape) => Ok((storage, shape)),
                    #[cfg(feature = "cuda")]
                    _ => bail!("{}: the result is not in the emulation", O::NAME),
                }
            }
        }
    }

    fn on_cuda(&self, inputs: &[(&CudaStorage, &Layout)]) -> Result<(CudaStorage, Shape)> {
        match self.gpu {
            #[cfg(feature = "cuda")]
            Gpu::Cuda(_) => {
                let views = inputs.iter().map(|(s, l)| view(super::cuda::pointer(s), s.dtype(), l, O::NAME));
                match self.op.run(&self.gpu, &views.collect::<Result<Vec<_>>>()?)? {
                    (Fresh::Cuda(storage), shape) => Ok((storage, shape)),
                    _ => bail!("{}: the result is not on the device", O::NAME),
                }
            }
            Gpu::Emulated(_) => bail!("{}: {} inputs that are not in the emulation", O::NAME, inputs.len()),
        }
    }

    fn back(&self, inputs: &[&Tensor], y: &Tensor, dy: &Tensor) -> Result<std::vec::IntoIter<Option<Tensor>>> {
        let gradients = self.op.gradients(&self.gpu, inputs, y, &dy.contiguous()?)?;
        if gradients.len() != inputs.len() {
            bail!("{}: {} gradients of {} inputs", O::NAME, gradients.len(), inputs.len());
        }
        Ok(gradients.into_iter())
    }
}

fn view<'a>(start: u64, dtype: DType, layout: &'a Layout, op: &str) -> Result<View<'a>> {
    let Some((first, _)) = layout.contiguous_offsets() else {
        bail!("{op}: a tensor must be contiguous, it is {layout:?}");
    };
    let pointer = start + (first * dtype.size_in_bytes()) as u64;
    Ok(View { pointer, dtype, dims: layout.dims(), storage: PhantomData })
}

impl<O: KernelOp> CustomOp1 for OnGpu<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu(&[(x, l)])
    }

    fn cuda_fwd(&self, x: &CudaStorage, l: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on_cuda(&[(x, l)])
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        Ok(self.back(&[x], y, dy)?.next().flatten())
    }
}

impl<O: KernelOp> CustomOp2 for OnGpu<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(&self, a: &CpuStorage, al: &Layout, b: &CpuStorage, bl: &Layout) -> Result<(CpuStorage, Shape)> {
        self.on_cpu(&[(a, al), (b, bl)])
    }

    fn cuda_fwd(&self, a: &CudaStorage, al: &Layout, b: &CudaStorage, bl: &Layout) -> Result<(CudaStorage, Shape)> {
        self.on_cuda(&[(a, al), (b, bl)])
    }

    fn bwd(&self, a: &Tensor, b: &Tensor, y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut all = self.back(&[a, b], y, dy)?;
        Ok((all.next().flatten(), all.next().flatten()))
    }
}

impl<O: KernelOp> CustomOp3 for OnGpu<O> {
    fn name(&self) -> &'static str {
        O::NAME
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        al: &Layout,
        b: &CpuStorage,
        bl: &Layout,
        c: &CpuStorage,
        cl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.on_cpu(&[(a, al), (b, bl), (c, cl)])
    }

    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        al: &Layout,
        b: &CudaStorage,
        bl: &Layout,
        c: &CudaStorage,
        cl: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.on_cuda(&[(a, al), (b, bl), (c, cl)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut all = self.back(&[a, b, c], y, dy)?;
        Ok((all.next().flatten(), all.next().flatten(), all.next().flatten()))
    }
}
