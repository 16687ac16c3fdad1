//! Zeroed, aligned memory for packed weights.
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};

const HUGE_PAGE: usize = 2 << 20;

#[cfg(target_os = "linux")]
unsafe extern "C" {
    fn madvise(addr: *mut core::ffi::c_void, len: usize, advice: i32) -> i32;
}
#[cfg(target_os = "linux")]
const MADV_HUGEPAGE: i32 = 14;

/// `u32`s, 64-byte aligned; from 2 MiB on 2 MiB aligned, so that the system may back them with huge pages.
pub(super) struct Buffer {
    ptr: *mut u32,
    len: usize,
    layout: Layout,
}
// SAFETY: plain owned memory.
unsafe impl Send for Buffer {}
// SAFETY: shared access only reads.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zeroed elements.
    pub(super) fn zeroed(len: usize) -> Self {
        let bytes = (len * 4).max(64);
        let huge = bytes >= HUGE_PAGE;
        let (size, align) = if huge { (bytes.next_multiple_of(HUGE_PAGE), HUGE_PAGE) } else { (bytes, 64) };
        let layout = Layout::from_size_align(size, align).expect("a packed weight is smaller than the address space");
        // SAFETY: size > 0. `alloc` and explicit zeroing, not `alloc_zeroed`, which would touch over-aligned
        // memory before the advice.
        unsafe {
            let p = alloc(layout);
            if p.is_null() {
                handle_alloc_error(layout)
            }
            #[cfg(target_os = "linux")]
            if huge {
                // Its failure is harmless: small pages.
                madvise(p.cast(), size, MADV_HUGEPAGE);
            }
            std::ptr::write_bytes(p, 0, size);
            Buffer { ptr: p.cast(), len, layout }
        }
    }

    pub(super) fn as_ptr(&self) -> *const u32 {
        self.ptr
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut u32 {
        self.ptr
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn as_slice(&self) -> &[u32] {
        // SAFETY: `len` initialised elements.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u32] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: the layout of the allocation.
        unsafe { dealloc(self.ptr.cast(), self.layout) }
    }
}
