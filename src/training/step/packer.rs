//! The sequences of all jobs of a batch, one after the other, as the packed pass takes them.
use super::{Example, Goal, Outcome, Part, Work};
use crate::adapter::InputRow;
use crate::error::{Error, Result};
use crate::model::batch::PackedBatch;
use crate::ops::embed::RowSource;
use crate::ops::prefix_attention::PackedSequence;
use crate::training::job::{Job, Placement};
use candle_core::Tensor;
use std::collections::HashMap;
use std::ops::Range;

/// Puts the sequences of all jobs one after the other.
pub(super) struct Packer {
    pub batch: PackedBatch,
    /// Rows of K and V before the batch's own.
    stored: usize,
    /// Stored rows and virtual tokens given to jobs so far.
    used: (usize, usize),
    encoder: bool,
}

/// What the sequences of one task attend to.
struct Shared {
    /// Rows of K and V.
    prefix: Range<usize>,
    /// The row that has seen all of it.
    last: Option<u32>,
}

impl Packer {
    pub fn new(stored: usize, encoder: bool) -> Self {
        Packer { batch: PackedBatch::default(), stored, used: (0, 0), encoder }
    }

    /// Adds a job's sequences; `rows` are the prompt encoder's of [`Work::tasks`].
    pub fn job(&mut self, work: &Work<'_>, rows: Tensor, tasks: &[u32]) -> Result<Part> {
        let (job, n) = (work.job, rows.dim(0)?);
        let used = if job.placement == Placement::Stored { &mut self.used.0 } else { &mut self.used.1 };
        let own = *used..*used + n;
        *used += n;
        let per_task = n / tasks.len().max(1);
        let (first, start) = (self.batch.wanted.len(), self.batch.inputs.len());
        let shared: HashMap<usize, (u32, Shared)> = tasks
            .iter()
            .enumerate()
            .map(|(i, task)| {
                let soft = (own.start + i * per_task) as u32;
                (*task as usize, (soft, self.shared(job, own.start, soft, per_task)))
            })
            .collect();
        let (mut targets, mut ends) = (Vec::new(), Vec::new());
        for example in &work.examples {
            let (soft, common) = &shared[&example.task];
            self.example(example, *soft, common, &mut targets)?;
            ends.push(targets.len());
        }
        if targets.is_empty() {
            return Err(Error::invalid("labels", "none", "a step needs at least one token that is to be predicted"));
        }
        let outcome = Outcome { rows: self.batch.inputs.len() - start, ..Outcome::default() };
        Ok(Part {
            rows,
            encoder: job.encoder.clone(),
            head: job.head.clone(),
            placement: job.placement,
            own,
            wanted: first..self.batch.wanted.len(),
            targets,
            ends,
            right: Vec::new(),
            divisor: work.divisor.max(1),
            train: work.train,
            outcome,
            head_gradients: Vec::new(),
        })
    }

    /// Adds what all sequences of a task attend to.
    fn shared(&mut self, job: &Job, stored: usize, soft: u32, n: usize) -> Shared {
        if job.placement == Placement::Stored {
            return Shared { prefix: stored..stored + n, last: None };
        }
        let virtual_tokens = if job.placement == Placement::AmongRows { 0 } else { n as u32 };
        let text = |ids: &[u32]| ids.iter().map(|id| RowSource::Token(*id)).collect::<Vec<_>>();
        let rows: Vec<RowSource> = text(&job.before)
            .into_iter()
            .chain((soft..soft + virtual_tokens).map(RowSource::Soft))
            .chain(text(&job.after))
            .collect();
        if rows.is_empty() {
            return Shared { prefix: 0..0, last: None };
        }
        let own = self.sequence(rows.into_iter(), 0, 0..0);
        Shared { last: Some((own.end - 1 - self.stored) as u32), prefix: own }
    }

    fn example(&mut self, example: &Example, soft: u32, common: &Shared, targets: &mut Vec<u32>) -> Result<()> {
        let rows = example.rows.iter().map(|row| match *row {
            InputRow::Token(id) => RowSource::Token(id),
            InputRow::Soft(i) => RowSource::Soft(soft + i),
        });
        let own = self.sequence(rows, common.prefix.len(), common.prefix.clone());
        let row = |i: usize| (own.start - self.stored + i) as u32;
        match &example.goal {
            Goal::Class(class) => {
                self.batch.wanted.push(if self.encoder { row(0) } else { row(own.len() - 1) });
                targets.push(*class);
            }
            Goal::Tokens(labels) if labels.len() != example.rows.len() => {
                let rule = format!("must be {}, one a row", example.rows.len());
                return Err(Error::invalid("labels", format!("{} entries", labels.len()), rule));
            }
            Goal::Tokens(labels) => {
                for (i, label) in labels.iter().enumerate() {
                    // Row i - 1 predicts token i; the last row of the prefix predicts the first one.
                    let before = if i == 0 { common.last } else { Some(row(i - 1)) };
                    if let (Some(before), Some(label)) = (before, label) {
                        self.batch.wanted.push(before);
                        targets.push(*label);
                    }
                }
            }
        }
        Ok(())
    }

    /// Adds rows at positions from `at` on; returns their rows of K and V.
    fn sequence(&mut self, inputs: impl Iterator<Item = RowSource>, at: usize, prefix: Range<usize>) -> Range<usize> {
        let start = self.batch.inputs.len();
        self.batch.inputs.extend(inputs);
        let queries = start..self.batch.inputs.len();
        self.batch.positions.extend((at..at + queries.len()).map(|p| p as u32));
        let own = self.stored + queries.start..self.stored + queries.end;
        self.batch.sequences.push(PackedSequence { queries, prefix, own: own.clone() });
        own
    }
}
