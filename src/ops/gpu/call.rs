//! One launch of a kernel: its arguments in the order of its parameters, and its grid.
use super::{Buffer, Fresh, Gpu, View};
use candle_core::{DType, Result, bail};

/// How many threads run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Blocks in x, y and z. None at all: there is nothing to do, and nothing is launched.
    pub blocks: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u32,
}

/// A launch in the making.
pub struct Call<'a> {
    gpu: &'a Gpu,
    kernel: &'static str,
    dtype: DType,
    /// Pointers, and scalars in the low bytes: a kernel reads as many bytes as its parameter has.
    values: Vec<u64>,
    misaligned: Option<usize>,
}

impl<'a> Call<'a> {
    pub(super) fn new(gpu: &'a Gpu, kernel: &'static str, dtype: DType) -> Self {
        Call { gpu, kernel, dtype, values: Vec::with_capacity(16), misaligned: None }
    }

    /// A tensor that is read.
    pub fn view(self, view: &View<'_>) -> Self {
        self.pointer(view.pointer())
    }

    /// A tensor that is made.
    pub fn fresh(self, made: &mut Fresh) -> Self {
        let pointer = made.pointer();
        self.pointer(pointer)
    }

    /// Memory of ours, from element `at` of `size` bytes on.
    pub fn buffer(self, buffer: &Buffer, at: usize, size: usize) -> Self {
        self.pointer(buffer.pointer() + (at * size) as u64)
    }

    /// All of a buffer, or null.
    pub fn optional(self, buffer: Option<&Buffer>) -> Self {
        self.pointer(buffer.map_or(0, Buffer::pointer))
    }

    /// An address, or null.
    pub fn pointer(mut self, pointer: u64) -> Self {
        self.values.push(pointer);
        self
    }

    /// The last pointer must be aligned to 16 bytes, for loads of a [`Pack`](https://docs.nvidia.com/cuda/cuda-c-programming-guide/#device-memory-accesses).
    pub fn aligned(mut self) -> Self {
        if self.values.last().is_some_and(|p| p % 16 != 0) {
            self.misaligned.get_or_insert(self.values.len() - 1);
        }
        self
    }

    /// An `int`.
    pub fn int(mut self, value: usize) -> Self {
        // Every count is bounded by the memory of a device, and checked by the op; what does not fit shows as no valid size.
        self.values.push(u64::from(i32::try_from(value).unwrap_or(-1) as u32));
        self
    }

    /// A `float`.
    pub fn float(mut self, value: f32) -> Self {
        self.values.push(u64::from(value.to_bits()));
        self
    }

    /// Puts the kernel on the device's stream.
    ///
    /// # Errors
    /// Names the kernel and what the device, or the emulation, says.
    ///
    /// # Safety
    /// The arguments are those of the kernel, and it accesses only memory that they span.
    pub unsafe fn launch(self, grid: Grid) -> Result<()> {
        let suffix = match self.dtype {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            other => bail!("{}: there is no kernel for {other:?}", self.kernel),
        };
        if let Some(index) = self.misaligned {
            bail!("{}_{suffix}: argument {index} is not aligned to 16 bytes", self.kernel);
        }
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        let name = format!("{}_{suffix}", self.kernel);
        match *self.gpu {
            #[cfg(feature = "cuda")]
            // SAFETY: the caller's.
            Gpu::Cuda(ref cuda) => unsafe { cuda.launch(&name, grid, &self.values) },
            // SAFETY: the caller's.
            Gpu::Emulated(order) => unsafe { order.launch(&name, grid, &self.values) },
        }
    }
}
