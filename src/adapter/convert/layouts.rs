//! What tensors mean by their names and shapes, and what they become.
use super::{KvShape, SavedAdapter, SavedBase, SavedTensor, Tensors};
use crate::adapter::Method;
use crate::adapter::peft::{SERVED_DTYPES, config_method, head_module, is_prompt_tensor};
use crate::error::{Context, Error, Kind, Result};
use candle_core::{DType, Device, Tensor};
use safetensors::Dtype;
use serde_json::{Map, Value};

/// A folder of PEFT's: its config as it is, its tensors as they are.
pub(super) fn peft(config: &[u8], tensors: Tensors) -> Result<SavedAdapter> {
    const CONFIG: &str = "adapter_config.json";
    let mut config: Map<String, Value> = serde_json::from_slice(config).or_kind(Kind::InvalidArgument, CONFIG)?;
    config_method(config.get("peft_type").and_then(Value::as_str).unwrap_or(""))?;
    if config.get("num_transformer_submodules").and_then(Value::as_i64).is_some_and(|n| n != 1) {
        return Err(Error::precondition(format!(
            "{CONFIG}: `num_transformer_submodules` is not 1: made for an encoder-decoder, which prefixd does not serve"
        )));
    }
    refuse_others(&tensors, |name| is_prompt_tensor(name) || head_module(name).is_some())?;
    check_dtypes(&tensors)?;
    // How PEFT marks an adapter that is not being trained.
    config.insert("inference_mode".into(), true.into());
    Ok(SavedAdapter { config, tensors })
}

/// Tensors of another layout, from the file `name`.
pub(super) fn place(name: &str, tensors: Tensors, shape: Option<&KvShape>) -> Result<SavedAdapter> {
    check_dtypes(&tensors)?;
    if let Some(bare) = tensors.get("") {
        return virtual_tokens(name, bare);
    }
    let encoder = tensors.keys().find(|key| key.ends_with("prefix_encoder.embedding.weight")).cloned();
    if let Some(key) = encoder {
        let prefix = key.trim_end_matches("embedding.weight");
        return prefix_encoder(prefix, tensors, shape);
    }
    if tensors.contains_key("prompt_embeddings") {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!(
                "{name}: `prompt_embeddings` without an adapter_config.json beside it: nothing says whether its rows are \
                 virtual tokens or stored K and V"
            ),
        ));
    }
    refuse_others(&tensors, |_| false)?;
    Err(Error::new(Kind::InvalidArgument, format!("{name}: holds no tensor")))
}

/// TGIS and caikit: virtual tokens `[n, d]` alone.
fn virtual_tokens(name: &str, tensor: &SavedTensor) -> Result<SavedAdapter> {
    let [n, d] = tensor.shape[..] else {
        let dims = &tensor.shape;
        return Err(misfit(format!(
            "{name}: a bare tensor of rank {} {dims:?}, virtual tokens are [n, d]",
            dims.len()
        )));
    };
    if n == 0 {
        return Err(misfit(format!("{name}: [0, {d}] holds no virtual token")));
    }
    let base = SavedBase { token_dim: Some(d), ..SavedBase::default() };
    let mut adapter = SavedAdapter::new(Method::PromptTuning, n, "CAUSAL_LM", &base)?;
    adapter.tensors.insert("prompt_embeddings".into(), tensor.clone());
    Ok(adapter)
}

/// ChatGLM and P-tuning v2: `{prefix}embedding.weight`, with `{prefix}trans.0` and `.2` also a projection.
fn prefix_encoder(prefix: &str, mut tensors: Tensors, shape: Option<&KvShape>) -> Result<SavedAdapter> {
    let Some(shape) = shape else {
        return Err(Error::new(
            Kind::InvalidArgument,
            format!(
                "`{prefix}embedding.weight` holds K and V of all layers, and their number is not in the file: give \
                 --layers, --kv-heads and --head-dim, or --model"
            ),
        ));
    };
    let parts =
        ["trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"].map(|name| format!("{prefix}{name}"));
    let key = format!("{prefix}embedding.weight");
    refuse_others(&tensors, |name| {
        name == key || parts.iter().any(|part| part == name) || head_module(name).is_some()
    })?;
    let mut take = |name: &str| tensors.remove(name).ok_or_else(|| misfit(format!("`{name}` is missing")));
    let mut rows = take(&key)?;
    let heads_dim = shape.num_kv_heads.saturating_mul(shape.head_dim);
    let width = shape.num_layers.saturating_mul(2).saturating_mul(heads_dim);
    let rule = format!(
        "{width}, which is 2 * {} layers * {} KV heads * {} head_dim",
        shape.num_layers, shape.num_kv_heads, shape.head_dim
    );
    let mut from = key;
    if tensors.keys().any(|name| parts.contains(name)) {
        let mut take = |name: &str| tensors.remove(name).ok_or_else(|| misfit(format!("`{name}` is missing")));
        let [w0, b0, w2, b2] = [take(&parts[0])?, take(&parts[1])?, take(&parts[2])?, take(&parts[3])?];
        rows = project(&rows, [&w0, &b0, &w2, &b2]).map_err(|e| misfit(format!("`{prefix}trans`: {e}")))?;
        from = parts[2].clone();
    }
    let [n, found] = rows.shape[..] else {
        return Err(misfit(format!("`{from}` has rank {} {:?}, needs 2", rows.shape.len(), rows.shape)));
    };
    if found != width || n == 0 {
        return Err(misfit(format!("`{from}` gives [{n}, {found}], needs [n, {rule}]")));
    }
    let base = SavedBase {
        name: shape.name.clone(),
        num_layers: Some(shape.num_layers),
        num_heads: Some(shape.num_kv_heads),
        token_dim: Some(heads_dim),
    };
    let task = if tensors.is_empty() { "CAUSAL_LM" } else { "SEQ_CLS" };
    let mut adapter = SavedAdapter::new(Method::PrefixTuning, n, task, &base)?;
    adapter.tensors.insert("prompt_embeddings".into(), rows);
    if !tensors.is_empty() {
        adapter.config.insert("modules_to_save".into(), Value::from(vec!["classifier", "score"]));
    }
    for (name, tensor) in tensors {
        // Heads alone are left.
        let Some((module, bias)) = head_module(&name) else { continue };
        let name = format!("base_model.{module}.{}", if bias { "bias" } else { "weight" });
        adapter.tensors.insert(name, tensor);
    }
    Ok(adapter)
}

/// tanh(x W0^T + b0) W2^T + b2 in f32. x `[n, e]`, W0 `[h, e]`, W2 `[2*L*H*D, h]`.
fn project(x: &SavedTensor, [w0, b0, w2, b2]: [&SavedTensor; 4]) -> candle_core::Result<SavedTensor> {
    let tensor = |t: &SavedTensor| {
        let dtype = match t.dtype {
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            _ => DType::F32,
        };
        Tensor::from_raw_buffer(&t.bytes, dtype, &t.shape, &Device::Cpu)?.to_dtype(DType::F32)
    };
    let hidden = tensor(x)?.matmul(&tensor(w0)?.t()?)?.broadcast_add(&tensor(b0)?)?.tanh()?;
    let rows = hidden.matmul(&tensor(w2)?.t()?)?.broadcast_add(&tensor(b2)?)?;
    Ok(SavedTensor::f32(rows.dims().to_vec(), &rows.flatten_all()?.to_vec1::<f32>()?))
}

/// Refuses all tensors that `placed` does not know, by name.
fn refuse_others(tensors: &Tensors, placed: impl Fn(&str) -> bool) -> Result<()> {
    let others: Vec<&str> = tensors.keys().map(String::as_str).filter(|name| !placed(name)).collect();
    if others.is_empty() {
        return Ok(());
    }
    let shown: Vec<String> = others.iter().take(5).map(|name| name.chars().take(80).collect()).collect();
    let more = if others.len() > shown.len() { ", ..." } else { "" };
    Err(misfit(format!(
        "{} tensors have no place in an adapter: {}{more}; weights of the base itself stay with the base",
        others.len(),
        shown.join(", ")
    )))
}

fn check_dtypes(tensors: &Tensors) -> Result<()> {
    match tensors.iter().find(|(_, t)| !SERVED_DTYPES.contains(&t.dtype)) {
        Some((name, t)) => Err(misfit(format!("`{name}` is {:?}, must be F32, F16 or BF16", t.dtype))),
        None => Ok(()),
    }
}

fn misfit(message: String) -> Error {
    Error::new(Kind::InvalidArgument, message)
}
