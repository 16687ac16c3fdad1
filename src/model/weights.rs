//! Tensors out of safetensors files, each taken once, by name and shape.
use super::source::WeightFile;
use crate::error::{Context, Error, Kind, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use std::collections::BTreeMap;

/// The open files of a checkpoint and what was taken from them.
pub struct Checkpoint<'a> {
    shards: Vec<Shard<'a>>,
    /// Tensor name -> shard; a taken tensor is gone.
    left: BTreeMap<String, usize>,
    /// Type to convert to, if not the checkpoint's own.
    dtype: Option<DType>,
    parameters: u64,
    found: Option<DType>,
}

struct Shard<'a> {
    name: &'a str,
    /// Bytes after the header.
    data: &'a [u8],
    metadata: Metadata,
}

impl<'a> Checkpoint<'a> {
    /// Reads the headers. Weights are converted to `dtype` as they are taken, if given.
    ///
    /// # Errors
    /// `InvalidArgument` naming the file for a broken header, or a tensor that two files hold.
    pub fn open(files: &'a [WeightFile], dtype: Option<DType>) -> Result<Self> {
        let (mut shards, mut left) = (Vec::new(), BTreeMap::new());
        for (i, file) in files.iter().enumerate() {
            let place = &file.name;
            let (header, metadata) = SafeTensors::read_metadata(&file.bytes).or_kind(Kind::InvalidArgument, place)?;
            for name in metadata.tensors().into_keys() {
                if left.insert(name.clone(), i).is_some() {
                    return Err(Error::new(
                        Kind::InvalidArgument,
                        format!("{place}: tensor {name} is in another file too"),
                    ));
                }
            }
            // 8 bytes of length, then the header.
            let data = file.bytes.get(header + 8..).unwrap_or_default();
            shards.push(Shard { name: place, data, metadata });
        }
        Ok(Checkpoint { shards, left, dtype, parameters: 0, found: None })
    }

    /// Takes `name`, which must have `shape`.
    ///
    /// # Errors
    /// `FailedPrecondition` naming the tensor: missing, of another shape or type.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let Some(shard) = self.left.remove(name) else {
            return Err(Error::precondition(format!("the checkpoint has no tensor {name} (shape {shape:?})")));
        };
        let shard = &self.shards[shard];
        let missing = || Error::precondition(format!("{}: tensor {name} cannot be read", shard.name));
        let info = shard.metadata.info(name).ok_or_else(missing)?;
        if info.shape != shape {
            let found = &info.shape;
            return Err(Error::precondition(format!(
                "{}: tensor {name} has shape {found:?}, config.json asks for {shape:?}",
                shard.name
            )));
        }
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            other => {
                return Err(Error::precondition(format!(
                    "{}: tensor {name} has type {other:?}; f32, bf16 and f16 are served",
                    shard.name
                )));
            }
        };
        let bytes = shard.data.get(info.data_offsets.0..info.data_offsets.1).ok_or_else(missing)?;
        let tensor = Tensor::from_raw_buffer(bytes, dtype, shape, &Device::Cpu)?;
        self.parameters += tensor.elem_count() as u64;
        let dtype = self.dtype.unwrap_or(dtype);
        self.found.get_or_insert(dtype);
        Ok(tensor.to_dtype(dtype)?)
    }

    /// Elements taken so far.
    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// Type of the first tensor taken: the embedding table's.
    pub fn table_dtype(&self) -> Option<DType> {
        self.found
    }

    /// Whether `name` is there and was not taken.
    pub fn has(&self, name: &str) -> bool {
        self.left.contains_key(name)
    }

    /// Rows of `name`, if it is there and was not taken.
    pub fn rows(&self, name: &str) -> Option<usize> {
        let shard = &self.shards[*self.left.get(name)?];
        shard.metadata.info(name)?.shape.first().copied()
    }

    /// Forgets `name`, if it is there: a copy of something taken under another name.
    pub fn forget(&mut self, name: &str) {
        self.left.remove(name);
    }

    /// Forgets tensors that are known and not needed, by the start or the end of their names.
    pub fn forget_all(&mut self, parts: &[&str]) {
        self.left.retain(|name, _| !parts.iter().any(|p| name.starts_with(p) || name.ends_with(p)));
    }

    /// Everything must have been taken: what the decoder does not know would be left out in silence.
    ///
    /// # Errors
    /// `FailedPrecondition` with up to five names.
    pub fn finish(self) -> Result<()> {
        if self.left.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = self.left.keys().take(5).map(String::as_str).collect();
        Err(Error::precondition(format!(
            "the checkpoint has {} tensors that this family does not use: {}",
            self.left.len(),
            names.join(", ")
        )))
    }
}
