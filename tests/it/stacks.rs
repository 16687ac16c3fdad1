//! Stacked prefixes and tasks by request, over the wire: what they give is what one adapter of the same content gives.
use crate::served::{Served, prompt, upload};
use crate::support::embedded;
use prefixd::adapter::Method;
use prefixd::adapter::peft::{SavedAdapter, SavedBase, SavedTensor, save};
use prefixd::config::EngineConfig;
use prefixd::rpc::proto::{self, score_request};
use tonic::Code;

/// Deterministic values of about the size of K and V.
fn values(seed: u32, n: usize) -> Vec<f32> {
    (0..n as u32)
        .map(|i| ((i.wrapping_mul(2654435761).wrapping_add(seed * 97) >> 16) as f32 / 65536.0 - 0.5) * 2.0)
        .collect()
}

type Tensors<'a> = &'a [(&'a str, &'a [usize], &'a [f32])];

async fn load(served: &Served, id: &str, method: Method, card: &str, tensors: Tensors<'_>) {
    let dir = tempfile::tempdir().unwrap();
    let mut adapter = SavedAdapter::new(method, tensors[0].1[0], "CAUSAL_LM", &SavedBase::default()).unwrap();
    for (name, dims, values) in tensors {
        adapter.tensors.insert((*name).into(), SavedTensor::f32(dims.to_vec(), values));
    }
    save(dir.path(), &adapter).unwrap();
    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    let (config, weights) = (read("adapter_config.json"), read("adapter_model.safetensors"));
    let files: [(&str, &[u8]); 3] =
        [("adapter_config.json", &config), ("adapter_model.safetensors", &weights), ("task.toml", card.as_bytes())];
    let parts = tokio_stream::iter(upload(id, false, &files));
    let adapter = served.adapters().await.upload_adapter(parts).await.unwrap().into_inner().adapter.unwrap();
    assert_eq!(adapter.method, method.as_str());
}

fn score(id: &str, before: &[&str], task_id: Option<u32>) -> proto::ScoreRequest {
    let content = proto::continuation::Content::Text(" the soup was good".into());
    proto::ScoreRequest {
        adapter_id: id.into(),
        input: Some(score_request::Input::Prompt("at Zazan".into())),
        continuations: vec![proto::Continuation { content: Some(content) }],
        prefix_adapter_ids: before.iter().map(|id| (*id).into()).collect(),
        task_id,
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stack_is_the_prefix_of_all_its_rows() {
    let served = Served::start(EngineConfig::default()).await;
    let info = embedded().info().clone();
    let width = 2 * info.num_layers * info.num_kv_heads * info.head_dim;
    // 3 rows and 18, so that the stack's pages are split elsewhere than the parts'.
    let (a, b) = (values(1, 3 * width), values(2, 18 * width));
    let both = [a.as_slice(), &b].concat();
    let template = "template = '{{ input }}:'";
    load(&served, "a", Method::PrefixTuning, "prefix = ''", &[("prompt_embeddings", &[3, width], &a)]).await;
    load(&served, "b", Method::Cartridge, template, &[("prompt_embeddings", &[18, width], &b)]).await;
    load(&served, "both", Method::PrefixTuning, template, &[("prompt_embeddings", &[21, width], &both)]).await;
    let mut client = served.inference().await;
    let mut scored = Vec::new();
    for (id, before) in [("b", ["a"].as_slice()), ("both", &[]), ("b", &[])] {
        scored.push(client.score(score(id, before, None)).await.unwrap().into_inner());
    }
    assert_eq!(scored[0].scores, scored[1].scores, "the same rows, the same bits");
    assert_ne!(scored[0].scores, scored[2].scores);
    assert_eq!(scored[0].usage.unwrap().prefix_tokens, 21);
    let names = |refs: &[proto::AdapterRef]| refs.iter().map(|r| r.adapter_id.clone()).collect::<Vec<_>>();
    assert_eq!((names(&scored[0].prefix_adapters), names(&scored[1].prefix_adapters)), (vec!["a".into()], vec![]));

    // Before a text prefix, and on the bare base; streams say who stood before, too.
    let stacked = |id: &str| proto::GenerateRequest { prefix_adapter_ids: vec!["a".into()], ..prompt(id, "the soup") };
    for id in ["topic", ""] {
        let answer = client.generate(stacked(id)).await.unwrap().into_inner();
        assert_eq!(names(&answer.prefix_adapters), ["a"]);
        assert!(answer.usage.unwrap().prefix_tokens >= 3);
    }
    let mut stream = client.generate_stream(stacked("b")).await.unwrap().into_inner();
    assert_eq!(names(&stream.message().await.unwrap().unwrap().prefix_adapters), ["a"]);

    let status = client.score(score("a", &["topic"], None)).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("prefix 1 of the stack"), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_by_request_is_the_cards_task() {
    let served = Served::start(EngineConfig::default()).await;
    let (n, d) = (4, embedded().info().hidden_size);
    let (shared, cols, rows) = (values(3, n * d), values(4, 2 * n), values(5, 2 * d));
    let (col_dims, row_dims, dims) = ([2, n, 1], [2, 1, d], [n, d]);
    let tensors: Tensors<'_> = &[
        ("prompt_embeddings", &dims, &shared),
        ("prefix_task_cols", &col_dims, &cols),
        ("prefix_task_rows", &row_dims, &rows),
    ];
    let method = Method::MultitaskPromptTuning;
    load(&served, "first", method, "task_id = 0", tensors).await;
    load(&served, "second", method, "task_id = 1", tensors).await;
    let mut client = served.inference().await;
    let mut scored = Vec::new();
    for (id, task) in [("first", None), ("second", Some(0)), ("second", None), ("first", Some(1))] {
        scored.push(client.score(score(id, &[], task)).await.unwrap().into_inner().scores);
    }
    assert_eq!((&scored[0], &scored[2]), (&scored[1], &scored[3]));
    assert_ne!(scored[0], scored[2]);
    let status = client.score(score("first", &[], Some(2))).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("`task_id` is 2, the adapter has 2 tasks"), "{status}");
}
