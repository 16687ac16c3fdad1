//! What a step over the pool needs on the device, in one copy: its rows, a work list for each sort of attention, and what is done with
//! its results.
use super::plan::{Cut, Group, Split, Step, WorkList};
use super::{DevicePlan, Launched};
use crate::ops::embed::RowSource;
use crate::ops::gpu::{Buffer, Carried, DeviceRows, Gpu, Words};
use crate::ops::prefix_attention::Attention;
use candle_core::Result;
use std::sync::Arc;

/// Where steps lie on the device, each in the place of the one before.
pub struct Uploads {
    gpu: Gpu,
    words: Arc<Buffer>,
    scratch: Arc<Buffer>,
    sampled: Arc<Buffer>,
}

/// One step, until the next.
pub struct OnDevice {
    /// Its rows.
    pub rows: Arc<DeviceRows>,
    /// A plan for each sort of attention that layers have.
    pub plans: Vec<(Attention, Arc<DevicePlan>)>,
    /// What went with them.
    pub carried: Carried,
    /// Bytes of the buffer: it changes with them alone.
    room: usize,
}

impl Uploads {
    /// `scratch` as of [`DevicePlan::new`]; `sampled` holds the tokens that the step before chose.
    pub fn new(gpu: &Gpu, scratch: &Arc<Buffer>, sampled: &Arc<Buffer>) -> Result<Self> {
        // Tests outgrow it.
        let room = if cfg!(debug_assertions) { 1 << 12 } else { 1 << 20 };
        let words = Arc::new(Buffer::poisoned(gpu, room)?);
        Ok(Uploads { gpu: gpu.clone(), words, scratch: scratch.clone(), sampled: sampled.clone() })
    }

    /// Puts a step there, after all work on the last one. `sources`, `positions` and `slots` are one each a row; `step` says what the
    /// layers with `attentions` attend to; `carried` is for what follows them.
    ///
    /// # Errors
    /// As of [`DevicePlan::new`] and [`DeviceRows::new`].
    pub fn put(
        &mut self,
        (sources, positions, slots): (&[RowSource], &[u32], &[u32]),
        step: &Step<'_>,
        attentions: impl Iterator<Item = Attention>,
        carried: &Words,
    ) -> Result<OnDevice> {
        let mut words = Words::default();
        let rows_at = words.add(&DeviceRows::words(sources, positions, slots)?);
        let mut lists: Vec<(Attention, WorkList)> = Vec::new();
        for attention in attentions {
            if !lists.iter().any(|(other, _)| *other == attention) {
                let split = Split::Auto { sms: self.gpu.multiprocessors() };
                let cut = Cut { split, group: Group::Auto, scratch: self.scratch.bytes() };
                lists.push((attention, WorkList::new(&Step { attention, ..*step }, cut)?));
            }
        }
        let lists: Vec<_> = lists.into_iter().map(|(a, list)| (a, words.add(&list.data), list)).collect();
        // What a graph reads is in the same places each time. The length of the table is in no graph's key, so it is last.
        let carried_at = words.append(carried);
        let table = words.add(step.table);
        words.replace(&self.gpu, &mut self.words)?;
        let plan = |(attention, at, list)| {
            let step = Step { attention, ..*step };
            (attention, Arc::new(DevicePlan::within(&self.words, (at, table), list, &step, &self.scratch)))
        };
        let rows = DeviceRows::within((&self.words, rows_at), Some(&self.sampled), sources, positions, slots);
        let plans = lists.into_iter().map(plan).collect();
        let carried = Carried::new(&self.words, carried_at, carried.len());
        Ok(OnDevice { rows: Arc::new(rows), plans, carried, room: self.words.bytes() })
    }
}

impl OnDevice {
    /// Equal ones have equal launches, up to what those read from the device.
    pub fn launched(&self) -> (usize, Vec<Launched>) {
        (self.room, self.plans.iter().map(|(_, plan)| plan.launched()).collect())
    }
}
