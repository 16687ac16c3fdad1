//! Models, prefixes and requests for the tests.
use candle_core::Tensor;
use prefixd::adapter::{InputRow, Prefix};
use prefixd::config::{Device, DtypeChoice, EngineConfig, KvCacheDtype, Quantize};
use prefixd::engine::request::{Event, Finish, Request, Sampling, Stopping, TokenLogprob};
use prefixd::engine::{Engine, EngineHandle};
use prefixd::error::Result;
use prefixd::kv::{KvPool, PageId, pages_for};
use prefixd::model::batch::{Batch, Rows};
use prefixd::model::{LoadOptions, Model, source};
use prefixd::ops::embed::RowSource;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rand_distr::StandardNormal;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

/// The folder of oracle data, or `None` with the reason printed.
pub fn data(part: &str) -> Option<PathBuf> {
    let root = std::env::var("PREFIXD_TEST_DATA").unwrap_or_else(|_| "../shared/data".into());
    let dir = Path::new(&root).join(part);
    if !dir.is_dir() {
        println!("skipped: {} is absent (set PREFIXD_TEST_DATA)", dir.display());
        return None;
    }
    Some(dir)
}

pub fn load(name: &str, dtype: DtypeChoice) -> Model {
    try_load(name, dtype).unwrap()
}

pub fn try_load(name: &str, dtype: DtypeChoice) -> Result<Model> {
    load_with(name, LoadOptions { dtype, ..LoadOptions::default() })
}

/// On two threads of what the tests run on.
pub fn load_with(name: &str, options: LoadOptions) -> Result<Model> {
    Model::load(&source::resolve(name)?, LoadOptions { device: device(), threads: 2, ..options })
}

/// What the tests of models run on: `PREFIXD_TEST_DEVICE`, the processor by default.
pub fn device() -> Device {
    std::env::var("PREFIXD_TEST_DEVICE").map_or(Device::Cpu, |name| name.parse().unwrap())
}

/// The shipped model.
pub fn embedded() -> Model {
    load("embedded", DtypeChoice::Auto)
}

/// The same with int8 weights.
pub fn int8() -> Model {
    let options = LoadOptions { quantize: Quantize::Int8, threads: 2, ..LoadOptions::default() };
    Model::load(&source::resolve("embedded").unwrap(), options).unwrap()
}

/// The same with K and V in f16.
pub fn halved() -> Model {
    let options = LoadOptions { kv_cache_dtype: KvCacheDtype::F16, threads: 2, ..LoadOptions::default() };
    Model::load(&source::resolve("embedded").unwrap(), options).unwrap()
}

/// Random tensors, the same at every run, so that a bound holds for the numbers it was found with.
pub struct Draws(StdRng);

impl Draws {
    pub fn new(seed: u64) -> Draws {
        Draws(StdRng::seed_from_u64(seed))
    }

    pub fn uniform(&mut self, range: std::ops::Range<f32>, shape: &[usize]) -> Tensor {
        let value = |_| self.0.random_range(range.clone());
        Tensor::from_iter((0..shape.iter().product()).map(value), &candle_core::Device::Cpu)
            .and_then(|t| t.reshape(shape))
            .unwrap()
    }

    /// About 0.
    pub fn normal(&mut self, deviation: f32, shape: &[usize]) -> Tensor {
        let value = |_| deviation * self.0.sample::<f32, _>(StandardNormal);
        Tensor::from_iter((0..shape.iter().product()).map(value), &candle_core::Device::Cpu)
            .and_then(|t| t.reshape(shape))
            .unwrap()
    }
}

/// All logits of one sequence, run by itself: those of the prefix's input rows, then those of `tokens`.
pub fn logits(model: &Model, prefix: Option<&Prefix>, tokens: &[u32]) -> Vec<Vec<f32>> {
    logits_with(model, prefix, tokens, &|_| ())
}

/// The same with something wrong in each batch, done by `harm`.
pub fn logits_with(model: &Model, prefix: Option<&Prefix>, tokens: &[u32], harm: &dyn Fn(&mut Batch)) -> Vec<Vec<f32>> {
    let prefix_len = prefix.map_or(0, Prefix::len);
    let prefix_pages: Vec<PageId> = (0..pages_for(prefix_len) as u32).map(PageId).collect();
    let first = prefix_pages.len() as u32;
    let own_pages: Vec<PageId> = (first..first + pages_for(tokens.len()) as u32).map(PageId).collect();
    let kv = model.kv_pool(prefix_pages.len() + own_pages.len()).unwrap();
    let mut out = Vec::new();
    if let Some(prefix) = prefix {
        if let Some(rows) = &prefix.kv {
            kv.store(&rows.data, rows.len, &prefix_pages).unwrap();
        }
        let row = |r: &InputRow| match r {
            InputRow::Token(id) => RowSource::Token(*id),
            InputRow::Soft(i) => RowSource::Soft(*i),
        };
        let inputs: Vec<RowSource> = prefix.rows.iter().map(row).collect();
        let rows = Rows {
            inputs: &inputs,
            soft: &prefix.soft,
            first: prefix.kv_len(),
            prefix_len: 0,
            prefix_pages: &[],
            own_pages: &prefix_pages,
            wanted: 0..inputs.len(),
            sampled: false,
        };
        if !inputs.is_empty() {
            out.extend(run(model, &rows, &kv, harm));
        }
    }
    let inputs: Vec<RowSource> = tokens.iter().map(|id| RowSource::Token(*id)).collect();
    let rows = Rows {
        inputs: &inputs,
        soft: &[],
        first: 0,
        prefix_len,
        prefix_pages: &prefix_pages,
        own_pages: &own_pages,
        wanted: 0..inputs.len(),
        sampled: false,
    };
    out.extend(run(model, &rows, &kv, harm));
    out
}

fn run(model: &Model, rows: &Rows<'_>, kv: &KvPool, harm: &dyn Fn(&mut Batch)) -> Vec<Vec<f32>> {
    let mut batch = Batch::default();
    batch.push(rows, model.info().hidden_size);
    harm(&mut batch);
    let hidden = model.forward(&batch, kv).unwrap().hidden.unwrap();
    model.logits(&hidden).unwrap().to_vec2().unwrap()
}

/// Whether a folder of a model or a run is one that `PREFIXD_TEST_CASES` names, by the start of its name; all are, where that is
/// not set.
pub fn asked_for(dir: &Path) -> bool {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    std::env::var("PREFIXD_TEST_CASES").map_or(true, |names| names.split(',').any(|n| name.starts_with(n)))
}

/// Answers of one request in two batches: the same bits on the processor; on a GPU, where a library multiplies many rows, the
/// same tokens, and figures that differ by roundings of f32.
pub fn same(a: &Answer, b: &Answer, what: &str) {
    if device() == Device::Cpu {
        return assert_eq!(a.bits(), b.bits(), "{what}");
    }
    let (a, b) = (a.bits(), b.bits());
    assert_eq!(a.len(), b.len(), "{what}");
    for ((id, x), (other, y)) in a.iter().zip(&b) {
        let (x, y) = (f32::from_bits(*x), f32::from_bits(*y));
        assert!(id == other && (x - y).abs() < 1e-4, "{what}: {id} {x}, {other} {y}");
    }
}

/// Losses of a training job alone and beside others: the same bits on the processor. On a GPU a library multiplies, by a kernel that it
/// chooses by the number of rows, and the optimiser carries those roundings of f32 from step to step.
pub fn same_loss(alone: f64, together: f64, what: &str) {
    let close = match device() {
        Device::Cpu => alone.to_bits() == together.to_bits(),
        _ => (alone - together).abs() <= 2e-6 * alone.abs().max(1.0),
    };
    assert!(close, "{what}: {alone}, with others {together}");
}

/// A request with the defaults of a test.
pub fn request(prefix: Option<Arc<Prefix>>, tokens: &[u32], max_new_tokens: usize) -> Request {
    Request {
        id: "test".into(),
        tenant: prefix.as_ref().map_or(String::new(), |p| p.digest.to_string()).into(),
        prefix,
        input: tokens.iter().map(|id| InputRow::Token(*id)).collect(),
        soft: None,
        head: None,
        sampling: Sampling::default(),
        stopping: Stopping { max_new_tokens, ignore_eos: true, ..Stopping::default() },
        score_from: None,
        top_logprobs: Some(0),
        deadline: None,
        arrival: Instant::now(),
    }
}

/// Everything that came back for one request.
#[derive(Debug)]
pub struct Answer {
    pub tokens: Vec<TokenLogprob>,
    pub scored: Vec<TokenLogprob>,
    /// Logits of the classes.
    pub pooled: Vec<f32>,
    pub text: String,
    pub finish: Finish,
}

impl Answer {
    /// Ids and the bits of their log-probabilities, scores first, and of the logits of classes.
    pub fn bits(&self) -> Vec<(u32, u32)> {
        let classes = self.pooled.iter().map(|x| (0, x.to_bits()));
        self.scored.iter().chain(&self.tokens).map(|t| (t.id, t.logprob.to_bits())).chain(classes).collect()
    }
}

/// Submits all at once and waits for all.
pub fn ask_all(engine: &EngineHandle, requests: Vec<Request>) -> Vec<Answer> {
    let receivers: Vec<_> = requests.into_iter().map(|r| engine.submit(r).unwrap()).collect();
    receivers.into_iter().map(collect).collect()
}

pub fn collect(mut events: tokio::sync::mpsc::Receiver<Event>) -> Answer {
    let (mut tokens, mut scored, mut pooled, mut text) = (Vec::new(), Vec::new(), Vec::new(), String::new());
    loop {
        match events.blocking_recv().expect("the engine ends every request") {
            Event::Scored(s) => scored = s,
            Event::Pooled(logits) => pooled = logits,
            Event::Token { logprob, text: piece, .. } => {
                tokens.push(logprob.expect("every request of the tests asks for it"));
                text += &piece;
            }
            Event::Finished(finish) => {
                text += &finish.text;
                return Answer { tokens, scored, pooled, text, finish };
            }
            Event::Failed(e) => panic!("{e}"),
        }
    }
}

/// An engine with a pool of `kv_tokens`.
pub fn engine(model: Model, kv_tokens: usize) -> Engine {
    Engine::start(model, &EngineConfig { kv_tokens, ..EngineConfig::default() }).unwrap()
}

/// How far apart two sets of logits are: the root of the mean square, in deviations of the first.
pub fn apart(want: &[Vec<f32>], got: &[Vec<f32>]) -> f64 {
    let (mut error, mut norm) = (0f64, 0f64);
    for (want, got) in want.iter().zip(got) {
        let mean = want.iter().sum::<f32>() / want.len() as f32;
        error += want.iter().zip(got).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        norm += want.iter().map(|a| f64::from(a - mean).powi(2)).sum::<f64>();
    }
    (error / norm).sqrt()
}
