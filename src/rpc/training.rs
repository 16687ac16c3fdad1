//! `TrainingService`: jobs in, their progress out, and evaluation.
use super::call::Call;
use super::convert;
use super::datasets::Datasets;
use super::drain::Drain;
use super::evaluate::Evaluator;
use super::proto::{self, training_service_server::TrainingService};
use crate::adapter::AdapterId;
use crate::blocking;
use crate::engine::loader::AdapterLoader;
use crate::error::{Error, Kind, Result};
use crate::training::jobs::{JobStatus, Jobs, NewJob, News};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

/// Jobs on a page where the request does not say, and the most it may ask for.
const PAGE: (u32, u32) = (100, 1000);

/// Events that wait for a client; the rest waits in the job.
const WATCHED: usize = 64;

/// Trains and measures adapters.
#[derive(Clone)]
pub struct Training {
    /// Why there is none on this server, if so.
    pub jobs: Result<Jobs>,
    /// Named data.
    pub datasets: Datasets,
    /// Whose ids are taken.
    pub loader: AdapterLoader,
    /// Runs datasets through adapters.
    pub evaluator: Evaluator,
    /// Closed while the server drains.
    pub drain: Drain,
}

#[tonic::async_trait]
impl TrainingService for Training {
    type WatchTrainingJobStream = ReceiverStream<Result<proto::WatchTrainingJobResponse, Status>>;

    async fn create_training_job(
        &self,
        request: Request<proto::CreateTrainingJobRequest>,
    ) -> Result<Response<proto::CreateTrainingJobResponse>, Status> {
        let call = Call::work("CreateTrainingJob", request.metadata(), &self.drain)?;
        let job = call.within(self.created(request.into_inner())).await;
        call.finish(job.map(|job| proto::CreateTrainingJobResponse { job: Some(convert::status_of_job(&job)) }))
    }

    async fn get_training_job(
        &self,
        request: Request<proto::GetTrainingJobRequest>,
    ) -> Result<Response<proto::GetTrainingJobResponse>, Status> {
        let call = Call::new("GetTrainingJob", request.metadata());
        let job = self.jobs().and_then(|jobs| jobs.get(&request.get_ref().job_id));
        call.finish(job.map(|job| proto::GetTrainingJobResponse { job: Some(convert::status_of_job(&job)) }))
    }

    async fn list_training_jobs(
        &self,
        request: Request<proto::ListTrainingJobsRequest>,
    ) -> Result<Response<proto::ListTrainingJobsResponse>, Status> {
        let call = Call::new("ListTrainingJobs", request.metadata());
        let result = self.page(request.get_ref());
        call.finish(result)
    }

    async fn watch_training_job(
        &self,
        request: Request<proto::WatchTrainingJobRequest>,
    ) -> Result<Response<Self::WatchTrainingJobStream>, Status> {
        let mut call = Call::new("WatchTrainingJob", request.metadata());
        let id = request.into_inner().job_id;
        let jobs = match self.jobs().and_then(|jobs| jobs.get(&id).map(|_| jobs)) {
            Ok(jobs) => jobs.clone(),
            Err(e) => return Err(call.fail(e)),
        };
        let (events, receiver) = tokio::sync::mpsc::channel(WATCHED);
        let (headers, drain) = (call.response(()), self.drain.clone());
        tokio::spawn(async move {
            let told = tokio::select! {
                told = tell(&jobs, &id, &events) => told,
                // A drain does not wait for jobs: they go on when the server is back.
                () = drain.closed() => Err(Error::unavailable("the server is draining; the job goes on when it is back")),
            };
            match told {
                Ok(()) => call.done(),
                // A client that has gone hears nothing.
                Err(e) => drop(events.send(Err(call.fail(e))).await),
            }
        });
        Ok(headers.map(|()| ReceiverStream::new(receiver)))
    }

    async fn cancel_training_job(
        &self,
        request: Request<proto::CancelTrainingJobRequest>,
    ) -> Result<Response<proto::CancelTrainingJobResponse>, Status> {
        let call = Call::work("CancelTrainingJob", request.metadata(), &self.drain)?;
        let id = request.into_inner().job_id;
        let job = match self.jobs() {
            Ok(jobs) => {
                let jobs = jobs.clone();
                blocking::run("training", move || jobs.cancel(&id)).await
            }
            Err(e) => Err(e),
        };
        call.finish(job.map(|job| proto::CancelTrainingJobResponse { job: Some(convert::status_of_job(&job)) }))
    }

    async fn upload_dataset(
        &self,
        request: Request<Streaming<proto::UploadDatasetRequest>>,
    ) -> Result<Response<proto::UploadDatasetResponse>, Status> {
        let call = Call::work("UploadDataset", request.metadata(), &self.drain)?;
        let result = call.within(self.datasets.take(request.into_inner())).await;
        call.finish(result)
    }

    async fn evaluate(
        &self,
        request: Request<proto::EvaluateRequest>,
    ) -> Result<Response<proto::EvaluateResponse>, Status> {
        let call = Call::work("Evaluate", request.metadata(), &self.drain)?;
        let result = call.within(async {
            let mut request = request.into_inner();
            let data = self.datasets.read("data", request.data.take()).await?;
            self.evaluator.evaluate(&call, request, data).await
        });
        let result = result.await;
        call.finish(result)
    }
}

/// Sends what has happened and what happens, until the job has ended or the client has.
async fn tell(
    jobs: &Jobs,
    id: &str,
    events: &tokio::sync::mpsc::Sender<Result<proto::WatchTrainingJobResponse, Status>>,
) -> Result<()> {
    use proto::watch_training_job_response::Event;
    let gone = || Error::new(Kind::Cancelled, "the client went away");
    let (mut from, mut state) = (0, None);
    loop {
        let (of, name) = (jobs.clone(), id.to_owned());
        let News { reports, job, more, mut changed } = blocking::run("training", move || of.news(&name, from)).await?;
        from += reports.len();
        let mut news: Vec<Event> = reports.iter().map(convert::report).collect();
        if state != Some(job.state) && !(more && job.state.ended()) {
            state = Some(job.state);
            let job = Event::Job(convert::status_of_job(&job));
            // What it did comes before its end, and after its start.
            if state.is_some_and(|s| s.ended()) { news.push(job) } else { news.insert(0, job) }
        }
        for event in news {
            let message = proto::WatchTrainingJobResponse { event: Some(event) };
            events.send(Ok(message)).await.map_err(|_| gone())?;
        }
        if more {
            continue;
        }
        if job.state.ended() {
            return Ok(());
        }
        tokio::select! {
            changed = changed.changed() => changed.map_err(|_| Error::not_found(format!("job `{id}` is forgotten")))?,
            () = events.closed() => return Err(gone()),
        }
    }
}

impl Training {
    fn jobs(&self) -> Result<&Jobs> {
        self.jobs.as_ref().map_err(Clone::clone)
    }

    async fn created(&self, message: proto::CreateTrainingJobRequest) -> Result<JobStatus> {
        let jobs = self.jobs()?.clone();
        let adapter_id = AdapterId::parse(&message.adapter_id)?;
        if !message.replace && self.loader.holds(&adapter_id) {
            let text = format!("adapter `{adapter_id}` exists; set `replace` to replace it");
            return Err(Error::new(Kind::AlreadyExists, text));
        }
        if message.pinned && !message.load {
            return Err(Error::invalid("pinned", true, "but `load` is not set: nothing would be pinned"));
        }
        if let Some(job) = jobs.making(&adapter_id).filter(|_| !message.replace) {
            let text = format!("job `{job}` makes adapter `{adapter_id}`; set `replace` to replace what it makes");
            return Err(Error::new(Kind::AlreadyExists, text));
        }
        let settings = convert::settings(message.settings.unwrap_or_default())?;
        let data = self.datasets.read("data", message.data).await?;
        let evaluation = match message.evaluation_data {
            None => Vec::new(),
            data => self.datasets.read("evaluation_data", data).await.map_err(|e| e.context("`evaluation_data`"))?,
        };
        let (card, load, pinned) = (message.task_card, message.load, message.pinned);
        let new = NewJob { adapter_id, settings, card, load, pinned, data, evaluation };
        blocking::run("training", move || jobs.create(new)).await
    }

    /// The token of a page is the last job of the page before.
    fn page(&self, message: &proto::ListTrainingJobsRequest) -> Result<proto::ListTrainingJobsResponse> {
        let (usual, most) = PAGE;
        let size = match message.page_size {
            0 => usual,
            n if n <= most => n,
            n => return Err(Error::invalid("page_size", n, format!("must be from 0 to {most}"))),
        };
        let mut rest = self.jobs()?.list();
        rest.retain(|job| *job.id > *message.page_token);
        let more = rest.len() > size as usize;
        rest.truncate(size as usize);
        let next = rest.last().filter(|_| more).map(|job| job.id.to_string());
        Ok(proto::ListTrainingJobsResponse {
            jobs: rest.iter().map(convert::status_of_job).collect(),
            next_page_token: next.unwrap_or_default(),
        })
    }
}
