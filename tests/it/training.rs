//! Whole training runs of PEFT and torch against ours: every loss and the final weights.
use crate::support::{data, load};
use candle_core::{Device, Tensor};
use prefixd::adapter::InputRow;
use prefixd::config::DtypeChoice;
use prefixd::model::Model;
use prefixd::model::packed::Activations;
use prefixd::training::{
    AdamWConfig, EncoderKind, Example, Goal, Job, Outcome, Placement, PromptEncoder, Schedule, Step, Work,
};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

const LOSS_TOLERANCE: f64 = 1e-5;
const WEIGHT_TOLERANCE: f32 = 2e-5;

/// One stored run.
struct Run {
    name: String,
    log: Value,
    tensors: BTreeMap<String, Tensor>,
}

impl Run {
    fn read(dir: &Path) -> Self {
        let log = serde_json::from_slice(&std::fs::read(dir.join("train.json")).unwrap()).unwrap();
        let tensors = candle_core::safetensors::load(dir.join("train.safetensors"), &Device::Cpu).unwrap();
        Run { name: dir.file_name().unwrap().to_string_lossy().into(), log, tensors: tensors.into_iter().collect() }
    }

    fn weights(&self, prefix: &str) -> BTreeMap<String, Tensor> {
        let own = self.tensors.iter().filter_map(|(name, t)| Some((name.strip_prefix(prefix)?.to_owned(), t.clone())));
        own.collect()
    }

    fn job(&self) -> Job {
        let weights = self.weights("init.");
        let has = |name: &str| weights.keys().any(|k| k.starts_with(name));
        let kind = if has("lstm_head") {
            EncoderKind::Lstm
        } else if has("mlp_head") {
            EncoderKind::Mlp
        } else if has("transform") {
            EncoderKind::Projection
        } else {
            EncoderKind::Embedding
        };
        let adapter = self.log["adapter"].as_str().unwrap();
        let placement = if adapter.starts_with("prefix") { Placement::Stored } else { Placement::VirtualTokens };
        let number = |key: &str| self.log[key].as_f64().unwrap();
        let config = AdamWConfig {
            beta1: self.log["betas"][0].as_f64().unwrap(),
            beta2: self.log["betas"][1].as_f64().unwrap(),
            eps: number("eps"),
            weight_decay: number("weight_decay"),
            max_gradient_norm: number("clip_grad_norm"),
        };
        Job::new(PromptEncoder::new(kind, weights).unwrap(), placement, config).unwrap()
    }

    fn number(&self, key: &str) -> usize {
        self.log[key].as_u64().unwrap() as usize
    }

    fn learning_rate(&self, step: usize) -> f64 {
        let share = Schedule::Linear.share(step, self.number("warmup_steps"), self.number("total_steps"));
        let rate = self.log["lr"].as_f64().unwrap() * share;
        assert!((rate - self.log["lr_used"][step].as_f64().unwrap()).abs() < 1e-12, "step {step}");
        rate
    }

    /// Checks a loss; returns its difference.
    fn check_loss(&self, step: usize, loss: f64) -> f64 {
        let want = self.log["losses_f32"][step].as_f64().unwrap();
        assert!((loss - want).abs() < LOSS_TOLERANCE, "{} step {step}: {loss} {want}", self.name);
        (loss - want).abs()
    }

    /// Checks the final weights and what they give; returns the largest difference.
    fn check_weights(&self, job: &Job) -> f32 {
        let worst = |a: &Tensor, b: &Tensor| {
            (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap()
        };
        let finals = self.weights("final.");
        let mut all = worst(&job.encoder.rows().unwrap(), &self.tensors["final_prompt_embeddings"]);
        for (name, var) in job.encoder.weights() {
            all = all.max(worst(var, &finals[name]));
        }
        assert!(all < WEIGHT_TOLERANCE, "{}: {all}", self.name);
        all
    }
}

/// The batches of a run, in order.
fn batches(root: &Path) -> Vec<Vec<Example>> {
    let all: Value = serde_json::from_slice(&std::fs::read(root.join("dataset.json")).unwrap()).unwrap();
    let example = |v: &Value| {
        let tokens = v["input_ids"].as_array().unwrap().iter();
        let labels = v["labels"].as_array().unwrap().iter().map(|i| i.as_u64().map(|i| i as u32));
        Example {
            task: 0,
            rows: tokens.map(|i| InputRow::Token(i.as_u64().unwrap() as u32)).collect(),
            goal: Goal::Tokens(labels.collect()),
        }
    };
    let examples: Vec<Example> = all["examples"].as_array().unwrap().iter().map(example).collect();
    let pick = |i: &Value| examples[i.as_u64().unwrap() as usize].clone();
    all["batches"].as_array().unwrap().iter().map(|b| b.as_array().unwrap().iter().map(pick).collect()).collect()
}

/// A batch from end to end, and an optimiser's step of each job: loss and gradient norm.
fn steps(model: &Model, jobs: &mut [Job], examples: &[Example], rate: &[f64], keep: Activations) -> Vec<(f64, f64)> {
    let work = jobs.iter().map(|job| Work {
        job,
        examples: examples.iter().collect(),
        divisor: examples.iter().map(|e| job.targets(e)).sum(),
        train: true,
    });
    let mut step = Step::new(model, &work.collect::<Vec<_>>(), keep).unwrap();
    while step.advance(model).unwrap() {}
    let outcomes = step.finish().unwrap();
    let update = |((job, out), rate): ((&mut Job, &Outcome), &f64)| {
        (out.nll / out.targets as f64, job.update(out.gradients.as_ref().unwrap(), *rate).unwrap())
    };
    jobs.iter_mut().zip(&outcomes).zip(rate).map(update).collect()
}

/// Every run by itself, then all runs of a model in the same batches: the same losses to the bit.
#[test]
fn training_oracle_runs() {
    let Some(root) = data("peft/train") else { return };
    let batches = batches(&root);
    let mut dirs: Vec<_> =
        std::fs::read_dir(&root).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    dirs.sort();
    let runs: Vec<Run> = dirs.iter().map(|d| Run::read(d)).collect();
    let mut models: Vec<&str> = runs.iter().map(|r| r.log["model"].as_str().unwrap()).collect();
    models.dedup();
    for name in models {
        let model = load(root.join("..").join(name).to_str().unwrap(), DtypeChoice::F32);
        let runs: Vec<&Run> = runs.iter().filter(|r| r.log["model"] == name).collect();
        let mut alone: Vec<Vec<u64>> = Vec::new();
        for run in &runs {
            let (mut job, mut worst, mut bits) = ([run.job()], 0f64, Vec::new());
            assert!(batches.len() >= run.number("total_steps"));
            for (s, examples) in batches.iter().take(run.number("total_steps")).enumerate() {
                // Activations kept and computed again, in turn: the bits are the same, as the batch below shows.
                let keep = Activations::Keep(s % 3);
                let (loss, got) = steps(&model, &mut job, examples, &[run.learning_rate(s)], keep)[0];
                worst = worst.max(run.check_loss(s, loss));
                bits.push(loss.to_bits());
                let norm = run.log["grad_norms_unclipped_f32"][s].as_f64().unwrap();
                assert!((got - norm).abs() < 1e-4 * norm, "{} step {s}: {got} {norm}", run.name);
            }
            let weights = run.check_weights(&job[0]);
            println!("{}: {} losses, largest difference {worst:.1e}; weights {weights:.1e}", run.name, bits.len());
            alone.push(bits);
        }
        let mut jobs: Vec<Job> = runs.iter().map(|r| r.job()).collect();
        for (s, examples) in batches.iter().take(runs[0].number("total_steps")).enumerate() {
            let rates: Vec<f64> = runs.iter().map(|run| run.learning_rate(s)).collect();
            let reports = steps(&model, &mut jobs, examples, &rates, Activations::Keep(usize::MAX));
            for (((loss, _), bits), run) in reports.iter().zip(&alone).zip(&runs) {
                assert_eq!(loss.to_bits(), bits[s], "{} step {s}: with others {loss}", run.name);
            }
        }
        println!("{name}: {} jobs in one batch, the same bits of every loss", runs.len());
    }
}

/// The LSTM and the other encoders give the rows that PEFT saved.
#[test]
fn training_oracle_prompt_encoders() {
    let Some(root) = data("peft/llama_gqa") else { return };
    let mut seen = 0;
    let kinds = [
        ("ptuning_lstm", EncoderKind::Lstm),
        ("ptuning_mlp", EncoderKind::Mlp),
        ("prefix_proj", EncoderKind::Projection),
    ];
    for (name, kind) in kinds {
        let load = |file: &str| candle_core::safetensors::load(root.join(name).join(file), &Device::Cpu).unwrap();
        let weights = load("encoder_state.safetensors").into_iter().collect();
        let got = PromptEncoder::new(kind, weights).unwrap().rows().unwrap();
        let want = &load("adapter_model.safetensors")["prompt_embeddings"];
        let worst = (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        let worst = worst.to_scalar::<f32>().unwrap();
        println!("{name}: {worst:.1e}");
        assert!(worst < 1e-5, "{name}: {worst}");
        seen += 1;
    }
    assert_eq!(seen, 3);
}
