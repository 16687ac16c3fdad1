//! What the allocator does with memory that is given back.
//!
//! A step's activations are tens of megabytes. glibc hands buffers of that size back to the system and asks for them again,
//! and the system clears every page: measured, a tenth of a prefill.

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

    /// All that there is: mallopt(3) says what -1 means. The largest `c_int` is 2 GiB, less than eight jobs of 2 x 128 keep.
    const ALL: c_int = -1;

    pub fn hold() {
        // SAFETY: as below.
        unsafe {
            mallopt(M_TRIM_THRESHOLD, ALL);
        }
    }

    pub fn settle() {
        // SAFETY: both take plain numbers and may be called at any time; a refusal changes nothing.
        unsafe {
            malloc_trim(0);
            mallopt(M_TRIM_THRESHOLD, KEPT);
            mallopt(M_MMAP_THRESHOLD, LARGE);
            // Other arenas are heaps of 64 MiB, which come and go whole.
            mallopt(M_ARENA_MAX, 1);
        }
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
