//! A CUDA device: its context, one stream, the kernels of this crate, and cuBLAS.
mod staging;

pub use staging::Later;

use super::Grid;
use crate::error::{lacks_memory, without_trace};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::cublas::{result as cublas, sys as cublas_sys};
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaGraph, CudaModule, CudaSlice, DevicePtr, LaunchConfig, PushKernelArg, result as driver, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Result, bail};
use half::{bf16, f16};
use std::collections::HashMap;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

// The compiled kernels: `KERNELS: &[(file, fatbin)]`, one for each file of `kernels/`.
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Of the context that all devices opened in this process share. Opening one waits for all of its work, unloading kernels may, and
/// whoever waits for a context spoils what another thread records in it. A server opens one device and never waits here; tests open many.
static CONTEXT: Mutex<()> = Mutex::new(());

/// Nobody else opens, closes or records meanwhile.
fn alone() -> MutexGuard<'static, ()> {
    // It guards no value that a panic could have left half done.
    CONTEXT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The device. All its work is on one stream, in order.
pub struct Cuda {
    device: CudaDevice,
    modules: Vec<Arc<CudaModule>>,
    functions: Mutex<HashMap<String, Function>>,
    multiprocessors: usize,
    /// Bytes of shared memory that a block can ask for.
    shared: usize,
    staging: Arc<staging::Pool>,
    /// cuBLAS's.
    _workspace: CudaSlice<u8>,
}

/// A kernel's handle.
#[derive(Clone)]
struct Function {
    handle: CudaFunction,
    /// Bytes of dynamic shared memory that it may be launched with.
    shared: u32,
}

/// Of dynamic shared memory, without asking for more.
const DEFAULT_SHARED: usize = 48 << 10;

impl Cuda {
    /// # Errors
    /// If there is no driver or no such device, or if the kernels are for others.
    pub fn new(index: usize) -> Result<Self> {
        Self::open(index).map_err(without_trace)
    }

    fn open(index: usize) -> Result<Self> {
        let _alone = alone();
        // A stream of its own: the default one belongs to a thread, and the model is loaded by another than runs it.
        let device = CudaDevice::new_with_stream(index).map_err(|e| {
            if lacks_memory(&e.to_string()) {
                return e;
            }
            let needs = "needs the NVIDIA driver (libcuda.so.1), libcublas.so.13 and libcurand.so.10, found by the loader (LD_LIBRARY_PATH)";
            candle_core::Error::Msg(format!("{}; a build for CUDA {needs}", without_trace(e)))
        })?;
        // Never given back. The last to hold it may be any tensor, on any thread; cudarc then gives up the handles of cuBLAS and cuRAND, which
        // waits for the context, and panics where they refuse, as they do once the device has failed. A server needs them until it ends.
        std::mem::forget(device.clone());
        // SAFETY: there is one stream, so nothing needs an event to wait for.
        unsafe { device.disable_event_tracking() };
        let stream = device.cuda_stream();
        let context = stream.context();
        let modules = KERNELS.iter().map(|(file, image)| {
            context
                .load_module(Ptx::from_binary(image.to_vec()))
                .map_err(|e| candle_core::Error::Msg(format!("kernels/{file}.cu is not compiled for this device: {e}")))
        });
        let modules = modules.collect::<Result<Vec<_>>>()?;
        let count = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors = context.attribute(count).w()? as usize;
        let most = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared = context.attribute(most).w()? as usize;
        keep_freed_memory(context.cu_device())?;
        sum_in_f32(&device)?;
        let workspace = workspace(&device)?;
        let (functions, staging) = Default::default();
        Ok(Cuda { device, modules, functions, multiprocessors, shared, staging, _workspace: workspace })
    }

    pub fn device(&self) -> Device {
        Device::Cuda(self.device.clone())
    }

    pub fn name(&self) -> String {
        self.device.cuda_stream().context().name().unwrap_or_else(|e| format!("an unknown device ({e})"))
    }

    pub fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    pub fn memory(&self) -> Result<(usize, usize)> {
        self.device.cuda_stream().context().mem_get_info().w()
    }

    /// Seconds between two events of the stream.
    pub fn timed(&self, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let stream = self.device.cuda_stream();
        let event = || stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).w();
        let began = event()?;
        work()?;
        Ok(f64::from(began.elapsed_ms(&event()?).w()?) / 1e3)
    }

    /// What `work` gives to the stream, which is not done: it can be launched as a whole.
    pub fn record(&self, work: impl FnOnce() -> Result<()>) -> Result<Recorded> {
        let _alone = alone();
        let stream = self.device.cuda_stream();
        // Of this thread alone: others may ask the driver for memory meanwhile.
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        // A panic too must not leave the stream recording.
        let worked = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| bail!("what was recorded panicked"));
        // What failed while memory was given back is kept for the next call, which would then do nothing.
        let dropped = stream.context().check_err().w();
        // Also where the work failed: else the stream would go on recording.
        let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).w();
        worked?;
        dropped?;
        match graph? {
            Some(graph) => Ok(Recorded(graph)),
            None => bail!("nothing was recorded"),
        }
    }

    /// # Safety
    /// As of [`super::Call::launch`].
    pub unsafe fn launch(&self, name: &str, grid: Grid, values: &[u64]) -> Result<()> {
        let function = self.function(name, grid.shared)?;
        let stream = self.device.cuda_stream();
        let mut call = stream.launch_builder(&function);
        for value in values {
            call.arg(value);
        }
        let [x, y, z] = grid.blocks;
        let config =
            LaunchConfig { grid_dim: (x, y, z), block_dim: (grid.threads, 1, 1), shared_mem_bytes: grid.shared };
        // SAFETY: the caller's. A parameter that is narrower than 8 bytes is read from the low ones.
        match unsafe { call.launch(config) } {
            Ok(_) => Ok(()),
            Err(e) => bail!("{name}, {grid:?}: {e}"),
        }
    }

    /// The handle of a kernel, found once, for launches with `shared` bytes.
    fn function(&self, name: &str, shared: u32) -> Result<CudaFunction> {
        let mut known = self.functions.lock().unwrap_or_else(PoisonError::into_inner);
        let mut function = match known.get(name) {
            Some(function) if shared <= function.shared => return Ok(function.handle.clone()),
            Some(function) => function.clone(),
            None => self.find(name)?,
        };
        if shared > function.shared {
            // More than the default has to be asked for. All that the device has: later calls may need more.
            let own = function.handle.shared_size_bytes().w()?.max(0) as usize;
            let most = self.shared.saturating_sub(own);
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            function.handle.set_attribute(attribute, most as i32).w()?;
            function.shared = most as u32;
        }
        known.insert(name.to_owned(), function.clone());
        Ok(function.handle)
    }

    fn find(&self, name: &str) -> Result<Function> {
        for module in &self.modules {
            match module.load_function(name) {
                Ok(handle) => {
                    let own = handle.shared_size_bytes().w()?.max(0) as usize;
                    return Ok(Function { handle, shared: DEFAULT_SHARED.saturating_sub(own) as u32 });
                }
                // It is another file's.
                Err(driver::DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND)) => {}
                Err(e) => bail!("{name}: {e}"),
            }
        }
        bail!("there is no kernel {name}")
    }

    /// Room for a tensor's elements.
    pub fn fresh(&self, dtype: DType, len: usize) -> Result<CudaStorage> {
        // A GPU gives no memory of no bytes.
        let (device, len) = (&self.device, len.max(1));
        // SAFETY: kernels write every element before anything reads one.
        let slice = unsafe {
            match dtype {
                DType::F32 => CudaStorageSlice::F32(device.alloc::<f32>(len)?),
                DType::BF16 => CudaStorageSlice::BF16(device.alloc::<bf16>(len)?),
                DType::F16 => CudaStorageSlice::F16(device.alloc::<f16>(len)?),
                DType::U32 => CudaStorageSlice::U32(device.alloc::<u32>(len)?),
                other => bail!("no kernel makes {other:?}"),
            }
        };
        Ok(CudaStorage { slice, device: device.clone() })
    }

    /// A tensor's elements, `bytes` of them in all.
    pub fn upload(&self, dtype: DType, bytes: &[u8]) -> Result<CudaStorage> {
        let storage = self.fresh(dtype, bytes.len() / dtype.size_in_bytes())?;
        let stream = self.device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        // SAFETY: room for as many elements was just made.
        unsafe { self.staging.put(&stream, pointer(&storage), bytes)? };
        Ok(storage)
    }

    /// Memory outside of any tensor.
    pub fn allocate(&self, bytes: usize) -> Result<Allocation> {
        // SAFETY: `Buffer` writes it, or its user does before reading.
        let slice = unsafe { self.device.alloc::<u8>(bytes.max(1))? };
        Ok(Allocation { slice, device: self.device.clone(), staging: self.staging.clone() })
    }

    /// C (column-major, `[m, n]`) = op(A) op(B) + beta C, as cuBLAS has it; sums in f32.
    ///
    /// # Safety
    /// The three addresses span matrices of the given sizes.
    pub(super) unsafe fn gemm(&self, g: &super::gemm::Columns) -> Result<()> {
        let kind = |dtype: DType| -> Result<cublas_sys::cudaDataType_t> {
            Ok(match dtype {
                DType::F32 => cublas_sys::cudaDataType_t::CUDA_R_32F,
                DType::BF16 => cublas_sys::cudaDataType_t::CUDA_R_16BF,
                DType::F16 => cublas_sys::cudaDataType_t::CUDA_R_16F,
                other => bail!("no product of {other:?}"),
            })
        };
        let turned = |yes: bool| {
            if yes { cublas_sys::cublasOperation_t::CUBLAS_OP_T } else { cublas_sys::cublasOperation_t::CUBLAS_OP_N }
        };
        let (one, beta) = (1f32, g.beta);
        let handle = self.device.cublas_handle();
        // SAFETY: the caller's; the scalars are on the host, as the handle's pointer mode says.
        let status = unsafe {
            cublas::gemm_ex(
                *handle.handle(),
                turned(g.a.turned),
                turned(g.b.turned),
                g.m,
                g.n,
                g.k,
                std::ptr::from_ref(&one).cast(),
                g.a.pointer as *const c_void,
                kind(g.dtype)?,
                g.a.stride,
                g.b.pointer as *const c_void,
                kind(g.dtype)?,
                g.b.stride,
                std::ptr::from_ref(&beta).cast(),
                g.c.pointer as *mut c_void,
                kind(g.out)?,
                g.c.stride,
                cublas_sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
                cublas_sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        match status {
            Ok(()) => Ok(()),
            Err(e) => bail!("cuBLAS, {} x {} x {}: {e}", g.m, g.n, g.k),
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        let _alone = alone();
        // A kernel's handle keeps its module.
        self.functions.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
        self.modules.clear();
    }
}

/// A graph of launches, on the device's stream.
pub struct Recorded(CudaGraph);
// SAFETY: the driver wants one thread at a time, and only `&mut self` reaches it; the context is bound to each thread that comes.
unsafe impl Send for Recorded {}

impl Recorded {
    pub fn launch(&mut self) -> Result<()> {
        self.0.launch().w()
    }
}

/// Scratch of cuBLAS, which it would else allocate, also while a graph is recorded: NVIDIA's recommendation for Hopper.
const WORKSPACE: usize = 32 << 20;

/// Memory for cuBLAS's products, of which one runs at a time.
fn workspace(device: &CudaDevice) -> Result<CudaSlice<u8>> {
    // SAFETY: cuBLAS writes what it reads.
    let memory = unsafe { device.alloc::<u8>(WORKSPACE)? };
    let start = memory.device_ptr(&device.cuda_stream()).0;
    // SAFETY: a live handle, and memory that lives as long as it: `Cuda` holds both.
    let status =
        unsafe { cublas_sys::cublasSetWorkspace_v2(*device.cublas_handle().handle(), start as *mut c_void, WORKSPACE) };
    status.result().map_err(|e| candle_core::Error::Msg(format!("cuBLAS: {e}")))?;
    Ok(memory)
}

/// cuBLAS may else add parts of a product in its own type, bf16 or f16.
fn sum_in_f32(device: &CudaDevice) -> Result<()> {
    let mode = cublas_sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    // SAFETY: a live handle.
    let status = unsafe { cublas_sys::cublasSetMathMode(*device.cublas_handle().handle(), mode) };
    status.result().map_err(|e| candle_core::Error::Msg(format!("cuBLAS: {e}")))
}

/// Freed memory stays with the process: each step frees what the next one allocates.
fn keep_freed_memory(device: sys::CUdevice) -> Result<()> {
    let mut all = u64::MAX;
    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device is that of a live context, and the attribute is a u64.
    unsafe {
        let pool = driver::device::get_default_mem_pool(device).w()?;
        driver::mem_pool::set_attribute(pool, threshold, std::ptr::from_mut(&mut all).cast()).w()
    }
}

/// Where the elements of a tensor start.
pub fn pointer(storage: &CudaStorage) -> u64 {
    let stream = storage.device().cuda_stream();
    // The second part records events; they are off, as there is one stream.
    match &storage.slice {
        CudaStorageSlice::F32(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::BF16(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::F16(s) => s.device_ptr(&stream).0,
        CudaStorageSlice::U32(s) => s.device_ptr(&stream).0,
        // No kernel has such a type, and null shows.
        _ => 0,
    }
}

/// Memory outside of any tensor.
pub struct Allocation {
    slice: CudaSlice<u8>,
    device: CudaDevice,
    staging: Arc<staging::Pool>,
}

impl Allocation {
    pub fn pointer(&self) -> u64 {
        self.slice.device_ptr(&self.device.cuda_stream()).0
    }

    pub fn write(&self, start: usize, bytes: &[u8]) -> Result<()> {
        let stream = self.device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        // SAFETY: `Buffer` checked the range.
        unsafe { self.staging.put(&stream, self.pointer() + start as u64, bytes) }
    }

    pub fn read(&self, start: usize, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let stream = self.device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        // SAFETY: as above; the stream has come to its end before the bytes are used.
        unsafe { driver::memcpy_dtoh_async(bytes, self.pointer() + start as u64, stream.cu_stream()).w()? };
        stream.synchronize().w()
    }

    pub fn read_later(&self, start: usize, bytes: usize) -> Result<Later> {
        let stream = self.device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        // SAFETY: as above.
        unsafe { self.staging.get(&stream, self.pointer() + start as u64, bytes) }
    }

    pub fn copy(&self, from: &Self, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let stream = self.device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        // SAFETY: as above.
        unsafe { driver::memcpy_dtod_async(self.pointer(), from.pointer(), bytes, stream.cu_stream()).w() }
    }

    pub fn fill(&self, byte: u8) -> Result<()> {
        let stream = self.device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        // SAFETY: exactly the allocation.
        unsafe { driver::memset_d8_async(self.pointer(), byte, self.slice.len(), stream.cu_stream()).w() }
    }
}
