//! How a GGUF writes the elements of a tensor, and how they become f32, bf16 or f16 again.
//!
//! The blocks are decoded by candle, a run at a time: the whole tensor is there in its final type alone.
use super::header::Stored;
use crate::error::{Error, Result};
use candle_core::quantized::GgmlDType;
use candle_core::{CpuStorage, DType, Device, Tensor};
use half::bf16;
use std::borrow::Cow;

/// Elements that are decoded at once.
const RUN: usize = 1 << 16;

/// How elements are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Encoding(GgmlDType);

/// Types by the format's numbers. The served ones also have candle's name.
const TYPES: &[(u32, &str, Option<GgmlDType>)] = &[
    (0, "F32", Some(GgmlDType::F32)),
    (1, "F16", Some(GgmlDType::F16)),
    (2, "Q4_0", Some(GgmlDType::Q4_0)),
    (3, "Q4_1", Some(GgmlDType::Q4_1)),
    (6, "Q5_0", Some(GgmlDType::Q5_0)),
    (7, "Q5_1", Some(GgmlDType::Q5_1)),
    (8, "Q8_0", Some(GgmlDType::Q8_0)),
    (9, "Q8_1", None),
    (10, "Q2_K", Some(GgmlDType::Q2K)),
    (11, "Q3_K", Some(GgmlDType::Q3K)),
    (12, "Q4_K", Some(GgmlDType::Q4K)),
    (13, "Q5_K", Some(GgmlDType::Q5K)),
    (14, "Q6_K", Some(GgmlDType::Q6K)),
    (15, "Q8_K", None),
    (16, "IQ2_XXS", None),
    (17, "IQ2_XS", None),
    (18, "IQ3_XXS", None),
    (19, "IQ1_S", None),
    (20, "IQ4_NL", None),
    (21, "IQ3_S", None),
    (22, "IQ2_S", None),
    (23, "IQ4_XS", None),
    (24, "I8", None),
    (25, "I16", None),
    (26, "I32", None),
    (27, "I64", None),
    (28, "F64", None),
    (29, "IQ1_M", None),
    (30, "BF16", Some(GgmlDType::BF16)),
    (34, "TQ1_0", None),
    (35, "TQ2_0", None),
    (39, "MXFP4", None),
    (40, "NVFP4", None),
];

impl Encoding {
    /// The type of that number.
    ///
    /// # Errors
    /// `FailedPrecondition` with its name and those that are served.
    pub fn of(number: u32) -> Result<Self> {
        let found = TYPES.iter().find(|t| t.0 == number);
        found.and_then(|t| t.2).map(Encoding).ok_or_else(|| {
            let name = found.map_or(format!("{number}"), |t| t.1.to_owned());
            let served: Vec<_> = TYPES.iter().filter(|t| t.2.is_some()).map(|t| t.1).collect();
            Error::precondition(format!("type {name} is not served; served are {}", served.join(", ")))
        })
    }

    /// As the format calls it.
    pub fn name(self) -> &'static str {
        TYPES.iter().find(|t| t.2 == Some(self.0)).map_or("", |t| t.1)
    }

    /// The type of each element, if they are not in blocks.
    pub fn plain(self) -> Option<DType> {
        match self.0 {
            GgmlDType::F32 => Some(DType::F32),
            GgmlDType::F16 => Some(DType::F16),
            GgmlDType::BF16 => Some(DType::BF16),
            _ => None,
        }
    }

    /// Elements of a block.
    pub fn block_elements(self) -> usize {
        self.0.block_size()
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.0.type_size()
    }
}

/// The tensor with elements of type `to`: f32, bf16 or f16.
pub fn decode(stored: &Stored<'_>, to: DType) -> Result<Tensor> {
    let (shape, encoding) = (stored.shape.as_slice(), stored.encoding);
    if let Some(dtype) = encoding.plain() {
        return Ok(Tensor::from_raw_buffer(stored.bytes, dtype, shape, &Device::Cpu)?.to_dtype(to)?);
    }
    // candle reads blocks in place. A mapped file starts at a page and its tensors at multiples of 8, blocks need 2.
    if !stored.bytes.as_ptr().cast::<u16>().is_aligned() {
        return Err(Error::internal("the blocks of a tensor lie at an odd address"));
    }
    let count = stored.bytes.len() / encoding.block_bytes() * encoding.block_elements();
    match to {
        DType::BF16 => {
            let mut values = Vec::with_capacity(count);
            each_run(stored, |run| values.extend(run.iter().map(|x| bf16::from_f32(*x))))?;
            Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
        }
        _ => {
            let mut values = Vec::with_capacity(count);
            each_run(stored, |run| values.extend_from_slice(run))?;
            Ok(Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(to)?)
        }
    }
}

/// Calls `f` with the elements of some blocks after the other.
fn each_run(stored: &Stored<'_>, mut f: impl FnMut(&[f32])) -> Result<()> {
    let Encoding(kind) = stored.encoding;
    let blocks = RUN / kind.block_size();
    for bytes in stored.bytes.chunks(blocks * kind.type_size()) {
        let elements = bytes.len() / kind.type_size() * kind.block_size();
        match kind.from_data(Cow::Borrowed(bytes)).dequantize(elements)? {
            CpuStorage::F32(values) => f(&values),
            _ => return Err(Error::internal("candle decodes blocks to another type than f32")),
        }
    }
    Ok(())
}
