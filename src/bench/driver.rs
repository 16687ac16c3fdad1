//! Sends the requests and times what comes back: an open loop by rate, or a closed one by concurrency.
//!
//! Each request is a task with a stream of its own over one of a few channels; one loop starts them and takes in what
//! they bring. Nothing a request does holds up the next.
use super::record::{INCOMPLETE, Outcome, Record};
use super::schedule::Schedule;
use super::stop::Stop;
use super::workload::{Phase, Planned, Workload};
use crate::error::{Error, Result};
use crate::rpc::convert::status_name;
use crate::rpc::proto::GenerateStreamResponse;
use crate::rpc::proto::inference_service_client::InferenceServiceClient;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::{JoinError, JoinSet};
use tokio_stream::{Stream, StreamExt};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

/// When requests are sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Load {
    /// So many a second, whatever the server does.
    Rate {
        /// Requests a second.
        rate: f64,
        /// Coefficient of variation of the gaps: 1 is Poisson.
        cv: f64,
    },
    /// So many at once: one ends, the next is sent.
    Concurrency(usize),
}

/// When sending ends. What is under way then is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// After so many requests.
    Requests(u64),
    /// After that time by the clock, also where requests that were due by then are not sent yet.
    Elapsed(Duration),
}

/// Requests at once while warming up for an open loop.
const WARM_UP: usize = 16;

/// The server ends a request at its deadline; one that does not is given up so much later.
const GRACE: Duration = Duration::from_secs(2);

impl Load {
    /// Coefficient of variation of the gaps; that of Poisson where there are none.
    pub fn cv(self) -> f64 {
        match self {
            Load::Rate { cv, .. } => cv,
            Load::Concurrency(_) => 1.0,
        }
    }

    pub(super) fn warm_up(self) -> usize {
        match self {
            Load::Rate { .. } => WARM_UP,
            Load::Concurrency(n) => n,
        }
    }

    /// For people.
    pub fn describe(self) -> String {
        match self {
            Load::Rate { rate, cv } => format!("{rate:.4} requests/s, cv {cv}"),
            Load::Concurrency(n) => format!("{n} requests at once"),
        }
    }
}

/// Sends a workload.
pub(super) struct Driver<'a> {
    pub channels: &'a [Channel],
    pub workload: Arc<Workload>,
    pub timeout: Duration,
    pub stop: &'a Stop,
}

/// What a run brought.
pub(super) struct Ran {
    /// All requests that were sent, in the order of their ends.
    pub records: Vec<Record>,
    /// Requests that were due, but that could not be sent in time.
    pub unsent: usize,
    /// What the records' times count from.
    pub epoch: Instant,
}

impl Driver<'_> {
    /// Runs to the end, or until stopped; `watch` sees each record as it comes, and how many there are.
    pub async fn run(
        &self,
        load: Load,
        until: Until,
        phase: Phase,
        seed: u64,
        watch: &mut dyn FnMut(u64, &Record, Duration),
    ) -> Result<Ran> {
        let most = match load {
            Load::Rate { .. } => usize::MAX,
            Load::Concurrency(n) => n.max(1),
        };
        let mut schedule = Schedule::new(load, until, seed)?;
        let epoch = Instant::now();
        let (mut under_way, mut records) = (JoinSet::new(), Vec::new());
        let mut take_in = |ended: std::result::Result<Record, JoinError>| -> Result<()> {
            let record = ended.map_err(|e| Error::internal(format!("a request's task: {e}")))?;
            watch(records.len() as u64 + 1, &record, epoch.elapsed());
            records.push(record);
            Ok(())
        };
        while !self.stop.is_stopped() && !schedule.is_over(epoch.elapsed()) {
            let due = schedule.due();
            let ripe = async {
                if let Some(due) = due.filter(|due| *due > epoch.elapsed()) {
                    tokio::time::sleep_until((epoch + due).into()).await;
                }
            };
            tokio::select! {
                // Requests are sent before answers are looked at: the load is what was asked for.
                biased;
                () = ripe, if under_way.len() < most => {
                    let index = schedule.advance();
                    let planned = self.workload.request(phase, index);
                    let channel = self.channels[index as usize % self.channels.len()].clone();
                    let sending = Sending {
                        client: InferenceServiceClient::new(channel),
                        epoch,
                        due,
                        timeout: self.timeout,
                        stop: self.stop.clone(),
                    };
                    under_way.spawn(sending.send(planned));
                    // A generator that is behind never waits, and comes by here alone. Two for each that is sent:
                    // what has ended cannot pile up, nor hold up the next sending.
                    for ended in (0..2).map_while(|_| under_way.try_join_next()) {
                        take_in(ended)?;
                    }
                    // Nor does it keep others from this thread.
                    tokio::task::coop::consume_budget().await;
                }
                Some(ended) = under_way.join_next() => take_in(ended)?,
                () = self.stop.stopped() => {}
            }
        }
        let sent_until = epoch.elapsed();
        while let Some(ended) = under_way.join_next().await {
            take_in(ended)?;
        }
        Ok(Ran { records, unsent: schedule.unsent(sent_until), epoch })
    }
}

/// One request's means.
struct Sending {
    client: InferenceServiceClient<Channel>,
    epoch: Instant,
    due: Option<Duration>,
    timeout: Duration,
    stop: Stop,
}

impl Sending {
    async fn send(self, planned: Planned) -> Record {
        let Sending { mut client, epoch, due, timeout, stop } = self;
        let Planned { tenant, message, wanted } = planned;
        let mut request = Request::new(message);
        request.set_timeout(timeout);
        let sent = epoch.elapsed();
        let mut record = Record {
            tenant,
            due: due.unwrap_or(sent),
            sent,
            ended: sent,
            ttft: None,
            gaps: Vec::with_capacity(wanted.unwrap_or(0)),
            queued: None,
            prompt_tokens: 0,
            cached_tokens: 0,
            output_tokens: 0,
            wanted,
            outcome: Outcome::Interrupted,
        };
        let failed = |code: Code| Outcome::Failed(status_name(code));
        let answer = async {
            match client.generate_stream(request).await {
                Ok(answer) => receive(answer.into_inner(), epoch, &mut record).await,
                Err(status) => failed(status.code()),
            }
        };
        let outcome = tokio::select! {
            answered = tokio::time::timeout(timeout + GRACE, answer) => {
                answered.unwrap_or_else(|_| failed(Code::DeadlineExceeded))
            }
            // Dropping the stream cancels it on the server.
            () = stop.stopped() => Outcome::Interrupted,
        };
        if outcome != Outcome::Done {
            record.ended = epoch.elapsed();
        }
        record.outcome = outcome;
        record
    }
}

/// Reads a stream to its end. The end of a whole answer is its last message, not the end of the HTTP/2 stream.
async fn receive(
    stream: impl Stream<Item = std::result::Result<GenerateStreamResponse, Status>>,
    epoch: Instant,
    record: &mut Record,
) -> Outcome {
    let mut stream = pin!(stream);
    let (mut last, mut outcome) = (record.sent, Outcome::Failed(INCOMPLETE));
    while let Some(message) = stream.next().await {
        let message = match message {
            Ok(message) => message,
            Err(status) => return Outcome::Failed(status_name(status.code())),
        };
        let now = epoch.elapsed();
        let tokens = message.choice.as_ref().map_or(0, |choice| choice.token_ids.len());
        for _ in 0..tokens {
            match record.ttft {
                None => record.ttft = Some(now.saturating_sub(record.due)),
                Some(_) => record.gaps.push(now - last),
            }
            last = now;
            record.output_tokens += 1;
        }
        if let Some(usage) = &message.usage {
            record.prompt_tokens = usage.prompt_tokens as usize;
            record.cached_tokens = usage.cached_tokens as usize;
            outcome = Outcome::Done;
        }
        if let Some(timings) = &message.timings {
            record.queued = Duration::try_from_secs_f64(timings.queue_ms * 1e-3).ok();
        }
        record.ended = now;
    }
    outcome
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::record::tests::record;
    use super::super::stop::Stopper;
    use super::*;
    use crate::bench::{Popularity, Synthetic};
    use crate::rpc::proto::{Choice, GetServerInfoResponse, Usage};
    use tonic::transport::Endpoint;

    async fn received(messages: Vec<std::result::Result<GenerateStreamResponse, Status>>) -> (Outcome, Record) {
        let sent = Duration::from_millis(30);
        let blank = Record { due: Duration::from_millis(20), sent, ended: sent, ttft: None, ..record(0, 0, 0, &[]) };
        let mut record = Record { output_tokens: 0, ..blank };
        // So the stream begins 50 ms after the run, at the earliest.
        let epoch = Instant::now() - Duration::from_millis(50);
        let outcome = receive(tokio_stream::iter(messages), epoch, &mut record).await;
        (outcome, record)
    }

    fn token(id: u32) -> GenerateStreamResponse {
        let choice = Some(Choice { token_ids: vec![id], ..Choice::default() });
        GenerateStreamResponse { choice, ..GenerateStreamResponse::default() }
    }

    fn last() -> GenerateStreamResponse {
        let usage = Some(Usage { prompt_tokens: 9, cached_tokens: 4, ..Usage::default() });
        GenerateStreamResponse { usage, ..token(2) }
    }

    #[tokio::test]
    async fn an_answer_is_whole_with_its_last_message_alone() {
        let (outcome, whole) = received(vec![Ok(token(1)), Ok(last())]).await;
        assert_eq!((outcome, whole.output_tokens, whole.prompt_tokens, whole.cached_tokens), (Outcome::Done, 2, 9, 4));
        // From when it was due at 20 ms, not from the sending at 30 ms.
        assert!(whole.ttft.unwrap() >= Duration::from_millis(30) && whole.gaps.len() == 1, "{whole:?}");
        assert_eq!(received(vec![]).await.0, Outcome::Failed("INCOMPLETE_ANSWER"));
        assert_eq!(received(vec![Ok(token(1))]).await.0, Outcome::Failed("INCOMPLETE_ANSWER"));
        let refused = received(vec![Ok(last()), Err(Status::aborted("gone"))]).await;
        assert_eq!(refused.0, Outcome::Failed("ABORTED"));
    }

    /// What a generator that cannot keep up with its rate, however fast it is, makes of a server that is not there.
    async fn hopeless(until: Until, watch: &mut dyn FnMut(u64), stop: &Stop) -> Ran {
        let lengths = Synthetic { prompt_len: "1".parse().unwrap(), output_len: "1".parse().unwrap() };
        let facts = GetServerInfoResponse::default();
        let workload = Workload::synthetic(lengths, Vec::new(), Popularity::Uniform, 0, &facts).unwrap();
        let channels = [Endpoint::from_static("http://127.0.0.1:1").connect_lazy()];
        let timeout = Duration::from_secs(60);
        let driver = Driver { channels: &channels, workload: Arc::new(workload), timeout, stop };
        let load = Load::Rate { rate: 1e8, cv: 0.0 };
        driver.run(load, until, Phase::Measured, 0, &mut |done, _, _| watch(done)).await.unwrap()
    }

    #[tokio::test]
    async fn a_generator_that_is_behind_takes_in_what_ends_and_hears_a_stop() {
        let (stopper, stop) = Stopper::new();
        let ran = hopeless(Until::Requests(1 << 24), &mut |_| stopper.stop(), &stop).await;
        assert!((1..1 << 23).contains(&ran.records.len()), "{} were sent before the first was seen", ran.records.len());
    }

    #[tokio::test]
    async fn time_ends_a_run_that_is_behind_and_what_was_not_sent_is_counted() {
        let (_stopper, stop) = Stopper::new();
        let mut seen = 0;
        // A request every 10 ns.
        let ran = hopeless(Until::Elapsed(Duration::from_millis(20)), &mut |done| seen = done, &stop).await;
        assert_eq!((ran.records.len() + ran.unsent, seen as usize), (2_000_000, ran.records.len()));
        assert!(ran.unsent > 0 && !ran.records.is_empty());
    }
}
