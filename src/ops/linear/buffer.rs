//! Zeroed, aligned memory for packed weights.
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::sync::{Arc, Mutex, PoisonError, Weak};

const HUGE_PAGE: usize = 2 << 20;
/// A cache line. Buffers start on one.
const ALIGN: usize = 64;
/// Bytes that are asked for at once for what lasts. What nobody has written takes no memory.
const CHUNK: usize = 256 << 20;

#[cfg(target_os = "linux")]
unsafe extern "C" {
    fn madvise(addr: *mut core::ffi::c_void, len: usize, advice: i32) -> i32;
}
#[cfg(target_os = "linux")]
const MADV_HUGEPAGE: i32 = 14;

/// Memory in huge pages, where it is large and the system has them.
struct Chunk {
    ptr: *mut u8,
    layout: Layout,
}
// SAFETY: plain owned memory; each part of it belongs to one buffer.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

/// The chunk of lasting buffers that has room, while one of them lives, and how much of it is taken.
static CURRENT: Mutex<(Weak<Chunk>, usize)> = Mutex::new((Weak::new(), 0));

impl Chunk {
    fn new(bytes: usize) -> Self {
        let align = if bytes < HUGE_PAGE { ALIGN } else { HUGE_PAGE };
        let layout = Layout::from_size_align(bytes.max(1).next_multiple_of(align), align);
        let layout = layout.expect("a packed weight is smaller than the address space");
        // SAFETY: size > 0.
        let ptr = unsafe { alloc(layout) };
        if ptr.is_null() {
            handle_alloc_error(layout)
        }
        #[cfg(target_os = "linux")]
        if align == HUGE_PAGE {
            // SAFETY: all of the allocation. Its failure is harmless: small pages.
            unsafe { madvise(ptr.cast(), layout.size(), MADV_HUGEPAGE) };
        }
        Chunk { ptr, layout }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: the layout of the allocation.
        unsafe { dealloc(self.ptr, self.layout) }
    }
}

/// `u32`s, 64-byte aligned.
pub(super) struct Buffer {
    chunk: Arc<Chunk>,
    /// Where it starts in the chunk, in bytes.
    start: usize,
    len: usize,
}

impl Buffer {
    /// `len` zeroed elements, for a while.
    pub(super) fn zeroed(len: usize) -> Self {
        Self::within(Arc::new(Chunk::new(len * 4)), 0, len)
    }

    /// `len` zeroed elements of a weight. Weights lie one after the other: each in huge pages of its own, those of a model of half a billion
    /// parameters left 80 MiB unused, and the small ones had small pages. Their memory is given back when all of a chunk are gone.
    pub(super) fn lasting(len: usize) -> Self {
        let bytes = (len * 4).next_multiple_of(ALIGN);
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let open = current.0.upgrade().filter(|chunk| current.1 + bytes <= chunk.layout.size());
        let (chunk, start) = match open {
            Some(chunk) => (chunk, current.1),
            None => (Arc::new(Chunk::new(bytes.max(CHUNK))), 0),
        };
        *current = (Arc::downgrade(&chunk), start + bytes);
        drop(current);
        Self::within(chunk, start, len)
    }

    /// Nobody else has this part of the chunk.
    fn within(chunk: Arc<Chunk>, start: usize, len: usize) -> Self {
        // SAFETY: within the chunk, by both callers. The allocator gives memory as it is.
        unsafe { std::ptr::write_bytes(chunk.ptr.add(start), 0, len * 4) };
        Buffer { chunk, start, len }
    }

    fn pointer(&self) -> *mut u32 {
        // SAFETY: within the chunk.
        unsafe { self.chunk.ptr.add(self.start).cast() }
    }

    pub(super) fn as_ptr(&self) -> *const u32 {
        self.pointer()
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut u32 {
        self.pointer()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn as_slice(&self) -> &[u32] {
        // SAFETY: `len` initialised elements.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u32] {
        // SAFETY: as above, and `self`, which alone has this part of the chunk, is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zeroed_apart_and_aligned() {
        // More than one chunk, from several threads, with some that go at once and are followed by others.
        let lengths = [1, 15, 16, 17, 5_000, 0, 70_000_000, 3];
        let make = |len| if len == 5_000 { Buffer::zeroed(len) } else { Buffer::lasting(len) };
        let many = || lengths.map(|len| (len, make(len)));
        std::thread::scope(|scope| {
            for mark in 1..4u32 {
                scope.spawn(move || {
                    drop(many());
                    let mut all = many();
                    for (i, (len, buffer)) in (0..).zip(&mut all) {
                        assert!(buffer.len() == *len && buffer.as_slice().iter().all(|v| *v == 0));
                        assert!((buffer.as_ptr() as usize).is_multiple_of(ALIGN));
                        buffer.as_mut_slice().fill(10 * mark + i);
                    }
                    let holds = |(i, (_, buffer)): (u32, &(usize, Buffer))| {
                        buffer.as_slice().iter().all(|v| *v == 10 * mark + i)
                    };
                    assert!((0..).zip(&all).all(holds));
                });
            }
        });
    }
}
