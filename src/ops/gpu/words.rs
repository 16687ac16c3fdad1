//! What goes to the device in one copy.
use super::{Buffer, Gpu};
use candle_core::Result;
use std::sync::Arc;

/// 32-bit words: lists of several sorts, one after the other.
#[derive(Default)]
pub struct Words(Vec<u32>);

/// A word of the device's.
pub trait Word: Copy {
    /// Its bits.
    fn bits(self) -> u32;
}
impl Word for u32 {
    fn bits(self) -> u32 {
        self
    }
}
impl Word for i32 {
    fn bits(self) -> u32 {
        self.cast_unsigned()
    }
}

impl Words {
    /// Adds a list; returns the element at which it starts, a multiple of 4.
    pub fn add<W: Word>(&mut self, list: &[W]) -> usize {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        let at = self.0.len();
        self.0.extend(list.iter().map(|word| word.bits()));
        at
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
