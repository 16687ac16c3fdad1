//! One job from its first step to its last: which examples, at what rate, evaluated when, started again how often.
//!
//! What happens next depends on the settings, the data and [`Progress`] alone, so a run that goes on from a checkpoint ends
//! with the bits of one that was never disturbed.
mod order;

pub use order::shuffle;

use self::order::Order;
use super::init;
use super::job::{Job, Placement};
use super::settings::{Init, Settings};
use super::step::{Example, Outcome, Work};
use crate::error::{Error, Kind, Result};
use crate::model::Model;
use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// All that a run is made of, checked and encoded.
#[derive(Debug)]
pub struct Plan {
    /// Checked.
    pub settings: Settings,
    /// The virtual tokens' places and the card's texts.
    pub placement: Placement,
    /// Text before virtual tokens.
    pub before: Vec<u32>,
    /// Text after them, of all sequences.
    pub after: Vec<u32>,
    /// Tokens of [`Init::Text`].
    pub init_text: Vec<u32>,
    /// Classes of a head; 0: none is trained.
    pub labels: usize,
    /// To learn from.
    pub train: Vec<Example>,
    /// To evaluate on.
    pub evaluation: Vec<Example>,
}

/// Where a run is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Which start of several, from 0.
    pub restart: usize,
    /// Steps done since that start.
    pub step: usize,
    /// The last step that was evaluated.
    evaluated: Option<usize>,
    /// Evaluations since the best one of this start.
    without_gain: usize,
    /// Loss of the best weights of this start, and its step.
    best: Option<(f64, usize)>,
    /// Loss of the best start so far.
    champion: Option<f64>,
    /// Losses of the steps of this start's last epoch: their sum, and how many.
    #[serde(default)]
    tail: (f64, usize),
    /// Rows that the model ran in training.
    pub rows: u64,
    /// All steps of all starts are done.
    pub done: bool,
}

/// What happened in a step, an evaluation or a start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Which start of several, from 0.
    pub restart: usize,
    /// Steps done.
    pub step: usize,
    /// What of.
    pub what: Happened,
}

/// See [`Report`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Happened {
    /// A step of the optimiser.
    Step {
        /// Mean over the step's targets, before the step.
        loss: f64,
        /// Used in it.
        learning_rate: f64,
        /// Before clipping.
        gradient_norm: f64,
        /// Rows run for the job a second, of the time that its batches took.
        tokens_per_second: f64,
    },
    /// The evaluation examples were run.
    Evaluation {
        /// Mean over their targets.
        loss: f64,
        /// Share of targets that greedy decoding would choose.
        token_accuracy: f64,
        /// Share of examples that it would get right to the last token.
        exact_match: f64,
    },
    /// A loss or gradient was not finite: this start has no result, the next one begins.
    Diverged {
        /// What was not finite.
        reason: String,
    },
}

/// One job under way.
pub struct Run {
    plan: Arc<Plan>,
    job: Job,
    progress: Progress,
    /// Weights that may become the result: the best of this start, the best start's.
    kept: BTreeMap<String, Vec<Tensor>>,
    /// Of the batches of the step or evaluation at hand.
    so_far: Outcome,
    /// Batches done of it.
    batches: usize,
    spent: Duration,
    order: Order,
    /// Examples of the step at hand, and what its losses are divided by.
    step: (Vec<usize>, usize),
}

const BEST: &str = "best";
const CHAMPION: &str = "champion";

/// The examples of a batch: indices, and what they are for.
struct Batch {
    examples: Vec<usize>,
    evaluation: bool,
    divisor: usize,
}

impl Run {
    /// A run at its start, or where `checkpoint` left it: its progress and its bytes.
    pub fn new(model: &Model, plan: Arc<Plan>, checkpoint: Option<(Progress, &[u8])>) -> Result<Self> {
        let restart = checkpoint.as_ref().map_or(0, |(progress, _)| progress.restart);
        let mut job = start(model, &plan, restart)?;
        let (mut progress, mut kept) = (Progress::default(), BTreeMap::new());
        if let Some((at, bytes)) = checkpoint {
            (progress, kept) = (at, job.load(bytes, &[BEST, CHAMPION])?);
        }
        let (so_far, batches, spent, step) = Default::default();
        let order = plan.order(restart);
        let mut run = Run { plan, job, progress, kept, so_far, batches, spent, order, step };
        run.draw();
        Ok(run)
    }

    /// Where it is.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// The job's present weights; once the run is done, the result's.
    pub fn job(&self) -> &Job {
        &self.job
    }

    /// Its settings and data.
    pub fn plan(&self) -> &Arc<Plan> {
        &self.plan
    }

    /// The state after the last step, to go on from later.
    pub fn save(&self) -> Result<Vec<u8>> {
        self.job.save(&self.kept)
    }

    /// What to run next; `None` when all is done.
    pub fn work(&self) -> Option<Work<'_>> {
        if self.progress.done {
            return None;
        }
        let batch = self.batch();
        let all = if batch.evaluation { &self.plan.evaluation } else { &self.plan.train };
        let examples = batch.examples.iter().map(|i| &all[*i]).collect();
        Some(Work { job: &self.job, examples, divisor: batch.divisor, train: !batch.evaluation })
    }

    /// Takes in what the work came to; `spent` is this job's share of the time. Reports what has ended with it.
    ///
    /// A start whose loss or gradient is not finite is given up for the next one.
    ///
    /// # Errors
    /// `FailedPrecondition` where that was the last start, and none before it had a result: the run is over.
    pub fn take(&mut self, model: &Model, outcome: Outcome, spent: Duration) -> Result<Option<Report>> {
        let evaluation = self.evaluating();
        let settings = &self.plan.settings;
        self.batches += 1;
        self.spent += spent;
        let sum = &mut self.so_far;
        sum.nll += outcome.nll;
        sum.targets += outcome.targets;
        sum.greedy += outcome.greedy;
        sum.exact += outcome.exact;
        sum.examples += outcome.examples;
        sum.rows += outcome.rows;
        sum.gradients = match (sum.gradients.take(), outcome.gradients) {
            (Some(sum), Some(more)) => {
                Some(sum.iter().zip(&more).map(|(a, b)| Ok((a + b)?)).collect::<Result<Vec<_>>>()?)
            }
            (sum, more) => sum.or(more),
        };
        let batches = match evaluation {
            true => self.plan.evaluation.len().div_ceil(settings.batch_size),
            false => settings.accumulation_steps,
        };
        if self.batches < batches {
            return Ok(None);
        }
        let out = std::mem::take(&mut self.so_far);
        let spent = std::mem::take(&mut self.spent);
        self.batches = 0;
        let loss = out.nll / out.targets.max(1) as f64;
        let (restart, step) = (self.progress.restart, self.progress.step);
        if !loss.is_finite() {
            let rate = self.learning_rate();
            let reason = format!("the loss of step {step} is {loss}: lower the learning rate (now {rate:.1e})");
            return self.diverged(model, reason).map(Some);
        }
        if evaluation {
            let report = Happened::Evaluation {
                loss,
                token_accuracy: out.greedy as f64 / out.targets.max(1) as f64,
                exact_match: out.exact as f64 / out.examples.max(1) as f64,
            };
            self.evaluated(model, loss)?;
            return Ok(Some(Report { restart, step, what: report }));
        }
        let learning_rate = self.learning_rate();
        let gradients = out.gradients.unwrap_or_default();
        let gradient_norm = self.job.update(&gradients, learning_rate)?;
        if !gradient_norm.is_finite() {
            let reason = format!("the gradient of step {step} is {gradient_norm}: lower the learning rate");
            return self.diverged(model, reason).map(Some);
        }
        self.progress.step += 1;
        self.progress.rows += out.rows as u64;
        if step + self.plan.epoch() >= self.steps() {
            let (sum, count) = self.progress.tail;
            self.progress.tail = (sum + loss, count + 1);
        }
        self.draw();
        if self.finished() && !self.evaluating() {
            self.end_of_start(model)?;
        }
        let tokens_per_second = out.rows as f64 / spent.as_secs_f64().max(1e-9);
        let what = Happened::Step { loss, learning_rate, gradient_norm, tokens_per_second };
        Ok(Some(Report { restart, step: step + 1, what }))
    }

    /// Steps of one start.
    pub fn steps(&self) -> usize {
        self.plan.steps()
    }

    fn finished(&self) -> bool {
        self.progress.step >= self.steps()
    }

    /// Whether what comes next is an evaluation.
    fn evaluating(&self) -> bool {
        let (p, every) = (&self.progress, self.plan.settings.evaluation_interval);
        let due = every > 0 && p.step > 0 && p.step.is_multiple_of(every) || self.finished();
        !self.plan.evaluation.is_empty() && due && p.evaluated != Some(p.step)
    }

    fn learning_rate(&self) -> f64 {
        let s = &self.plan.settings;
        s.learning_rate * s.schedule.share(self.progress.step, s.warmup_steps, self.steps())
    }

    fn batch(&self) -> Batch {
        let s = &self.plan.settings;
        let (size, from) = (s.batch_size, self.batches * s.batch_size);
        if self.evaluating() {
            let examples = (from..self.plan.evaluation.len().min(from + size)).collect();
            return Batch { examples, evaluation: true, divisor: 1 };
        }
        let (chosen, divisor) = &self.step;
        Batch { examples: chosen[from..from + size].to_vec(), evaluation: false, divisor: *divisor }
    }

    /// Draws the examples of the step that comes next, if one does: once for all its batches.
    fn draw(&mut self) {
        if self.finished() {
            return;
        }
        let of_step = self.plan.settings.step_size();
        let first = self.progress.step * of_step;
        let chosen = self.order.places(first..first + of_step);
        let divisor = chosen.iter().map(|i| self.job.targets(&self.plan.train[*i])).sum();
        self.step = (chosen, divisor);
    }

    fn evaluated(&mut self, model: &Model, loss: f64) -> Result<()> {
        let p = &mut self.progress;
        p.evaluated = Some(p.step);
        if p.best.is_none_or(|(best, _)| loss < best) {
            p.best = Some((loss, p.step));
            p.without_gain = 0;
            self.kept.insert(BEST.into(), self.job.values()?);
        } else {
            p.without_gain += 1;
        }
        let patience = self.plan.settings.early_stopping_patience;
        let patient = patience == 0 || self.progress.without_gain < patience;
        if self.finished() || !patient { self.end_of_start(model) } else { Ok(()) }
    }

    /// A start has come to its end: the weights that it leaves, and the next one or the result.
    fn end_of_start(&mut self, model: &Model) -> Result<()> {
        if let Some(best) = self.kept.remove(BEST) {
            self.job.set_values(&best)?;
        }
        // Without an evaluation: one batch says little, and each start has another one last.
        let (sum, count) = self.progress.tail;
        let trained = if count > 0 { sum / count as f64 } else { f64::INFINITY };
        let loss = self.progress.best.map_or(trained, |(loss, _)| loss);
        if self.progress.champion.is_none_or(|best| loss < best) {
            self.progress.champion = Some(loss);
            self.kept.insert(CHAMPION.into(), self.job.values()?);
        }
        self.next_start(model)
    }

    /// This start is lost, with all that it had.
    fn diverged(&mut self, model: &Model, reason: String) -> Result<Report> {
        let (restart, step, starts) = (self.progress.restart, self.progress.step, self.plan.settings.restarts);
        if restart + 1 >= starts && self.progress.champion.is_none() {
            let all =
                if starts > 1 { format!("each of {starts} restarts diverged; in the last ") } else { String::new() };
            return Err(Error::precondition(all + &reason));
        }
        self.kept.remove(BEST);
        self.next_start(model)?;
        Ok(Report { restart, step, what: Happened::Diverged { reason } })
    }

    /// Begins the next start; after the last one the best one's weights are the result.
    fn next_start(&mut self, model: &Model) -> Result<()> {
        let next = self.progress.restart + 1;
        if next < self.plan.settings.restarts {
            self.job = start(model, &self.plan, next)?;
            let (champion, rows) = (self.progress.champion, self.progress.rows);
            self.progress = Progress { restart: next, champion, rows, ..Progress::default() };
            self.order = self.plan.order(next);
            self.draw();
            return Ok(());
        }
        if let Some(champion) = self.kept.remove(CHAMPION) {
            self.job.set_values(&champion)?;
        }
        self.progress.done = true;
        Ok(())
    }
}

impl Plan {
    /// Rows that the model runs in a batch in front of the sequences of each task.
    pub fn leading_rows(&self) -> usize {
        match self.placement {
            Placement::Stored => 0,
            Placement::AmongRows => self.before.len() + self.after.len(),
            Placement::VirtualTokens => self.before.len() + self.settings.num_virtual_tokens + self.after.len(),
        }
    }

    /// Rows of K and V that every sequence attends to beside its own.
    pub fn prefix_rows(&self) -> usize {
        if self.placement == Placement::Stored { self.settings.num_virtual_tokens } else { self.leading_rows() }
    }

    /// Steps of one start.
    pub fn steps(&self) -> usize {
        self.settings.steps(self.train.len())
    }

    /// Steps that go once through the data.
    fn epoch(&self) -> usize {
        self.train.len().div_ceil(self.settings.step_size())
    }

    /// Of the examples, in one start.
    fn order(&self, restart: usize) -> Order {
        Order::new(self.train.len(), (!self.settings.keep_order).then(|| seed(&self.settings, restart)))
    }
}

/// The job of a start, before its first step.
fn start(model: &Model, plan: &Plan, restart: usize) -> Result<Job> {
    let seed = seed(&plan.settings, restart);
    if plan.settings.init == Init::Text && plan.init_text.is_empty() {
        return Err(Error::new(Kind::InvalidArgument, "`settings.init_text` has no token"));
    }
    let encoder = init::encoder(model, &plan.settings, seed, &plan.init_text)?;
    let head = if plan.labels > 0 { Some(init::head(model, plan.labels, seed)?) } else { None };
    let mut job = Job::with_head(encoder, head, plan.placement, plan.settings.optimizer())?;
    (job.before, job.after) = (plan.before.clone(), plan.after.clone());
    Ok(job)
}

fn seed(settings: &Settings, restart: usize) -> u64 {
    settings.seed.wrapping_add(restart as u64)
}

#[cfg(test)]
mod tests;
