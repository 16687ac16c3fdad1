//! Tensors out of safetensors files or a GGUF, each taken once, by name and shape.
use super::config::ModelConfig;
use super::gguf::{Gguf, Stored, TensorNames, decode};
use super::source::WeightFile;
use crate::config::Quantize;
use crate::error::{Context, Error, Kind, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors};
use std::collections::BTreeMap;

/// The open files of a checkpoint and what was taken from them.
pub struct Checkpoint<'a> {
    /// By name; a taken tensor is gone.
    left: BTreeMap<String, Weight<'a>>,
    /// What the names are in the file, if it is a GGUF.
    names: Option<TensorNames>,
    types: Types,
    parameters: u64,
    found: Option<DType>,
}

/// A tensor where it lies.
struct Weight<'a> {
    /// For messages.
    file: &'a str,
    shape: Vec<usize>,
    content: Content<'a>,
}

enum Content<'a> {
    Plain {
        dtype: Dtype,
        bytes: &'a [u8],
    },
    Gguf {
        stored: Stored<'a>,
        /// Heads whose rows are in pairs.
        paired: Option<usize>,
    },
}

/// What tensors become when they are taken.
#[derive(Clone, Copy)]
enum Types {
    /// What they are in the file.
    Own,
    /// All of them this.
    All(DType),
    /// Those with more than one dimension what the first tensor taken is.
    First,
    /// Those with more than one dimension this. The vectors of a GGUF are f32 and stay so: beside its blocks they are exact.
    Matrices(DType),
}

impl<'a> Checkpoint<'a> {
    /// Reads the headers. Weights are converted to `dtype` as they are taken, if given.
    ///
    /// # Errors
    /// `InvalidArgument` naming the file for a broken header, or a tensor that two files hold.
    pub fn open(
        files: &'a [WeightFile],
        dtype: Option<DType>,
        quantize: Quantize,
        config: &ModelConfig,
    ) -> Result<Self> {
        let types = dtype.map_or(Types::Own, Types::All);
        let mut checkpoint = Checkpoint { left: BTreeMap::new(), names: None, types, parameters: 0, found: None };
        match files.first() {
            Some(first) if Gguf::is(&first.bytes) => {
                checkpoint.open_gguf(files, dtype, quantize, config).map_err(|e| e.context(&first.name))?;
            }
            _ => files.iter().try_for_each(|file| checkpoint.open_safetensors(file))?,
        }
        Ok(checkpoint)
    }

    fn open_safetensors(&mut self, file: &'a WeightFile) -> Result<()> {
        let place = &file.name;
        let (header, metadata) = SafeTensors::read_metadata(&file.bytes).or_kind(Kind::InvalidArgument, place)?;
        // 8 bytes of length, then the header.
        let data = file.bytes.get(header + 8..).unwrap_or_default();
        for (name, info) in metadata.tensors() {
            let bytes = data.get(info.data_offsets.0..info.data_offsets.1);
            let bytes = bytes.ok_or_else(|| Error::precondition(format!("{place}: tensor {name} cannot be read")))?;
            let content = Content::Plain { dtype: info.dtype, bytes };
            self.add(name, Weight { file: place, shape: info.shape.clone(), content })?;
        }
        Ok(())
    }

    fn open_gguf(
        &mut self,
        files: &'a [WeightFile],
        dtype: Option<DType>,
        quantize: Quantize,
        config: &ModelConfig,
    ) -> Result<()> {
        let gguf = Gguf::open(files.iter().map(|file| &*file.bytes))?;
        let names = TensorNames::new(&gguf, config)?;
        self.types = Types::Matrices(matrix_type(&gguf, dtype, quantize));
        for (name, stored) in gguf.tensors() {
            let Some(full) = names.full(name) else { continue };
            let content = Content::Gguf { stored: stored.clone(), paired: names.paired_heads(name) };
            self.add(full, Weight { file: &files[0].name, shape: stored.shape.clone(), content })?;
        }
        self.names = Some(names);
        Ok(())
    }

    fn add(&mut self, name: String, weight: Weight<'a>) -> Result<()> {
        let file = weight.file;
        match self.left.insert(name.clone(), weight) {
            None => Ok(()),
            Some(_) => {
                let message = format!("{file}: tensor {name} is in another file too");
                Err(Error::new(Kind::InvalidArgument, message))
            }
        }
    }

    /// Matrices take the type of the first one, the embedding table, where nothing else was asked: kernels of a GPU multiply
    /// values of one type.
    pub fn make_uniform(&mut self) {
        if matches!(self.types, Types::Own) {
            self.types = Types::First;
        }
    }

    /// Takes `name`, which must have `shape`.
    ///
    /// # Errors
    /// `FailedPrecondition` naming the tensor: missing, of another shape or type.
    pub fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let stored_name = self.stored_name(name);
        let Some(weight) = self.left.remove(name) else {
            return Err(Error::precondition(format!("the checkpoint has no tensor {stored_name} (shape {shape:?})")));
        };
        if weight.shape != shape {
            let (file, found) = (weight.file, &weight.shape);
            let source = if self.names.is_some() { "the metadata" } else { "config.json" };
            return Err(Error::precondition(format!(
                "{file}: tensor {stored_name} has shape {found:?}, {source} asks for {shape:?}"
            )));
        }
        let tensor = match weight.content {
            Content::Plain { dtype, bytes } => {
                let dtype = plain(dtype).map_err(|e| e.context(format!("{}: tensor {name}", weight.file)))?;
                let tensor = Tensor::from_raw_buffer(bytes, dtype, shape, &Device::Cpu)?;
                tensor.to_dtype(self.dtype_of(shape, dtype))?
            }
            Content::Gguf { stored, paired } => {
                let own = stored.encoding.plain().unwrap_or(DType::F32);
                let tensor = decode(&stored, self.dtype_of(shape, own))?;
                paired.map_or(Ok(tensor.clone()), |heads| apart(&tensor, heads))?
            }
        };
        self.parameters += tensor.elem_count() as u64;
        self.found.get_or_insert(tensor.dtype());
        Ok(tensor)
    }

    /// What a tensor becomes that is `own` in the file.
    fn dtype_of(&self, shape: &[usize], own: DType) -> DType {
        match self.types {
            Types::All(dtype) => dtype,
            Types::Matrices(dtype) if shape.len() > 1 => dtype,
            Types::First if shape.len() > 1 => self.found.unwrap_or(own),
            _ => own,
        }
    }

    /// What the file calls the tensor `name`.
    fn stored_name(&self, name: &str) -> String {
        self.names.as_ref().map_or_else(|| name.to_owned(), |names| names.stored(name))
    }

    /// Whether it is a GGUF: layers are `[out, in]` whatever the family, and a norm has w where the family's own
    /// checkpoints have w - 1.
    pub fn is_gguf(&self) -> bool {
        self.names.is_some()
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
        self.left.get(name)?.shape.first().copied()
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
        let names: Vec<String> = self.left.keys().take(5).map(|name| self.stored_name(name)).collect();
        Err(Error::precondition(format!(
            "the checkpoint has {} tensors that this family does not use: {}",
            self.left.len(),
            names.join(", ")
        )))
    }
}

fn plain(dtype: Dtype) -> Result<DType> {
    match dtype {
        Dtype::F32 => Ok(DType::F32),
        Dtype::BF16 => Ok(DType::BF16),
        Dtype::F16 => Ok(DType::F16),
        other => Err(Error::precondition(format!("has type {other:?}; f32, bf16 and f16 are served"))),
    }
}

/// What the matrices of a GGUF become: blocks bf16 unless `asked` otherwise, and f32 where they are rounded once more; without
/// blocks what they are, and f32 where they are several types.
fn matrix_type(gguf: &Gguf<'_>, asked: Option<DType>, quantize: Quantize) -> DType {
    let matrices = || gguf.tensors().filter(|(_, t)| t.shape.len() > 1).map(|(_, t)| t.encoding.plain());
    let blocks = matrices().any(|plain| plain.is_none());
    if blocks && quantize != Quantize::None {
        return DType::F32;
    }
    asked.unwrap_or_else(|| {
        let first = matrices().next().flatten().unwrap_or(DType::F32);
        match blocks {
            true => DType::BF16,
            false if matrices().all(|plain| plain == Some(first)) => first,
            false => DType::F32,
        }
    })
}

/// Rows of heads whose pairs `(2 i, 2 i + 1)` turn together -> the two halves of each head apart.
fn apart(tensor: &Tensor, heads: usize) -> Result<Tensor> {
    let shape = tensor.shape().clone();
    let half = shape.dims()[0] / heads / 2;
    let pairs = tensor.reshape((heads, half, 2, tensor.elem_count() / (heads * half * 2)))?;
    Ok(pairs.transpose(1, 2)?.contiguous()?.reshape(shape)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::model::source::Bytes;
    use crate::ops::mapped::Mapped;

    /// A table of bf16 and what else is there in f32: as it is, and as kernels of one type want it.
    #[test]
    fn matrices_take_the_type_of_the_table() {
        let config = std::fs::read("models/demo/config.json").unwrap();
        let config = ModelConfig::parse(&config).unwrap();
        let of = |dtype| Tensor::ones((2, 2), dtype, &Device::Cpu).unwrap();
        let norm = Tensor::ones(2, DType::F32, &Device::Cpu).unwrap();
        let tensors = [("table", of(DType::BF16)), ("norm", norm), ("head", of(DType::F32))];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        candle_core::safetensors::save(&std::collections::HashMap::from(tensors), &path).unwrap();
        let bytes = Bytes::Mapped(Mapped::open(&path).unwrap());
        let files = [WeightFile { name: "x.safetensors".into(), bytes }];
        for uniform in [false, true] {
            let mut checkpoint = Checkpoint::open(&files, None, Quantize::None, &config).unwrap();
            if uniform {
                checkpoint.make_uniform();
            }
            let mut types = |name, shape: &[usize]| checkpoint.take(name, shape).unwrap().dtype();
            let found = [types("table", &[2, 2]), types("norm", &[2]), types("head", &[2, 2])];
            assert_eq!(found, [DType::BF16, DType::F32, if uniform { DType::BF16 } else { DType::F32 }]);
        }
    }
}
