//! Encoders and virtual tokens inside a template, over the wire, against transformers and PEFT.
use crate::served::{Served, prompt};
use prefixd::config::Config;
use prefixd::rpc::proto::{self, classify_request};
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::{Path, PathBuf};
use tonic::Code;

const RESULTS: &str = "tests/oracle/results";

/// A server of `model` with the adapters `(id, folder)`.
async fn serve(model: &Path, adapters: &[(&str, PathBuf)]) -> (Served, tempfile::TempDir) {
    let store = tempfile::tempdir().unwrap();
    for (id, folder) in adapters {
        let to = store.path().join(id);
        std::fs::create_dir(&to).unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors", "task.toml"] {
            if folder.join(file).is_file() {
                std::fs::copy(folder.join(file), to.join(file)).unwrap();
            }
        }
    }
    let (model, adapters) = (model.to_str().unwrap().into(), Some(store.path().into()));
    (Served::with(Config { model, adapters, ..Config::default() }).await, store)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect()
}

/// Softmax of the stored logits of prompt `i`.
fn probabilities(folder: &Path, i: usize) -> Vec<f64> {
    let file = std::fs::read(folder.join("oracle.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let logits = tensors.tensor(&format!("p{i}.logits")).unwrap();
    let e: Vec<f64> =
        logits.data().chunks(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap())).exp()).collect();
    e.iter().map(|v| v / e.iter().sum::<f64>()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encoder_classifies_with_its_own_head_and_with_those_of_adapters() {
    for name in ["bert_seqcls", "roberta_seqcls"] {
        let model = Path::new(RESULTS).join("peft").join(name);
        let kinds = ["prefix", "prompt_random", "ptuning_mlp"];
        let folders: Vec<_> = kinds.iter().map(|kind| (*kind, model.join(kind))).collect();
        let (served, _store) = serve(&model, &folders).await;
        let info = served.server().await.get_server_info(proto::GetServerInfoRequest {}).await.unwrap().into_inner();
        let info = info.model.unwrap();
        assert!(info.encoder && info.labels == ["LABEL_0", "LABEL_1", "LABEL_2"], "{info:?}");

        let mut calls = Vec::new();
        for (id, folder) in folders.iter().cloned().chain([("", model.join("oracle_base"))]) {
            for (i, p) in json(&folder.join("oracle.json"))["prompts"].as_array().unwrap().iter().enumerate() {
                let request = proto::ClassifyRequest {
                    adapter_id: id.into(),
                    input: Some(classify_request::Input::TokenIds(proto::TokenIds { ids: ids(&p["input_ids"]) })),
                    ..Default::default()
                };
                let (mut client, want) = (served.inference().await, probabilities(&folder, i));
                // All at once: the batch is mixed.
                calls.push((id, want, tokio::spawn(async move { client.classify(request).await })));
            }
        }
        for (id, want, call) in calls {
            let answer = call.await.unwrap().unwrap().into_inner();
            assert_eq!(answer.scores.len(), want.len());
            for score in &answer.scores {
                let label: usize = score.label.strip_prefix("LABEL_").unwrap().parse().unwrap();
                assert!((score.probability - want[label]).abs() < 1e-5, "{name} {id}: {score:?} {want:?}");
            }
            assert_eq!(answer.label, answer.scores[0].label);
            let usage = answer.usage.unwrap();
            assert_eq!(usage.prefix_tokens, if id == "prefix" { 6 } else { 0 }, "{id}");
        }
        let refused = served.inference().await.generate(prompt("", "w5 w6")).await.unwrap_err();
        assert!(refused.code() == Code::FailedPrecondition && refused.message().contains("encoder"), "{refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn virtual_tokens_stand_where_the_template_has_them() {
    let mut names: Vec<_> =
        std::fs::read_dir(format!("{RESULTS}/placed")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert!(names.len() >= 4);
    for name in names {
        let (model, folder) =
            (Path::new(RESULTS).join("peft").join(&name), Path::new(RESULTS).join("placed").join(&name));
        // The same virtual tokens as a prefix, to have both in one batch.
        let (served, _store) =
            serve(&model, &[("placed", folder.clone()), ("leading", model.join("prompt_random"))]).await;
        let oracle = json(&folder.join("oracle.json"));
        let cases = oracle["prompts"].as_array().unwrap();
        // Twice: the second time the blocks of the prompt are cached.
        for round in 0..2 {
            let mut calls = Vec::new();
            for (i, case) in cases.iter().enumerate() {
                for id in ["placed", "leading"] {
                    let want = ids(&case["greedy_ids"]);
                    let stopping = proto::Stopping {
                        max_new_tokens: Some(want.len() as u32),
                        ignore_eos: true,
                        ..Default::default()
                    };
                    let output = proto::Output { token_ids: true, logprobs: Some(0), ..Default::default() };
                    let request = proto::GenerateRequest {
                        stopping: Some(stopping),
                        output: Some(output),
                        ..prompt(id, case["prompt"].as_str().unwrap())
                    };
                    let mut client = served.inference().await;
                    calls.push((id, i, want, tokio::spawn(async move { client.generate(request).await })));
                }
            }
            for (id, i, want, call) in calls {
                let answer = call.await.unwrap().unwrap().into_inner();
                let (choice, usage) = (&answer.choices[0], answer.usage.unwrap());
                if id == "leading" {
                    assert_eq!(usage.prefix_tokens, 6);
                    assert_ne!(choice.token_ids, want, "{name:?}: the place makes no difference");
                    continue;
                }
                assert_eq!(choice.token_ids, want, "{name:?} prompt {i}");
                for (got, want) in choice.logprobs.iter().zip(cases[i]["logprobs"].as_array().unwrap()) {
                    assert!((f64::from(got.logprob) - want.as_f64().unwrap()).abs() < 1e-4, "{name:?} prompt {i}");
                }
                let words = cases[i]["prompt"].as_str().unwrap().split(' ').count();
                assert_eq!((usage.prefix_tokens, usage.prompt_tokens as usize), (0, words + 8));
                let cached = (words + 7) / 16 * 16;
                assert_eq!(usage.cached_tokens as usize, if round == 0 { 0 } else { cached }, "{name:?} prompt {i}");
            }
        }
    }
}
