//! What clients get wrong: each case has its status, names field, value and limit, and disturbs nobody.
use crate::served::{Served, long, prompt, upload};
use prefixd::config::EngineConfig;
use prefixd::rpc::proto::{self, generate_request};
use tokio_stream::StreamExt;
use tonic::Code;

type Case = (&'static str, proto::GenerateRequest, Code, &'static [&'static str]);

fn with_sampling(change: impl FnOnce(&mut proto::Sampling)) -> proto::GenerateRequest {
    let mut sampling = proto::Sampling::default();
    change(&mut sampling);
    proto::GenerateRequest { sampling: Some(sampling), ..prompt("sentiment", "x") }
}

fn with_stopping(change: impl FnOnce(&mut proto::Stopping)) -> proto::GenerateRequest {
    let mut stopping = proto::Stopping::default();
    change(&mut stopping);
    proto::GenerateRequest { stopping: Some(stopping), ..prompt("sentiment", "x") }
}

fn token_ids(ids: Vec<u32>) -> proto::GenerateRequest {
    let input = Some(generate_request::Input::TokenIds(proto::TokenIds { ids }));
    proto::GenerateRequest { input, ..Default::default() }
}

fn cases() -> Vec<Case> {
    use Code::*;
    vec![
        ("unknown adapter", prompt("sentimental", "x"), NotFound, &["sentimental", "sentiment"]),
        ("a path as an id", prompt("../../etc/passwd", "x"), InvalidArgument, &["adapter_id", "../../etc/passwd"]),
        ("no input", proto::GenerateRequest::default(), InvalidArgument, &["input"]),
        ("empty prompt", prompt("", ""), InvalidArgument, &["prompt", "empty"]),
        ("prompt past the context", prompt("", &"word ".repeat(5000)), InvalidArgument, &["prompt", "256"]),
        ("prompt past the bytes", prompt("", &"x".repeat(2 << 20)), InvalidArgument, &["prompt", "1048576"]),
        ("10 MB message", prompt("", &"x".repeat(10 << 20)), InvalidArgument, &["4194304"]),
        ("no token ids", token_ids(vec![]), InvalidArgument, &["input"]),
        ("token id out of range", token_ids(vec![1, 4_000_000_000]), InvalidArgument, &["token_ids", "4000000000"]),
        (
            "temperature -1",
            with_sampling(|s| s.temperature = Some(-1.0)),
            InvalidArgument,
            &["temperature", "-1", "100"],
        ),
        (
            "temperature NaN",
            with_sampling(|s| s.temperature = Some(f32::NAN)),
            InvalidArgument,
            &["temperature", "NaN"],
        ),
        ("top_p 0", with_sampling(|s| s.top_p = Some(0.0)), InvalidArgument, &["top_p", "1"]),
        ("min_p 2", with_sampling(|s| s.min_p = Some(2.0)), InvalidArgument, &["min_p", "2", "1"]),
        (
            "repetition_penalty 0",
            with_sampling(|s| s.repetition_penalty = Some(0.0)),
            InvalidArgument,
            &["repetition_penalty"],
        ),
        (
            "presence_penalty 3",
            with_sampling(|s| s.presence_penalty = Some(3.0)),
            InvalidArgument,
            &["presence_penalty", "3", "2"],
        ),
        (
            "frequency_penalty inf",
            with_sampling(|s| s.frequency_penalty = Some(f32::INFINITY)),
            InvalidArgument,
            &["frequency_penalty"],
        ),
        ("n 1000", with_sampling(|s| s.n = Some(1000)), InvalidArgument, &["`sampling.n`", "1000", "16"]),
        ("n 0", with_sampling(|s| s.n = Some(0)), InvalidArgument, &["`sampling.n`", "0"]),
        ("max_new_tokens 0", with_stopping(|s| s.max_new_tokens = Some(0)), InvalidArgument, &["max_new_tokens", "0"]),
        (
            "max_new_tokens too many",
            with_stopping(|s| s.max_new_tokens = Some(1 << 30)),
            InvalidArgument,
            &["max_new_tokens", "256"],
        ),
        (
            "min above max",
            with_stopping(|s| (s.min_new_tokens, s.max_new_tokens) = (Some(9), Some(3))),
            InvalidArgument,
            &["min_new_tokens", "9", "3"],
        ),
        (
            "17 stop sequences",
            with_stopping(|s| s.stop_sequences = vec!["a".into(); 17]),
            InvalidArgument,
            &["stop_sequences", "17", "16"],
        ),
        (
            "empty stop sequence",
            with_stopping(|s| s.stop_sequences = vec![String::new()]),
            InvalidArgument,
            &["stop_sequences"],
        ),
        (
            "long stop sequence",
            with_stopping(|s| s.stop_sequences = vec!["a".repeat(999)]),
            InvalidArgument,
            &["stop_sequences", "aaaa", "256"],
        ),
        (
            "21 logprobs",
            proto::GenerateRequest {
                output: Some(proto::Output { logprobs: Some(21), ..Default::default() }),
                ..prompt("", "x")
            },
            InvalidArgument,
            &["logprobs", "21", "20"],
        ),
        (
            "another generation",
            proto::GenerateRequest { adapter_generation: Some(999), ..prompt("sentiment", "x") },
            FailedPrecondition,
            &["999"],
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_request_gets_its_status_and_disturbs_nobody() {
    let served = Served::start(EngineConfig::default()).await;
    let client = served.inference().await;
    let good = || long("describe", "name = Zazan | food = thai", 100);
    let want = client.clone().generate(good()).await.unwrap().into_inner().choices.remove(0).text;
    let mut neighbour = client.clone();
    let (stop, mut stopped) = tokio::sync::oneshot::channel::<()>();
    let neighbours = tokio::spawn(async move {
        let mut answers = Vec::new();
        while stopped.try_recv().is_err() {
            answers.push(neighbour.generate(good()).await.unwrap().into_inner().choices.remove(0).text);
        }
        answers
    });
    for (name, request, code, words) in cases() {
        let status = client.clone().generate(request.clone()).await.expect_err(name);
        assert_eq!(status.code(), code, "{name}: {status:?}");
        assert!(words.iter().all(|w| status.message().contains(w)), "{name}: {}", status.message());
        assert!(status.message().len() < 1000, "{name}: {} bytes", status.message().len());
        let streamed = match client.clone().generate_stream(request).await {
            Err(status) => status,
            Ok(mut stream) => loop {
                match stream.get_mut().next().await.expect(name) {
                    Ok(_) => {}
                    Err(status) => break status,
                }
            },
        };
        assert_eq!(streamed.code(), code, "{name}, streamed");
    }
    stop.send(()).unwrap();
    let answers = neighbours.await.unwrap();
    assert!(!answers.is_empty() && answers.iter().all(|a| *a == want));
}

fn safetensors(name: &str, shape: &[usize], value: f32) -> Vec<u8> {
    let data: Vec<u8> = (0..shape.iter().product()).flat_map(|_| value.to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &data).unwrap();
    safetensors::serialize([(name, view)], None).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_bad_upload_gets_its_status_and_leaves_nothing() {
    let served = Served::start(EngineConfig::default()).await;
    let mut client = served.adapters().await;
    let hidden = served.server().await.get_server_info(proto::GetServerInfoRequest {}).await.unwrap();
    let hidden = hidden.into_inner().model.unwrap().hidden_size as usize;
    let config =
        |kind: &str| format!(r#"{{"peft_type": "{kind}", "num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}}"#);
    let (prompt_config, lora) = (config("PROMPT_TUNING"), config("LORA"));
    let good = safetensors("prompt_embeddings", &[4, hidden], 0.1);
    let nan = safetensors("prompt_embeddings", &[4, hidden], f32::NAN);
    let wide = safetensors("prompt_embeddings", &[4, hidden + 1], 0.1);
    let mut bomb = (1u64 << 60).to_le_bytes().to_vec();
    bomb.extend(b"{}");
    let (c, w) = ("adapter_config.json", "adapter_model.safetensors");
    type Upload<'a> = (&'a str, Vec<(&'a str, &'a [u8])>, Code, &'a [&'a str]);
    let cases: Vec<Upload<'_>> = vec![
        ("u-nan", vec![(c, prompt_config.as_bytes()), (w, &nan)], Code::InvalidArgument, &["prompt_embeddings", "NaN"]),
        ("u-wide", vec![(c, prompt_config.as_bytes()), (w, &wide)], Code::FailedPrecondition, &["prompt_embeddings"]),
        ("u-lora", vec![(c, lora.as_bytes()), (w, &good)], Code::FailedPrecondition, &["LORA"]),
        ("u-bomb", vec![(c, prompt_config.as_bytes()), (w, &bomb)], Code::InvalidArgument, &["header"]),
        ("u-pickle", vec![("adapter_model.bin", b"\x80\x02")], Code::InvalidArgument, &["adapter_model.bin"]),
        ("u-path", vec![("../evil", b"x")], Code::InvalidArgument, &["../evil"]),
        ("u-empty", vec![], Code::InvalidArgument, &["adapter_config.json", "task.toml"]),
        ("u-card", vec![("task.toml", b"descripton = 1")], Code::InvalidArgument, &["task.toml", "descripton"]),
        ("../up", vec![("task.toml", b"")], Code::InvalidArgument, &["adapter_id"]),
        ("sentiment", vec![("task.toml", b"prefix = \"x\"")], Code::AlreadyExists, &["sentiment", "replace"]),
    ];
    for (id, files, code, words) in cases {
        let status = client.upload_adapter(tokio_stream::iter(upload(id, false, &files))).await.expect_err(id);
        assert_eq!(status.code(), code, "{id}: {status:?}");
        assert!(words.iter().all(|w| status.message().contains(w)), "{id}: {}", status.message());
    }
    let load = client.load_adapter(proto::LoadAdapterRequest { adapter_id: "u-nan".into(), pinned: false }).await;
    assert_eq!(load.unwrap_err().code(), Code::NotFound, "a refused upload is not in the store");
    let ok = upload("u-good", false, &[(c, prompt_config.as_bytes()), (w, &good)]);
    client.upload_adapter(tokio_stream::iter(ok)).await.unwrap();
}

/// 2,000 calls at once over few connections: each is answered, or refused with a retry hint.
#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_calls_at_once() {
    let engine = EngineConfig { max_queue: 300, max_queue_per_adapter: 200, ..EngineConfig::default() };
    let served = Served::start(engine).await;
    let client = served.inference().await;
    let want =
        client.clone().generate(long("topic", "the old song", 8)).await.unwrap().into_inner().choices.remove(0).text;
    let calls: Vec<_> = (0..2000)
        .map(|i| {
            let (mut client, id) = (client.clone(), if i % 2 == 0 { "topic" } else { "sentiment" });
            tokio::spawn(async move { (id, client.generate(long(id, "the old song", 8)).await) })
        })
        .collect();
    let (mut answered, mut refused) = (0, 0);
    for call in calls {
        match call.await.unwrap() {
            (id, Ok(answer)) => {
                answered += 1;
                assert!(id != "topic" || answer.into_inner().choices[0].text == want);
            }
            (_, Err(status)) => {
                refused += 1;
                assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
                assert!(status.metadata().contains_key("retry-after-ms"));
            }
        }
    }
    println!("{answered} answered, {refused} refused");
    assert!(answered >= 300 && answered + refused == 2000);
    client.clone().generate(long("topic", "the old song", 8)).await.unwrap();
}

/// Streams that nobody reads hold up nobody.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_never_read_hold_up_nobody() {
    let served = Served::start(EngineConfig::default()).await;
    let mut silent = served.inference().await;
    let mut streams = Vec::new();
    for _ in 0..64 {
        let mut request = long("", "on monday", 200);
        request.output = Some(proto::Output { logprobs: Some(20), token_ids: true, ..Default::default() });
        streams.push(silent.generate_stream(request).await.unwrap());
    }
    let mut client = served.inference().await;
    for _ in 0..20 {
        client.generate(prompt("sentiment", "the soup was tasty")).await.unwrap();
    }
    let mut server = served.server().await;
    while server.get_stats(proto::GetStatsRequest {}).await.unwrap().into_inner().running > 0 {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    drop(streams);
}
