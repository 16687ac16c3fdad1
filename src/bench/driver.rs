//! Sends the requests and times what comes back: an open loop by rate, or a closed one by concurrency.
//!
//! Each request is a task with a stream of its own over one of a few channels; one loop starts them and takes in what
//! they bring. Nothing a request does holds up the next.
use super::arrivals::Arrivals;
use super::record::{Outcome, Record};
use super::stop::Stop;
use super::workload::{Phase, Planned, Workload};
use crate::error::{Error, Result};
use crate::rpc::proto::inference_service_client::InferenceServiceClient;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
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
    /// After that time.
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
        let mut arrivals = match load {
            Load::Rate { rate, cv } => Some(Arrivals::new(rate, cv, seed)?),
            Load::Concurrency(_) => None,
        };
        let most = match load {
            Load::Rate { .. } => usize::MAX,
            Load::Concurrency(n) => n.max(1),
        };
        let epoch = Instant::now();
        let (mut under_way, mut records) = (JoinSet::new(), Vec::new());
        let mut index = 0;
        let mut due = arrivals.as_mut().and_then(Iterator::next);
        loop {
            let over = self.stop.is_stopped()
                || match until {
                    Until::Requests(n) => index >= n,
                    Until::Elapsed(time) => due.unwrap_or_else(|| epoch.elapsed()) >= time,
                };
            if over && under_way.is_empty() {
                break;
            }
            let ripe = async {
                if let Some(due) = due.filter(|due| *due > epoch.elapsed()) {
                    tokio::time::sleep_until((epoch + due).into()).await;
                }
            };
            tokio::select! {
                // Requests are sent before answers are looked at: the load is what was asked for.
                biased;
                () = ripe, if !over && under_way.len() < most => {
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
                    index += 1;
                    due = arrivals.as_mut().and_then(Iterator::next);
                }
                Some(ended) = under_way.join_next() => {
                    let record: Record = ended.map_err(|e| Error::internal(format!("a request's task: {e}")))?;
                    records.push(record);
                    if let Some(record) = records.last() {
                        watch(records.len() as u64, record, epoch.elapsed());
                    }
                }
                () = self.stop.stopped(), if !over => {}
            }
        }
        Ok(Ran { records, epoch })
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
        let received = tokio::time::timeout(timeout + GRACE, receive(&mut client, request, epoch, &mut record));
        let outcome = tokio::select! {
            received = received => match received {
                Ok(Ok(())) => Outcome::Done,
                Ok(Err(status)) => Outcome::Failed(status.code()),
                Err(_) => Outcome::Failed(Code::DeadlineExceeded),
            },
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
    client: &mut InferenceServiceClient<Channel>,
    request: Request<crate::rpc::proto::GenerateRequest>,
    epoch: Instant,
    record: &mut Record,
) -> std::result::Result<(), Status> {
    let mut stream = client.generate_stream(request).await?.into_inner();
    let mut last = record.sent;
    while let Some(message) = stream.message().await? {
        let now = epoch.elapsed();
        let tokens = message.choice.as_ref().map_or(0, |choice| choice.token_ids.len());
        for _ in 0..tokens {
            match record.ttft {
                None => record.ttft = Some(now - record.sent),
                Some(_) => record.gaps.push(now - last),
            }
            last = now;
            record.output_tokens += 1;
        }
        if let Some(usage) = &message.usage {
            record.prompt_tokens = usage.prompt_tokens as usize;
            record.cached_tokens = usage.cached_tokens as usize;
        }
        if let Some(timings) = &message.timings {
            record.queued = Duration::try_from_secs_f64(timings.queue_ms * 1e-3).ok();
        }
        record.ended = now;
    }
    Ok(())
}
