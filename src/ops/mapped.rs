//! Files mapped into memory: weights are read from the page cache, without a copy of the file.
use memmap2::Mmap;
use std::fs::File;
use std::io::Result;
use std::ops::Deref;
use std::path::Path;

/// A read-only mapping of a whole file.
pub struct Mapped(Mmap);

impl Mapped {
    /// Maps `path`.
    pub fn open(path: &Path) -> Result<Self> {
        // SAFETY: the mapping is read-only and private to this process. A file that somebody truncates while it is
        // mapped would fault: checkpoints are not written in place, and weights are read once, at load.
        unsafe { Mmap::map(&File::open(path)?) }.map(Mapped)
    }
}

impl Deref for Mapped {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}
