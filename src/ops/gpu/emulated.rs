//! The kernels on the CPU: the same source, compiled by a C++ compiler, a fiber a thread (`kernels/cpu/cuda_cpu.h`).
use super::Grid;
use candle_core::{CpuStorage, DType, Result, bail};
use std::cell::UnsafeCell;
#[cfg(feature = "emulate")]
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};

/// In which order the threads of a block run.
#[derive(Clone, Copy)]
pub struct Order(pub u32);

#[cfg(feature = "emulate")]
unsafe extern "C" {
    fn prefixd_emulate(
        name: *const c_char,
        grid: *const c_uint,
        block: *const c_uint,
        shared: usize,
        order: c_uint,
        values: *mut *mut c_void,
        message: *mut c_char,
        size: usize,
    ) -> c_int;
}

impl Order {
    /// # Safety
    /// As of [`super::Call::launch`].
    #[cfg(not(feature = "emulate"))]
    pub unsafe fn launch(self, name: &str, grid: Grid, values: &[u64]) -> Result<()> {
        bail!("{name}, {grid:?}, {} arguments, order {}: this build has no emulation", values.len(), self.0)
    }

    /// # Safety
    /// As of [`super::Call::launch`].
    #[cfg(feature = "emulate")]
    pub unsafe fn launch(self, name: &str, grid: Grid, values: &[u64]) -> Result<()> {
        let Ok(kernel) = CString::new(name) else { bail!("{name}: no name of a kernel") };
        let mut pointers: Vec<*mut c_void> = values.iter().map(|v| std::ptr::from_ref(v).cast_mut().cast()).collect();
        let mut message = [0 as c_char; 512];
        let block = [grid.threads, 1, 1];
        // SAFETY: the strings end with 0, the arrays have three elements, and the arguments are the caller's.
        let status = unsafe {
            prefixd_emulate(
                kernel.as_ptr(),
                grid.blocks.as_ptr(),
                block.as_ptr(),
                grid.shared as usize,
                self.0,
                pointers.as_mut_ptr(),
                message.as_mut_ptr(),
                message.len(),
            )
        };
        if status != 0 {
            // SAFETY: the callee ends its message with 0.
            let message = unsafe { CStr::from_ptr(message.as_ptr()) };
            bail!("{name}: {}", message.to_string_lossy());
        }
        Ok(())
    }
}

/// Elements that nobody has written: NaN.
pub fn fresh(dtype: DType, len: usize) -> Result<CpuStorage> {
    Ok(match dtype {
        DType::F32 => CpuStorage::F32(vec![f32::NAN; len]),
        DType::BF16 => CpuStorage::BF16(vec![half::bf16::NAN; len]),
        DType::F16 => CpuStorage::F16(vec![half::f16::NAN; len]),
        DType::U32 => CpuStorage::U32(vec![u32::MAX; len]),
        other => bail!("no kernel makes {other:?}"),
    })
}

/// Where the elements start, to be read.
pub fn pointer(storage: &CpuStorage) -> u64 {
    match storage {
        CpuStorage::F32(v) => v.as_ptr() as u64,
        CpuStorage::BF16(v) => v.as_ptr() as u64,
        CpuStorage::F16(v) => v.as_ptr() as u64,
        CpuStorage::U32(v) => v.as_ptr() as u64,
        // No kernel has such a type, and null shows.
        _ => 0,
    }
}

/// Where the elements start, to be written.
pub fn pointer_mut(storage: &mut CpuStorage) -> u64 {
    match storage {
        CpuStorage::F32(v) => v.as_mut_ptr() as u64,
        CpuStorage::BF16(v) => v.as_mut_ptr() as u64,
        CpuStorage::F16(v) => v.as_mut_ptr() as u64,
        CpuStorage::U32(v) => v.as_mut_ptr() as u64,
        _ => 0,
    }
}

/// Memory that kernels write while others hold it, as on a device.
pub struct Allocation(Box<[UnsafeCell<u128>]>);

// SAFETY: as on a device, whoever launches says what is written, and those that share memory launch in turn.
unsafe impl Send for Allocation {}
// SAFETY: as above.
unsafe impl Sync for Allocation {}

impl Allocation {
    /// Aligned to 16 bytes.
    pub fn new(bytes: usize) -> Self {
        Allocation((0..bytes.div_ceil(16)).map(|_| UnsafeCell::new(0)).collect())
    }

    /// Where it starts.
    pub fn pointer(&self) -> u64 {
        self.0.as_ptr() as u64
    }

    /// The caller keeps to its size.
    pub fn write(&self, start: usize, bytes: &[u8]) -> Result<()> {
        // SAFETY: the range was checked by `Buffer`, and nobody else runs a kernel on this memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (self.pointer() as *mut u8).add(start), bytes.len()) };
        Ok(())
    }

    /// The caller keeps to its size.
    pub fn read(&self, start: usize, bytes: &mut [u8]) -> Result<()> {
        // SAFETY: as above.
        unsafe {
            std::ptr::copy_nonoverlapping((self.pointer() as *const u8).add(start), bytes.as_mut_ptr(), bytes.len())
        };
        Ok(())
    }

    /// All of it.
    pub fn fill(&self, byte: u8) -> Result<()> {
        // SAFETY: as above.
        unsafe { std::ptr::write_bytes(self.pointer() as *mut u8, byte, self.0.len() * 16) };
        Ok(())
    }
}
