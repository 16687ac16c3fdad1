//! Settings, read once and checked whole before anything is bound.
//!
//! Order, later wins: defaults, the `--config` TOML file, environment `PREFIXD_*` (`PREFIXD_ENGINE__MAX_SEQUENCES`
//! for a nested one), command line.
use crate::error::{Context, Error, Kind, Result};
use figment::{
    Figment,
    providers::{Env, Format, Serialized, Toml},
};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// All settings of `prefixd serve`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where gRPC listens. Port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where `/metrics` listens; none: no metrics server.
    pub metrics_listen: Option<SocketAddr>,
    /// `embedded`, a Hugging Face folder, a GGUF, or a hub id.
    pub model: String,
    /// The adapter store. None: the shipped adapters in a folder that is gone at exit.
    pub adapters: Option<PathBuf>,
    /// Load adapters that appear in the store's folder and unload those that vanish.
    pub watch: bool,
    /// Where the model runs.
    pub device: Device,
    /// Type of the weights; `auto` keeps the checkpoint's, and decodes the blocks of a GGUF to bf16.
    pub dtype: DtypeChoice,
    /// What the weights are rounded to once they are loaded.
    pub quantize: Quantize,
    /// Batching and memory.
    pub engine: EngineConfig,
    /// What a request may ask for.
    pub limits: Limits,
    /// Adapters that are trained while the server serves.
    pub training: TrainingConfig,
    /// Seconds that running requests get to finish after SIGTERM.
    pub drain_seconds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 50051)),
            metrics_listen: None,
            model: "embedded".into(),
            adapters: None,
            watch: false,
            device: Device::Auto,
            dtype: DtypeChoice::Auto,
            quantize: Quantize::None,
            engine: EngineConfig::default(),
            limits: Limits::default(),
            training: TrainingConfig::default(),
            drain_seconds: 30,
        }
    }
}

/// Where the model runs.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq)]
#[serde(try_from = "String", into = "String")]
pub enum Device {
    /// CUDA where this build and machine have it, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of that index.
    Cuda(usize),
}

impl std::str::FromStr for Device {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match (s, s.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(Device::Auto),
            ("cpu", _) => Ok(Device::Cpu),
            ("cuda", _) => Ok(Device::Cuda(0)),
            (_, Some(Ok(index))) => Ok(Device::Cuda(index)),
            _ => Err(Error::invalid("device", format!("{s:?}"), "must be auto, cpu or cuda:N")),
        }
    }
}

impl TryFrom<String> for Device {
    type Error = Error;
    fn try_from(s: String) -> Result<Self> {
        s.parse()
    }
}

impl From<Device> for String {
    fn from(d: Device) -> String {
        match d {
            Device::Auto => "auto".into(),
            Device::Cpu => "cpu".into(),
            Device::Cuda(i) => format!("cuda:{i}"),
        }
    }
}

/// Type of the weights in memory.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum DtypeChoice {
    /// As in the checkpoint; the blocks of a GGUF are decoded to bf16.
    #[default]
    Auto,
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half. On the CPU it is held as f32, which is exact.
    F16,
}

/// What the weights of linear layers and the token table are rounded to.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Quantize {
    /// They stay as they are.
    #[default]
    None,
    /// 8-bit integers with a scale for every 256 of a row: each weight is off by 1/254 of the largest of its 256 at most. The
    /// inputs of each layer are rounded alike.
    Int8,
}

/// Type that K and V are held in.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize, PartialEq, Eq, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KvCacheDtype {
    /// f32 on the CPU, exact; on a GPU that of the weights, the only one it has.
    #[default]
    Auto,
    /// 32-bit float.
    F32,
    /// bfloat16: half the memory, K and V off by 1/512 at most.
    Bf16,
    /// IEEE half: half the memory, K and V off by 1/4096 at most; what lies beyond 65504 is cut there.
    F16,
}

/// Batching and memory.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Rows (prompt and decode tokens) in one step.
    pub max_batch_tokens: usize,
    /// Sequences in one step.
    pub max_sequences: usize,
    /// Sequences that may wait.
    pub max_queue: usize,
    /// Of those, sequences of one adapter: a flood on one task leaves room for the others.
    pub max_queue_per_adapter: usize,
    /// Tokens that the KV pool holds; 0: as many as fit `kv_memory_mib`.
    pub kv_tokens: usize,
    /// Memory of the KV pool in MiB, when `kv_tokens` is 0; 0: on a GPU what `gpu_memory_utilization` leaves, on the CPU 65,536
    /// tokens, at most a quarter of the memory available.
    pub kv_memory_mib: usize,
    /// Of the GPU's memory, what weights, activations and the KV pool may take together, 0.1 to 0.98.
    pub gpu_memory_utilization: f64,
    /// Type that K and V are held in.
    pub kv_cache_dtype: KvCacheDtype,
    /// Decoding on a GPU launches its kernels one by one, and records no CUDA graphs.
    pub enforce_eager: bool,
    /// Longest sequence; 0: the model's own.
    pub max_model_len: usize,
    /// Threads of the CPU ops; 0: one a core.
    pub threads: usize,
    /// Reuse KV of equal leading blocks under the same adapter.
    pub prefix_caching: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            max_batch_tokens: 512,
            max_sequences: 64,
            max_queue: 4096,
            max_queue_per_adapter: 2048,
            kv_tokens: 0,
            kv_memory_mib: 0,
            gpu_memory_utilization: 0.9,
            kv_cache_dtype: KvCacheDtype::Auto,
            enforce_eager: false,
            max_model_len: 0,
            threads: 0,
            prefix_caching: true,
        }
    }
}

/// Training of adapters.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrainingConfig {
    /// Of the engine's time while requests run, 0 to 0.9. Training takes everything when there are none.
    pub share: f64,
    /// Where jobs are kept. None: in `.training` of the adapter store; that of the shipped adapters is gone at exit.
    pub dir: Option<PathBuf>,
    /// Folder of datasets (`NAME.jsonl`) that jobs and evaluations may name, and where uploads go. None: `datasets` in
    /// `dir`.
    pub data: Option<PathBuf>,
    /// Jobs that train at once; they share batches.
    pub max_running: usize,
    /// Jobs that may wait.
    pub max_queued: usize,
    /// Ended jobs that are remembered.
    pub kept_jobs: usize,
    /// Examples of one job.
    pub max_examples: usize,
    /// Bytes of one dataset.
    pub max_data_bytes: u64,
    /// Rows of a batch that several jobs share.
    pub batch_rows: usize,
    /// MiB of activations that are kept from the way forward; layers beyond compute theirs again.
    pub activation_mib: usize,
    /// MiB that one layer's activations of the largest batch may take.
    pub batch_mib: usize,
    /// MiB that a job's own weights may take, with their gradients, moments and copies.
    pub weights_mib: usize,
    /// Seconds between checkpoints of a job.
    pub checkpoint_seconds: u64,
}

impl Default for TrainingConfig {
    fn default() -> Self {
        TrainingConfig {
            share: 0.3,
            dir: None,
            data: None,
            max_running: 8,
            max_queued: 1000,
            kept_jobs: 1000,
            max_examples: 1_000_000,
            max_data_bytes: 256 << 20,
            batch_rows: 2048,
            activation_mib: 1024,
            batch_mib: 1024,
            weights_mib: 4096,
            checkpoint_seconds: 10,
        }
    }
}

/// What a request may ask for.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Longest prompt in bytes.
    pub max_prompt_bytes: usize,
    /// Longest gRPC message in bytes.
    pub max_message_bytes: usize,
    /// Most choices (`n`) of one request.
    pub max_n: usize,
    /// Most continuations or labels of one request.
    pub max_continuations: usize,
    /// Most stop sequences of one request.
    pub max_stop_sequences: usize,
    /// Longest stop sequence in bytes.
    pub max_stop_sequence_bytes: usize,
    /// Adapters that may be registered.
    pub max_adapters: usize,
    /// Bytes of one adapter's files.
    pub max_adapter_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            max_prompt_bytes: 1 << 20,
            max_message_bytes: 4 << 20,
            max_n: 16,
            max_continuations: 256,
            max_stop_sequences: 16,
            max_stop_sequence_bytes: 256,
            max_adapters: 10_000,
            max_adapter_bytes: 1 << 30,
        }
    }
}

impl Config {
    /// Defaults, then `file`, then the environment, then `overrides` (the command line, a TOML-like value).
    ///
    /// # Errors
    /// `InvalidArgument` naming the key, its value and the rule.
    pub fn read(file: Option<&Path>, overrides: impl Serialize) -> Result<Self> {
        let mut figment = Figment::from(Serialized::defaults(Config::default()));
        if let Some(path) = file {
            figment = figment.merge(Toml::file_exact(path));
        }
        let config: Config = figment
            .merge(
                Env::prefixed("PREFIXD_").ignore(&["config", "server", "test_data", "log", "log_format"]).split("__"),
            )
            .merge(Serialized::defaults(overrides))
            .extract()
            .or_kind(Kind::InvalidArgument, "settings")?;
        config.validate()?;
        Ok(config)
    }

    fn validate(&self) -> Result<()> {
        let e = &self.engine;
        let at_least = |field, value: usize, low: usize| {
            if value >= low { Ok(()) } else { Err(Error::invalid(field, value, format!("must be at least {low}"))) }
        };
        at_least("engine.max_batch_tokens", e.max_batch_tokens, 1)?;
        at_least("engine.max_sequences", e.max_sequences, 1)?;
        at_least("engine.max_queue", e.max_queue, 1)?;
        at_least("engine.max_queue_per_adapter", e.max_queue_per_adapter, 1)?;
        if e.max_batch_tokens < e.max_sequences {
            let rule = format!("must be at least engine.max_sequences ({})", e.max_sequences);
            return Err(Error::invalid("engine.max_batch_tokens", e.max_batch_tokens, rule));
        }
        if !(0.1..=0.98).contains(&e.gpu_memory_utilization) {
            let rule = "must be from 0.1 to 0.98";
            return Err(Error::invalid("engine.gpu_memory_utilization", e.gpu_memory_utilization, rule));
        }
        at_least("limits.max_prompt_bytes", self.limits.max_prompt_bytes, 1)?;
        at_least("limits.max_message_bytes", self.limits.max_message_bytes, 1024)?;
        at_least("limits.max_n", self.limits.max_n, 1)?;
        at_least("limits.max_continuations", self.limits.max_continuations, 1)?;
        at_least("limits.max_adapters", self.limits.max_adapters, 1)?;
        let t = &self.training;
        if !(0.0..=0.9).contains(&t.share) {
            return Err(Error::invalid("training.share", t.share, "must be from 0 to 0.9"));
        }
        at_least("training.max_running", t.max_running, 1)?;
        at_least("training.kept_jobs", t.kept_jobs, 1)?;
        at_least("training.max_examples", t.max_examples, 1)?;
        at_least("training.batch_rows", t.batch_rows, 1)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn file_then_overrides() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "model = \"m\"\n[engine]\nmax_sequences = 3\n").unwrap();
        let config = Config::read(Some(file.path()), serde_json::json!({ "model": "n" })).unwrap();
        assert_eq!((config.model.as_str(), config.engine.max_sequences), ("n", 3));
    }

    #[test]
    fn unknown_keys_and_bad_values_are_named() {
        let read = |v| Config::read(None, v).unwrap_err().to_string();
        assert!(read(serde_json::json!({ "engin": 1 })).contains("engin"));
        assert!(read(serde_json::json!({ "device": "gpu" })).contains("cuda:N"));
        let e = read(serde_json::json!({ "engine": { "max_sequences": 0 } }));
        assert!(e.contains("engine.max_sequences") && e.contains('0'), "{e}");
    }
}
