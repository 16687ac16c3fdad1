//! The jobs of a server: what a client sees of them, and what survives the process.
//!
//! One thread, the `clerk`, hears the trainer, writes the journal and publishes results; the handle answers from memory, but
//! for reports that are on disk.
mod base;
mod clerk;
mod prepare;
mod status;
mod wires;

pub use base::Base;
pub use status::{JobState, JobStatus, NewJob, Spec};
pub use wires::{Publish, Published, Trained, Wires};

use super::dataset;
use super::journal::{Journal, Row};
use super::run::{Happened, Report};
use super::settings::{MOST_TASKS, TrainMethod};
use super::trainer::{Event, JobId, Order};
use crate::adapter::AdapterId;
use crate::error::{Context, Error, Kind, Result};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;

/// How many jobs, and how large.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// In training at once.
    pub running: usize,
    /// Waiting.
    pub queued: usize,
    /// Ended ones that are remembered.
    pub kept: usize,
    /// Examples of one job.
    pub examples: usize,
    /// Bytes of activations that the largest batch of a job may take.
    pub batch_bytes: usize,
    /// Bytes of activations that are kept from the way forward, of all layers.
    pub activation_bytes: usize,
    /// Bytes that a job's own weights may take, with their gradients, moments and copies.
    pub weight_bytes: usize,
}

/// The handle. Cheap to clone.
#[derive(Clone)]
pub struct Jobs {
    inner: Arc<Inner>,
}

struct Inner {
    base: Base,
    limits: Limits,
    journal: Mutex<Journal>,
    jobs: Mutex<BTreeMap<JobId, Entry>>,
    orders: Mutex<Sender<Order>>,
    clerk: Mutex<Sender<Event>>,
    /// Tells the thread that trains to look at its orders.
    wake: Box<dyn Fn() + Send + Sync>,
    /// The server stops: no job begins any more.
    stopping: AtomicBool,
    /// The clerk says so at its end.
    stopped: Mutex<Receiver<()>>,
}

struct Entry {
    row: Row,
    adapter_id: AdapterId,
    spec: Arc<Spec>,
    /// Reports that are on disk, and there alone.
    persisted: usize,
    /// Those after them.
    reports: Vec<Report>,
    last_step: Option<Report>,
    last_evaluation: Option<Report>,
    changed: watch::Sender<u64>,
}

/// What has happened in a job since its watcher last asked.
pub struct News {
    /// In order.
    pub reports: Vec<Report>,
    /// The job as it is now.
    pub job: JobStatus,
    /// There are reports already after these: ask again.
    pub more: bool,
    /// Tells of a change.
    pub changed: watch::Receiver<u64>,
}

/// Reports that are read from the disk at once.
const PAGE: usize = 1000;

impl Jobs {
    /// Reads the journal and goes on with what had not ended.
    ///
    /// # Errors
    /// `Internal` for a journal that cannot be read.
    pub fn start(base: Base, limits: Limits, journal: Journal, wires: Wires) -> Result<Self> {
        let Wires { orders, clerk, events, wake, publish } = wires;
        let mut jobs = BTreeMap::new();
        for mut row in journal.jobs()? {
            let spec: Spec = serde_json::from_str(&row.spec).or_kind(Kind::Internal, "training job")?;
            if !row.state.ended() {
                row.state = JobState::Queued;
            }
            let adapter_id = AdapterId::parse(&row.adapter_id)?;
            let mut entry = Entry::new(row, adapter_id, spec);
            let id = entry.row.id.as_str();
            entry.persisted = journal.count(id)?;
            entry.last_step = journal.last(id, "Step")?;
            // Looked for among all reports where there is none.
            if entry.spec.examples.1 > 0 {
                entry.last_evaluation = journal.last(id, "Evaluation")?;
            }
            jobs.insert(JobId::from(id), entry);
        }
        let (there, stopped) = channel();
        let inner = Arc::new(Inner {
            base,
            limits,
            journal: Mutex::new(journal),
            jobs: Mutex::new(jobs),
            orders: Mutex::new(orders),
            clerk: Mutex::new(clerk),
            wake,
            stopping: AtomicBool::new(false),
            stopped: Mutex::new(stopped),
        });
        let work = Arc::clone(&inner);
        let thread = std::thread::Builder::new().name("prefixd-jobs".into());
        let clerk = move || {
            work.listen(&events, &publish);
            drop(work);
            // Nobody may wait for it.
            let _ = there.send(());
        };
        thread.spawn(clerk).map_err(|e| Error::internal(format!("jobs: {e}")))?;
        inner.look();
        Ok(Jobs { inner })
    }

    /// Checks a job, writes it down and queues it. Blocks.
    ///
    /// # Errors
    /// `InvalidArgument` naming the field, or the lines of the data; `FailedPrecondition` for what this base cannot train;
    /// `ResourceExhausted` when too many jobs wait, when a batch would not fit into memory, or the disk is full.
    pub fn create(&self, new: NewJob) -> Result<JobStatus> {
        let inner = &self.inner;
        let waiting = inner.lock().values().filter(|e| !e.row.state.ended()).count();
        if waiting >= inner.limits.queued + inner.limits.running {
            let text = format!("{waiting} training jobs have not ended, the limit");
            return Err(Error::exhausted(text, Some(Duration::from_secs(10))));
        }
        let mut settings = new.settings.checked(inner.base.info.max_model_len)?;
        let max = inner.limits.examples;
        let mut data = dataset::check(new.data, max)?;
        let evaluation_lines = new.evaluation.len();
        if evaluation_lines > 0 {
            data.extend(dataset::check(new.evaluation, max)?);
        }
        if settings.method == TrainMethod::MultitaskPromptTuning && settings.num_tasks == 0 {
            let most = data.iter().filter_map(|r| r.task_id).max().unwrap_or(0) as usize;
            if most >= MOST_TASKS {
                return Err(Error::invalid("task_id", most, format!("must be below {MOST_TASKS}")));
            }
            settings.num_tasks = most + 1;
        }
        let card = prepare::with_labels(new.card, &settings, &data)?;
        let (load, pinned) = (new.load, new.pinned);
        let mut spec = Spec { settings, card, load, pinned, evaluation_lines, too_long: 0, examples: (0, 0), steps: 0 };
        let (plan, too_long) = inner.plan(&spec, &data)?;
        inner.check_weights(&plan)?;
        inner.check_memory(&plan)?;
        (spec.too_long, spec.examples, spec.steps) =
            (too_long, (plan.train.len(), plan.evaluation.len()), plan.steps());
        let lines: Vec<String> =
            data.iter().map(|r| serde_json::to_string(r).or_kind(Kind::Internal, "data")).collect::<Result<_>>()?;
        let row = Row {
            id: format!("job-{:012x}-{:06x}", micros(), rand::random::<u32>() >> 8),
            created_at: micros(),
            ended_at: None,
            adapter_id: new.adapter_id.to_string(),
            spec: serde_json::to_string(&spec).or_kind(Kind::Internal, "settings")?,
            base: inner.base.name(),
            state: JobState::Queued,
            error: String::new(),
            generation: 0,
            progress: None,
            starts: 0,
        };
        inner.prune()?;
        inner.journal().create(&row, &lines.join("\n"))?;
        let id = JobId::from(row.id.as_str());
        let entry = Entry::new(row, new.adapter_id, spec);
        let status = entry.status();
        inner.lock().insert(id, entry);
        inner.look();
        Ok(status)
    }

    /// Begins no job any more: the server is about to stop.
    pub fn stop(&self) {
        self.inner.stopping.store(true, Relaxed);
    }

    /// Waits until the clerk has written what the trainer said, which is gone; false if that takes longer than `most`, or has failed.
    /// Blocks.
    pub fn stopped(&self, most: Duration) -> bool {
        self.inner.stopped.lock().unwrap_or_else(PoisonError::into_inner).recv_timeout(most).is_ok()
    }

    /// One job.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn get(&self, id: &str) -> Result<JobStatus> {
        self.inner.lock().get(id).map(Entry::status).ok_or_else(|| unknown(id))
    }

    /// The job that is going to make `adapter_id`.
    pub fn making(&self, adapter_id: &AdapterId) -> Option<JobId> {
        let jobs = self.inner.lock();
        let found = jobs.iter().find(|(_, e)| e.adapter_id == *adapter_id && !e.row.state.ended());
        found.map(|(id, _)| id.clone())
    }

    /// All jobs, oldest first.
    pub fn list(&self) -> Vec<JobStatus> {
        self.inner.lock().values().map(Entry::status).collect()
    }

    /// What has happened from report number `from` on. Blocks on the disk, where all reports up to the last checkpoint lie.
    ///
    /// # Errors
    /// `NotFound`; `Internal` for the disk.
    pub fn news(&self, id: &str, from: usize) -> Result<News> {
        let (persisted, mut news, total) = {
            let jobs = self.inner.lock();
            let entry = jobs.get(id).ok_or_else(|| unknown(id))?;
            let after = from.checked_sub(entry.persisted).and_then(|at| entry.reports.get(at..));
            let (reports, changed) = (after.unwrap_or_default().to_vec(), entry.changed.subscribe());
            let total = entry.persisted + entry.reports.len();
            (entry.persisted, News { reports, job: entry.status(), more: false, changed }, total)
        };
        if from < persisted {
            news.reports = self.inner.journal().reports(id, from, PAGE.min(persisted - from))?;
            if news.reports.is_empty() {
                return Err(unknown(id)); // forgotten meanwhile
            }
            news.more = from + news.reports.len() < total;
        }
        Ok(news)
    }

    /// Ends a job without a result. Blocks on the disk.
    ///
    /// # Errors
    /// `NotFound`; `FailedPrecondition` for one that has ended, or whose adapter is being published; what the disk says, if the end is not on
    /// it: the job has stopped, and goes on when the server starts again.
    pub fn cancel(&self, id: &str) -> Result<JobStatus> {
        let before = self.get(id)?.state;
        let kept = self.inner.try_end(id, JobState::Cancelled, "", 0);
        let state = self.get(id)?.state;
        if before.ended() || state != JobState::Cancelled {
            return Err(Error::precondition(format!("job `{id}` is {}, there is nothing to cancel", state.as_str())));
        }
        // The trainer may have dropped it already.
        let _ = self.inner.orders.lock().unwrap_or_else(PoisonError::into_inner).send(Order::Cancel(id.into()));
        (self.inner.wake)();
        self.inner.look();
        kept.map_err(|e| e.context("the job has stopped, but that is not on disk"))?;
        self.get(id)
    }
}

impl Entry {
    fn new(row: Row, adapter_id: AdapterId, spec: Spec) -> Self {
        let (persisted, reports, last_step, last_evaluation) = Default::default();
        let (spec, changed) = (Arc::new(spec), watch::Sender::new(0));
        Entry { row, adapter_id, spec, persisted, reports, last_step, last_evaluation, changed }
    }

    fn report(&mut self, report: Report) {
        match report.what {
            Happened::Step { .. } => self.last_step = Some(report.clone()),
            Happened::Evaluation { .. } => self.last_evaluation = Some(report.clone()),
            Happened::Diverged { .. } => {}
        }
        self.reports.push(report);
        self.change();
    }

    fn status(&self) -> JobStatus {
        let at = |micros: i64| UNIX_EPOCH + Duration::from_micros(micros.max(0) as u64);
        JobStatus {
            id: self.row.id.as_str().into(),
            adapter_id: self.adapter_id.clone(),
            spec: Arc::clone(&self.spec),
            state: self.row.state,
            error: self.row.error.clone(),
            generation: self.row.generation,
            created_at: at(self.row.created_at),
            ended_at: self.row.ended_at.map(at),
            at: self.last_step.as_ref().map_or((0, 0), |r| (r.restart, r.step)),
            last_step: self.last_step.clone(),
            last_evaluation: self.last_evaluation.clone(),
        }
    }

    fn change(&mut self) {
        self.changed.send_modify(|n| *n += 1);
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<JobId, Entry>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the clerk see what may start.
    fn look(&self) {
        // Without a clerk the server is at its end.
        let _ = self.clerk.lock().unwrap_or_else(PoisonError::into_inner).send(Event::Look);
    }

    /// Forgets the oldest jobs that have ended.
    fn prune(&self) -> Result<()> {
        let old: Vec<String> = {
            let jobs = self.lock();
            let mut ended: Vec<_> = jobs.values().filter(|e| e.row.state.ended()).collect();
            ended.sort_by_key(|e| e.row.created_at);
            let surplus = ended.len().saturating_sub(self.limits.kept.saturating_sub(1));
            ended.into_iter().take(surplus).map(|e| e.row.id.clone()).collect()
        };
        // Held, so that nothing is written of a job that is deleted.
        let mut journal = self.journal();
        for id in old {
            journal.delete(&id)?;
            self.lock().remove(id.as_str());
        }
        Ok(())
    }
}

fn unknown(id: &str) -> Error {
    Error::not_found(format!("training job `{id}` is not known"))
}

fn micros() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_micros() as i64)
}

#[cfg(test)]
mod tests;
