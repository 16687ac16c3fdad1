//! What the rows of a pass are, on the device: one upload, read by every layer.
use super::{Buffer, Gpu};
use crate::ops::embed::RowSource;
use candle_core::{Result, bail};
use std::sync::Arc;

/// Source, position and, where there is a pool, slot of each row.
pub struct DeviceRows {
    /// `[source | position | slot]`, each `[rows]`, from element `at` on.
    buffer: Arc<Buffer>,
    at: usize,
    sources: Vec<RowSource>,
    largest_position: u32,
    largest_slot: Option<u32>,
}

impl DeviceRows {
    /// `positions`, and `slots` or nothing at all, are as many as `sources`.
    pub fn new(gpu: &Gpu, sources: &[RowSource], positions: &[u32], slots: &[u32]) -> Result<Self> {
        let buffer = Arc::new(Buffer::new(gpu, &Self::words(sources, positions, slots)?)?);
        Ok(Self::within(&buffer, 0, sources, positions, slots))
    }

    /// What lies on the device.
    pub(in crate::ops) fn words(sources: &[RowSource], positions: &[u32], slots: &[u32]) -> Result<Vec<u32>> {
        let n = sources.len();
        if positions.len() != n || !slots.is_empty() && slots.len() != n {
            bail!("{n} rows at {} positions in {} slots", positions.len(), slots.len());
        }
        // Virtual tokens count down from -1.
        let source = |row: &RowSource| match *row {
            RowSource::Token(id) => id,
            RowSource::Soft(i) => !i,
        };
        if let Some(row) =
            sources.iter().find(|row| matches!(row, RowSource::Token(i) | RowSource::Soft(i) if *i > i32::MAX as u32))
        {
            bail!("{row:?} is no row");
        }
        let mut all: Vec<u32> = Vec::with_capacity(3 * n);
        all.extend(sources.iter().map(source));
        all.extend_from_slice(positions);
        all.extend_from_slice(slots);
        Ok(all)
    }

    /// Their [`Self::words`] lie in `buffer`, from element `at` on.
    pub(in crate::ops) fn within(
        buffer: &Arc<Buffer>,
        at: usize,
        sources: &[RowSource],
        positions: &[u32],
        slots: &[u32],
    ) -> Self {
        let largest_position = positions.iter().copied().max().unwrap_or(0);
        let largest_slot = slots.iter().copied().max();
        DeviceRows { buffer: buffer.clone(), at, sources: sources.to_vec(), largest_position, largest_slot }
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.sources.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.sources.is_empty()
    }

    /// Where each row's embedding comes from.
    pub fn sources(&self) -> &[RowSource] {
        &self.sources
    }

    /// The largest position of all.
    pub fn largest_position(&self) -> u32 {
        self.largest_position
    }

    /// The largest slot of all, if they have any.
    pub fn largest_slot(&self) -> Option<u32> {
        self.largest_slot
    }

    /// Buffer, and the element at which the sources start.
    pub fn source(&self) -> (&Buffer, usize) {
        (&self.buffer, self.at)
    }

    /// Buffer, and the element at which the positions start.
    pub fn position(&self) -> (&Buffer, usize) {
        (&self.buffer, self.at + self.sources.len())
    }

    /// Buffer, and the element at which the slots start.
    pub fn slot(&self) -> (&Buffer, usize) {
        (&self.buffer, self.at + 2 * self.sources.len())
    }
}
