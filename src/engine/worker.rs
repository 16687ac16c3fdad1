//! The engine thread: owns the model, the pool and every sequence.
use super::capacity;
use super::guest::Hosting;
use super::readout;
use super::readout::on_device::{Chosen, Receivers};
use super::request::{Event, FinishReason, Request};
use super::runner::Runner;
use super::sampler::Sampled;
use super::scheduler::{NewSequence, Pooling, Scheduler, SchedulerConfig, SequenceId, Step};
use super::sequence::Sequence;
use super::shared::Shared;
use super::{Guest, Stats};
use crate::adapter::{Digest, Head, Prefix};
use crate::config::EngineConfig;
use crate::error::{Error, Result};
use crate::kv::PAGE_TOKENS;
use crate::model::Model;
use std::collections::{HashMap, HashSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::{mpsc, oneshot};

/// A message to the engine thread.
pub enum Command {
    /// Run this.
    Submit(Box<Request>, mpsc::Sender<Event>),
    /// Compile a prefix now.
    Prepare { prefix: Arc<Prefix>, pinned: bool, done: oneshot::Sender<Result<()>> },
    /// A prefix is out of service.
    Forget(Digest),
    /// Look at the stop flag, and whether the guest has work.
    Wake,
}

/// The thread's state.
pub struct Worker {
    runner: Runner,
    scheduler: Scheduler,
    sequences: HashMap<SequenceId, Sequence>,
    /// Who waits for a prefix to be compiled.
    waiting: HashMap<Digest, Vec<oneshot::Sender<Result<()>>>>,
    inbox: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
    hosting: Hosting,
    /// The step that a GPU is at, launched and not collected.
    under_way: Option<Launched>,
    /// What it counts itself; the rest of the figures is others'.
    counted: Stats,
}

/// A step whose work was given to the device, or done.
struct Launched {
    step: Step,
    /// Its tokens, where the model is on the processor.
    sampled: Vec<(SequenceId, Sampled)>,
    /// What a GPU chooses.
    chosen: Option<Chosen>,
}

impl Worker {
    /// Sizes the pool and takes it.
    ///
    /// # Errors
    /// `InvalidArgument` when the pool would not hold one page, or a GPU could not choose as many tokens in a step.
    pub fn new(
        model: Model,
        config: &EngineConfig,
        inbox: mpsc::Receiver<Command>,
        guest: Option<Guest>,
    ) -> Result<Self> {
        let info = model.info();
        let gpu = model.gpu_memory(config.max_batch_tokens)?;
        let training = guest.as_ref().map_or(0, |guest| guest.device_bytes);
        let gpu = gpu.map(|(free, total, activations)| capacity::GpuMemory { free, total, activations, training });
        let pages = capacity::pages(config, model.page_bytes(), gpu)?;
        if let Some(most) = model.most_sequences().filter(|most| config.max_sequences > *most) {
            let rule = format!("at most {most} can be sampled on a GPU");
            return Err(Error::invalid("engine.max_sequences", config.max_sequences, rule));
        }
        let (max_model_len, encoder) = (info.max_model_len, info.encoder);
        let shared = Arc::new(Shared::new(info, pages * PAGE_TOKENS));
        let scheduler = Scheduler::new(SchedulerConfig {
            pages,
            // All rows of an encoder's sequence run in one step.
            max_batch_tokens: config.max_batch_tokens.max(if encoder { max_model_len } else { 0 }),
            max_sequences: config.max_sequences,
            max_queue: config.max_queue,
            max_queue_per_tenant: config.max_queue_per_adapter,
            prefix_caching: config.prefix_caching,
        });
        Ok(Worker {
            runner: Runner::new(model, pages)?,
            scheduler,
            sequences: HashMap::new(),
            waiting: HashMap::new(),
            inbox,
            shared,
            hosting: Hosting::new(guest),
            under_way: None,
            counted: Stats::default(),
        })
    }

    /// Which row a classification head reads.
    fn pooling(&self) -> Pooling {
        if self.shared.encoder { Pooling::First } else { Pooling::Last }
    }

    /// What handles share with it.
    pub fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// Runs until it is stopped, every handle is gone, or the GPU is lost.
    pub fn run(mut self) {
        self.publish();
        if let Err(error) = self.run_steps() {
            tracing::error!(%error, "the GPU is lost: the engine ends");
        }
        let stopped = || Error::unavailable("the server is stopping");
        self.sequences.drain().for_each(|(_, s)| s.fail(stopped()));
        self.waiting.drain().flat_map(|(_, w)| w).for_each(|done| drop(done.send(Err(stopped()))));
    }

    /// Steps of serving, and slices of the guest's work between them. A GPU works at a step while the next one is planned and launched: its
    /// tokens are not known by then, and need not be. A sequence that turns out to have ended with one has run a row too many, of which
    /// nothing is kept.
    ///
    /// # Errors
    /// When the GPU is lost.
    fn run_steps(&mut self) -> Result<()> {
        while self.listen() {
            let began = Instant::now();
            self.reap();
            let step = self.scheduler.schedule();
            self.announce(&step);
            let ahead = self.looks_ahead(&step);
            if !ahead {
                self.collect_under_way()?;
            }
            let launched = if step.is_empty() { None } else { self.launch(step)? };
            let before = std::mem::replace(&mut self.under_way, launched);
            before.map_or(Ok(()), |before| self.collect(before))?;
            if !ahead {
                self.collect_under_way()?;
            }
            self.answer_waiting();
            self.counted.step_time += began.elapsed();
            self.publish();
            self.hosting.served(began.elapsed());
            self.hosting.run(self.runner.model(), self.scheduler.has_work())?;
        }
        Ok(())
    }

    /// Whether `step` is launched before the one under way is done, and not waited for. A class is read on the processor, so its step is
    /// waited for anyway. The guest's slices wait for all work, which would be on its account.
    fn looks_ahead(&self, step: &Step) -> bool {
        self.runner.model().gpu().is_some() && !self.hosting.awake() && readout::heads(step, &self.sequences).is_empty()
    }

    /// Takes in what came; blocks while there is nothing to do. False: stop.
    fn listen(&mut self) -> bool {
        if self.under_way.is_none() && !self.scheduler.has_work() && !self.hosting.awake() {
            match self.inbox.blocking_recv() {
                Some(command) => self.obey(command),
                None => return false,
            }
        }
        loop {
            match self.inbox.try_recv() {
                Ok(command) => self.obey(command),
                Err(mpsc::error::TryRecvError::Empty) => break,
                Err(mpsc::error::TryRecvError::Disconnected) => return false,
            }
        }
        !self.shared.stopped()
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(request, events) => {
                let new = NewSequence {
                    tenant: request.tenant.clone(),
                    prefix: request.prefix.clone(),
                    input: request.input.clone(),
                    soft: request.soft.clone(),
                    pooling: request.head.as_ref().map(|_| self.pooling()),
                    score_from: request.score_from,
                    max_new_tokens: request.stopping.max_new_tokens,
                };
                let sequence = Sequence::new(*request, events);
                match self.scheduler.submit(new) {
                    Ok(id) => drop(self.sequences.insert(id, sequence)),
                    Err(e) => sequence.fail(e),
                }
            }
            Command::Prepare { prefix, pinned, done } => {
                let digest = prefix.digest;
                match self.scheduler.prepare(prefix, pinned) {
                    Ok(()) => self.waiting.entry(digest).or_default().push(done),
                    // Nobody may be listening any more.
                    Err(e) => drop(done.send(Err(e))),
                }
            }
            Command::Forget(digest) => {
                self.scheduler.forget(&digest);
                self.disappoint(&digest, &Error::precondition("the adapter was unloaded while it was compiled"));
            }
            Command::Wake => self.hosting.wake(),
        }
    }

    /// Ends sequences that nobody waits for, before they cost another step.
    fn reap(&mut self) {
        let now = Instant::now();
        let ended = |s: &Sequence| match s.deadline {
            _ if s.abandoned() => Some(FinishReason::Cancelled),
            Some(deadline) if deadline <= now => Some(FinishReason::Deadline),
            _ => None,
        };
        let gone: Vec<_> = self.sequences.iter().filter_map(|(id, s)| Some((*id, ended(s)?))).collect();
        gone.into_iter().for_each(|(id, reason)| self.finish(id, reason, None));
    }

    fn announce(&mut self, step: &Step) {
        for id in &step.preempted {
            self.sequences.get_mut(id).into_iter().for_each(Sequence::preempted);
        }
        for id in &step.admitted {
            let cached = self.scheduler.get(*id).map_or(0, |e| e.cached());
            self.sequences.get_mut(id).into_iter().for_each(|s| s.admitted(cached));
        }
        let adapters: HashSet<_> =
            step.sequences.iter().filter_map(|c| self.scheduler.get(c.id)).map(|e| e.tenant().clone()).collect();
        for chunk in &step.sequences {
            let sequence = self.sequences.get_mut(&chunk.id);
            sequence.into_iter().for_each(|s| s.shared(step.sequences.len(), adapters.len()));
        }
        for digest in &step.unfit {
            self.disappoint(digest, &Error::exhausted("the KV pool has no room for this prefix", None));
        }
        for id in &step.stuck {
            self.fail(*id, Error::exhausted("the KV pool has no room for this request even alone", None));
        }
    }

    /// Runs a step, on a GPU up to the launch. `None`: it failed, and so did its sequences.
    ///
    /// # Errors
    /// When the GPU is lost.
    fn launch(&mut self, step: Step) -> Result<Option<Launched>> {
        self.counted.steps += 1;
        let eos = self.runner.model().eos_token_ids().to_vec();
        let mut sampled = Vec::new();
        let (runner, scheduler, sequences) = (&self.runner, &self.scheduler, &mut self.sequences);
        // A panic here is a bug of ours; it must cost the requests of this step only.
        let run = AssertUnwindSafe(|| {
            let heads: HashMap<SequenceId, Arc<Head>> = readout::heads(&step, sequences);
            let head = |id| heads.get(&id).map(|h| &**h);
            let pool = runner.model().threads();
            let mut prepared = runner.prepare(&step, scheduler)?;
            let receivers = match runner.model().gpu() {
                Some(_) => Some(Receivers::plan(&mut prepared, scheduler, sequences, &eos)?),
                None => None,
            };
            let (time, chosen) = runner.run(&prepared, head, |uses, logits| {
                readout::take(uses, logits, scheduler, sequences, &eos, pool, &mut sampled);
            })?;
            Ok((time, receivers.zip(chosen).map(|(receivers, chosen)| receivers.of(chosen))))
        });
        match catch_unwind(run).unwrap_or_else(|_| Err(Error::internal("the step panicked"))) {
            Ok((time, chosen)) => {
                self.counted.forward_time += time;
                self.scheduler.complete(&step);
                let whose = chosen.iter().flat_map(|chosen| chosen.whose());
                (0..).zip(whose).for_each(|(place, id)| self.scheduler.chosen(*id, place));
                Ok(Some(Launched { step, sampled, chosen }))
            }
            Err(e) => {
                // What the step before has given is good, and some end with it.
                self.collect_under_way()?;
                self.fail_step(&step, &e).map(|()| None)
            }
        }
    }

    fn collect_under_way(&mut self) -> Result<()> {
        self.under_way.take().map_or(Ok(()), |step| self.collect(step))
    }

    /// Takes in what a step came to: scores, classes, tokens, and who ends with them.
    ///
    /// # Errors
    /// When the GPU is lost.
    fn collect(&mut self, Launched { step, mut sampled, chosen }: Launched) -> Result<()> {
        if let Some(chosen) = chosen {
            let began = Instant::now();
            match chosen.wait(&mut self.sequences) {
                Ok(tokens) => sampled = tokens,
                Err(e) => return self.fail_step(&step, &e),
            }
            self.counted.forward_time += began.elapsed();
        }
        for chunk in &step.sequences {
            let end = self.sequences.get_mut(&chunk.id).and_then(Sequence::after_step);
            end.into_iter().for_each(|reason| self.finish(chunk.id, reason, None));
        }
        let eos = self.runner.model().eos_token_ids().to_vec();
        for (id, token) in sampled {
            self.counted.generated_tokens += 1;
            self.scheduler.push_token(id, token.id);
            let Some(s) = self.sequences.get_mut(&id) else { continue };
            match s.generated(token, self.runner.model().tokenizer(), &eos) {
                Ok(None) => {}
                Ok(Some((reason, stop))) => self.finish(id, reason, stop),
                Err(e) => self.fail(id, e),
            }
        }
        Ok(())
    }

    /// The model failed: the step's sequences end, and so do those that wait for its prefixes.
    ///
    /// # Errors
    /// When the GPU is lost. Out of memory is this step's alone; after a fault every call fails, and so would every request.
    fn fail_step(&mut self, step: &Step, error: &Error) -> Result<()> {
        tracing::error!(%error, sequences = step.sequences.len(), prefixes = step.prefixes.len(), "step failed");
        for chunk in &step.sequences {
            self.fail(chunk.id, error.clone());
        }
        let prefixes = step.prefixes.iter().map(|c| c.digest).chain(step.copies.iter().copied());
        for digest in prefixes.collect::<HashSet<_>>() {
            for id in self.scheduler.fail_prefix(&digest) {
                self.fail(id, error.clone());
            }
            self.disappoint(&digest, error);
        }
        self.runner.model().synchronize()
    }

    /// Tells those who wait for a prefix that it will not come.
    fn disappoint(&mut self, digest: &Digest, error: &Error) {
        let waiting = self.waiting.remove(digest).unwrap_or_default();
        waiting.into_iter().for_each(|done| drop(done.send(Err(error.clone()))));
    }

    fn answer_waiting(&mut self) {
        let ready: Vec<_> = self.waiting.keys().filter(|d| self.scheduler.is_ready(d)).copied().collect();
        for digest in ready {
            let waiting = self.waiting.remove(&digest).unwrap_or_default();
            waiting.into_iter().for_each(|done| drop(done.send(Ok(()))));
        }
    }

    fn finish(&mut self, id: SequenceId, reason: FinishReason, stop: Option<String>) {
        self.scheduler.finish(id);
        if let Some(s) = self.sequences.remove(&id) {
            s.finish(reason, stop, self.runner.model().tokenizer());
        }
    }

    fn fail(&mut self, id: SequenceId, error: Error) {
        self.scheduler.finish(id);
        self.sequences.remove(&id).into_iter().for_each(|s| s.fail(error.clone()));
    }

    fn publish(&self) {
        let (running, waiting) = self.scheduler.load();
        let (kv_pages_total, kv_pages_available) = self.scheduler.page_counts();
        let counters = self.scheduler.counters();
        let resident: HashSet<Digest> = self.scheduler.prefixes().ready().collect();
        let stats = Stats {
            running,
            waiting,
            kv_pages_total,
            kv_pages_available,
            prefixes_resident: resident.len(),
            prompt_tokens: counters.prompt_tokens,
            cached_tokens: counters.cached_tokens,
            preemptions: counters.preemptions,
            prefix_hits: counters.prefix_hits,
            prefix_misses: counters.prefix_misses,
            prefix_evictions: counters.prefix_evictions,
            ..self.counted
        };
        self.shared.publish(stats, resident);
    }
}
