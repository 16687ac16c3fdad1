//! What the rows of a pass are, on the device: one upload, read by every layer.
use super::{Buffer, Gpu};
use crate::ops::embed::RowSource;
use candle_core::{Result, bail};
use std::sync::Arc;

/// In a source: what is added to the place of a token that was chosen. `kernels/embed.cu` has it too.
const SAMPLED: u32 = 1 << 30;

/// Source, position and, where there is a pool, slot of each row.
pub struct DeviceRows {
    /// `[source | position | slot]`, each `[rows]`, from element `at` on.
    buffer: Arc<Buffer>,
    at: usize,
    /// Tokens that the step before chose, u32: those of [`RowSource::Sampled`].
    sampled: Option<Arc<Buffer>>,
    sources: Vec<RowSource>,
    largest_position: u32,
    largest_slot: Option<u32>,
}

impl DeviceRows {
    /// `positions`, and `slots` or nothing at all, are as many as `sources`.
    pub fn new(gpu: &Gpu, sources: &[RowSource], positions: &[u32], slots: &[u32]) -> Result<Self> {
        let buffer = Arc::new(Buffer::new(gpu, &Self::words(sources, positions, slots)?)?);
        Ok(Self::within((&buffer, 0), None, sources, positions, slots))
    }

    /// What lies on the device.
    pub(in crate::ops) fn words(sources: &[RowSource], positions: &[u32], slots: &[u32]) -> Result<Vec<u32>> {
        let n = sources.len();
        if positions.len() != n || !slots.is_empty() && slots.len() != n {
            bail!("{n} rows at {} positions in {} slots", positions.len(), slots.len());
        }
        // Virtual tokens count down from -1, places of tokens up from `SAMPLED`.
        let source = |row: &RowSource| match *row {
            RowSource::Token(id) if id < SAMPLED => Ok(id),
            RowSource::Soft(i) if i < 2 * SAMPLED => Ok(!i),
            RowSource::Sampled(i) if i < SAMPLED => Ok(SAMPLED | i),
            ref other => bail!("{other:?} is no row"),
        };
        let mut all: Vec<u32> = Vec::with_capacity(3 * n);
        for row in sources {
            all.push(source(row)?);
        }
        all.extend_from_slice(positions);
        all.extend_from_slice(slots);
        Ok(all)
    }

    /// Their [`Self::words`] lie in `buffer`, from element `at` on; what the step before chose in `sampled`.
    pub(in crate::ops) fn within(
        (buffer, at): (&Arc<Buffer>, usize),
        sampled: Option<&Arc<Buffer>>,
        sources: &[RowSource],
        positions: &[u32],
        slots: &[u32],
    ) -> Self {
        let largest_position = positions.iter().copied().max().unwrap_or(0);
        let largest_slot = slots.iter().copied().max();
        let (buffer, sampled) = (buffer.clone(), sampled.cloned());
        DeviceRows { buffer, at, sampled, sources: sources.to_vec(), largest_position, largest_slot }
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

    /// Tokens that the step before chose, if rows may name them.
    pub fn sampled(&self) -> Option<&Buffer> {
        self.sampled.as_deref()
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
