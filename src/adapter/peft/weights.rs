//! `adapter_model.safetensors`, read without trusting a byte of it.
use super::config::PeftConfig;
use super::heads::HeadNames;
use super::{WEIGHTS_FILE, io_error};
use crate::adapter::Method;
use crate::error::{Context, Error, Kind, Result};
use crate::ops::float::largest;
use candle_core::DType;
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors, tensor::Metadata};
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Longest header in bytes; an adapter's has a few hundred.
const MAX_HEADER: u64 = 16 << 20;

/// The file's bytes and what its header says of them, validated: every range lies inside.
pub(super) struct Weights {
    bytes: Vec<u8>,
    metadata: Metadata,
    /// Where the tensors' own offsets start.
    data_start: usize,
}

fn malformed(message: impl std::fmt::Display) -> Error {
    Error::new(Kind::InvalidArgument, format!("{WEIGHTS_FILE}: {message}"))
}

impl Weights {
    /// Reads the file into memory if it has at most `max_bytes`.
    ///
    /// Sizes are compared before anything is allocated. Not mapped: a file cut short under a mapping
    /// kills the process.
    pub(super) fn open(path: &Path, max_bytes: u64) -> Result<Self> {
        let mut file = File::open(path).map_err(|e| io_error(path, &e))?;
        let size = file.metadata().map_err(|e| io_error(path, &e))?.len();
        if size > max_bytes {
            return Err(malformed(format!(
                "{size} bytes; an adapter of this kind takes at most {max_bytes} on this base"
            )));
        }
        let mut length = [0; 8];
        if size < 8 {
            return Err(malformed(format!("{size} bytes, a header length takes 8")));
        }
        file.read_exact(&mut length).map_err(|e| io_error(path, &e))?;
        let (header, most) = (u64::from_le_bytes(length), MAX_HEADER.min(size - 8));
        if header > most {
            return Err(malformed(format!("its header claims {header} bytes, at most {most} can be there")));
        }
        let mut bytes = Vec::with_capacity(size as usize);
        bytes.extend_from_slice(&length);
        file.take(size - 8).read_to_end(&mut bytes).map_err(|e| io_error(path, &e))?;
        let (header, metadata) = SafeTensors::read_metadata(&bytes).or_kind(Kind::InvalidArgument, WEIGHTS_FILE)?;
        Ok(Weights { bytes, metadata, data_start: 8 + header })
    }

    /// Names of all tensors, sorted.
    pub(super) fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.metadata.tensors().into_keys().collect();
        names.sort();
        names
    }

    /// Dimensions of a tensor.
    pub(super) fn dims(&self, name: &str) -> Option<&[usize]> {
        self.metadata.info(name).map(|info| info.shape.as_slice())
    }

    /// Refuses tensors that would be left out in silence. `head`: those that the head is made of.
    pub(super) fn check_names(&self, config: &PeftConfig, head: &HeadNames) -> Result<()> {
        let multitask = config.method == Method::MultitaskPromptTuning;
        let mut others = self.names();
        others.retain(|name| match name.as_str() {
            "prompt_embeddings" => false,
            "prefix_task_cols" | "prefix_task_rows" => !multitask,
            name => !is_prompt_encoder(name) && !head.has(name),
        });
        if others.is_empty() {
            return Ok(());
        }
        let (count, shown) = (others.len(), others.len().min(5));
        let names: Vec<String> = others[..shown].iter().map(|n| n.chars().take(80).collect()).collect();
        Err(Error::precondition(format!(
            "{WEIGHTS_FILE}: {count} tensors besides the prompt: {}{}; of the modules trained with it \
             (`modules_to_save`) only the `classifier` or `score` of `task_type` SEQ_CLS is served (it is {:?} here), the \
             base is shared and frozen",
            names.join(", "),
            if count > shown { ", ..." } else { "" },
            config.task_type
        )))
    }

    /// The tensor's values as f32, row-major, once `check` has accepted its dimensions. `rule` says the
    /// dimensions in words: "[rows, columns]", as many as the tensor must have. All are finite, also in the type `held` that
    /// they are to be held in.
    pub(super) fn floats(
        &self,
        name: &str,
        rule: &str,
        held: DType,
        check: impl FnOnce(&[usize]) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let Some(info) = self.metadata.info(name) else {
            return Err(malformed(format!("tensor `{name}` {rule} is missing")));
        };
        let rank = rule.split(", ").count();
        if info.shape.len() != rank {
            let dims = &info.shape;
            return Err(malformed(format!("`{name}` has rank {} {dims:?}, needs {rank}: {rule}", dims.len())));
        }
        check(&info.shape).map_err(|e| e.context(WEIGHTS_FILE))?;
        let (start, end) = info.data_offsets;
        let bytes = self.bytes.get(self.data_start + start..self.data_start + end);
        let bytes = bytes.ok_or_else(|| malformed(format!("`{name}` lies outside the file")))?;
        let values: Vec<f32> = match info.dtype {
            Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            other => return Err(malformed(format!("`{name}` is {other:?}, must be F32, F16 or BF16"))),
        };
        if let Some(at) = values.iter().position(|v| !fits(*v, held)) {
            let (index, rule) = (unravel(at, &info.shape), must_fit(held));
            return Err(malformed(format!("`{name}` at {index:?} is {}, {rule}", values[at])));
        }
        Ok(values)
    }

    /// The dimensions of `name` are exactly `expected`.
    pub(super) fn same(name: &str, dims: &[usize], expected: &[usize]) -> Result<()> {
        if dims == expected {
            return Ok(());
        }
        Err(Error::precondition(format!("`{name}` is {dims:?}, needs {expected:?}")))
    }
}

/// Whether a value is finite in the type `held` that it is to be held in.
pub(in crate::adapter) fn fits(value: f32, held: DType) -> bool {
    value.abs() <= largest(held)
}

/// The rule in words.
pub(in crate::adapter) fn must_fit(held: DType) -> String {
    match held {
        DType::F32 => "must be finite".into(),
        _ => format!("must be {} at most: it is held in {}", largest(held), held.as_str()),
    }
}

/// Types that a tensor may have.
pub(in crate::adapter) const SERVED_DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

/// Tensors of prompts and of their encoders.
pub(in crate::adapter) fn is_prompt_tensor(name: &str) -> bool {
    matches!(name, "prompt_embeddings" | "prefix_task_cols" | "prefix_task_rows") || is_prompt_encoder(name)
}

/// Keys of a prompt encoder: its output is what was saved as `prompt_embeddings`.
fn is_prompt_encoder(name: &str) -> bool {
    let name = name.strip_prefix("base_model.").unwrap_or(name);
    ["prompt_encoder.", "embedding.", "mlp_head.", "lstm_head.", "transform."]
        .iter()
        .any(|start| name.starts_with(start))
}

/// The index of flat position `at` in a tensor of shape `dims`.
fn unravel(mut at: usize, dims: &[usize]) -> Vec<usize> {
    let mut index: Vec<usize> = dims.iter().rev().map(|&d| (at % d, at /= d).0).collect();
    index.reverse();
    index
}
