//! Whole training runs of PEFT and torch against ours: every loss and the final weights.
use crate::support::{asked_for, data, load, same_loss};
use candle_core::{Device, Tensor};
use prefixd::adapter::InputRow;
use prefixd::config::DtypeChoice;
use prefixd::model::Model;
use prefixd::model::packed::Activations;
use prefixd::training::settings::{Reparametrisation, Settings, TrainMethod};
use prefixd::training::{
    AdamWConfig, EncoderKind, Example, Goal, Job, Outcome, Placement, PromptEncoder, Schedule, Step, TrainedHead, Work,
    init,
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
        let (head, weights): (BTreeMap<_, _>, BTreeMap<_, _>) = self
            .weights("init.")
            .into_iter()
            .partition(|(name, _)| name.starts_with("classifier") || name.starts_with("score"));
        let has = |name: &str| weights.keys().any(|k| k.starts_with(name));
        let kind = if has("lstm_head") {
            EncoderKind::Lstm
        } else if has("mlp_head") {
            EncoderKind::Mlp
        } else if has("transform") {
            EncoderKind::Projection
        } else if has("prefix_task") {
            EncoderKind::Multitask
        } else {
            EncoderKind::Embedding
        };
        let adapter = self.log["adapter"].as_str().unwrap();
        let placement = if adapter.starts_with("prefix") {
            Placement::Stored
        } else if self.log["model"].as_str().unwrap().contains("bert") {
            Placement::AmongRows
        } else {
            Placement::VirtualTokens
        };
        // Sorted, a head's layers come in their order: `dense`, then `out_proj`.
        let modules = head.keys().filter_map(|name| name.strip_suffix(".weight"));
        let layers: Vec<_> = modules
            .map(|module| {
                let of = |part: &str| head.get(&format!("{module}.{part}")).cloned();
                (module.to_owned(), of("weight").unwrap(), of("bias"))
            })
            .collect();
        let head = (!layers.is_empty()).then(|| TrainedHead::new(layers).unwrap());
        let number = |key: &str| self.log[key].as_f64().unwrap();
        // Null: gradients are not clipped, which is 0 here. A log that says nothing is no such log.
        let clip = self.log.get("clip_grad_norm").unwrap();
        let config = AdamWConfig {
            beta1: self.log["betas"][0].as_f64().unwrap(),
            beta2: self.log["betas"][1].as_f64().unwrap(),
            eps: number("eps"),
            weight_decay: number("weight_decay"),
            max_gradient_norm: if clip.is_null() { 0.0 } else { clip.as_f64().unwrap() },
        };
        Job::with_head(PromptEncoder::new(kind, weights).unwrap(), head, placement, config).unwrap()
    }

    fn number(&self, key: &str) -> usize {
        self.log[key].as_u64().unwrap() as usize
    }

    fn learning_rate(&self, step: usize) -> f64 {
        let cosine = self.log["schedule"].as_str() == Some("cosine");
        let schedule = if cosine { Schedule::Cosine } else { Schedule::Linear };
        let share = schedule.share(step, self.number("warmup_steps"), self.number("total_steps"));
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
        let rows = self.tensors.get("final_prompt_embeddings");
        let mut all = rows.map_or(0.0, |rows| worst(&job.encoder.rows(&[0]).unwrap(), rows));
        for (name, var) in job.weights() {
            all = all.max(worst(var, &finals[name]));
        }
        assert!(all < WEIGHT_TOLERANCE, "{}: {all}", self.name);
        all
    }
}

impl Run {
    /// The batches, in order: of the run itself, or of the runs' folder.
    fn batches(&self, root: &Path) -> Vec<Vec<Example>> {
        let all: Value = match &self.log["examples"] {
            Value::Null => serde_json::from_slice(&std::fs::read(root.join("dataset.json")).unwrap()).unwrap(),
            _ => self.log.clone(),
        };
        let soft = if self.job().placement == Placement::AmongRows {
            self.job().encoder.rows(&[0]).unwrap().dims()[0]
        } else {
            0
        };
        let example = |v: &Value| {
            let tokens = v["input_ids"].as_array().unwrap().iter();
            let tokens = tokens.map(|i| InputRow::Token(i.as_u64().unwrap() as u32));
            let goal = match v["labels"].as_array() {
                Some(labels) => Goal::Tokens(labels.iter().map(|i| i.as_u64().map(|i| i as u32)).collect()),
                None => Goal::Class(v["class"].as_u64().unwrap() as u32),
            };
            let rows = (0..soft as u32).map(InputRow::Soft).chain(tokens).collect();
            Example { task: v["task"].as_u64().unwrap_or(0) as usize, rows, goal }
        };
        let examples: Vec<Example> = all["examples"].as_array().unwrap().iter().map(example).collect();
        let pick = |i: &Value| examples[i.as_u64().unwrap() as usize].clone();
        all["batches"].as_array().unwrap().iter().map(|b| b.as_array().unwrap().iter().map(pick).collect()).collect()
    }
}

/// A batch from end to end, and an optimiser's step of each job: loss and gradient norm.
fn steps(model: &Model, jobs: &mut [Job], examples: &[&[Example]], rate: &[f64], keep: Activations) -> Vec<(f64, f64)> {
    let work = jobs.iter().zip(examples).map(|(job, examples)| Work {
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

/// Every run by itself, then all runs of a model in the same batches: the same losses. Runs of `peft/train` in the test data, and
/// those that `tests/oracle/train.py` made.
#[test]
fn training_oracle_runs() {
    let own = walk(Path::new("tests/oracle/results/peft/train"));
    let given = data("peft/train").map(|root| walk(&root));
    let chosen = std::env::var_os("PREFIXD_TEST_CASES").is_some();
    assert!(given != Some(0) || chosen, "the test data has a folder of runs and none in it");
    let count = own + given.unwrap_or(0);
    println!("{count} runs");
    assert!(count > 0, "no run found");
}

fn walk(root: &Path) -> usize {
    let mut dirs: Vec<_> =
        std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir() && asked_for(p)).collect();
    dirs.sort();
    let runs: Vec<Run> = dirs.iter().map(|d| Run::read(d)).collect();
    let mut models: Vec<&str> = runs.iter().map(|r| r.log["model"].as_str().unwrap()).collect();
    models.dedup();
    for name in models {
        let model = load(root.join("..").join(name).to_str().unwrap(), DtypeChoice::F32);
        let runs: Vec<&Run> = runs.iter().filter(|r| r.log["model"] == name).collect();
        let batches: Vec<Vec<Vec<Example>>> = runs.iter().map(|run| run.batches(root)).collect();
        let mut alone: Vec<Vec<f64>> = Vec::new();
        for (run, batches) in runs.iter().zip(&batches) {
            let (mut job, mut worst, mut losses) = ([run.job()], 0f64, Vec::new());
            assert!(batches.len() >= run.number("total_steps"));
            for (s, examples) in batches.iter().take(run.number("total_steps")).enumerate() {
                // Activations kept and computed again, in turn: the losses are the same, as the batch below shows.
                let keep = Activations::Keep(s % 3);
                let (loss, got) = steps(&model, &mut job, &[examples], &[run.learning_rate(s)], keep)[0];
                worst = worst.max(run.check_loss(s, loss));
                losses.push(loss);
                let norm = run.log["grad_norms_unclipped_f32"][s].as_f64().unwrap();
                assert!((got - norm).abs() < 1e-4 * norm, "{} step {s}: {got} {norm}", run.name);
            }
            let weights = run.check_weights(&job[0]);
            println!("{}: {} losses, largest difference {worst:.1e}; weights {weights:.1e}", run.name, losses.len());
            alone.push(losses);
        }
        let mut jobs: Vec<Job> = runs.iter().map(|r| r.job()).collect();
        // As long as all of them run.
        for s in 0..runs.iter().map(|run| run.number("total_steps")).min().unwrap() {
            let rates: Vec<f64> = runs.iter().map(|run| run.learning_rate(s)).collect();
            let examples: Vec<&[Example]> = batches.iter().map(|b| &b[s][..]).collect();
            let reports = steps(&model, &mut jobs, &examples, &rates, Activations::Keep(usize::MAX));
            for (((loss, _), alone), run) in reports.iter().zip(&alone).zip(&runs) {
                same_loss(alone[s], *loss, &format!("{} step {s}", run.name));
            }
        }
        println!("{name}: {} jobs in one batch, the same losses", runs.len());
    }
    runs.len()
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
        let got = PromptEncoder::new(kind, weights).unwrap().rows(&[0]).unwrap();
        let want = &load("adapter_model.safetensors")["prompt_embeddings"];
        let worst = (got - want).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap();
        let worst = worst.to_scalar::<f32>().unwrap();
        println!("{name}: {worst:.1e}");
        assert!(worst < 1e-5, "{name}: {worst}");
        seen += 1;
    }
    assert_eq!(seen, 3);
}

/// What a job is refused by is what its encoder has.
#[test]
fn training_sizes_are_those_of_the_weights() {
    let model = load("tests/oracle/results/peft/qwen3_tied", DtypeChoice::F32);
    let methods = [
        (TrainMethod::PrefixTuning, Reparametrisation::Default),
        (TrainMethod::PrefixTuning, Reparametrisation::Projection),
        (TrainMethod::PTuning, Reparametrisation::Mlp),
        (TrainMethod::PTuning, Reparametrisation::Lstm),
        (TrainMethod::PromptTuning, Reparametrisation::Default),
        (TrainMethod::MultitaskPromptTuning, Reparametrisation::Default),
    ];
    for (method, reparametrisation) in methods {
        for encoder_hidden_size in [0, 12] {
            let usual = Settings { method, reparametrisation, encoder_hidden_size, ..Settings::default() };
            let settings =
                Settings { num_virtual_tokens: 3, num_tasks: 5, num_ranks: 2, encoder_num_layers: 3, ..usual };
            let encoder = init::encoder(&model, &settings, 1, &[5, 6]).unwrap();
            let numbers: usize = encoder.weights().map(|(_, var)| var.elem_count()).sum();
            assert_eq!(init::size(model.info(), &settings, 0), numbers, "{method:?} {reparametrisation:?}");
        }
    }
}
