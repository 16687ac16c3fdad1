//! What the allocator does with memory that is given back, and memory of its own for what is large and lasts.
//!
//! A step's activations are tens of megabytes. glibc hands buffers of that size back to the system and asks for them again,
//! and the system clears every page: measured, a tenth of a prefill.

use super::gpu::Plain;
use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod glibc {
    use core::ffi::c_int;

    unsafe extern "C" {
        fn mallopt(parameter: c_int, value: c_int) -> c_int;
        fn malloc_trim(pad: usize) -> c_int;
    }
    const M_TRIM_THRESHOLD: c_int = -1;
    const M_MMAP_THRESHOLD: c_int = -3;
    const M_ARENA_MAX: c_int = -8;

    /// Freed memory at the end of the heap that is kept.
    const KEPT: c_int = 128 << 20;
    /// Buffers from here on come from the system each time.
    const LARGE: c_int = 512 << 20;
    /// The same for an old glibc.
    const OLD_LARGE: c_int = 32 << 20;

    /// The same while memory of its own is asked for: what is smaller is not worth it.
    const APART: c_int = 64 << 10;

    /// All that there is: mallopt(3) says what -1 means. The largest `c_int` is 2 GiB, less than eight jobs of 2 x 128 keep.
    const ALL: c_int = -1;

    pub fn hold() {
        // SAFETY: as below.
        unsafe {
            mallopt(M_TRIM_THRESHOLD, ALL);
        }
    }

    pub fn apart<T>(allocate: impl FnOnce() -> T) -> T {
        // SAFETY: as below. What other threads ask for meanwhile comes from the system too, and goes back there.
        unsafe {
            mallopt(M_MMAP_THRESHOLD, APART);
        }
        let memory = allocate();
        keep_large();
        memory
    }

    fn keep_large() {
        // SAFETY: plain numbers, at any time. 0 is a refusal: glibc before 2.35 takes no more than half of a heap of 64 MiB.
        unsafe {
            if mallopt(M_MMAP_THRESHOLD, LARGE) == 0 {
                mallopt(M_MMAP_THRESHOLD, OLD_LARGE);
            }
        }
    }

    pub fn settle() {
        // SAFETY: both take plain numbers and may be called at any time; a refusal changes nothing.
        unsafe {
            malloc_trim(0);
            mallopt(M_TRIM_THRESHOLD, KEPT);
            // Other arenas are heaps of 64 MiB, which come and go whole.
            mallopt(M_ARENA_MAX, 1);
        }
        keep_large();
    }
}

/// Gives back what loading or training left over, and keeps what steps of serving use from here on. To be called once the
/// weights are in place, before the thread that runs the model starts.
pub fn settle() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    glibc::settle();
}

/// Keeps all that is given back, until [`settle`]: a step of training asks for the same gigabytes as the one before.
pub fn hold() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    glibc::hold();
}

/// `len` zeros in memory that the system gives when it is written, page by page, and gets back when it is freed. A part of the heap would
/// be cleared first, and so be resident: the KV pool of a server was, whole, before its first request.
pub fn sparse<T: Plain>(len: usize) -> Vec<T> {
    let layout = Layout::array::<T>(len).expect("smaller than the address space");
    if layout.size() == 0 {
        return Vec::new();
    }
    // SAFETY: the size is not 0.
    let allocate = || unsafe { alloc_zeroed(layout) };
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    let pointer = glibc::apart(allocate);
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    let pointer = allocate();
    if pointer.is_null() {
        handle_alloc_error(layout)
    }
    // SAFETY: of the global allocator, with the layout of a vector of that capacity; zeros are a value of a plain type.
    unsafe { Vec::from_raw_parts(pointer.cast::<T>(), len, len) }
}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use half::bf16;

    /// Bytes of the process that are in memory.
    fn resident() -> usize {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        4096 * pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap()
    }

    /// As a server's pool: slabs smaller than what comes from the system by itself once a base is loaded. Other tests run beside this one.
    #[test]
    fn sparse_memory_comes_and_goes_with_what_is_written() {
        const SLAB: usize = 32 << 20;
        settle();
        let start = resident();
        let mut slabs: Vec<Vec<bf16>> = (0..64).map(|_| sparse(SLAB / 2)).collect();
        assert!(resident() < start + 16 * SLAB);
        for slab in &mut slabs[..16] {
            assert!(slab.iter().all(|x| *x == bf16::ZERO));
            slab.fill(bf16::ONE);
        }
        let written = resident();
        // What lies in the middle of the heap would stay. A sanitizer keeps some for a while.
        slabs.drain(..16);
        assert!(resident() + 4 * SLAB < written);
        assert!(sparse::<f32>(0).is_empty());
    }
}
