//! `gpu`: where kernels run, and what they read and write.
//!
//! A kernel is CUDA C++ in `kernels/`. Its launch code, beside the CPU code of the same op, says which arguments it gets and
//! how many threads. The same launch code serves two places: a CUDA device (feature `cuda`), and the emulation that runs the
//! same kernels on the CPU for tests (feature `emulate`). Without either feature no [`Gpu`] can be made, and the launch code is
//! still compiled and checked.
//!
//! Activations, K and V on a GPU have the type of the frozen weights; sums are f32.
mod buffer;
mod call;
#[cfg(feature = "cuda")]
mod cuda;
mod emulated;
mod gemm;
mod op;
mod rows;
mod words;

pub use buffer::{Buffer, Later, Plain};
pub use call::{Call, Grid};
pub use gemm::{Gemm, Side};
pub use op::{Fresh, KernelOp, View};
pub use rows::DeviceRows;
pub use words::{Carried, Words};

use candle_core::{DType, Device, Result};

/// A device that runs the kernels. Cheap to clone.
#[derive(Clone)]
pub enum Gpu {
    /// A CUDA device.
    #[cfg(feature = "cuda")]
    Cuda(std::sync::Arc<cuda::Cuda>),
    /// The CPU, by fibers: for tests.
    Emulated(emulated::Order),
}

impl Gpu {
    /// CUDA device `index`.
    ///
    /// # Errors
    /// If the driver or the device is not there, or the kernels do not fit it; and in a build without CUDA.
    pub fn cuda(index: usize) -> Result<Self> {
        #[cfg(feature = "cuda")]
        return Ok(Gpu::Cuda(std::sync::Arc::new(cuda::Cuda::new(index)?)));
        #[cfg(not(feature = "cuda"))]
        candle_core::bail!("this build has no CUDA support, so there is no device {index}");
    }

    /// The emulation. `order`: 0 and 1 run the threads of a block forward and backward, any other seeds a random order.
    #[cfg(feature = "emulate")]
    pub fn emulated(order: u32) -> Self {
        Gpu::Emulated(emulated::Order(order))
    }

    /// Where its tensors lie.
    pub fn device(&self) -> Device {
        match *self {
            #[cfg(feature = "cuda")]
            Gpu::Cuda(ref cuda) => cuda.device(),
            Gpu::Emulated(_) => Device::Cpu,
        }
    }

    /// What it is called, for people.
    pub fn name(&self) -> String {
        match *self {
            #[cfg(feature = "cuda")]
            Gpu::Cuda(ref cuda) => cuda.name(),
            Gpu::Emulated(_) => "emulated".into(),
        }
    }

    /// Multiprocessors: how many blocks it takes to have all of it at work.
    pub fn multiprocessors(&self) -> usize {
        match *self {
            #[cfg(feature = "cuda")]
            Gpu::Cuda(ref cuda) => cuda.multiprocessors(),
            Gpu::Emulated(_) => 4,
        }
    }

    /// Bytes that are free, and all there are.
    pub fn memory(&self) -> Result<(usize, usize)> {
        match *self {
            #[cfg(feature = "cuda")]
            Gpu::Cuda(ref cuda) => cuda.memory(),
            Gpu::Emulated(_) => Ok((64 << 20, 64 << 20)),
        }
    }

    /// Seconds that the device takes for what `work` gives it to do, by its own clock.
    pub fn timed(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        match *self {
            #[cfg(feature = "cuda")]
            Gpu::Cuda(ref cuda) => cuda.timed(work),
            Gpu::Emulated(_) => {
                let began = std::time::Instant::now();
                work().map(|()| began.elapsed().as_secs_f64())
            }
        }
    }

    /// Records what `work` gives the device to do, without doing it, to be launched as a whole: one call of the driver for hundreds. `work`
    /// must neither read nor upload. `None` where nothing is recorded and `work` not called: the emulation has no such thing.
    ///
    /// # Errors
    /// Those of `work`, or what the driver says.
    pub fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<Option<Recorded>> {
        match *self {
            #[cfg(feature = "cuda")]
            Gpu::Cuda(ref cuda) => cuda.record(work).map(|recorded| Some(Recorded::Cuda(recorded))),
            Gpu::Emulated(_) => {
                drop(work);
                Ok(None)
            }
        }
    }

    /// Starts the call of `kernel`, in the variant for `dtype`.
    pub fn call(&self, kernel: &'static str, dtype: DType) -> Call<'_> {
        Call::new(self, kernel, dtype)
    }
}

/// Work of a device that was recorded.
pub enum Recorded {
    /// A CUDA graph.
    #[cfg(feature = "cuda")]
    Cuda(cuda::Recorded),
}

impl Recorded {
    /// Does it once more, in the memory that it was recorded with, after all work before.
    pub fn launch(&mut self) -> Result<()> {
        match *self {
            #[cfg(feature = "cuda")]
            Recorded::Cuda(ref mut recorded) => recorded.launch(),
        }
    }
}

#[cfg(all(test, feature = "emulate"))]
pub(in crate::ops) mod tests;
