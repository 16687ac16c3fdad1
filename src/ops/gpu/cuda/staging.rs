//! Page-locked memory of the host: the stream copies from it and to it while the processor goes on. From other memory, a copy may wait
//! for all work before it.
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, PinnedHostSlice, result as driver};
use candle_core::{Result, bail};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Larger copies are a model's weights, for which nobody waits. A step of 256 rows with penalties on 2,000 tokens each takes 4 MiB and its rows.
const MOST: usize = 8 << 20;
/// Copies under way before the oldest is waited for.
const MANY: usize = 64;

/// Memory that was used, the oldest first.
#[derive(Default)]
pub struct Pool(Mutex<VecDeque<Staging>>);

/// Some of it, and whether a copy still uses it.
struct Staging {
    memory: PinnedHostSlice<u8>,
    done: CudaEvent,
}

impl Pool {
    /// Room for `bytes` that no copy uses any more.
    fn take(&self, stream: &Arc<CudaStream>, bytes: usize) -> Result<Staging> {
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let many = used.len() >= MANY;
        let idle = used.iter().position(|s| s.memory.len() >= bytes && s.done.is_complete());
        if let Some(staging) = idle.and_then(|i| used.remove(i)) {
            return Ok(staging);
        }
        let oldest = if many { used.pop_front() } else { None };
        if let Some(oldest) = oldest {
            oldest.done.synchronize().w()?;
            if oldest.memory.len() >= bytes {
                return Ok(oldest);
            }
        }
        let size = bytes.next_power_of_two().max(4096);
        // SAFETY: nothing is read before it was written: `put` does, or the device.
        let memory = unsafe { stream.context().alloc_pinned_with_flags::<u8>(size, 0).w()? };
        Ok(Staging { memory, done: stream.record_event(None).w()? })
    }

    fn give_back(&self, staging: Staging) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push_back(staging);
    }

    /// Copies `bytes` to address `to` of the device, after all work before; they may change as soon as this returns.
    ///
    /// # Safety
    /// The device has that memory.
    pub unsafe fn put(&self, stream: &Arc<CudaStream>, to: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        if bytes.len() > MOST {
            // SAFETY: the caller's; the copy of pageable memory has left it when the call returns.
            return unsafe { driver::memcpy_htod_async(to, bytes, stream.cu_stream()).w() };
        }
        let mut staging = self.take(stream, bytes.len())?;
        let start = staging.memory.as_mut_ptr().w()?;
        // SAFETY: `take` saw that it is large enough and that nobody uses it.
        let copy = unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), start, bytes.len());
            std::slice::from_raw_parts(start.cast_const(), bytes.len())
        };
        // SAFETY: the caller's; the copy in page-locked memory stays until `done`.
        let sent = unsafe { driver::memcpy_htod_async(to, copy, stream.cu_stream()).w() };
        staging.done.record(stream).w()?;
        self.give_back(staging);
        sent
    }

    /// Begins to copy `bytes` from address `from` of the device, after all work before.
    ///
    /// # Safety
    /// The device has that memory.
    pub unsafe fn get(self: &Arc<Self>, stream: &Arc<CudaStream>, from: u64, bytes: usize) -> Result<Later> {
        let mut staging = self.take(stream, bytes)?;
        let start = staging.memory.as_mut_ptr().w()?;
        // SAFETY: `take` saw that it is large enough and that nobody uses it.
        let room = unsafe { std::slice::from_raw_parts_mut(start, bytes) };
        let sent = match bytes {
            // Only the wait is wanted.
            0 => Ok(()),
            // SAFETY: the caller's; `Later` keeps the room until the copy is done.
            _ => unsafe { driver::memcpy_dtoh_async(room, from, stream.cu_stream()).w() },
        };
        staging.done.record(stream).w()?;
        sent.map(|()| Later { staging: Some(staging), pool: self.clone() })
    }
}

/// Bytes on their way from the device.
pub struct Later {
    staging: Option<Staging>,
    pool: Arc<Pool>,
}

impl Later {
    /// Waits for them, as many as were asked for.
    pub fn wait(mut self, bytes: &mut [u8]) -> Result<()> {
        let Some(staging) = self.staging.take() else { bail!("read twice") };
        staging.done.synchronize().w()?;
        let all = staging.memory.as_slice().w()?;
        bytes.copy_from_slice(&all[..bytes.len()]);
        self.pool.give_back(staging);
        Ok(())
    }
}

/// What nobody waited for: its copy goes on, and the pool looks whether it is done.
impl Drop for Later {
    fn drop(&mut self) {
        self.staging.take().into_iter().for_each(|staging| self.pool.give_back(staging));
    }
}

/// A copy may still write to the memory, or read it.
impl Drop for Staging {
    fn drop(&mut self) {
        // A device that is lost copies nothing any more.
        let _ = self.done.synchronize();
    }
}
