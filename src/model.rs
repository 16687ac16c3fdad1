//! The base model: loaded once, frozen, shared by every task.
pub mod background;
pub mod batch;
pub mod config;
mod decoder;
mod device;
mod gguf;
mod layer;
pub mod packed;
pub mod source;
mod weights;

use crate::adapter::{BaseShape, Head};
use crate::config::{Device, DtypeChoice, KvCacheDtype, Quantize};
use crate::error::{Context, Error, Kind, Result};
use crate::kv::{KvPool, PageId, pages_for};
use crate::ops::Machine;
use crate::ops::Pool;
use crate::ops::cross_entropy::CrossEntropy;
use crate::ops::embed::RowSource;
use crate::ops::gpu::Gpu;
use crate::ops::linear::Linear;
use crate::tokenizer::Tokenizer;
use crate::tokenizer::chat::ChatTemplate;
use batch::{Batch, Forward, Rows};
use candle_core::{DType, Tensor};
use config::ModelConfig;
use decoder::Decoder;
use device::{fits_kernels, kv_dtype, machine};
use source::ModelFiles;
use std::sync::Arc;
use weights::Checkpoint;

/// Weights, tokenizer and facts of the base.
pub struct Model {
    decoder: Decoder,
    /// Type that K and V are held in.
    kv_dtype: DType,
    /// What classification heads run on: the processor, also where the base is on a GPU. They are small and read few rows.
    heads: Arc<Machine>,
    /// The classification head that the base came with.
    head: Option<Arc<Head>>,
    tokenizer: Tokenizer,
    chat_template: Result<ChatTemplate>,
    info: ModelInfo,
    eos_token_ids: Vec<u32>,
}

/// The facts that the API shows.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct ModelInfo {
    /// Folder, file, hub id or `embedded`.
    pub name: String,
    pub family: &'static str,
    pub num_parameters: u64,
    pub num_layers: usize,
    pub hidden_size: usize,
    pub num_attention_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub vocab_size: usize,
    /// Tokens in the longest sequence, prefix included.
    pub max_model_len: usize,
    /// It classifies and generates nothing.
    pub encoder: bool,
    /// Modules of a classification head on it, in order, as PEFT's `modules_to_save` names them.
    pub head_modules: &'static [&'static str],
    /// Classes of the base's own head, if it came with one.
    pub labels: Vec<String>,
    /// Type of the weights: the checkpoint's or as asked for; `int8` where they were rounded to it.
    pub dtype: &'static str,
    /// Type that K and V are held in.
    pub kv_cache_dtype: &'static str,
    /// `cpu`, or the GPU's name.
    pub device: String,
}

/// How to load a model.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// Where it runs.
    pub device: Device,
    /// Type of the weights.
    pub dtype: DtypeChoice,
    /// What they are rounded to.
    pub quantize: Quantize,
    /// Threads of the CPU ops; 0: one a core.
    pub threads: usize,
    /// Longest sequence; 0: the model's own.
    pub max_model_len: usize,
    /// Type that K and V are held in.
    pub kv_cache_dtype: KvCacheDtype,
    /// Decoding on a GPU launches its kernels one by one; else steps that come again are recorded as CUDA graphs.
    pub enforce_eager: bool,
}

impl Model {
    /// Reads, checks and packs the weights. Blocks for as long as that takes.
    ///
    /// # Errors
    /// `FailedPrecondition` for a model or device that is not served, `InvalidArgument` for broken files.
    pub fn load(files: &ModelFiles, options: LoadOptions) -> Result<Self> {
        let load = || Self::load_inner(files, options);
        load().map_err(|e| e.context(format!("model {}", files.name)))
    }

    fn load_inner(files: &ModelFiles, options: LoadOptions) -> Result<Self> {
        let config = ModelConfig::parse(&files.config)?;
        let tokenizer = Tokenizer::from_bytes(&files.tokenizer)?;
        let chat_template = chat_template(files);
        let max_model_len = match options.max_model_len {
            0 => config.default_positions,
            n if n <= config.max_positions => n,
            n => {
                let rule = format!("the model has {} positions", config.max_positions);
                return Err(Error::invalid("engine.max_model_len", n, rule));
            }
        };
        let dtype = match options.dtype {
            DtypeChoice::Auto => None,
            DtypeChoice::F32 => Some(DType::F32),
            DtypeChoice::Bf16 => Some(DType::BF16),
            DtypeChoice::F16 => Some(DType::F16),
        };
        let eos_token_ids = match &files.generation_config {
            None => config.eos_token_ids.clone(),
            Some(json) => {
                let v: serde_json::Value =
                    serde_json::from_slice(json).or_kind(Kind::InvalidArgument, "generation_config.json")?;
                let ids = config::token_ids(&v["eos_token_id"]);
                if ids.is_empty() { config.eos_token_ids.clone() } else { ids }
            }
        };
        let mut checkpoint = Checkpoint::open(&files.weights, dtype, options.quantize, &config)?;
        let machine = machine(options)?;
        if machine.gpu().is_some() {
            checkpoint.make_uniform();
        }
        let decoder = Decoder::load(&mut checkpoint, &config, max_model_len, options, &machine)?;
        if machine.gpu().is_some() {
            fits_kernels(&config, decoder.activation_dtype())?;
        }
        let kv_dtype = kv_dtype(options.kv_cache_dtype, decoder.activation_dtype(), machine.gpu().is_some())?;
        let heads = if machine.gpu().is_some() { Machine::new(options.threads) } else { machine.clone() };
        let head = classifier(&mut checkpoint, &config, &heads)?;
        let info = ModelInfo {
            name: files.name.clone(),
            family: config.family.name,
            num_parameters: checkpoint.parameters(),
            num_layers: config.num_layers(),
            hidden_size: config.hidden_size,
            num_attention_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            vocab_size: config.vocab_size,
            max_model_len,
            encoder: config.family.encoder,
            head_modules: if config.family.encoder { config.family.names.classifier } else { &["score"] },
            labels: head.as_ref().map_or(Vec::new(), |h| labels(&config, h.labels())),
            dtype: match options.quantize {
                Quantize::None => checkpoint.table_dtype().map_or("f32", |d| d.as_str()),
                Quantize::Int8 => "int8",
            },
            kv_cache_dtype: kv_dtype.as_str(),
            device: machine.gpu().map_or("cpu".into(), |gpu| gpu.name()),
        };
        checkpoint.finish()?;
        [&machine, &heads].iter().for_each(|machine| machine.settle());
        Ok(Model { decoder, kv_dtype, heads, head: head.map(Arc::new), tokenizer, chat_template, info, eos_token_ids })
    }

    /// Its facts.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// The threads of its ops.
    pub fn threads(&self) -> &Pool {
        &self.decoder.machine().pool
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// How it words a conversation; else why it cannot.
    pub fn chat_template(&self) -> &Result<ChatTemplate> {
        &self.chat_template
    }

    /// Tokens that end a text.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos_token_ids
    }

    /// What adapters must agree with.
    pub fn shape(&self) -> BaseShape {
        BaseShape {
            name: self.info.name.clone(),
            num_layers: self.info.num_layers,
            num_kv_heads: self.info.num_kv_heads,
            head_dim: self.info.head_dim,
            hidden_size: self.info.hidden_size,
            max_model_len: self.info.max_model_len,
            encoder: self.info.encoder,
            input_dtype: self.decoder.activation_dtype(),
            kv_dtype: self.kv_dtype,
            machine: self.heads.clone(),
        }
    }

    /// Bytes of one KV page.
    pub fn page_bytes(&self) -> usize {
        KvPool::page_bytes(self.decoder.kv_layout(), self.info.num_layers, self.kv_dtype)
    }

    /// The GPU that it lies on.
    pub fn gpu(&self) -> Option<&Gpu> {
        self.decoder.machine().gpu()
    }

    /// How many sequences can decode in one step; `None`: as many as there is memory for.
    pub fn most_sequences(&self) -> Option<usize> {
        self.gpu().map(|_| decoder::MOST_SAMPLED)
    }

    /// Waits until a GPU has done what it was given.
    ///
    /// # Errors
    /// When it is lost: everything that follows will fail too.
    pub fn synchronize(&self) -> Result<()> {
        Ok(self.decoder.machine().synchronize()?)
    }

    /// Bytes of the GPU that the model lies on: free, all, and what the activations of a step of `rows` rows take at most.
    pub fn gpu_memory(&self, rows: usize) -> Result<Option<(usize, usize, usize)>> {
        let Some(gpu) = self.decoder.machine().gpu() else { return Ok(None) };
        let (free, total) = gpu.memory()?;
        Ok(Some((free, total, self.decoder.step_bytes(rows))))
    }

    /// A pool of `pages` for this model.
    pub fn kv_pool(&self, pages: usize) -> Result<KvPool> {
        KvPool::new(self.decoder.kv_layout(), self.info.num_layers, pages, self.decoder.machine(), self.kv_dtype)
    }

    /// Runs the batch: K and V go into `kv`; what it gives is in [`Forward`].
    pub fn forward(&self, batch: &Batch, kv: &KvPool) -> Result<Forward> {
        self.decoder.forward(batch, kv)
    }

    /// The embeddings of tokens `[tokens, hidden]`, as virtual tokens in their place would be.
    pub fn token_rows(&self, tokens: &[u32]) -> Result<Tensor> {
        self.decoder.token_rows(tokens)
    }

    /// K and V of a text at positions 0 and on, in every layer: `[tokens, 2 * layers * kv_heads * head_dim]`, the layout
    /// that prefix-tuning stores.
    pub fn kv_of(&self, tokens: &[u32]) -> Result<Tensor> {
        let pages: Vec<PageId> = (0..pages_for(tokens.len()) as u32).map(PageId).collect();
        let kv = self.kv_pool(pages.len())?;
        let inputs: Vec<RowSource> = tokens.iter().map(|id| RowSource::Token(*id)).collect();
        let mut batch = Batch::default();
        let rows = Rows {
            inputs: &inputs,
            soft: &[],
            first: 0,
            prefix_len: 0,
            prefix_pages: &[],
            own_pages: &pages,
            wanted: 0..0,
            sampled: false,
        };
        batch.push(&rows, self.info.hidden_size);
        self.forward(&batch, &kv)?;
        kv.read(&pages, tokens.len())
    }

    /// Hidden rows `[n, hidden]` -> logits `[n, vocab]`.
    ///
    /// # Errors
    /// `Internal` for an encoder.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.decoder.logits(hidden)
    }

    /// Hidden rows `[n, hidden]`, a target token each -> their losses, and with `gradient` that of their sum.
    ///
    /// # Errors
    /// `Internal` for an encoder.
    pub fn cross_entropy(&self, hidden: &Tensor, targets: &[u32], gradient: bool) -> Result<CrossEntropy> {
        self.decoder.cross_entropy(hidden, targets, gradient)
    }

    /// Bytes that a row's activations take in one layer while its graph is kept.
    pub fn activation_bytes_per_row(&self) -> usize {
        self.decoder.activation_bytes_per_row()
    }

    /// Hidden rows `[n, hidden]` -> what a classification head reads, differentiable.
    pub fn pool(&self, hidden: &Tensor) -> Result<Tensor> {
        self.decoder.pool(hidden)
    }

    /// Pooled hidden rows `[n, hidden]` -> logits of the classes `[n, labels]`.
    pub fn classify(&self, hidden: &Tensor, head: &Head) -> Result<Tensor> {
        Ok(head.forward(&Machine::to_host(&self.decoder.pool(hidden)?)?)?)
    }

    /// The classification head that the base came with.
    pub fn head(&self) -> Option<&Arc<Head>> {
        self.head.as_ref()
    }
}

/// A model whose template is missing or broken still serves prompts, so this is an error only for who wants it.
fn chat_template(files: &ModelFiles) -> Result<ChatTemplate> {
    let template = ChatTemplate::from_files(files.chat_template.as_deref(), files.tokenizer_config.as_deref());
    template.map_err(|e| {
        tracing::info!(model = files.name, %e, "`messages` will be refused");
        e.context(format!("model {}", files.name))
    })
}

/// The base's own classification head, if the checkpoint has one.
fn classifier(checkpoint: &mut Checkpoint<'_>, config: &ModelConfig, machine: &Arc<Machine>) -> Result<Option<Head>> {
    let (names, hidden) = (config.family.names.classifier, config.hidden_size);
    let Some(last) = names.last() else { return Ok(None) };
    let Some(labels) = checkpoint.rows(&format!("{last}.weight")) else { return Ok(None) };
    let layers = names.iter().map(|name| {
        let rows = if name == last { labels } else { hidden };
        let weight = checkpoint.take(&format!("{name}.weight"), &[rows, hidden])?;
        let bias = checkpoint.take(&format!("{name}.bias"), &[rows])?;
        Ok(Linear::new(&[weight], &[Some(bias)], machine)?)
    });
    Ok(Some(Head::new(layers.collect::<Result<_>>()?)))
}

/// Names of `count` classes: the config's, or transformers' default.
fn labels(config: &ModelConfig, count: usize) -> Vec<String> {
    if config.labels.len() == count {
        return config.labels.clone();
    }
    (0..count).map(|i| format!("LABEL_{i}")).collect()
}
