//! Trains on the thread that serves: a slice of a batch whenever serving lets it.
//!
//! Jobs whose next batches fit together share one. What a batch throws (a fault of the device, a panic of ours) ends the
//! job that caused it and no other: the batch is tried again, one job at a time.
use super::run::{Plan, Progress, Report, Run};
use super::step::Step;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::background::Background;
use crate::model::packed::Activations;
use crate::ops::memory;
use crate::training::settings::Recompute;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

/// Names a job.
pub type JobId = Arc<str>;

/// To the trainer.
pub enum Order {
    /// Begin, or go on from a checkpoint.
    Start(JobId, Arc<Plan>, Option<(Progress, Vec<u8>)>),
    /// Stop without a result.
    Cancel(JobId),
}

/// From the trainer.
pub enum Event {
    /// The first slice is about to run.
    Started(JobId),
    /// A step or an evaluation is done, or a start is given up.
    Reported(JobId, Report),
    /// All that is needed to go on later.
    Checkpoint(JobId, Progress, Vec<u8>, Unwritten),
    /// The last step is done.
    Finished(JobId, Box<Run>),
    /// It will not end.
    Failed(JobId, Error),
    /// Not the trainer's: there may be a job to start.
    Look,
    /// The trainer is gone.
    Stopped {
        /// Not with a thread that panicked, and not while jobs whose shared batch failed wait to be told apart.
        orderly: bool,
    },
}

/// Lives as long as a checkpoint that is not on disk: a job never has two of them in memory.
pub type Unwritten = Arc<()>;

/// What bounds a trainer.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Rows of a batch that several jobs share, virtual tokens counted; a single job's batch may be larger.
    pub batch_rows: usize,
    /// Bytes of activations that are kept from the way forward.
    pub activation_bytes: usize,
    /// Between two checkpoints of a job.
    pub checkpoint_every: Duration,
}

/// The jobs under way.
pub struct Trainer {
    orders: Receiver<Order>,
    events: Sender<Event>,
    bounds: Bounds,
    runs: BTreeMap<JobId, Under>,
    batch: Option<Batch>,
    /// Jobs of a batch that failed: each by itself next.
    suspects: Vec<JobId>,
    /// Who was in the last batch comes after who was not.
    last: Vec<JobId>,
    /// The memory of a step is kept for the next one.
    holding: bool,
}

struct Under {
    run: Run,
    /// When and where it was written down last, or began.
    saved: Instant,
    at: Progress,
    /// How long after that the next checkpoint is due, if it has got further.
    due: Duration,
    /// Held by the checkpoint that is being written.
    unwritten: Unwritten,
}

/// The first checkpoint of a process is due after that time: others may wait for a sign that the job does no harm.
const FIRST_CHECKPOINT: Duration = Duration::from_secs(1);

struct Batch {
    step: Step,
    jobs: Vec<JobId>,
    spent: Duration,
}

impl Trainer {
    /// Takes orders, sends events. Whoever orders must wake the thread that runs it.
    pub fn new(orders: Receiver<Order>, events: Sender<Event>, bounds: Bounds) -> Self {
        let (runs, batch, suspects, last, holding) = Default::default();
        Trainer { orders, events, bounds, runs, batch, suspects, last, holding }
    }

    fn tell(&self, event: Event) {
        // The receiver outlives the server's work; at its end nobody listens any more.
        let _ = self.events.send(event);
    }

    fn obey(&mut self, model: &Model) {
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Start(id, plan, checkpoint) => {
                    let at = checkpoint.as_ref().map(|(progress, bytes)| (progress.clone(), bytes.as_slice()));
                    match guarded(|| Run::new(model, plan, at)) {
                        Ok(run) => {
                            self.tell(Event::Started(id.clone()));
                            // Ended before the process did, but not published.
                            if run.progress().done {
                                self.tell(Event::Finished(id, Box::new(run)));
                            } else {
                                let due = self.bounds.checkpoint_every.min(FIRST_CHECKPOINT);
                                let at = run.progress().clone();
                                let (saved, unwritten) = (Instant::now(), Unwritten::default());
                                self.runs.insert(id, Under { run, saved, at, due, unwritten });
                            }
                        }
                        Err(e) => self.tell(Event::Failed(id, e)),
                    }
                }
                Order::Cancel(id) => drop(self.runs.remove(&id)),
            }
        }
    }

    /// The next batch: jobs in turn, as many as fit.
    fn pick(&mut self, model: &Model) -> Result<Option<Batch>> {
        self.suspects.retain(|id| self.runs.contains_key(id));
        let mut order: Vec<&JobId> = self.runs.keys().filter(|id| !self.last.contains(id)).collect();
        order.extend(self.runs.keys().filter(|id| self.last.contains(id)));
        if let Some(suspect) = self.suspects.pop() {
            order.retain(|id| **id == suspect);
        }
        let (mut jobs, mut work, mut rows) = (Vec::new(), Vec::new(), 0);
        let mut recompute = false;
        for id in order {
            let Some(next) = self.runs[id].run.work() else { continue };
            let plan = self.runs[id].run.plan();
            let own =
                next.examples.iter().map(|e| e.rows.len()).sum::<usize>() + next.tasks().len() * plan.leading_rows();
            if !jobs.is_empty() && rows + own > self.bounds.batch_rows {
                continue;
            }
            recompute |= plan.settings.recompute == Recompute::Always;
            rows += own;
            jobs.push(id.clone());
            work.push(next);
        }
        if work.is_empty() {
            if std::mem::take(&mut self.holding) {
                memory::settle();
            }
            return Ok(None);
        }
        if !std::mem::replace(&mut self.holding, true) {
            memory::hold();
        }
        // Layers. A job that wants all of them kept was let in because they fit, where it runs by itself.
        let fit = self.bounds.activation_bytes / (rows * model.activation_bytes_per_row()).max(1);
        let keep = if recompute { 0 } else { fit };
        self.last.clone_from(&jobs);
        let step = guarded(|| Step::new(model, &work, Activations::Keep(keep)));
        step.map(|step| Some(Batch { step, jobs, spent: Duration::ZERO }))
    }

    /// One slice; an error is that of the batch at hand.
    fn work(&mut self, model: &Model) -> Result<bool> {
        let Some(batch) = &mut self.batch else {
            self.batch = self.pick(model)?;
            return Ok(self.batch.is_some());
        };
        let began = Instant::now();
        // A GPU has done it when its time is taken.
        let more = guarded(|| batch.step.advance(model).and_then(|more| model.synchronize().map(|()| more)))?;
        batch.spent += began.elapsed();
        if more {
            return Ok(true);
        }
        let Some(batch) = self.batch.take() else { return Ok(true) };
        let Batch { step, jobs, spent } = batch;
        let outcomes = guarded(|| step.finish())?;
        let rows: usize = outcomes.iter().map(|o| o.rows).sum();
        for (id, outcome) in jobs.into_iter().zip(outcomes) {
            // Cancelled meanwhile.
            let Some(under) = self.runs.get_mut(&id) else { continue };
            let share = spent.mul_f64(outcome.rows as f64 / rows.max(1) as f64);
            match guarded(|| under.run.take(model, outcome, share)) {
                Ok(report) => self.after(id, report),
                Err(e) => self.fail(id, e),
            }
        }
        Ok(true)
    }

    fn after(&mut self, id: JobId, report: Option<Report>) {
        report.into_iter().for_each(|report| self.tell(Event::Reported(id.clone(), report)));
        let Some(under) = self.runs.get_mut(&id) else { return };
        if under.run.progress().done {
            if let Some(under) = self.runs.remove(&id) {
                self.tell(Event::Finished(id, Box::new(under.run)));
            }
            return;
        }
        let progress = under.run.progress().clone();
        let written = Arc::strong_count(&under.unwritten) == 1;
        if under.saved.elapsed() >= under.due && progress != under.at && written {
            (under.saved, under.due) = (Instant::now(), self.bounds.checkpoint_every);
            under.at = progress.clone();
            match guarded(|| under.run.save()) {
                Ok(bytes) => {
                    let unwritten = under.unwritten.clone();
                    self.tell(Event::Checkpoint(id, progress, bytes, unwritten));
                }
                Err(e) => self.fail(id, e),
            }
        }
    }

    fn fail(&mut self, id: JobId, error: Error) {
        self.runs.remove(&id);
        self.tell(Event::Failed(id, error));
    }
}

impl Background for Trainer {
    fn slice(&mut self, model: &Model) -> bool {
        self.obey(model);
        match self.work(model) {
            Ok(more) => more,
            Err(error) => {
                self.batch = None;
                let mut jobs = std::mem::take(&mut self.last);
                match jobs.len() {
                    1 => jobs.into_iter().for_each(|id| self.fail(id, error.clone())),
                    _ => {
                        tracing::warn!(%error, jobs = jobs.len(), "a shared training batch failed; one job at a time");
                        self.suspects.append(&mut jobs);
                    }
                }
                true
            }
        }
    }
}

impl Drop for Trainer {
    /// The server stops: what has been trained since the last checkpoint is not lost.
    fn drop(&mut self) {
        for (id, under) in std::mem::take(&mut self.runs) {
            match guarded(|| under.run.save()) {
                Ok(bytes) => self.tell(Event::Checkpoint(id, under.run.progress().clone(), bytes, under.unwritten)),
                Err(e) => tracing::warn!(job = &*id, "no last checkpoint: {e}"),
            }
        }
        // After a fault of a shared batch nobody knows yet which job it was.
        self.tell(Event::Stopped { orderly: !std::thread::panicking() && self.suspects.is_empty() });
    }
}

/// A panic here is a bug of ours; it must not take the thread that serves.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(Error::internal("training panicked")))
}
