//! Runs a step: the pool's copies, the model, and the logits in blocks.
use super::batcher::{self, LogitUse};
use super::scheduler::{Scheduler, SequenceId, Step};
use crate::adapter::Head;
use crate::error::{Error, Result};
use crate::kv::KvPool;
use crate::model::Model;
use crate::model::batch::{Batch, Forward};
use crate::ops::sample::device::Chosen;
use candle_core::{CpuStorage, Storage, Tensor};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Rows whose logits are held at once: `[tokens, vocab]` never exists.
const LOGIT_ROWS: usize = 64;

/// The model and its KV pool, on the engine thread.
pub struct Runner {
    model: Model,
    kv: KvPool,
}

/// A step as the model takes it.
pub struct Prepared {
    /// Its rows.
    pub batch: Batch,
    /// What each of the batch's `logit_rows` is for.
    pub uses: Vec<LogitUse>,
    /// All of `uses`, in order.
    pub blocks: Vec<Block>,
}

/// Rows whose logits are held at once.
pub struct Block {
    /// Which of the `uses`.
    pub uses: Range<usize>,
    /// Of whom the one row is for a head, not for the vocabulary.
    pub classifies: Option<SequenceId>,
}

/// A row for a head by itself, rows for the vocabulary [`LOGIT_ROWS`] at a time.
fn blocks(uses: &[LogitUse]) -> Vec<Block> {
    let classified = |usage: &LogitUse| if let LogitUse::Pool { id } = *usage { Some(id) } else { None };
    let (mut blocks, mut row) = (Vec::new(), 0);
    while row < uses.len() {
        let classifies = classified(&uses[row]);
        let rows = uses[row..].iter().take(LOGIT_ROWS).take_while(|u| classified(u).is_none()).count().max(1);
        blocks.push(Block { uses: row..row + rows, classifies });
        row += rows;
    }
    blocks
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

    /// Makes `step`'s pages ready for the model: poison in those that change hands, stored prefixes in theirs. Returns its rows.
    pub fn prepare(&self, step: &Step, scheduler: &Scheduler) -> Result<Prepared> {
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
        let blocks = blocks(&uses);
        Ok(Prepared { batch, uses, blocks })
    }

    /// Runs a step. On a GPU what the batch says is chosen there. All other rows of logits, `[n, vocab]` or `[1, labels]`, are handed to
    /// `take`, a block at a time; `head` tells which head classifies a sequence. Returns the time of the forward pass, logits included.
    pub fn run<'h>(
        &self,
        prepared: &Prepared,
        head: impl Fn(SequenceId) -> Option<&'h Head>,
        mut take: impl FnMut(&[LogitUse], &[f32]),
    ) -> Result<(Duration, Option<Chosen>)> {
        if prepared.batch.inputs.is_empty() {
            // Copies of stored prefixes may be under way: whose they are is known now.
            self.model.synchronize()?;
            return Ok((Duration::ZERO, None));
        }
        let began = Instant::now();
        let Forward { hidden, chosen } = self.model.forward(&prepared.batch, &self.kv)?;
        let mut time = began.elapsed();
        for block in prepared.blocks.iter().filter(|block| chosen.is_none() || block.classifies.is_some()) {
            let hidden = hidden.as_ref().ok_or_else(|| Error::internal("rows of logits are wanted, and none came"))?;
            let hidden = hidden.narrow(0, block.uses.start, block.uses.len())?;
            let began = Instant::now();
            let logits = match block.classifies {
                Some(id) => {
                    let head = head(id).ok_or_else(|| Error::internal("a classified sequence without a head"))?;
                    self.model.classify(&hidden, head)?
                }
                None => self.model.logits(&hidden)?,
            };
            time += began.elapsed();
            with_values(&logits, |logits| take(&prepared.uses[block.uses.clone()], logits))?;
        }
        Ok((time, chosen))
    }
}

/// The elements of contiguous logits `[n, width]` on the processor.
fn with_values(logits: &Tensor, take: impl FnOnce(&[f32])) -> Result<()> {
    let (storage, layout) = logits.storage_and_layout();
    let (Storage::Cpu(CpuStorage::F32(all)), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
        return Err(Error::internal("logits are not contiguous f32 on the CPU"));
    };
    take(&all[start..end]);
    Ok(())
}
