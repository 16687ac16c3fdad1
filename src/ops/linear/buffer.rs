//! Zeroed, aligned memory for packed weights.
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::sync::{Arc, Mutex, PoisonError};

const HUGE_PAGE: usize = 2 << 20;
/// A cache line. Buffers start on one.
const ALIGN: usize = 64;
/// Bytes of a model's first chunk, and of its largest: each is twice as large as the one before.
const CHUNKS: [usize; 2] = [HUGE_PAGE, 256 << 20];

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
pub(in crate::ops) struct Buffer {
    chunk: Arc<Chunk>,
    /// Where it starts in the chunk, in bytes.
    start: usize,
    len: usize,
}

impl Buffer {
    /// `len` zeroed elements, for a while.
    pub(in crate::ops) fn zeroed(len: usize) -> Self {
        Self::within(Arc::new(Chunk::new(len * 4)), 0, len)
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

    pub(in crate::ops) fn as_slice(&self) -> &[u32] {
        // SAFETY: `len` initialised elements.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.len) }
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [u32] {
        // SAFETY: as above, and `self`, which alone has this part of the chunk, is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(), self.len) }
    }
}

/// Memory of a base's weights, which come together and go together: one after the other in chunks. Each in huge pages of its own, those of
/// half a billion parameters left 80 MiB unused, and the small ones had small pages.
pub struct Arena(Mutex<State>);

enum State {
    /// Of the last chunk so much is taken.
    Open(Option<Arc<Chunk>>, usize),
    /// The base is there. What comes later goes by itself, and has memory of its own.
    Sealed,
}

impl Default for Arena {
    fn default() -> Self {
        Arena(Mutex::new(State::Open(None, 0)))
    }
}

impl Arena {
    /// From here on buffers have memory of their own.
    pub(in crate::ops) fn seal(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = State::Sealed;
    }

    /// `len` zeroed elements.
    pub(super) fn zeroed(&self, len: usize) -> Buffer {
        let bytes = (len * 4).next_multiple_of(ALIGN);
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let State::Open(last, taken) = &mut *state else { return Buffer::zeroed(len) };
        let room = last.as_ref().map_or(0, |chunk| chunk.layout.size());
        let (chunk, start) = match last {
            Some(chunk) if *taken + bytes <= room => (chunk.clone(), *taken),
            _ => (Arc::new(Chunk::new(bytes.max((2 * room).clamp(CHUNKS[0], CHUNKS[1])))), 0),
        };
        *state = State::Open(Some(chunk.clone()), start + bytes);
        drop(state);
        Buffer::within(chunk, start, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_zeroed_apart_and_aligned() {
        // More than one chunk, from several threads, and some that go at once.
        let lengths = [1, 15, 16, 17, 5_000, 0, 700_000, 3, 9_000_000, 5];
        let arena = Arena::default();
        std::thread::scope(|scope| {
            for mark in 1..4u32 {
                let arena = &arena;
                scope.spawn(move || {
                    let many = || lengths.map(|len| arena.zeroed(len));
                    drop(many());
                    if mark == 3 {
                        arena.seal();
                    }
                    let mut all = many();
                    for (i, (len, buffer)) in (0..).zip(lengths.iter().zip(&mut all)) {
                        assert!(buffer.len() == *len && buffer.as_slice().iter().all(|v| *v == 0));
                        assert!((buffer.as_ptr() as usize).is_multiple_of(ALIGN));
                        buffer.as_mut_slice().fill(10 * mark + i);
                    }
                    let holds = |(i, buffer): (u32, &Buffer)| buffer.as_slice().iter().all(|v| *v == 10 * mark + i);
                    assert!((0..).zip(&all).all(holds));
                });
            }
        });
        let own = [arena.zeroed(7), arena.zeroed(7)];
        assert!(!Arc::ptr_eq(&own[0].chunk, &own[1].chunk), "after the seal each has memory of its own");
        let arena = Arena::default();
        let shared = [arena.zeroed(7), arena.zeroed(7)];
        assert!(Arc::ptr_eq(&shared[0].chunk, &shared[1].chunk) && shared[1].start == ALIGN);
    }
}
