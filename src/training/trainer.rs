//! One step of training for several jobs at once.
use super::optimizer::{AdamW, AdamWConfig};
use super::prompt_encoder::PromptEncoder;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::batch::PackedBatch;
use crate::ops::embed::RowSource;
use crate::ops::prefix_attention::PackedSequence;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// What the encoder's rows are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Virtual tokens that the model runs: `[n, hidden]`.
    VirtualTokens,
    /// K and V of every layer, used as stored: `[n, 2 * layers * kv_heads * head_dim]`.
    Stored,
}

/// One adapter in training.
pub struct Job {
    /// What is trained.
    pub encoder: PromptEncoder,
    /// What its rows are.
    pub placement: Placement,
    optimizer: AdamW,
}

/// One sequence with targets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// `labels[i]`: whether token i is to be predicted, and as what.
    pub labels: Vec<Option<u32>>,
}

/// A job's part of a step.
pub struct Work<'a> {
    /// Whose.
    pub job: &'a mut Job,
    /// On what.
    pub examples: &'a [Example],
    /// The learning rate of this step.
    pub learning_rate: f64,
}

/// What one step did to one job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// Negative log-likelihood, mean over the labelled tokens.
    pub loss: f64,
    /// Norm of the gradients over all weights, before clipping.
    pub gradient_norm: f64,
    /// Labelled tokens.
    pub targets: usize,
}

impl Job {
    /// A job at its start.
    pub fn new(encoder: PromptEncoder, placement: Placement, config: AdamWConfig) -> Result<Self> {
        let optimizer = AdamW::new(encoder.weights().map(|(_, var)| var), config)?;
        Ok(Job { encoder, placement, optimizer })
    }
}

/// Forward, backward and one step of each job's optimiser. All sequences share one packed batch; a job's virtual tokens
/// are run once, and all its sequences attend to their K and V.
///
/// # Errors
/// `InvalidArgument` for an example without a label, or one whose labels are not as many as its tokens.
pub fn step(model: &Model, work: &mut [Work<'_>]) -> Result<Vec<StepReport>> {
    let rows = work.iter().map(|w| w.job.encoder.rows()).collect::<Result<Vec<_>>>()?;
    let of = |placement: Placement| -> Vec<&Tensor> {
        work.iter().zip(&rows).filter(|(w, _)| w.job.placement == placement).map(|(_, rows)| rows).collect()
    };
    let (soft, stored) = (of(Placement::VirtualTokens), of(Placement::Stored));
    let stored = if stored.is_empty() { None } else { Some(Tensor::cat(&stored, 0)?) };
    let soft = if soft.is_empty() {
        Tensor::zeros((0, model.info().hidden_size), DType::F32, &Device::Cpu)?
    } else {
        Tensor::cat(&soft, 0)?
    };
    let mut plan = Packer::new(stored.as_ref().map_or(0, |s| s.dims()[0]));
    for (w, rows) in work.iter().zip(&rows) {
        plan.job(w.job.placement, rows.dim(0)?, w.examples)?;
    }
    let hidden = model.forward_packed(&plan.batch, &soft, stored.as_ref())?;
    let hidden = hidden.ok_or_else(|| Error::internal("a step without targets"))?;
    let mut losses = Vec::with_capacity(work.len());
    for targets in &plan.targets {
        let rows = hidden.narrow(0, targets.start, targets.len())?.contiguous()?;
        let sum = model.cross_entropy(&rows, &plan.labels[targets.clone()])?;
        losses.push((sum / targets.len() as f64)?);
    }
    // The jobs share no weight, so the gradient of the sum is each one's own.
    let gradients = Tensor::stack(&losses, 0)?.sum_all()?.backward()?;
    let mut reports = Vec::with_capacity(work.len());
    for ((w, loss), targets) in work.iter_mut().zip(&losses).zip(&plan.targets) {
        let gradient_norm = w.job.update(&gradients, w.learning_rate)?;
        reports.push(StepReport { loss: f64::from(loss.to_scalar::<f32>()?), gradient_norm, targets: targets.len() });
    }
    Ok(reports)
}

impl Job {
    fn update(&mut self, gradients: &GradStore, learning_rate: f64) -> Result<f64> {
        let missing = |name: &str| Error::internal(format!("the weight {name} has no gradient"));
        let weights = self.encoder.weights().map(|(name, var)| {
            let gradient = gradients.get(var).ok_or_else(|| missing(name))?;
            Ok((var, gradient.clone()))
        });
        let weights = weights.collect::<Result<Vec<_>>>()?;
        self.optimizer.step(&weights, learning_rate)
    }
}

/// Puts the sequences of all jobs one after the other.
struct Packer {
    batch: PackedBatch,
    /// Rows of K and V before the batch's own.
    stored: usize,
    /// Stored rows and virtual tokens given to jobs so far.
    used: (usize, usize),
    /// A target for each of `batch.wanted`.
    labels: Vec<u32>,
    /// Which of `labels` are each job's.
    targets: Vec<Range<usize>>,
}

impl Packer {
    fn new(stored: usize) -> Self {
        Packer { batch: PackedBatch::default(), stored, used: (0, 0), labels: Vec::new(), targets: Vec::new() }
    }

    fn job(&mut self, placement: Placement, n: usize, examples: &[Example]) -> Result<()> {
        let first = self.labels.len();
        // Rows of K and V that every sequence of the job attends to, and the row that has seen all of a soft prompt.
        let (prefix, last) = match placement {
            Placement::Stored => {
                self.used.0 += n;
                (self.used.0 - n..self.used.0, None)
            }
            Placement::VirtualTokens => {
                let rows = self.used.1 as u32..(self.used.1 + n) as u32;
                self.used.1 += n;
                let own = self.sequence(rows.map(RowSource::Soft), 0, 0..0);
                (own.clone(), Some((own.end - 1 - self.stored) as u32))
            }
        };
        for example in examples {
            if example.labels.len() != example.tokens.len() {
                let (labels, tokens) = (example.labels.len(), example.tokens.len());
                return Err(Error::invalid(
                    "labels",
                    format!("{labels} entries"),
                    format!("must be {tokens}, one a token"),
                ));
            }
            let tokens = example.tokens.iter().map(|id| RowSource::Token(*id));
            let own = self.sequence(tokens, n, prefix.clone());
            for (i, label) in example.labels.iter().enumerate() {
                // Row i - 1 predicts token i; the last virtual token predicts the first one.
                let row = if i == 0 { last } else { Some((own.start - self.stored + i - 1) as u32) };
                if let (Some(row), Some(label)) = (row, label) {
                    self.batch.wanted.push(row);
                    self.labels.push(*label);
                }
            }
        }
        if self.labels.len() == first {
            return Err(Error::invalid("labels", "none", "a step needs at least one token that is to be predicted"));
        }
        self.targets.push(first..self.labels.len());
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
