//! Training by RPC: jobs from their creation to their adapter in service, and what happens in between.
mod commands;
mod killed;
mod methods;
mod refused;
mod settings;

use crate::served::{Served, prompt, upload};
use prefixd::config::{Config, TrainingConfig};
use prefixd::rpc::proto::training_service_client::TrainingServiceClient;
use prefixd::rpc::proto::watch_training_job_response::Event;
use prefixd::rpc::proto::{self, TrainingJobState, dataset::Source};
use std::path::Path;
use tonic::Code;
use tonic::transport::Channel;

type Client = TrainingServiceClient<Channel>;

const CARD: &str = "template = \"{{ input }}\\n=>\"\nadd_special_tokens = false\nlabels = [\"positive\", \"negative\"]\n\
                    verbalizers = [\" positive\", \" negative\"]\n[stopping]\nstop_sequences = [\"\\n\"]\nmax_new_tokens = 8\n";

async fn server(dir: Option<&Path>, training: TrainingConfig) -> Served {
    let adapters = dir.map(Path::to_owned);
    Served::with(Config { adapters, training, drain_seconds: 20, ..Config::default() }).await
}

async fn client(served: &Served) -> Client {
    TrainingServiceClient::new(served.channel().await)
}

/// Reviews, made here.
fn examples(count: usize) -> Vec<proto::TrainingExample> {
    let words = [("lovely", "positive"), ("awful", "negative"), ("charming", "positive"), ("rude", "negative")];
    let places = ["Zazan", "Kelto", "Braltir", "Oman", "Pirrel"];
    let one = |i: usize| {
        let (word, label) = words[i % words.len()];
        let input = format!("the soup at {} was {word}", places[i / 3 % places.len()]);
        proto::TrainingExample { input, targets: vec![label.into()], ..Default::default() }
    };
    (0..count).map(one).collect()
}

fn inline(examples: Vec<proto::TrainingExample>) -> Option<proto::Dataset> {
    Some(proto::Dataset { source: Some(Source::Inline(proto::ExampleList { examples })) })
}

fn job(adapter_id: &str, steps: u32) -> proto::CreateTrainingJobRequest {
    let settings = proto::TrainingSettings {
        num_virtual_tokens: Some(5),
        max_steps: Some(steps),
        batch_size: Some(4),
        target_template: Some("{{ target }}\n".into()),
        ..Default::default()
    };
    proto::CreateTrainingJobRequest {
        adapter_id: adapter_id.into(),
        settings: Some(settings),
        data: inline(examples(24)),
        task_card: CARD.into(),
        load: true,
        ..Default::default()
    }
}

async fn create(client: &mut Client, request: proto::CreateTrainingJobRequest) -> Result<String, tonic::Status> {
    Ok(client.create_training_job(request).await?.into_inner().job.unwrap().job_id)
}

/// Follows a job to its end: its steps, its evaluations, and how it ended.
async fn follow(
    client: &mut Client,
    job_id: &str,
) -> (Vec<proto::TrainingStep>, Vec<proto::TrainingEvaluation>, proto::TrainingJob) {
    let watch = proto::WatchTrainingJobRequest { job_id: job_id.into() };
    let mut events = client.watch_training_job(watch).await.unwrap().into_inner();
    let (mut steps, mut evaluations, mut last) = (Vec::new(), Vec::new(), None);
    while let Some(message) = events.message().await.unwrap() {
        match message.event.unwrap() {
            Event::Step(step) => steps.push(step),
            Event::Evaluation(e) => evaluations.push(e),
            Event::Divergence(d) => panic!("{d:?}"),
            Event::Job(job) => last = Some(job),
        }
    }
    (steps, evaluations, last.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_is_trained_and_serves() {
    let dir = tempfile::tempdir().unwrap();
    let served = server(Some(dir.path()), TrainingConfig::default()).await;
    let mut client = client(&served).await;
    let mut request = job("mood", 12);
    request.evaluation_data = inline(examples(9));
    let settings = request.settings.as_mut().unwrap();
    (settings.evaluation_interval, settings.warmup_steps) = (Some(5), Some(2));
    settings.init_text = "is this review positive or negative ?".into();
    let id = create(&mut client, request).await.unwrap();
    let (steps, evaluations, job) = follow(&mut client, &id).await;
    assert_eq!(job.state(), TrainingJobState::Succeeded, "{}", job.error);
    assert_eq!(steps.iter().map(|s| s.step).collect::<Vec<_>>(), (1..=12).collect::<Vec<_>>());
    assert_eq!(evaluations.iter().map(|e| e.step).collect::<Vec<_>>(), [5, 10, 12]);
    assert!(steps[0].learning_rate == 0.0 && steps[2].learning_rate == 1e-2, "{:?}", &steps[..3]);
    assert!(steps[11].loss < steps[0].loss && steps.iter().all(|s| s.gradient_norm > 0.0 && s.tokens_per_second > 0.0));
    assert_eq!((job.train_examples, job.evaluation_examples, job.total_steps, job.step), (24, 9, 12, 12));
    assert!(job.generation > 0 && job.ended_at.is_some());
    // A second watcher, too late for any of it, sees all of it.
    assert_eq!(follow(&mut client, &id).await.0, steps);
    for file in ["adapter_config.json", "adapter_model.safetensors", "task.toml"] {
        assert!(dir.path().join("mood").join(file).is_file(), "{file}");
    }
    let answer =
        served.inference().await.generate(prompt("mood", "the soup at Kelto was rude")).await.unwrap().into_inner();
    assert_eq!(answer.adapter.unwrap().generation, job.generation);
    let evaluate =
        proto::EvaluateRequest { adapter_id: "mood".into(), data: inline(examples(20)), ..Default::default() };
    let measured = client.evaluate(evaluate).await.unwrap().into_inner();
    let (with, bare) = (measured.scores.unwrap(), measured.base_scores.unwrap());
    assert!(with.exact_match > 0.9 && with.macro_f1.unwrap() > 0.9, "{with:?}");
    assert!(bare.exact_match < with.exact_match && with.bleu.is_none(), "{bare:?}");
    assert!(with.perplexity.unwrap() < bare.perplexity.unwrap(), "{with:?} {bare:?}");
    assert_eq!((measured.examples, measured.answers.len()), (20, 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_cancelled_and_others_go_on() {
    let served = server(None, TrainingConfig { max_running: 2, ..TrainingConfig::default() }).await;
    let mut client = client(&served).await;
    let endless = create(&mut client, job("endless", 1_000_000)).await.unwrap();
    let waiting = create(&mut client, job("other", 1_000_000)).await.unwrap();
    let queued = create(&mut client, job("queued", 3)).await.unwrap();
    // A request beside them is answered as ever.
    let ask = || prompt("sentiment", "the soup at Zazan was awful");
    let answer = served.inference().await.generate(ask()).await.unwrap().into_inner();
    assert_eq!(answer.choices[0].text.trim(), "negative");
    let state = |id: &str| proto::GetTrainingJobRequest { job_id: id.into() };
    let now = client.get_training_job(state(&queued)).await.unwrap().into_inner().job.unwrap();
    assert_eq!(now.state(), TrainingJobState::Queued);
    for id in [&endless, &waiting] {
        let cancel = proto::CancelTrainingJobRequest { job_id: id.clone() };
        let job = client.cancel_training_job(cancel.clone()).await.unwrap().into_inner().job.unwrap();
        assert_eq!(job.state(), TrainingJobState::Cancelled);
        let again = client.cancel_training_job(cancel).await.unwrap_err();
        assert_eq!(again.code(), Code::FailedPrecondition);
    }
    assert_eq!(follow(&mut client, &endless).await.2.state(), TrainingJobState::Cancelled);
    assert_eq!(follow(&mut client, &queued).await.2.state(), TrainingJobState::Succeeded);
    let page = proto::ListTrainingJobsRequest { page_size: 2, ..Default::default() };
    let first = client.list_training_jobs(page.clone()).await.unwrap().into_inner();
    let rest = proto::ListTrainingJobsRequest { page_token: first.next_page_token.clone(), ..page };
    let second = client.list_training_jobs(rest).await.unwrap().into_inner();
    let ids: Vec<_> = first.jobs.iter().chain(&second.jobs).map(|j| j.job_id.clone()).collect();
    assert_eq!(ids, [endless, waiting, queued]);
    assert!(second.next_page_token.is_empty());
}

/// What a job makes does not replace an upload that knew nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_is_told_of_the_job_that_makes_its_adapter() {
    let served = server(None, TrainingConfig::default()).await;
    let (mut adapters, mut client) = (served.adapters().await, client(&served).await);
    let id = create(&mut client, job("mine", 1_000_000)).await.unwrap();
    let files: [(&str, &[u8]); 1] = [("task.toml", b"template = \"{{ input }} ->\"\n")];
    let parts = |replace| tokio_stream::iter(upload("mine", replace, &files));
    let e = adapters.upload_adapter(parts(false)).await.unwrap_err();
    assert!(e.code() == Code::AlreadyExists && e.message().contains(&id) && e.message().contains("replace"), "{e:?}");
    adapters.upload_adapter(parts(true)).await.unwrap();
    client.cancel_training_job(proto::CancelTrainingJobRequest { job_id: id }).await.unwrap();
    let unload = proto::UnloadAdapterRequest { adapter_id: "mine".into(), delete: true, ..Default::default() };
    adapters.unload_adapter(unload).await.unwrap();
    adapters.upload_adapter(parts(false)).await.unwrap();
}

/// A dataset is uploaded in pieces that break lines and characters, and named by a job and an evaluation.
#[tokio::test(flavor = "multi_thread")]
async fn datasets_are_uploaded_and_named() {
    use proto::upload_dataset_request::Part;
    let dir = tempfile::tempdir().unwrap();
    let served = server(Some(dir.path()), TrainingConfig { max_data_bytes: 40_000, ..TrainingConfig::default() }).await;
    let mut client = client(&served).await;
    let parts = |name: &str, text: &str| {
        let first = Part::DatasetId(name.into());
        let rest = text.as_bytes().chunks(7).map(|c| Part::Chunk(c.to_vec()));
        let parts: Vec<_> = std::iter::once(first).chain(rest).collect();
        tokio_stream::iter(parts.into_iter().map(|part| proto::UploadDatasetRequest { part: Some(part) }))
    };
    let line = |e: &proto::TrainingExample| {
        format!("{}\n", serde_json::json!({ "input": format!("{} ü", e.input), "targets": e.targets }))
    };
    let text: String = examples(12).iter().map(line).collect();
    let stored = client.upload_dataset(parts("reviews", &text)).await.unwrap().into_inner();
    assert_eq!((stored.dataset_id.as_str(), stored.examples), ("reviews", 12));
    let bad = client.upload_dataset(parts("reviews", "{\"input\": 1}\n")).await.unwrap_err();
    assert!(bad.code() == Code::InvalidArgument && bad.message().contains("line 1"), "{bad:?}");
    let huge = client.upload_dataset(parts("reviews", &text.repeat(100))).await.unwrap_err();
    assert_eq!(huge.code(), Code::ResourceExhausted, "{huge:?}");
    let named = || Some(proto::Dataset { source: Some(Source::DatasetId("reviews".into())) });
    let id = create(&mut client, proto::CreateTrainingJobRequest { data: named(), ..job("named", 2) }).await.unwrap();
    assert_eq!(follow(&mut client, &id).await.2.state(), TrainingJobState::Succeeded);
    let evaluate = proto::EvaluateRequest { data: named(), max_examples: 3, ..Default::default() };
    let measured = client.evaluate(evaluate).await.unwrap().into_inner();
    let scores = measured.scores.unwrap();
    assert!(measured.examples == 3 && scores.perplexity.unwrap() > 1.0 && measured.base_scores.is_none(), "{scores:?}");
}

/// Requests beside training get the bits that they get in quiet.
#[tokio::test(flavor = "multi_thread")]
async fn training_beside_requests_changes_none_of_their_bits() {
    let served = server(None, TrainingConfig::default()).await;
    let (mut inference, mut client) = (served.inference().await, client(&served).await);
    let ask = || {
        let output = proto::Output { logprobs: Some(1), ..Default::default() };
        proto::GenerateRequest { output: Some(output), ..prompt("slots", "move Paken on tuesday for 3 people at 7 am") }
    };
    let logprobs =
        |r: &proto::GenerateResponse| r.choices[0].logprobs.iter().map(|t| t.logprob.to_bits()).collect::<Vec<_>>();
    let quiet = logprobs(&inference.generate(ask()).await.unwrap().into_inner());
    let id = create(&mut client, job("beside", 1_000_000)).await.unwrap();
    for _ in 0..10 {
        assert_eq!(logprobs(&inference.generate(ask()).await.unwrap().into_inner()), quiet);
    }
    let get = proto::GetTrainingJobRequest { job_id: id };
    let job = client.get_training_job(get).await.unwrap().into_inner().job.unwrap();
    assert!(job.state() == TrainingJobState::Running && job.step > 0, "training stood still: {job:?}");
}
