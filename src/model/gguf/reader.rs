//! Reads little-endian numbers and texts out of a file, never past its end.
use crate::error::{Error, Kind, Result};
use std::fmt::Display;

/// A place in the file.
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    /// At the start.
    pub fn new(bytes: &'a [u8]) -> Self {
        Reader { bytes, at: 0 }
    }

    /// Where it is.
    pub fn at(&self) -> usize {
        self.at
    }

    /// What is left.
    pub fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    /// Bytes that are left.
    pub fn left(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// The next `n` bytes; `what` they are, for the message.
    pub fn take(&mut self, n: u64, what: impl Display) -> Result<&'a [u8]> {
        let end = usize::try_from(n).ok().and_then(|n| self.at.checked_add(n));
        let Some(taken) = end.and_then(|end| self.bytes.get(self.at..end)) else {
            let (at, len) = (self.at, self.bytes.len());
            return Err(bad(format!("{what} takes {n} bytes from byte {at} on, the file has {len} bytes")));
        };
        self.at += taken.len();
        Ok(taken)
    }

    /// An array of `N` bytes.
    pub fn array<const N: usize>(&mut self, what: impl Display) -> Result<[u8; N]> {
        let bytes = self.take(N as u64, what)?;
        bytes.try_into().map_err(|_| Error::internal("a slice of another length than asked for"))
    }

    /// A number of 4 bytes.
    pub fn u32(&mut self, what: impl Display) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    /// A number of 8 bytes.
    pub fn u64(&mut self, what: impl Display) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// A length, then so many bytes.
    pub fn text(&mut self, what: impl Display) -> Result<&'a [u8]> {
        let len = self.u64(&what)?;
        self.take(len, what)
    }

    /// A text that names something: UTF-8, of at most `most` bytes.
    pub fn name(&mut self, most: u64, what: impl Display) -> Result<&'a str> {
        let len = self.u64(&what)?;
        if len > most {
            return Err(bad(format!("{what} has {len} bytes, may have {most}")));
        }
        let bytes = self.take(len, &what)?;
        std::str::from_utf8(bytes).map_err(|e| bad(format!("{what} is no UTF-8: {e}")))
    }
}

/// The file breaks a rule of its format.
pub fn bad(message: String) -> Error {
    Error::new(Kind::InvalidArgument, message)
}
