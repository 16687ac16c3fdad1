//! What the ops of one model run on.
use super::gpu::{Buffer, Gpu};
use super::linear::{Arena, Scratch};
use super::memory;
use super::pool::Pool;
use candle_core::{DType, Device, Result, Tensor};
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The processor's threads, and the GPU if the model lies there. All ops of a model share one.
pub struct Machine {
    /// The threads.
    pub pool: Pool,
    /// Where the weights lie, if not here.
    gpu: Option<Gpu>,
    /// Memory that would otherwise be allocated at each call.
    scratch: Mutex<Scratch>,
    /// Where packed weights lie.
    arena: Arena,
}

impl Machine {
    /// The processor alone; `threads` 0 means one a core.
    pub fn new(threads: usize) -> Arc<Self> {
        Arc::new(Machine { pool: Pool::new(threads), gpu: None, scratch: Mutex::default(), arena: Arena::default() })
    }

    /// A GPU, with `threads` for what stays on the processor.
    pub fn with_gpu(threads: usize, gpu: Gpu) -> Arc<Self> {
        Arc::new(Machine {
            pool: Pool::new(threads),
            gpu: Some(gpu),
            scratch: Mutex::default(),
            arena: Arena::default(),
        })
    }

    /// The GPU that the weights lie on.
    pub fn gpu(&self) -> Option<&Gpu> {
        self.gpu.as_ref()
    }

    /// Where tensors lie.
    pub fn device(&self) -> Device {
        self.gpu.as_ref().map_or(Device::Cpu, Gpu::device)
    }

    /// `[rows, columns]` of host values, where the ops want them. f32: kernels take inputs of users as they are.
    pub fn rows(&self, values: &[f32], columns: usize) -> Result<Tensor> {
        let shape = (values.len() / columns.max(1), columns);
        match &self.gpu {
            Some(gpu) if !values.is_empty() => gpu.upload(values, shape),
            _ => self.to_device(&Tensor::from_slice(values, shape, &Device::Cpu)?),
        }
    }

    /// Rows `[n, columns]` where the ops want them. A GPU has no tensor without elements: no rows become one of zeros, which nobody
    /// names.
    pub fn to_device(&self, rows: &Tensor) -> Result<Tensor> {
        if self.gpu.is_some() && rows.dim(0)? == 0 {
            return Tensor::zeros((1, rows.dim(1)?), rows.dtype(), &self.device());
        }
        rows.to_device(&self.device())
    }

    /// A tensor where the ops want it, as f32 on the processor.
    pub fn to_host(tensor: &Tensor) -> Result<Tensor> {
        tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)
    }

    /// Waits for a GPU to have done what it was given; an error says that it is lost.
    pub fn synchronize(&self) -> Result<()> {
        self.device().synchronize()
    }

    /// Where packed weights lie, until [`Machine::settle`].
    pub(super) fn arena(&self) -> &Arena {
        &self.arena
    }

    /// The base is in place: what is packed from here on has memory of its own, and what loading left over is given back.
    pub fn settle(&self) {
        self.arena.seal();
        memory::settle();
    }

    pub(super) fn scratch(&self) -> MutexGuard<'_, Scratch> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let gpu = self.gpu.as_ref().map(Gpu::name);
        write!(f, "Machine({} threads, GPU {gpu:?})", self.pool.threads())
    }
}

/// Small frozen weights in f32: norms, biases, frequencies. Always on the host, and on the GPU if the model lies there.
#[derive(Clone)]
pub struct Vector {
    host: Arc<[f32]>,
    device: Option<Arc<Buffer>>,
}

impl Vector {
    /// A copy where `machine`'s ops read it.
    pub fn new(values: Vec<f32>, machine: &Machine) -> Result<Self> {
        let device = machine.gpu().map(|gpu| Buffer::new(gpu, &values)).transpose()?.map(Arc::new);
        Ok(Vector { host: values.into(), device })
    }

    /// On the GPU.
    pub fn buffer(&self) -> Option<&Buffer> {
        self.device.as_deref()
    }
}

impl Deref for Vector {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.host
    }
}
