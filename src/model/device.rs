//! What a model runs on, and what that asks of the model.
use super::LoadOptions;
use super::config::ModelConfig;
use crate::config::{Device, KvCacheDtype, Quantize};
use crate::error::{Error, Kind, Result};
use crate::ops::Machine;
use crate::ops::gpu::Gpu;
use crate::ops::sample::device::MOST_TOKENS;
use candle_core::DType;
use std::sync::Arc;

/// What the kernels cannot do is said before the first request.
pub(super) fn fits_kernels(config: &ModelConfig, dtype: DType) -> Result<()> {
    let (head_dim, vocab) = (config.head_dim, config.vocab_size);
    if dtype != DType::F32 && !head_dim.is_multiple_of(8) {
        return Err(Error::precondition(format!(
            "heads of {head_dim} in {}: the GPU's kernels take multiples of 8; use `--dtype f32` or `--device cpu`",
            dtype.as_str()
        )));
    }
    if vocab > MOST_TOKENS {
        return Err(Error::precondition(format!(
            "a vocabulary of {vocab}: the GPU's kernels choose among {MOST_TOKENS}; use `--device cpu`"
        )));
    }
    Ok(())
}

/// The type of K and V beside activations of type `own`: a GPU's kernels read both in one.
pub(super) fn kv_dtype(asked: KvCacheDtype, own: DType, gpu: bool) -> Result<DType> {
    let dtype = match asked {
        KvCacheDtype::Auto => own,
        KvCacheDtype::F32 => DType::F32,
        KvCacheDtype::Bf16 => DType::BF16,
        KvCacheDtype::F16 => DType::F16,
    };
    if gpu && dtype != own {
        let rule = format!("on a GPU it is the weights', {}, here: use `auto`, or another `dtype`", own.as_str());
        return Err(Error::invalid("engine.kv_cache_dtype", dtype.as_str(), rule));
    }
    Ok(dtype)
}

/// What `options` ask to run on.
pub(super) fn machine(options: LoadOptions) -> Result<Arc<Machine>> {
    let on = |gpu: Gpu| {
        if options.quantize == Quantize::Int8 {
            let rule = "is for the CPU: a GPU has f32, bf16 and f16 weights";
            return Err(Error::invalid("quantize", "int8", rule));
        }
        Ok(Machine::with_gpu(options.threads, gpu))
    };
    match options.device {
        Device::Cpu => Ok(Machine::new(options.threads)),
        Device::Cuda(index) => match Gpu::cuda(index) {
            Ok(gpu) => on(gpu),
            Err(e) => Err(match Error::from(e) {
                full if full.kind() == Kind::ResourceExhausted => full.context(format!("`device` is cuda:{index}")),
                e => Error::precondition(format!("`device` is cuda:{index}: {e}; use `cpu` or `auto`")),
            }),
        },
        Device::Auto if cfg!(feature = "cuda") && options.quantize == Quantize::None => match Gpu::cuda(0) {
            Ok(gpu) => on(gpu),
            Err(e) => {
                tracing::warn!("no CUDA device ({e}): serving on the CPU");
                Ok(Machine::new(options.threads))
            }
        },
        Device::Auto => Ok(Machine::new(options.threads)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_kernels_cannot_do_is_said_at_load() {
        let mut config = ModelConfig::parse(&std::fs::read("models/demo/config.json").unwrap()).unwrap();
        config.head_dim = 100;
        fits_kernels(&config, DType::F32).unwrap();
        let e = fits_kernels(&config, DType::BF16).unwrap_err().to_string();
        assert!(e.contains("heads of 100 in bf16") && e.contains("--dtype f32"), "{e}");
        config.vocab_size = MOST_TOKENS + 1;
        let e = fits_kernels(&config, DType::F32).unwrap_err().to_string();
        assert!(e.contains("524289") && e.contains("524288"), "{e}");
    }

    #[test]
    fn types_of_k_and_v_are_those_that_the_device_has() {
        let of = |asked, own, gpu| kv_dtype(asked, own, gpu).map_err(|e| e.to_string());
        assert_eq!(of(KvCacheDtype::Auto, DType::BF16, true), Ok(DType::BF16));
        assert_eq!(of(KvCacheDtype::Auto, DType::F32, false), Ok(DType::F32));
        assert_eq!(of(KvCacheDtype::F16, DType::F32, false), Ok(DType::F16));
        let e = of(KvCacheDtype::F16, DType::BF16, true).unwrap_err();
        assert!(e.contains("engine.kv_cache_dtype") && e.contains("f16") && e.contains("bf16"), "{e}");
    }
}
