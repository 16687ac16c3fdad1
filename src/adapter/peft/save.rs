//! A folder as PEFT 0.21's `save_pretrained` writes it: `adapter_config.json` and `adapter_model.safetensors`.
use super::{CONFIG_FILE, WEIGHTS_FILE, io_error};
use crate::adapter::Method;
use crate::error::{Context, Error, Kind, Result};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// The PEFT whose files these are.
const PEFT_VERSION: &str = "0.21.2";

/// What goes into a folder.
#[derive(Clone, Debug, Default)]
pub struct SavedAdapter {
    /// `adapter_config.json`.
    pub config: Map<String, Value>,
    /// Tensors by name.
    pub tensors: BTreeMap<String, SavedTensor>,
}

/// A tensor on its way to disk.
#[derive(Clone, Debug, PartialEq)]
pub struct SavedTensor {
    /// Type of the values.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Row-major, little-endian.
    pub bytes: Vec<u8>,
}

impl SavedTensor {
    /// From f32 values, row-major.
    pub fn f32(shape: Vec<usize>, values: &[f32]) -> Self {
        SavedTensor { dtype: Dtype::F32, shape, bytes: values.iter().flat_map(|v| v.to_le_bytes()).collect() }
    }
}

/// Facts of the base that PEFT writes into a config.
#[derive(Clone, Debug, Default)]
pub struct SavedBase {
    /// `base_model_name_or_path`.
    pub name: Option<String>,
    /// Layers.
    pub num_layers: Option<usize>,
    /// `num_attention_heads`: KV heads for stored K and V, query heads otherwise.
    pub num_heads: Option<usize>,
    /// `token_dim`: KV heads * head_dim for stored K and V, the hidden size otherwise.
    pub token_dim: Option<usize>,
}

impl SavedAdapter {
    /// A config with all keys that PEFT writes for `method`, and no tensor yet. Settings that only matter to training
    /// have PEFT's defaults; `num_tasks` and `num_ranks` of a multitask prompt are the caller's to set.
    ///
    /// # Errors
    /// `Internal` for a method without weights.
    pub fn new(method: Method, num_virtual_tokens: usize, task_type: &str, base: &SavedBase) -> Result<Self> {
        let own = match method {
            Method::PromptTuning => json!({
                "prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": null, "tokenizer_kwargs": null,
                "tokenizer_name_or_path": null,
            }),
            Method::MultitaskPromptTuning => json!({
                "num_ranks": 1, "num_tasks": 1, "prompt_tuning_init": "RANDOM",
                "prompt_tuning_init_state_dict_path": null, "prompt_tuning_init_task": 0,
                "prompt_tuning_init_text": null, "tokenizer_kwargs": null, "tokenizer_name_or_path": null,
            }),
            Method::PTuning => json!({
                "encoder_dropout": 0.0, "encoder_hidden_size": base.token_dim, "encoder_num_layers": 2,
                "encoder_reparameterization_type": "MLP",
            }),
            Method::PrefixTuning => json!({
                "encoder_hidden_size": base.token_dim, "init_weights": null, "prefix_projection": false,
            }),
            Method::Cartridge => json!({ "num_frozen_tokens": 0 }),
            // One id a virtual token: PEFT takes their number from this list. Only training reads the ids.
            Method::Cpt => json!({
                "cpt_mask": vec![1; num_virtual_tokens], "cpt_token_ids": vec![0; num_virtual_tokens],
                "cpt_tokens_type_mask": vec![1; num_virtual_tokens], "opt_loss_decay_factor": 1.0,
                "opt_projection_epsilon": 0.1, "opt_projection_format_epsilon": 0.1,
                "opt_weighted_loss_type": "none", "tokenizer_name_or_path": null,
            }),
            Method::Text => return Err(Error::internal("a text-only adapter has no PEFT config")),
        };
        let mut all = json!({
            "auto_mapping": null,
            "base_model_name_or_path": base.name,
            "inference_mode": true,
            "modules_to_save": null,
            "num_attention_heads": base.num_heads,
            "num_layers": base.num_layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": num_virtual_tokens,
            "peft_type": method.as_str(),
            "peft_version": PEFT_VERSION,
            "revision": null,
            "task_type": task_type,
            "token_dim": base.token_dim,
        });
        let mut config = Map::new();
        for part in [&mut all, &mut own.clone()] {
            config.append(part.as_object_mut().ok_or_else(|| Error::internal("a config is no object"))?);
        }
        Ok(SavedAdapter { config, tensors: BTreeMap::new() })
    }

    /// The two files, by name: weights, then config.
    ///
    /// # Errors
    /// `InvalidArgument` for a tensor whose bytes are not its shape's.
    pub fn files(&self) -> Result<[(&'static str, Vec<u8>); 2]> {
        let views = self.tensors.iter().map(|(name, t)| {
            let view = TensorView::new(t.dtype, t.shape.clone(), &t.bytes);
            view.map(|view| (name.as_str(), view)).or_kind(Kind::InvalidArgument, name)
        });
        let views: Vec<_> = views.collect::<Result<_>>()?;
        let format = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let weights = safetensors::serialize(views, Some(format)).or_kind(Kind::InvalidArgument, WEIGHTS_FILE)?;
        // Sorted keys and two spaces, as PEFT writes it: serde_json's map is sorted.
        let config = serde_json::to_string_pretty(&self.config).or_kind(Kind::Internal, CONFIG_FILE)?;
        Ok([(WEIGHTS_FILE, weights), (CONFIG_FILE, config.into_bytes())])
    }
}

/// Writes `adapter` into `dir`, made if absent, both files fsynced. A crash may leave one file without the other: give
/// a folder that takes its name afterwards ([`crate::adapter::Staging`], or a rename).
///
/// # Errors
/// `AlreadyExists` if one of the files is there, `InvalidArgument` for a tensor whose bytes are not its shape's,
/// `Internal` with the path for a fault of the disk.
pub fn save(dir: &Path, adapter: &SavedAdapter) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| io_error(dir, &e))?;
    adapter.files()?.iter().try_for_each(|(name, bytes)| write(&dir.join(name), bytes))
}

/// Writes a new file to the disk.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let done = File::create_new(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    done.map_err(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => {
            Error::new(Kind::AlreadyExists, format!("{}: is there already", path.display()))
        }
        _ => io_error(path, &e),
    })
}
