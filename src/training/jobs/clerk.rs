//! What happens to jobs after they were made: they start, report, are written down, end, and their adapters are published.
use super::{Inner, JobState, Publish, Published, Spec, Trained, micros, unknown};
use crate::error::{Error, Kind, Result};
use crate::training::dataset;
use crate::training::export::export;
use crate::training::journal::Change;
use crate::training::run::{Progress, Run};
use crate::training::trainer::{Event, JobId, Order};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, PoisonError};

/// Processes that a job may end without getting further.
const MOST_STARTS: u32 = 5;

impl Inner {
    /// The clerk's loop, until the trainer is gone.
    pub(super) fn listen(&self, events: &Receiver<Event>, publish: &Publish) {
        while let Ok(event) = events.recv() {
            match event {
                Event::Look => self.start_next(),
                Event::Started(id) => self.set_running(&id),
                Event::Reported(id, report) => {
                    if let Some(entry) = self.lock().get_mut(&id) {
                        entry.report(report);
                    }
                }
                Event::Checkpoint(id, progress, bytes, unwritten) => {
                    let waited_for = self.lock().get(&id).is_some_and(|e| e.row.starts > 0);
                    let written = self.persist(&id, JobState::Running, Some((&progress, &bytes)));
                    drop((bytes, unwritten));
                    match written {
                        Err(e) => self.give_up(&id, &e.context("checkpoint")),
                        Ok(()) if waited_for => self.start_next(),
                        Ok(()) => {}
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
                Event::Stopped { orderly } => {
                    if orderly {
                        self.forgive();
                    }
                    return;
                }
            }
        }
    }

    /// That the process ends is the fault of no job that it began.
    fn forgive(&self) {
        let begun: Vec<JobId> = {
            let jobs = self.lock();
            let begun = jobs.iter().filter(|(_, e)| e.row.state == JobState::Running && e.row.starts > 0);
            begun.map(|(id, _)| id.clone()).collect()
        };
        for id in begun {
            if let Err(e) = self.journal().forgive(&id) {
                tracing::warn!(job = &*id, "{e}");
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
        // Held from here on, so that what is written last is what was true last.
        let mut journal = self.journal();
        let (error, generation, ended_at, starts, from, reports) = {
            let mut jobs = self.lock();
            let Some(entry) = jobs.get_mut(id) else { return Ok(()) };
            if entry.row.state.ended() && !state.ended() {
                return Ok(()); // cancelled meanwhile
            }
            let began = entry.row.progress.clone().unwrap_or_default();
            if checkpoint.is_some_and(|(progress, _)| *progress != began) {
                entry.row.starts = 0;
            }
            let row = &entry.row;
            // Reports count from the last checkpoint on: those after it happen again.
            let reports = if checkpoint.is_some() || state.ended() { &entry.reports[..] } else { &[] };
            (row.error.clone(), row.generation, row.ended_at, row.starts, entry.persisted, reports.to_vec())
        };
        let change = Change { state, error: &error, generation, ended_at, starts };
        journal.update(id, &change, from, &reports, checkpoint)?;
        if let Some(entry) = self.lock().get_mut(id) {
            entry.persisted += reports.len();
            entry.reports.drain(..reports.len());
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
        let publish = || -> Result<Published> {
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
            Ok(Published::Serving(generation)) => self.end(id, JobState::Succeeded, "", generation),
            Ok(Published::Stored) => self.end(id, JobState::Succeeded, "", 0),
            // What was trained is not lost: it can be loaded when there is room.
            Ok(Published::Waiting(e)) => {
                let text = format!("the adapter is in the store, but not in service: {e}");
                self.end(id, JobState::Succeeded, &text, 0);
            }
            // The next server publishes it.
            Err(e) if self.stopping.load(Relaxed) || e.kind() == Kind::Unavailable => {
                tracing::info!(job = id, "not published yet: {e}");
            }
            Err(e) => self.end(id, JobState::Failed, &e.context("publishing").to_string(), 0),
        }
    }

    /// Gives the trainer what waits, while there is room.
    fn start_next(&self) {
        while let Some((id, spec)) = self.pick() {
            let order = match self.order(&id, &spec) {
                Ok(order) => order,
                Err(e) => {
                    self.end(&id, JobState::Failed, &e.to_string(), 0);
                    continue;
                }
            };
            {
                // Held, so that a cancellation comes after the start, if it did not come before.
                let jobs = self.lock();
                if jobs.get(&id).is_none_or(|e| e.row.state.ended()) {
                    continue;
                }
                let sent = self.orders.lock().unwrap_or_else(PoisonError::into_inner).send(order);
                if sent.is_err() {
                    return; // the server is stopping; the job stays as it is on disk
                }
            }
            (self.wake)();
        }
    }

    /// The next job to run, if one may begin now; it counts as running.
    ///
    /// A job that a process began before, and that got no further, may be what ended that process. It begins when all
    /// that run have got further, and others begin when it has: so if it ends the process again, it alone is counted.
    fn pick(&self) -> Option<(JobId, Arc<Spec>)> {
        if self.stopping.load(Relaxed) {
            return None;
        }
        let mut jobs = self.lock();
        let running = || jobs.values().filter(|e| e.row.state == JobState::Running);
        let full = running().count() >= self.limits.running;
        let suspect_runs = running().any(|e| e.row.starts > 1);
        let unproven_runs = running().any(|e| e.row.starts > 0);
        let waiting = jobs.values_mut().filter(|e| e.row.state == JobState::Queued);
        let entry = waiting.min_by_key(|e| (e.row.starts == 0, e.row.created_at))?;
        let suspect = entry.row.starts > 0;
        if full || suspect_runs || (suspect && unproven_runs) {
            return None;
        }
        entry.row.state = JobState::Running;
        entry.row.starts += 1;
        entry.change();
        Some((entry.row.id.as_str().into(), Arc::clone(&entry.spec)))
    }

    fn order(&self, id: &str, spec: &Spec) -> Result<Order> {
        let (base, progress, starts) = {
            let jobs = self.lock();
            let entry = jobs.get(id).ok_or_else(|| unknown(id))?;
            (entry.row.base.clone(), entry.row.progress.clone(), entry.row.starts)
        };
        if starts > MOST_STARTS {
            let text = format!(
                "{MOST_STARTS} times the server's process ended while this job ran, and the job never got further; the \
                 machine's memory may be too small for it (training.activation_mib, settings.recomputation)"
            );
            return Err(Error::precondition(text));
        }
        if base != self.base.name() {
            let ours = self.base.name();
            return Err(Error::precondition(format!("the job was made for base {base}, this server has {ours}")));
        }
        let text = {
            let mut journal = self.journal();
            // A full disk does not keep a job from running: its first checkpoint will say so.
            if let Err(e) = journal.begin(id) {
                tracing::warn!(job = id, "a start is not counted: {e}");
            }
            journal.data(id)?
        };
        let data = dataset::parse(&text, usize::MAX)?;
        let (plan, _) = self.plan(spec, &data)?;
        let bytes = self.journal().checkpoint(id)?;
        Ok(Order::Start(id.into(), Arc::new(plan), progress.zip(bytes)))
    }
}
