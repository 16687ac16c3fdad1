//! Every case under `PREFIXD_TEST_DATA/peft/<model>/<adapter>`, made by transformers + PEFT, against ours: logits
//! within 1e-4 in f32, greedy tokens and log-probabilities of continuations equal.
use crate::support::{self, Answer, ask_all, data, engine, logits, request};
use prefixd::adapter::{Prefix, load_folder};
use prefixd::config::DtypeChoice;
use prefixd::model::Model;
use prefixd::model::config::ModelConfig;
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const LOGIT_TOLERANCE: f32 = 1e-4;

/// Folders in `dir`, sorted.
fn folders(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    all.sort();
    all
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect()
}

/// The adapter's prefix. The task of a multitask prompt is the oracle's, given by a task card.
fn prefix(model: &Model, dir: &Path, oracle: &Value) -> Option<Arc<Prefix>> {
    let copy = tempfile::tempdir().unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        if !dir.join(file).is_file() {
            return None;
        }
        std::fs::copy(dir.join(file), copy.path().join(file)).unwrap();
    }
    if let Some(task) = oracle["task_ids"][0].as_u64() {
        std::fs::write(copy.path().join("task.toml"), format!("task_id = {task}\n")).unwrap();
    }
    load_folder(copy.path(), &model.shape(), model.tokenizer()).unwrap().prefix
}

/// Checks all logits of all prompts; returns how many values and the largest difference.
fn check_logits(model: &Model, prefix: Option<&Prefix>, dir: &Path, oracle: &Value) -> (usize, f32) {
    let file = std::fs::read(dir.join("oracle.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let (mut count, mut worst) = (0, 0f32);
    for (i, prompt) in oracle["prompts"].as_array().unwrap().iter().enumerate() {
        let want = tensors.tensor(&format!("p{i}.logits_all")).unwrap();
        let (rows, vocab) = (want.shape()[0], want.shape()[1]);
        let want: Vec<f32> = want.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        let got = logits(model, prefix, &ids(&prompt["input_ids"]));
        assert_eq!((got.len(), got[0].len()), (rows, vocab), "{} prompt {i}", dir.display());
        for (row, want) in got.iter().zip(want.chunks(vocab)) {
            for (a, b) in row.iter().zip(want) {
                worst = worst.max((a - b).abs());
                count += 1;
            }
        }
    }
    (count, worst)
}

#[test]
fn oracle_peft() {
    let Some(root) = data("peft") else { return };
    let (mut cases, mut values) = (0, 0);
    for model_dir in folders(&root) {
        let config = model_dir.join("config.json");
        if !config.is_file() {
            continue;
        }
        if let Err(e) = ModelConfig::parse(&std::fs::read(config).unwrap()) {
            println!("{}: not served: {e}", model_dir.file_name().unwrap().display());
            continue;
        }
        let name = model_dir.to_str().unwrap();
        let model = support::load(name, DtypeChoice::Auto);
        if model.info().encoder {
            let dir = model_dir.join("oracle_base");
            let oracle = json(&dir.join("oracle.json"));
            let file = std::fs::read(dir.join("oracle.safetensors")).unwrap();
            let tensors = SafeTensors::deserialize(&file).unwrap();
            let head = model.head().cloned();
            let engine = engine(model, 16_384);
            for (i, prompt) in oracle["prompts"].as_array().unwrap().iter().enumerate() {
                let mut r = request(None, &ids(&prompt["input_ids"]), 0);
                r.head = head.clone();
                let got = ask_all(&engine.handle(), vec![r]).remove(0).pooled;
                let want = tensors.tensor(&format!("p{i}.logits")).unwrap();
                let want: Vec<f32> = want.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
                println!("{got:?} {want:?}");
            }
            continue;
        }
        let mut prefixes = Vec::new();
        for dir in folders(&model_dir) {
            let oracle = json(&dir.join("oracle.json"));
            let prefix = prefix(&model, &dir, &oracle);
            assert!(prefix.is_some() || dir.ends_with("oracle_base"), "{} gave no prefix", dir.display());
            let (count, worst) = check_logits(&model, prefix.as_deref(), &dir, &oracle);
            println!("{}: {count} logits, largest difference {worst:.2e}", dir.display());
            assert!(worst < LOGIT_TOLERANCE, "{}: {worst}", dir.display());
            values += count;
            prefixes.push((dir, oracle, prefix));
        }
        // All adapters and prompts of the model in one mixed batch.
        let engine = engine(model, 16_384);
        let (mut requests, mut expected) = (Vec::new(), Vec::new());
        for (dir, oracle, prefix) in &prefixes {
            for prompt in oracle["prompts"].as_array().unwrap() {
                let tokens = ids(&prompt["input_ids"]);
                let greedy = ids(&prompt["greedy_ids"]);
                requests.push(request(prefix.clone(), &tokens, greedy.len()));
                expected.push((dir, Expected::Greedy(greedy)));
                for continuation in prompt["continuations"].as_array().unwrap() {
                    let mut all = tokens.clone();
                    all.extend(ids(&continuation["ids"]));
                    let mut r = request(prefix.clone(), &all, 0);
                    r.score_from = Some(tokens.len());
                    requests.push(r);
                    let want = continuation["token_logprobs"].as_array().unwrap();
                    expected.push((dir, Expected::Scores(want.iter().map(|v| v.as_f64().unwrap()).collect())));
                }
            }
        }
        for (answer, (dir, expected)) in ask_all(&engine.handle(), requests).iter().zip(expected) {
            expected.check(answer, dir);
            cases += 1;
        }
    }
    println!("oracle_peft: {cases} generations and scores, {values} logits");
    assert!(cases > 0, "no case under {}", root.display());
}

enum Expected {
    Greedy(Vec<u32>),
    Scores(Vec<f64>),
}

impl Expected {
    fn check(&self, answer: &Answer, dir: &Path) {
        match self {
            Expected::Greedy(ids) => {
                let got: Vec<u32> = answer.tokens.iter().map(|t| t.id).collect();
                assert_eq!(&got, ids, "{}", dir.display());
            }
            Expected::Scores(want) => {
                assert_eq!(answer.scored.len(), want.len());
                for (got, want) in answer.scored.iter().zip(want) {
                    assert!((f64::from(got.logprob) - want).abs() < 1e-4, "{}: {} {want}", dir.display(), got.logprob);
                }
            }
        }
    }
}
