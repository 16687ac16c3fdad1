//! Every case under `PREFIXD_TEST_DATA/peft/<model>/<adapter>` and under `tests/oracle/results`, made by transformers + PEFT,
//! against ours: logits within 1e-4 in f32, greedy tokens, log-probabilities of continuations and classes equal.
use crate::support::{self, Answer, ask_all, data, engine, logits, request};
use prefixd::adapter::{InputRow, Loaded, load_folder};
use prefixd::config::{Device, DtypeChoice, KvCacheDtype};
use prefixd::engine::request::Request;
use prefixd::model::config::ModelConfig;
use prefixd::model::{LoadOptions, Model};
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::{Path, PathBuf};

pub const LOGIT_TOLERANCE: f32 = 1e-4;

/// What one folder of results says.
pub struct Case {
    pub dir: PathBuf,
    oracle: Value,
    tensors: Vec<u8>,
    /// `None`: the bare base.
    pub loaded: Option<Loaded>,
}

/// Folders in `dir`, sorted.
fn folders(dir: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    all.sort();
    all
}

/// The model folders of our own results and of those given.
pub fn models() -> Vec<PathBuf> {
    let own = Path::new("tests/oracle/results/peft").to_owned();
    let roots = data("peft").into_iter().chain(own.is_dir().then_some(own));
    let all = roots.flat_map(|root| folders(&root)).filter(|dir| dir.join("config.json").is_file());
    let all: Vec<PathBuf> = all.filter(|dir| support::asked_for(dir)).collect();
    // What compares nothing must not pass.
    assert!(!all.is_empty(), "PREFIXD_TEST_CASES names no model that is there");
    all
}

fn ids(v: &Value) -> Vec<u32> {
    v.as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect()
}

impl Case {
    /// All cases of a model.
    pub fn all(model: &Model, dir: &Path) -> Vec<Case> {
        folders(dir).into_iter().filter(|d| d.join("oracle.json").is_file()).map(|d| Case::read(model, d)).collect()
    }

    /// The task of a multitask prompt is the oracle's, given by a task card.
    fn read(model: &Model, dir: PathBuf) -> Case {
        let oracle: Value = serde_json::from_slice(&std::fs::read(dir.join("oracle.json")).unwrap()).unwrap();
        let tensors = std::fs::read(dir.join("oracle.safetensors")).unwrap();
        let copy = tempfile::tempdir().unwrap();
        let files = ["adapter_config.json", "adapter_model.safetensors"];
        let loaded = files.iter().all(|file| dir.join(file).is_file()).then(|| {
            files.iter().for_each(|file| assert!(std::fs::copy(dir.join(file), copy.path().join(file)).is_ok()));
            if let Some(task) = oracle["task_ids"][0].as_u64() {
                std::fs::write(copy.path().join("task.toml"), format!("task_id = {task}\n")).unwrap();
            }
            load_folder(copy.path(), &model.shape(), model.tokenizer()).unwrap()
        });
        assert!(loaded.is_some() || dir.ends_with("oracle_base"), "{} gave no adapter", dir.display());
        Case { dir, oracle, tensors, loaded }
    }

    fn prompts(&self) -> impl Iterator<Item = (usize, &Value, Vec<u32>)> {
        let all = self.oracle["prompts"].as_array().unwrap().iter().enumerate();
        all.map(|(i, prompt)| (i, prompt, ids(&prompt["input_ids"])))
    }

    /// The stored tensor `name`: shape and values.
    fn tensor(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let file = SafeTensors::deserialize(&self.tensors).unwrap();
        let t = file.tensor(name).unwrap();
        let values = t.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        (t.shape().to_vec(), values)
    }

    /// How many logits of all prompts `run` gives from token ids, and their largest difference from the stored ones.
    pub fn compare(&self, run: impl Fn(&[u32]) -> Vec<Vec<f32>>) -> (usize, f32) {
        let (mut count, mut worst) = (0, 0f32);
        for (i, _, tokens) in self.prompts() {
            let (shape, want) = self.tensor(&format!("p{i}.logits_all"));
            let got = run(&tokens);
            assert_eq!(vec![got.len(), got[0].len()], shape, "{} prompt {i}", self.dir.display());
            for (a, b) in got.iter().flatten().zip(&want) {
                // NaN must not pass for small.
                let difference = (a - b).abs();
                worst = if difference <= worst { worst } else { difference };
                count += 1;
            }
        }
        (count, worst)
    }

    /// Mean and largest difference of all logits, and the largest logit.
    fn spread(&self, run: impl Fn(&[u32]) -> Vec<Vec<f32>>) -> (f64, f64, f64) {
        let (mut sum, mut most, mut largest, mut count) = (0f64, 0f64, 0f64, 0);
        for (i, _, tokens) in self.prompts() {
            let (_, want) = self.tensor(&format!("p{i}.logits_all"));
            for (a, b) in run(&tokens).iter().flatten().zip(&want) {
                let difference = f64::from((a - b).abs());
                assert!(difference.is_finite());
                (sum, most, largest) = (sum + difference, most.max(difference), largest.max(f64::from(b.abs())));
                count += 1;
            }
        }
        (sum / f64::from(count), most, largest)
    }

    /// A request of this case's adapter for `tokens`.
    fn request(&self, model: &Facts, tokens: &[u32], max_new_tokens: usize) -> Request {
        let loaded = self.loaded.as_ref();
        let mut r = request(loaded.and_then(|l| l.prefix.clone()), tokens, max_new_tokens);
        if let Some(soft) = loaded.and_then(|l| l.soft.clone()) {
            r.input.splice(0..0, (0..soft.len as u32).map(InputRow::Soft));
            r.soft = Some(soft);
        }
        r.head = loaded.and_then(|l| l.head.clone()).or(model.head.clone());
        r
    }

    /// A head answers, the adapter's or an encoder's own.
    fn classifies(&self, model: &Facts) -> bool {
        model.encoder || self.writes_classes()
    }

    /// The adapter has a head of its own.
    pub fn writes_classes(&self) -> bool {
        self.loaded.as_ref().is_some_and(|l| l.head.is_some())
    }

    /// Everything else that the folder says, as requests and what they should give.
    fn requests(&self, model: &Facts) -> Vec<(Request, Expected)> {
        let mut all = Vec::new();
        for (i, prompt, tokens) in self.prompts() {
            if self.classifies(model) {
                let (_, classes) = self.tensor(&format!("p{i}.logits"));
                all.push((self.request(model, &tokens, 0), Expected::Classes(classes)));
                continue;
            }
            let greedy = ids(&prompt["greedy_ids"]);
            all.push((self.request(model, &tokens, greedy.len()), Expected::Greedy(greedy)));
            for continuation in prompt["continuations"].as_array().unwrap() {
                let mut r = self.request(model, &[tokens.clone(), ids(&continuation["ids"])].concat(), 0);
                r.score_from = Some(tokens.len());
                let want = continuation["token_logprobs"].as_array().unwrap();
                all.push((r, Expected::Scores(want.iter().map(|v| v.as_f64().unwrap()).collect())));
            }
        }
        all
    }
}

/// What requests need of a model once the engine has it.
struct Facts {
    encoder: bool,
    head: Option<std::sync::Arc<prefixd::adapter::Head>>,
}

#[test]
fn oracle_peft() {
    let (mut cases, mut values) = (0, 0);
    for model_dir in models() {
        if let Err(e) = ModelConfig::parse(&std::fs::read(model_dir.join("config.json")).unwrap()) {
            println!("{}: not served: {e}", model_dir.display());
            continue;
        }
        let model = support::load(model_dir.to_str().unwrap(), DtypeChoice::Auto);
        let facts = Facts { encoder: model.info().encoder, head: model.head().cloned() };
        let all = Case::all(&model, &model_dir);
        for case in all.iter().filter(|case| !case.classifies(&facts)) {
            let prefix = case.loaded.as_ref().and_then(|l| l.prefix.as_deref());
            let (count, worst) = case.compare(|tokens| logits(&model, prefix, tokens));
            println!("{}: {count} logits, largest difference {worst:.2e}", case.dir.display());
            assert!(worst < LOGIT_TOLERANCE, "{}: {worst}", case.dir.display());
            values += count;
        }
        // All adapters and prompts of the model in one mixed batch, then each by itself: the same bits.
        let engine = engine(model, 16_384);
        let of_case = |case: &Case| -> Vec<_> {
            case.requests(&facts).into_iter().map(|(r, e)| (r, e, case.dir.clone())).collect()
        };
        let mixed: Vec<_> = all.iter().flat_map(of_case).collect();
        let requests = || mixed.iter().map(|(r, _, _)| r.clone());
        for (answer, (_, expected, dir)) in ask_all(&engine.handle(), requests().collect()).iter().zip(&mixed) {
            expected.check(answer, dir);
            cases += 1;
        }
        let answers = ask_all(&engine.handle(), requests().collect());
        for (one, all) in requests().map(|r| ask_all(&engine.handle(), vec![r]).remove(0)).zip(answers) {
            support::same(&one, &all, &model_dir.display().to_string());
        }
    }
    assert!(cases > 0, "no case found");
    println!("oracle_peft: {cases} generations, scores and classes, {values} logits");
}

/// bf16 keeps 8 bits of each weight, and of each input of a product by a weight: about ten roundings a layer from embedding to
/// head.
#[test]
fn oracle_peft_in_bf16() {
    let all = LoadOptions { dtype: DtypeChoice::Bf16, ..LoadOptions::default() };
    within_roundings("oracle_peft_in_bf16", all, 10.0, 8);
}

/// K and V are rounded once a layer each, weights not at all.
#[test]
fn oracle_peft_with_halves_of_k_and_v() {
    for (kv_cache_dtype, bits) in [(KvCacheDtype::Bf16, 8), (KvCacheDtype::F16, 11)] {
        let kv = LoadOptions { kv_cache_dtype, dtype: DtypeChoice::F32, ..LoadOptions::default() };
        if support::device() != Device::Cpu {
            // A GPU's kernels read K and V in the type of the weights alone.
            let e = support::load_with("embedded", kv).err().unwrap();
            assert_eq!(e.field(), Some("engine.kv_cache_dtype"), "{e}");
            continue;
        }
        within_roundings("oracle_peft_with_halves_of_k_and_v", kv, 2.0, bits);
    }
}

/// Roundings are independent, so they add up like a walk: `a_layer` of them in each layer, each up to 2^-`bits` of what it rounds,
/// which near the end is of the size of the largest logit. The bound is sqrt(a_layer * layers) * 2^-bits of that on average over
/// all logits; single ones may be four times as far off.
fn within_roundings(name: &str, options: LoadOptions, a_layer: f64, bits: i32) {
    let (mut cases, mut worst_share) = (0, 0f64);
    for dir in models() {
        let model = support::load_with(dir.to_str().unwrap(), options).unwrap();
        if model.info().encoder {
            continue;
        }
        let unit = (a_layer * model.info().num_layers as f64).sqrt() * 2f64.powi(-bits);
        for case in Case::all(&model, &dir).iter().filter(|case| !case.writes_classes()) {
            let prefix = case.loaded.as_ref().and_then(|l| l.prefix.as_deref());
            let (mean, most, largest) = case.spread(|tokens| logits(&model, prefix, tokens));
            println!(
                "{}: mean {:.1e}, most {:.1e} of {largest:.1}",
                case.dir.display(),
                mean / largest,
                most / largest
            );
            assert!(mean > 0.0 && mean < unit * largest, "{}: mean {mean}", case.dir.display());
            assert!(most < 4.0 * unit * largest, "{}: {most} of {largest}", case.dir.display());
            worst_share = worst_share.max(most / (4.0 * unit * largest));
            cases += 1;
        }
    }
    assert!(cases > 0, "no case of a decoder found");
    println!("{name}: {cases} cases, at most {:.0} % of the bound", worst_share * 100.0);
}

enum Expected {
    Greedy(Vec<u32>),
    Scores(Vec<f64>),
    Classes(Vec<f32>),
}

impl Expected {
    fn check(&self, answer: &Answer, dir: &Path) {
        let close = |got: f64, want: f64| {
            assert!((got - want).abs() < f64::from(LOGIT_TOLERANCE), "{}: {got} {want}", dir.display());
        };
        match self {
            Expected::Greedy(ids) => {
                let got: Vec<u32> = answer.tokens.iter().map(|t| t.id).collect();
                assert_eq!(&got, ids, "{}", dir.display());
            }
            Expected::Scores(want) => {
                assert_eq!(answer.scored.len(), want.len());
                answer.scored.iter().zip(want).for_each(|(got, want)| close(f64::from(got.logprob), *want));
            }
            Expected::Classes(want) => {
                assert_eq!(answer.pooled.len(), want.len());
                answer.pooled.iter().zip(want).for_each(|(got, want)| close(f64::from(*got), f64::from(*want)));
            }
        }
    }
}
