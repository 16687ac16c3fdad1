//! What goes to the device in one copy.
use super::buffer::bytes;
use super::{Buffer, Gpu, Plain};
use candle_core::Result;
use std::sync::Arc;

/// Words on the device: `len` elements of a buffer from `start` on. Made by the copy that they went over in, and good until the next one.
pub struct Carried {
    buffer: Arc<Buffer>,
    start: usize,
    len: usize,
}

impl Carried {
    pub(in crate::ops) fn new(buffer: &Arc<Buffer>, start: usize, len: usize) -> Self {
        Carried { buffer: buffer.clone(), start, len }
    }

    pub(in crate::ops) fn len(&self) -> usize {
        self.len
    }

    /// Buffer, and the element that word `word` is.
    pub(in crate::ops) fn word(&self, word: usize) -> (&Buffer, usize) {
        (&self.buffer, self.start + word)
    }
}

/// 32-bit words: lists of several sorts, one after the other.
#[derive(Default)]
pub struct Words(Vec<u32>);

impl Words {
    /// Adds a list of elements of whole words; returns the word at which it starts, a multiple of 4.
    pub fn add<T: Plain>(&mut self, list: &[T]) -> usize {
        const { assert!(size_of::<T>().is_multiple_of(size_of::<u32>())) };
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        let at = self.0.len();
        self.0.extend(bytes(list).chunks_exact(4).map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]])));
        at
    }

    /// How many there are.
    pub(in crate::ops) fn len(&self) -> usize {
        self.0.len()
    }

    /// Adds all of `other`; returns the word at which it starts.
    pub fn append(&mut self, other: &Words) -> usize {
        self.add(&other.0)
    }

    /// By themselves on the device.
    pub fn carry(&self, gpu: &Gpu) -> Result<Carried> {
        Ok(Carried::new(&Arc::new(self.upload(gpu)?), 0, self.len()))
    }

    /// In a buffer of their own.
    pub fn upload(&self, gpu: &Gpu) -> Result<Buffer> {
        Buffer::new(gpu, &self.0)
    }

    /// In the place of what `buffer` holds, after all work on that. Where they find no room, a buffer twice as large takes its place.
    pub fn replace(&self, gpu: &Gpu, buffer: &mut Arc<Buffer>) -> Result<()> {
        Buffer::make_room(buffer, gpu, size_of_val(self.0.as_slice()))?;
        buffer.write(0, &self.0)
    }
}
