//! One packed batch of several jobs: forward, losses, and back, a slice at a time.
mod packer;

use self::packer::Packer;
use super::head::TrainedHead;
use super::job::{Job, Placement};
use super::prompt_encoder::PromptEncoder;
use crate::adapter::InputRow;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::packed::{Activations, PackedPass, back, of};
use crate::ops::Machine;
use crate::ops::cross_entropy::CHUNK;
use candle_core::{DType, Device, Tensor, Var};
use std::collections::HashSet;
use std::ops::Range;

/// One sequence and what is to be learned from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Which task of a multitask prompt; 0 otherwise.
    pub task: usize,
    /// The sequence's own rows; soft ones count from the first virtual token.
    pub rows: Vec<InputRow>,
    /// What is to come out.
    pub goal: Goal,
}

/// What is to come out of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Goal {
    /// For each row, whether it is to be predicted, and as which token.
    Tokens(Vec<Option<u32>>),
    /// The class that the head is to choose.
    Class(u32),
}

/// A job's part of a batch.
pub struct Work<'a> {
    /// Whose.
    pub job: &'a Job,
    /// On what.
    pub examples: Vec<&'a Example>,
    /// Losses are divided by this in the gradient: the targets of the optimiser's whole step.
    pub divisor: usize,
    /// Whether gradients are wanted; evaluation wants none.
    pub train: bool,
}

impl Work<'_> {
    /// The tasks of its examples, each once, in the order of their first ones.
    pub fn tasks(&self) -> Vec<u32> {
        let mut seen = HashSet::new();
        self.examples.iter().map(|e| e.task as u32).filter(|task| seen.insert(*task)).collect()
    }
}

/// What a batch did for one job.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Sum of the negative log-likelihoods of all targets.
    pub nll: f64,
    /// Targets.
    pub targets: usize,
    /// Targets that greedy decoding would choose.
    pub greedy: usize,
    /// Examples all of whose targets it would choose: what it would write is the target, to the last token.
    pub exact: usize,
    /// Examples.
    pub examples: usize,
    /// Rows that the model ran for this job.
    pub rows: usize,
    /// Of each weight, in the job's order, of the sum of losses divided by the divisor.
    pub gradients: Option<Vec<Tensor>>,
}

/// A batch on its way through the model.
pub struct Step {
    pass: PackedPass,
    parts: Vec<Part>,
    stage: Stage,
    train: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Forward,
    /// Of which part, from which of its targets on.
    Loss(usize, usize),
    Backward,
    Done,
}

/// What belongs to one job.
struct Part {
    /// The prompt encoder's rows, with their graph.
    rows: Tensor,
    encoder: PromptEncoder,
    head: Option<TrainedHead>,
    placement: Placement,
    /// Of all soft or all stored rows, those that are this job's.
    own: Range<usize>,
    /// Of the batch's wanted rows.
    wanted: Range<usize>,
    /// A token or a class for each.
    targets: Vec<u32>,
    /// Of each example, where its targets end.
    ends: Vec<usize>,
    right: Vec<bool>,
    divisor: usize,
    train: bool,
    outcome: Outcome,
    head_gradients: Vec<Tensor>,
}

impl Step {
    /// Packs the sequences of all jobs. `keep`: what becomes of activations where any job trains.
    ///
    /// # Errors
    /// `InvalidArgument` for a job without targets, or with labels that are not as many as rows.
    pub fn new(model: &Model, work: &[Work<'_>], keep: Activations) -> Result<Self> {
        let tasks: Vec<_> = work.iter().map(Work::tasks).collect();
        let rows = work.iter().zip(&tasks).map(|(w, tasks)| w.job.encoder.rows(tasks)).collect::<Result<Vec<_>>>()?;
        let of = |stored: bool| -> Vec<Tensor> {
            let own = work.iter().zip(&rows).filter(|(w, _)| (w.job.placement == Placement::Stored) == stored);
            own.map(|(_, rows)| rows.detach()).collect()
        };
        let (soft, stored) = (of(false), of(true));
        let stored = if stored.is_empty() { None } else { Some(Tensor::cat(&stored, 0)?) };
        let soft = if soft.is_empty() {
            Tensor::zeros((0, model.info().hidden_size), DType::F32, &Device::Cpu)?
        } else {
            Tensor::cat(&soft, 0)?
        };
        let mut packer = Packer::new(stored.as_ref().map_or(0, |s| s.dims()[0]), model.info().encoder);
        let mut parts = Vec::with_capacity(work.len());
        for ((w, rows), tasks) in work.iter().zip(rows).zip(&tasks) {
            parts.push(packer.job(w, rows, tasks)?);
        }
        let train = work.iter().any(|w| w.train);
        let activations = if train { keep } else { Activations::Discard };
        let pass = PackedPass::new(model, &packer.batch, &soft, stored.as_ref(), activations)?;
        Ok(Step { pass, parts, stage: Stage::Forward, train })
    }

    /// Does a slice of the work: a layer one way, or the losses of some rows. False: the outcomes are ready.
    pub fn advance(&mut self, model: &Model) -> Result<bool> {
        self.stage = match self.stage {
            Stage::Forward if self.pass.forward(model)? => Stage::Forward,
            Stage::Forward => Stage::Loss(0, 0),
            Stage::Loss(part, from) => self.losses(model, part, from)?,
            Stage::Backward if self.pass.backward(model)? => Stage::Backward,
            Stage::Backward | Stage::Done => Stage::Done,
        };
        Ok(self.stage != Stage::Done)
    }

    /// What came out for each job, in order; all slices must be done.
    pub fn finish(self) -> Result<Vec<Outcome>> {
        if self.stage != Stage::Done {
            return Err(Error::internal("a step that has not come to its end"));
        }
        let (soft, stored) = if self.train { self.pass.gradients()? } else { (None, None) };
        self.parts.into_iter().map(|part| part.finish(soft.as_ref(), stored.as_ref())).collect()
    }

    fn losses(&mut self, model: &Model, index: usize, from: usize) -> Result<Stage> {
        let Some(part) = self.parts.get_mut(index) else {
            return Ok(if self.train { Stage::Backward } else { Stage::Done });
        };
        if part.head.is_some() {
            // A head reads few rows, once; the vocabulary is wide.
            let (hidden, wanted) = self.pass.wanted(model, part.wanted.clone())?;
            let gradient = part.class_losses(model, &wanted)?;
            self.push_gradient(&hidden, &wanted, gradient)?;
            return Ok(Stage::Loss(index + 1, 0));
        }
        let first = part.wanted.start + from;
        let (some, next) = chunk(&mut self.parts, index, from, model.gpu().is_none());
        let rows = some.iter().map(|(_, range)| range.len()).sum::<usize>();
        let (hidden, wanted) = self.pass.wanted(model, first..first + rows)?;
        let gradient = token_losses(model, &wanted, some)?;
        self.push_gradient(&hidden, &wanted, gradient)?;
        Ok(next)
    }

    fn push_gradient(&mut self, hidden: &Var, wanted: &Tensor, gradient: Option<Tensor>) -> Result<()> {
        match gradient {
            Some(gradient) => self.pass.push_gradient(of(&back(wanted, &gradient)?, hidden)?),
            None if self.train => self.pass.push_gradient(hidden.zeros_like()?),
            None => {}
        }
        Ok(())
    }
}

/// The next targets from one of a part on, of all parts in a row that predict tokens: jobs share the readings of the
/// vocabulary's rows. With the stage that follows. Not `together`: of that part alone. On a GPU another kernel takes few rows, with
/// other bits, and a job's would depend on who shares its last chunk.
fn chunk(
    parts: &mut [Part],
    mut index: usize,
    mut from: usize,
    together: bool,
) -> (Vec<(&mut Part, Range<usize>)>, Stage) {
    let (mut some, mut room) = (Vec::new(), CHUNK);
    for part in parts[index..].iter_mut().take_while(|part| part.head.is_none()) {
        let all = part.targets.len();
        let to = all.min(from + room);
        room -= to - from;
        some.push((part, from..to));
        (index, from) = if to < all { (index, to) } else { (index + 1, 0) };
        if room == 0 || !together {
            break;
        }
    }
    (some, Stage::Loss(index, from))
}

/// Losses of some wanted rows, which belong to some targets of some parts; the gradient, if any of those trains.
fn token_losses(model: &Model, wanted: &Tensor, some: Vec<(&mut Part, Range<usize>)>) -> Result<Option<Tensor>> {
    let targets: Vec<u32> = some.iter().flat_map(|(part, range)| part.targets[range.clone()].iter().copied()).collect();
    let losses = model.cross_entropy(wanted, &targets, some.iter().any(|(part, _)| part.train))?;
    let (mut gradients, mut start) = (Vec::new(), 0);
    for (part, range) in some {
        let end = start + range.len();
        // One by one: the sum does not depend on where chunks end.
        losses.nll[start..end].iter().for_each(|nll| part.outcome.nll += nll);
        part.right.extend_from_slice(&losses.greedy[start..end]);
        if let Some(gradient) = &losses.gradient {
            let gradient = gradient.narrow(0, start, range.len())?;
            gradients.push(if part.train { (gradient / part.divisor as f64)? } else { gradient.zeros_like()? });
        }
        start = end;
    }
    Ok(if gradients.is_empty() { None } else { Some(Tensor::cat(&gradients, 0)?) })
}

impl Part {
    fn class_losses(&mut self, model: &Model, wanted: &Tensor) -> Result<Option<Tensor>> {
        let Some(head) = &self.head else { return Ok(None) };
        // The head that is learnt is small, and f32 on the processor; the base's pooler is where the base is.
        let pooled = Var::from_tensor(&wanted.detach())?;
        let logits = head.forward(&Machine::to_host(&model.pool(&pooled)?)?)?; // [examples, classes]
        let classes = logits.dim(1)?;
        let most = logits.detach().max_keepdim(1)?;
        let shifted = logits.broadcast_sub(&most)?;
        let norm = shifted.exp()?.sum_keepdim(1)?.log()?;
        let logprobs = shifted.broadcast_sub(&norm)?;
        let mut chosen = vec![0f32; self.targets.len() * classes];
        for (i, (row, class)) in logprobs.detach().to_vec2::<f32>()?.iter().zip(&self.targets).enumerate() {
            let class = *class as usize;
            if class >= classes {
                return Err(Error::internal(format!("class {class} of {classes}")));
            }
            chosen[i * classes + class] = 1.0;
            self.outcome.nll -= f64::from(row[class]);
            let best = row.iter().enumerate().fold(0, |best, (j, p)| if *p > row[best] { j } else { best });
            self.right.push(best == class);
        }
        if !self.train {
            return Ok(None);
        }
        let chosen = Tensor::from_vec(chosen, logprobs.shape(), &Device::Cpu)?;
        let loss = ((logprobs * chosen)?.sum_all()? * (-1.0 / self.divisor as f64))?;
        let gradients = loss.backward()?;
        self.head_gradients = head.weights().map(|(_, var)| of(&gradients, var)).collect::<Result<_>>()?;
        Ok(Some(of(&gradients, &pooled)?))
    }

    fn finish(mut self, soft: Option<&Tensor>, stored: Option<&Tensor>) -> Result<Outcome> {
        let out = &mut self.outcome;
        out.targets = self.targets.len();
        out.greedy = self.right.iter().filter(|right| **right).count();
        let mut start = 0;
        for end in &self.ends {
            out.exact += usize::from(self.right[start..*end].iter().all(|right| *right));
            start = *end;
        }
        out.examples = self.ends.len();
        if !self.train {
            return Ok(self.outcome);
        }
        let all = if self.placement == Placement::Stored { stored } else { soft };
        let gradient = all.ok_or_else(|| Error::internal("a job's rows without gradient"))?;
        let gradients = back(&self.rows, &gradient.narrow(0, self.own.start, self.own.len())?)?;
        let mut weights = self.encoder.weights().map(|(_, var)| of(&gradients, var)).collect::<Result<Vec<_>>>()?;
        weights.append(&mut self.head_gradients);
        self.outcome.gradients = Some(weights);
        Ok(self.outcome)
    }
}
