//! Memory on the device that is no tensor of a graph: frozen weights, the KV pool, the plan of a step.
use super::Gpu;
use candle_core::{Result, bail};
use std::marker::PhantomData;
use std::sync::Arc;

/// Types whose bytes go to the device as they are.
///
/// # Safety
/// Without padding, and any bytes are a value.
pub unsafe trait Plain: Copy + 'static {}
// SAFETY: all four are numbers.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: a transparent u16.
unsafe impl Plain for half::bf16 {}
// SAFETY: as above.
unsafe impl Plain for half::f16 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for f64 {}
// SAFETY: as above.
unsafe impl Plain for u8 {}

/// `values` as they lie in memory.
pub(super) fn bytes<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: plain values are their bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), size_of_val(values)) }
}

/// Memory that kernels read and write. It is freed when the last work on it is done.
pub struct Buffer {
    memory: Memory,
    bytes: usize,
}

/// Elements on their way from the device.
pub struct Later<T> {
    arriving: Arriving,
    len: usize,
    elements: PhantomData<T>,
}

enum Arriving {
    #[cfg(feature = "cuda")]
    Cuda(super::cuda::Later),
    Here(Vec<u8>),
}

impl<T: Plain> Later<T> {
    /// Waits for them.
    pub fn wait(self) -> Result<Vec<T>> {
        fill(self.len, |bytes| match self.arriving {
            #[cfg(feature = "cuda")]
            Arriving::Cuda(later) => later.wait(bytes),
            Arriving::Here(here) => {
                bytes.copy_from_slice(&here);
                Ok(())
            }
        })
    }
}

/// `len` elements, of which `read` writes the bytes.
fn fill<T: Plain>(len: usize, read: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<Vec<T>> {
    let mut values = Vec::<T>::with_capacity(len);
    // SAFETY: within the capacity, and any bytes are a value of a plain type.
    let bytes = unsafe {
        std::ptr::write_bytes(values.as_mut_ptr(), 0, len);
        values.set_len(len);
        std::slice::from_raw_parts_mut(values.as_mut_ptr().cast::<u8>(), len * size_of::<T>())
    };
    read(bytes)?;
    Ok(values)
}

enum Memory {
    #[cfg(feature = "cuda")]
    Cuda(super::cuda::Allocation),
    Emulated(super::emulated::Allocation),
}

impl Buffer {
    /// A copy of `values` on `gpu`.
    pub fn new<T: Plain>(gpu: &Gpu, values: &[T]) -> Result<Self> {
        let buffer = Self::uninitialised(gpu, size_of_val(values))?;
        buffer.write(0, values)?;
        Ok(buffer)
    }

    /// `bytes` of anything, NaN in debug builds: what reads a slot that nobody wrote shows at once.
    pub fn poisoned(gpu: &Gpu, bytes: usize) -> Result<Self> {
        let buffer = Self::uninitialised(gpu, bytes)?;
        buffer.fill(if cfg!(debug_assertions) { 0xff } else { 0 })?;
        Ok(buffer)
    }

    /// Puts one of at least `bytes` in the place of `buffer`, where that is smaller: what it held is gone then.
    pub fn make_room(buffer: &mut Arc<Self>, gpu: &Gpu, bytes: usize) -> Result<()> {
        if bytes > buffer.bytes() {
            *buffer = Arc::new(Self::poisoned(gpu, bytes.next_power_of_two())?);
        }
        Ok(())
    }

    fn uninitialised(gpu: &Gpu, bytes: usize) -> Result<Self> {
        let memory = match *gpu {
            #[cfg(feature = "cuda")]
            Gpu::Cuda(ref cuda) => Memory::Cuda(cuda.allocate(bytes)?),
            Gpu::Emulated(_) => Memory::Emulated(super::emulated::Allocation::new(bytes)),
        };
        Ok(Buffer { memory, bytes })
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where it starts.
    pub(super) fn pointer(&self) -> u64 {
        match self.memory {
            #[cfg(feature = "cuda")]
            Memory::Cuda(ref memory) => memory.pointer(),
            Memory::Emulated(ref memory) => memory.pointer(),
        }
    }

    /// Puts `values` at element `at`, after all work before.
    pub fn write<T: Plain>(&self, at: usize, values: &[T]) -> Result<()> {
        let start = self.range(at, size_of_val(values), size_of::<T>())?;
        let bytes = bytes(values);
        match self.memory {
            #[cfg(feature = "cuda")]
            Memory::Cuda(ref memory) => memory.write(start, bytes),
            Memory::Emulated(ref memory) => memory.write(start, bytes),
        }
    }

    /// `len` elements from `at` on, after all work before.
    pub fn read<T: Plain>(&self, at: usize, len: usize) -> Result<Vec<T>> {
        let start = self.range(at, len * size_of::<T>(), size_of::<T>())?;
        fill(len, |bytes| match self.memory {
            #[cfg(feature = "cuda")]
            Memory::Cuda(ref memory) => memory.read(start, bytes),
            Memory::Emulated(ref memory) => memory.read(start, bytes),
        })
    }

    /// The same without waiting for it.
    pub fn read_later<T: Plain>(&self, at: usize, len: usize) -> Result<Later<T>> {
        let bytes = len * size_of::<T>();
        let start = self.range(at, bytes, size_of::<T>())?;
        let arriving = match self.memory {
            #[cfg(feature = "cuda")]
            Memory::Cuda(ref memory) => Arriving::Cuda(memory.read_later(start, bytes)?),
            Memory::Emulated(_) => Arriving::Here(self.read::<u8>(start, bytes)?),
        };
        Ok(Later { arriving, len, elements: PhantomData })
    }

    /// Its first `bytes` become those of `from`, after all work before.
    pub fn copy(&self, from: &Buffer, bytes: usize) -> Result<()> {
        from.range(0, bytes, 1)?;
        self.range(0, bytes, 1)?;
        match (&self.memory, &from.memory) {
            #[cfg(feature = "cuda")]
            (Memory::Cuda(to), Memory::Cuda(from)) => to.copy(from, bytes),
            (Memory::Emulated(_), Memory::Emulated(_)) => self.write(0, &from.read::<u8>(0, bytes)?),
            #[cfg(feature = "cuda")]
            _ => bail!("a copy between two devices"),
        }
    }

    /// Every byte becomes `byte`.
    pub fn fill(&self, byte: u8) -> Result<()> {
        match self.memory {
            #[cfg(feature = "cuda")]
            Memory::Cuda(ref memory) => memory.fill(byte),
            Memory::Emulated(ref memory) => memory.fill(byte),
        }
    }

    fn range(&self, at: usize, bytes: usize, size: usize) -> Result<usize> {
        match at.checked_mul(size).and_then(|start| Some((start, start.checked_add(bytes)?))) {
            Some((start, end)) if end <= self.bytes => Ok(start),
            _ => bail!("a buffer of {} bytes, asked for {bytes} from element {at} on", self.bytes),
        }
    }
}
