//! Training by RPC: jobs from their creation to their adapter in service, and what happens in between.
use crate::served::{Served, prompt};
use prefixd::config::{Config, TrainingConfig};
use prefixd::rpc::proto::training_service_client::TrainingServiceClient;
use prefixd::rpc::proto::watch_training_job_response::Event;
use prefixd::rpc::proto::{
    self, PromptInit, PromptReparametrisation, TrainingJobState, TrainingMethod, dataset::Source,
};
use std::path::Path;
use std::process::{Child, Command, Stdio};
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

/// The methods, each with what makes it special.
fn methods() -> Vec<(&'static str, proto::CreateTrainingJobRequest)> {
    use PromptReparametrisation::{Lstm, Projection};
    let with = |id: &'static str, method: TrainingMethod, change: &dyn Fn(&mut proto::TrainingSettings)| {
        let mut request = job(id, 5);
        let settings = request.settings.as_mut().unwrap();
        settings.method = method.into();
        change(settings);
        (id, request)
    };
    let mut tasks = with("tasks", TrainingMethod::MultitaskPromptTuning, &|s| s.num_ranks = Some(2));
    let mut data = examples(24);
    data.iter_mut().enumerate().for_each(|(i, e)| e.task_id = i as u32 % 3);
    tasks.1.data = inline(data);
    vec![
        with("prefix", TrainingMethod::PrefixTuning, &|_| ()),
        with("prefix-random", TrainingMethod::PrefixTuning, &|s| s.init = PromptInit::Random.into()),
        with("projection", TrainingMethod::PrefixTuning, &|s| s.reparametrisation = Projection.into()),
        with("prompt", TrainingMethod::PromptTuning, &|s| s.init = PromptInit::SampledVocabulary.into()),
        with("mlp", TrainingMethod::PTuning, &|s| s.accumulation_steps = Some(2)),
        with("lstm", TrainingMethod::PTuning, &|s| s.reparametrisation = Lstm.into()),
        with("restarts", TrainingMethod::PromptTuning, &|s| {
            (s.restarts, s.evaluation_share, s.evaluation_interval) = (Some(2), Some(0.25), Some(2));
        }),
        tasks,
    ]
}

/// All methods at once in shared batches, then one after the other with every layer computed again: the same adapters.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_together_give_what_each_gives_alone() {
    let mut digests = Vec::new();
    for (running, recomputation) in [(8, proto::Recomputation::Never), (1, proto::Recomputation::Always)] {
        let served = server(None, TrainingConfig { max_running: running, ..TrainingConfig::default() }).await;
        let mut client = client(&served).await;
        let mut ids = Vec::new();
        for (_, mut request) in methods() {
            request.settings.as_mut().unwrap().recomputation = recomputation.into();
            ids.push(create(&mut client, request).await.unwrap());
        }
        let mut all = Vec::new();
        for ((name, _), id) in methods().into_iter().zip(ids) {
            let (steps, _, job) = follow(&mut client, &id).await;
            assert_eq!(job.state(), TrainingJobState::Succeeded, "{name}: {}", job.error);
            let get = proto::GetAdapterRequest { adapter_id: name.into() };
            let adapter = served.adapters().await.get_adapter(get).await.unwrap().into_inner().adapter.unwrap();
            if name == "tasks" {
                // Each example is asked as its task; the bare base beside it has none.
                let data = methods().pop().unwrap().1.data;
                let evaluate = proto::EvaluateRequest { adapter_id: name.into(), data, ..Default::default() };
                let measured = client.evaluate(evaluate).await.unwrap().into_inner();
                let scores = [measured.scores.unwrap(), measured.base_scores.unwrap()];
                assert!(scores.iter().all(|s| s.perplexity.unwrap() > 1.0), "{scores:?}");
            }
            all.push((name, adapter.digest, steps.iter().map(|s| s.loss.to_bits()).collect::<Vec<_>>()));
        }
        digests.push(all);
    }
    for (together, alone) in digests[0].iter().zip(&digests[1]) {
        assert_eq!(together, alone);
    }
}

/// A server in a process of its own, to be killed.
struct Process {
    child: Child,
    address: String,
}

impl Process {
    fn start(dir: &Path) -> Self {
        let address = format!("127.0.0.1:{}", free_port());
        let child = Command::new(env!("CARGO_BIN_EXE_prefixd"))
            .args(["serve", "--listen", &address, "--adapters"])
            .arg(dir)
            // Between any two steps there is a checkpoint.
            .env("PREFIXD_TRAINING__CHECKPOINT_SECONDS", "0")
            .env("PREFIXD_LOG", "error")
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Process { child, address: format!("http://{address}") }
    }

    async fn client(&self) -> Client {
        loop {
            if let Ok(channel) = Channel::from_shared(self.address.clone()).unwrap().connect().await {
                return TrainingServiceClient::new(channel);
            }
            tokio::time::sleep(std::time::Duration::from_millis(30)).await;
        }
    }
}

impl Drop for Process {
    /// SIGKILL.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Killed after several steps, the job goes on by itself and leaves the files and the losses of one that was let alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_ends_with_the_same_weights() {
    let request = || {
        let mut request = job("kept", 40);
        let settings = request.settings.as_mut().unwrap();
        settings.method = TrainingMethod::PTuning.into();
        (settings.restarts, settings.evaluation_share, settings.evaluation_interval) = (Some(2), Some(0.25), Some(7));
        request
    };
    let mut results = Vec::new();
    for kills in [0, 4] {
        let dir = tempfile::tempdir().unwrap();
        let mut process = Process::start(dir.path());
        let mut client = process.client().await;
        let id = create(&mut client, request()).await.unwrap();
        for kill in 0..kills {
            let watch = proto::WatchTrainingJobRequest { job_id: id.clone() };
            let mut events = client.watch_training_job(watch).await.unwrap().into_inner();
            let mut seen = 0;
            while seen < 9 * (kill + 1) {
                let message = events.message().await.unwrap().expect("the job ended before it was killed");
                seen += usize::from(matches!(message.event, Some(Event::Step(_))));
            }
            drop(process);
            process = Process::start(dir.path());
            client = process.client().await;
        }
        let (steps, evaluations, job) = follow(&mut client, &id).await;
        assert_eq!(job.state(), TrainingJobState::Succeeded, "{}", job.error);
        let weights = std::fs::read(dir.path().join("kept/adapter_model.safetensors")).unwrap();
        let losses: Vec<_> = steps.iter().map(|s| (s.restart, s.step, s.loss.to_bits())).collect();
        let scores: Vec<_> = evaluations.iter().map(|e| (e.restart, e.step, e.loss.to_bits())).collect();
        results.push((losses, scores, weights));
    }
    assert_eq!(results[0].0.len(), 80);
    let (quiet, killed) = (&results[0], &results[1]);
    assert_eq!(quiet.0, killed.0, "losses");
    assert_eq!(quiet.1, killed.1, "evaluations");
    assert!(quiet.2 == killed.2, "the weights differ");
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

/// One job's loss is not a number; the job beside it, in the same batches, ends as if it had been alone.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_diverges_fails_alone() {
    let served = server(None, TrainingConfig::default()).await;
    let mut client = client(&served).await;
    let mut wild = job("wild", 60);
    let settings = wild.settings.as_mut().unwrap();
    (settings.learning_rate, settings.max_gradient_norm) = (Some(1000.0), Some(0.0));
    settings.weight_decay = Some(10.0);
    let calm = create(&mut client, job("calm", 20)).await.unwrap();
    let wild = create(&mut client, wild).await.unwrap();
    let job = follow(&mut client, &wild).await.2;
    assert_eq!(job.state(), TrainingJobState::Failed);
    assert!(job.error.contains("lower the learning rate"), "{}", job.error);
    assert_eq!(follow(&mut client, &calm).await.2.state(), TrainingJobState::Succeeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_trained_is_refused_with_its_reason() {
    let served =
        server(None, TrainingConfig { max_queued: 0, max_running: 1, batch_mib: 64, ..TrainingConfig::default() })
            .await;
    let mut client = client(&served).await;
    let refused = async |client: &mut Client,
                         code: Code,
                         said: &[&str],
                         change: &dyn Fn(&mut proto::CreateTrainingJobRequest)| {
        let mut request = job("new", 3);
        change(&mut request);
        let status = create(client, request).await.expect_err(said[0]);
        assert_eq!(status.code(), code, "{status:?}");
        said.iter().for_each(|said| assert!(status.message().contains(said), "{said}: {}", status.message()));
    };
    let c = &mut client;
    let invalid = Code::InvalidArgument;
    refused(c, Code::AlreadyExists, &["sentiment", "replace"], &|r| r.adapter_id = "sentiment".into()).await;
    refused(c, invalid, &["adapter_id"], &|r| r.adapter_id = "../x".into()).await;
    refused(c, invalid, &["data", "missing"], &|r| r.data = None).await;
    refused(c, invalid, &["example 1", "no `target`"], &|r| {
        let mut all = examples(3);
        all[1].targets.clear();
        r.data = inline(all);
    })
    .await;
    let named = |name: &'static str| {
        move |r: &mut proto::CreateTrainingJobRequest| {
            r.data = Some(proto::Dataset { source: Some(Source::DatasetId(name.into())) })
        }
    };
    refused(c, Code::NotFound, &["nonesuch"], &named("nonesuch")).await;
    refused(c, invalid, &["dataset_id"], &named("../../etc/passwd")).await;
    refused(c, invalid, &["settings.method", "99"], &|r| r.settings.as_mut().unwrap().method = 99).await;
    refused(c, invalid, &["settings.num_virtual_tokens", "0"], &|r| {
        r.settings.as_mut().unwrap().num_virtual_tokens = Some(0)
    })
    .await;
    refused(c, invalid, &["settings.learning_rate", "NaN"], &|r| {
        r.settings.as_mut().unwrap().learning_rate = Some(f64::NAN)
    })
    .await;
    refused(c, invalid, &["settings.reparametrisation", "P_TUNING"], &|r| {
        r.settings.as_mut().unwrap().reparametrisation = PromptReparametrisation::Lstm.into();
    })
    .await;
    refused(c, invalid, &["pinned", "load"], &|r| (r.load, r.pinned) = (false, true)).await;
    refused(c, invalid, &["settings.encoder_hidden_size", "network"], &|r| {
        r.settings.as_mut().unwrap().encoder_hidden_size = Some(8)
    })
    .await;
    refused(c, invalid, &["settings.encoder_num_layers", "LSTM"], &|r| {
        r.settings.as_mut().unwrap().encoder_num_layers = Some(3)
    })
    .await;
    refused(c, invalid, &["settings.num_ranks", "MULTITASK"], &|r| r.settings.as_mut().unwrap().num_ranks = Some(2))
        .await;
    refused(c, invalid, &["settings.init_text", "PROJECTION"], &|r| {
        let settings = r.settings.as_mut().unwrap();
        (settings.init, settings.init_text) = (PromptInit::Text.into(), "the soup".into());
        settings.reparametrisation = PromptReparametrisation::Projection.into();
    })
    .await;
    refused(c, invalid, &["settings.early_stopping_patience"], &|r| {
        r.settings.as_mut().unwrap().early_stopping_patience = Some(2)
    })
    .await;
    refused(c, invalid, &["settings.target_template"], &|r| {
        r.settings.as_mut().unwrap().target_template = Some("x".into())
    })
    .await;
    refused(c, invalid, &["task.toml", "templat"], &|r| r.task_card = "templat = 1".into()).await;
    refused(c, invalid, &["longer than"], &|r| r.settings.as_mut().unwrap().max_length = Some(3)).await;
    refused(c, invalid, &["none of the card's `labels`", "weird"], &|r| {
        let mut all = examples(3);
        all[2].targets = vec!["weird".into()];
        r.data = inline(all);
        r.settings.as_mut().unwrap().classification_head = true;
        r.task_card = r.task_card.replace("verbalizers = [\" positive\", \" negative\"]\n", "");
    })
    .await;
    refused(c, Code::ResourceExhausted, &["settings.batch_size", "training.batch_mib"], &|r| {
        r.settings.as_mut().unwrap().batch_size = Some(4096);
    })
    .await;
    // Weights that no memory could hold, by what the data says and by what the settings say.
    let multitask = |r: &mut proto::CreateTrainingJobRequest| {
        r.settings.as_mut().unwrap().method = TrainingMethod::MultitaskPromptTuning.into();
        let mut all = examples(3);
        all[1].task_id = 9_999;
        r.data = inline(all);
    };
    refused(c, Code::ResourceExhausted, &["num_tasks", "training.weights_mib"], &|r| {
        multitask(r);
        r.settings.as_mut().unwrap().num_ranks = Some(1024);
    })
    .await;
    refused(c, invalid, &["task_id", "4294967295", "10000"], &|r| {
        multitask(r);
        let mut all = examples(3);
        all[1].task_id = u32::MAX;
        r.data = inline(all);
    })
    .await;
    refused(c, Code::ResourceExhausted, &["encoder_hidden_size", "training.weights_mib"], &|r| {
        let settings = r.settings.as_mut().unwrap();
        (settings.method, settings.encoder_hidden_size) = (TrainingMethod::PTuning.into(), Some(65_536));
    })
    .await;
    // One that is too long is left out and counted.
    let mut request = job("new", 100_000);
    let mut all = examples(9);
    all[4].input = "the soup ".repeat(300);
    request.data = inline(all);
    let made = client.create_training_job(request).await.unwrap().into_inner().job.unwrap();
    assert_eq!((made.train_examples, made.too_long_examples), (8, 1));
    let twice = create(&mut client, job("new", 3)).await.unwrap_err();
    assert!(twice.code() == Code::AlreadyExists && twice.message().contains(&made.job_id), "{twice:?}");
    let full = create(&mut client, job("another", 3)).await.unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted);
    let unknown = client.get_training_job(proto::GetTrainingJobRequest { job_id: "job-x".into() }).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
}

/// A dataset is uploaded in pieces that break lines and characters, and named by a job and an evaluation.
#[tokio::test(flavor = "multi_thread")]
async fn datasets_are_uploaded_and_named() {
    use proto::upload_dataset_request::Part;
    let dir = tempfile::tempdir().unwrap();
    let served = server(Some(dir.path()), TrainingConfig { max_data_bytes: 40_000, ..TrainingConfig::default() }).await;
    let mut client = client(&served).await;
    let upload = |name: &str, text: &str| {
        let first = Part::DatasetId(name.into());
        let rest = text.as_bytes().chunks(7).map(|c| Part::Chunk(c.to_vec()));
        let parts: Vec<_> = std::iter::once(first).chain(rest).collect();
        tokio_stream::iter(parts.into_iter().map(|part| proto::UploadDatasetRequest { part: Some(part) }))
    };
    let line = |e: &proto::TrainingExample| {
        format!("{}\n", serde_json::json!({ "input": format!("{} ü", e.input), "targets": e.targets }))
    };
    let text: String = examples(12).iter().map(line).collect();
    let stored = client.upload_dataset(upload("reviews", &text)).await.unwrap().into_inner();
    assert_eq!((stored.dataset_id.as_str(), stored.examples), ("reviews", 12));
    let bad = client.upload_dataset(upload("reviews", "{\"input\": 1}\n")).await.unwrap_err();
    assert!(bad.code() == Code::InvalidArgument && bad.message().contains("line 1"), "{bad:?}");
    let huge = client.upload_dataset(upload("reviews", &text.repeat(100))).await.unwrap_err();
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
