//! Runs a step: the pool's copies, the model, and the logits in blocks.
use super::batcher::{self, LogitUse};
use super::scheduler::{Scheduler, SequenceId, Step};
use crate::adapter::Head;
use crate::error::{Error, Result};
use crate::kv::KvPool;
use crate::model::Model;
use candle_core::{CpuStorage, Storage, Tensor};
use std::time::{Duration, Instant};

/// Rows whose logits are held at once: `[tokens, vocab]` never exists.
const LOGIT_ROWS: usize = 64;

/// The model and its KV pool, on the engine thread.
pub struct Runner {
    model: Model,
    kv: KvPool,
}

/// Rows of logits, where the model runs.
pub enum Logits<'a> {
    /// `[n, vocab]`, or `[1, labels]`.
    Host(&'a [f32]),
    /// `[n, vocab]` on a GPU.
    Device(&'a Tensor),
}

impl Runner {
    /// A pool of `pages` for `model`.
    pub fn new(model: Model, pages: usize) -> Result<Self> {
        let kv = model.kv_pool(pages)?;
        Ok(Runner { model, kv })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Runs `step` and hands the wanted rows of logits, `[n, vocab]` or `[1, labels]`, to `take`, a block at a time. `head`
    /// tells which head classifies a sequence. Returns the time of the forward pass, logits included.
    pub fn run<'h>(
        &self,
        step: &Step,
        scheduler: &Scheduler,
        head: impl Fn(SequenceId) -> Option<&'h Head>,
        mut take: impl FnMut(&[LogitUse], Logits<'_>) -> Result<()>,
    ) -> Result<Duration> {
        if cfg!(debug_assertions) {
            step.fresh.iter().try_for_each(|page| self.kv.poison(*page))?;
        }
        for digest in &step.copies {
            if let Some(resident) = scheduler.prefixes().get(digest) {
                let rows = resident.prefix.kv.iter();
                rows.into_iter().try_for_each(|rows| self.kv.store(&rows.data, rows.len, &resident.pages))?;
            }
        }
        let (batch, uses) = batcher::build(step, scheduler, self.model.info().hidden_size);
        if batch.inputs.is_empty() {
            return Ok(Duration::ZERO);
        }
        let began = Instant::now();
        let hidden = self.model.forward(&batch, &self.kv)?;
        let mut time = began.elapsed();
        let Some(hidden) = hidden else { return Ok(time) };
        let mut row = 0;
        while row < uses.len() {
            // A row for a head by itself, rows for the vocabulary in blocks.
            let pooled = |u: &LogitUse| matches!(u, LogitUse::Pool { .. });
            let vocabulary = uses[row..].iter().take(LOGIT_ROWS).take_while(|u| !pooled(u)).count();
            let block = &uses[row..row + vocabulary.max(1)];
            let hidden = hidden.narrow(0, row, block.len())?;
            let began = Instant::now();
            let logits = match block[0] {
                LogitUse::Pool { id } => {
                    let head = head(id).ok_or_else(|| Error::internal("a classified sequence without a head"))?;
                    self.model.classify(&hidden, head)?
                }
                _ => self.model.logits(&hidden)?,
            };
            time += began.elapsed();
            if self.model.gpu().is_some() && !pooled(&block[0]) {
                take(block, Logits::Device(&logits))?;
            } else {
                with_values(&logits, |logits| take(block, Logits::Host(logits)))?;
            }
            row += block.len();
        }
        Ok(time)
    }
}

/// The elements of contiguous logits `[n, width]` on the processor.
fn with_values(logits: &Tensor, take: impl FnOnce(&[f32]) -> Result<()>) -> Result<()> {
    let (storage, layout) = logits.storage_and_layout();
    let (Storage::Cpu(CpuStorage::F32(all)), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        return Err(Error::internal("logits are not contiguous f32 on the CPU"));
    };
    take(&all[start..end])
}
