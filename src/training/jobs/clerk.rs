//! What happens to jobs after they were made: they start, report, are written down, end, and their adapters are published.
use super::{Inner, JobState, Publish, Spec, Trained, micros, unknown};
use crate::error::{Error, Kind, Result};
use crate::training::dataset;
use crate::training::export::export;
use crate::training::journal::Change;
use crate::training::run::{Progress, Run};
use crate::training::trainer::{Event, Order};
use std::sync::mpsc::Receiver;
use std::sync::{Arc, PoisonError};

impl Inner {
    /// The clerk's loop, until the trainer is gone and the handles are.
    pub(super) fn listen(&self, events: &Receiver<Event>, publish: &Publish) {
        while let Ok(event) = events.recv() {
            match event {
                Event::Look => self.start_next(),
                Event::Started(id) => self.set_running(&id),
                Event::Reported(id, report) => {
                    if let Some(entry) = self.lock().get_mut(&id) {
                        entry.reports.push(report);
                        entry.change();
                    }
                }
                Event::Checkpoint(id, progress, bytes) => {
                    if let Err(e) = self.persist(&id, JobState::Running, Some((&progress, &bytes))) {
                        self.give_up(&id, &e.context("checkpoint"));
                    }
                }
                Event::Finished(id, run) => {
                    self.finish(&id, &run, publish);
                    self.start_next();
                }
                Event::Failed(id, e) => {
                    self.end(&id, JobState::Failed, &e.to_string(), 0);
                    self.start_next();
                }
                Event::Stopped => return,
            }
        }
    }

    fn set_running(&self, id: &str) {
        if let Some(entry) = self.lock().get_mut(id).filter(|e| e.row.state == JobState::Queued) {
            entry.row.state = JobState::Running;
            entry.change();
        }
    }

    /// A job that cannot be kept safe is stopped and says so.
    fn give_up(&self, id: &str, error: &Error) {
        let _ = self.orders.lock().unwrap_or_else(PoisonError::into_inner).send(Order::Cancel(id.into()));
        (self.wake)();
        self.end(id, JobState::Failed, &error.to_string(), 0);
        self.start_next();
    }

    /// Writes a job's state, its new reports and, with them, a checkpoint.
    fn persist(&self, id: &str, state: JobState, checkpoint: Option<(&Progress, &[u8])>) -> Result<()> {
        let (error, generation, ended_at, from, reports) = {
            let jobs = self.lock();
            let Some(entry) = jobs.get(id) else { return Ok(()) };
            if entry.row.state.ended() && !state.ended() {
                return Ok(()); // cancelled meanwhile
            }
            let row = &entry.row;
            // Reports count from the last checkpoint on: those after it happen again.
            let reports = if checkpoint.is_some() || state.ended() { &entry.reports[entry.persisted..] } else { &[] };
            (row.error.clone(), row.generation, row.ended_at, entry.persisted, reports.to_vec())
        };
        let change = Change { state, error: &error, generation, ended_at };
        self.journal().update(id, &change, from, &reports, checkpoint)?;
        if let Some(entry) = self.lock().get_mut(id) {
            entry.persisted = from + reports.len();
        }
        Ok(())
    }

    fn end(&self, id: &str, state: JobState, error: &str, generation: u64) {
        if let Err(e) = self.try_end(id, state, error, generation) {
            tracing::error!(job = id, "the end of the job is not on disk: {e}");
        }
    }

    /// Ends a job that has not ended. One whose adapter is being published is not cancelled any more.
    ///
    /// # Errors
    /// When the end is not on disk: the job has ended until the server starts again.
    pub(super) fn try_end(&self, id: &str, state: JobState, error: &str, generation: u64) -> Result<()> {
        {
            let mut jobs = self.lock();
            let late = |now: JobState| now.ended() || (state, now) == (JobState::Cancelled, JobState::Publishing);
            let Some(entry) = jobs.get_mut(id).filter(|e| !late(e.row.state)) else { return Ok(()) };
            entry.row.state = state;
            entry.row.error = error.to_owned();
            entry.row.generation = generation;
            entry.row.ended_at = Some(micros());
        }
        let kept = self.persist(id, state, None);
        if let Some(entry) = self.lock().get_mut(id) {
            entry.change();
        }
        match state {
            JobState::Failed => tracing::warn!(job = id, error, "training failed"),
            _ => tracing::info!(job = id, state = state.as_str(), "training ended"),
        }
        kept
    }

    fn finish(&self, id: &str, run: &Run, publish: &Publish) {
        let publish = || -> Result<u64> {
            let (spec, adapter_id) = {
                let mut jobs = self.lock();
                let entry = jobs.get_mut(id).ok_or_else(|| unknown(id))?;
                if entry.row.state.ended() {
                    return Err(Error::new(Kind::Cancelled, "cancelled"));
                }
                entry.row.state = JobState::Publishing;
                entry.change();
                (Arc::clone(&entry.spec), entry.adapter_id.clone())
            };
            // On disk first: a kill from here on publishes again, and trains nothing again.
            self.persist(id, JobState::Publishing, Some((run.progress(), &run.save()?)))?;
            let files = export(run.job(), &spec.settings, &self.base.info)?;
            let (card, load, pinned) = (spec.card.clone(), spec.load, spec.pinned);
            publish(Trained { adapter_id, files, card, load, pinned })
        };
        match publish() {
            Ok(generation) => self.end(id, JobState::Succeeded, "", generation),
            Err(e) => self.end(id, JobState::Failed, &e.context("publishing").to_string(), 0),
        }
    }

    /// Gives the trainer what waits, while there is room.
    fn start_next(&self) {
        loop {
            let (id, spec) = {
                let mut jobs = self.lock();
                let running = jobs.values().filter(|e| e.row.state == JobState::Running).count();
                let mut waiting: Vec<_> = jobs.values_mut().filter(|e| e.row.state == JobState::Queued).collect();
                waiting.sort_by_key(|e| e.row.created_at);
                match waiting.into_iter().next() {
                    Some(entry) if running < self.limits.running => {
                        entry.row.state = JobState::Running;
                        entry.change();
                        (entry.row.id.clone(), Arc::clone(&entry.spec))
                    }
                    _ => return,
                }
            };
            match self.order(&id, &spec) {
                Ok(order) => {
                    let sent = self.orders.lock().unwrap_or_else(PoisonError::into_inner).send(order);
                    if sent.is_err() {
                        return; // the server is stopping; the job stays as it is on disk
                    }
                    (self.wake)();
                }
                Err(e) => self.end(&id, JobState::Failed, &e.to_string(), 0),
            }
        }
    }

    fn order(&self, id: &str, spec: &Spec) -> Result<Order> {
        let (base, progress) = {
            let jobs = self.lock();
            let entry = jobs.get(id).ok_or_else(|| unknown(id))?;
            (entry.row.base.clone(), entry.row.progress.clone())
        };
        if base != self.base.name() {
            let ours = self.base.name();
            return Err(Error::precondition(format!("the job was made for base {base}, this server has {ours}")));
        }
        let data = dataset::parse(&self.journal().data(id)?, usize::MAX)?;
        let (plan, _) = self.plan(spec, &data)?;
        let bytes = self.journal().checkpoint(id)?;
        Ok(Order::Start(id.into(), Arc::new(plan), progress.zip(bytes)))
    }
}
