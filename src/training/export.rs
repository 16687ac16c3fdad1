//! A trained job as the files of an adapter: what PEFT's `save_pretrained` writes, and the task card.
use super::job::{Job, Placement};
use super::prompt_encoder::EncoderKind;
use super::settings::{Reparametrisation, Settings};
use crate::adapter::peft::{SavedAdapter, SavedBase, SavedTensor};
use crate::error::Result;
use crate::model::ModelInfo;
use candle_core::Tensor;
use serde_json::json;

/// The job's adapter on `base`.
pub fn export(job: &Job, settings: &Settings, base: &ModelInfo) -> Result<SavedAdapter> {
    let stored = job.placement == Placement::Stored;
    let heads = if stored { base.num_kv_heads } else { base.num_attention_heads };
    let width = if stored { base.num_kv_heads * base.head_dim } else { base.hidden_size };
    let saved = SavedBase {
        name: Some(base.name.clone()),
        num_layers: Some(base.num_layers),
        num_heads: Some(heads),
        token_dim: Some(width),
    };
    let task = if job.head.is_some() { "SEQ_CLS" } else { "CAUSAL_LM" };
    let mut adapter = SavedAdapter::new(settings.method.method(), settings.num_virtual_tokens, task, &saved)?;
    let hidden = if settings.encoder_hidden_size == 0 { width } else { settings.encoder_hidden_size };
    let rows = match job.encoder.kind() {
        EncoderKind::Multitask => {
            for name in ["prefix_task_cols", "prefix_task_rows"] {
                adapter.tensors.insert(name.into(), tensor(job.encoder.weight(name)?)?);
            }
            adapter.config.insert("num_tasks".into(), json!(job.encoder.tasks()));
            adapter.config.insert("num_ranks".into(), json!(settings.num_ranks));
            job.encoder.weight("embedding.weight")?.as_tensor().clone()
        }
        _ => job.encoder.rows(&[0])?,
    };
    match settings.reparametrisation {
        Reparametrisation::Lstm => {
            adapter.config.insert("encoder_reparameterization_type".into(), json!("LSTM"));
            adapter.config.insert("encoder_num_layers".into(), json!(settings.encoder_num_layers));
        }
        Reparametrisation::Projection => drop(adapter.config.insert("prefix_projection".into(), json!(true))),
        _ => {}
    }
    if adapter.config.contains_key("encoder_hidden_size") {
        adapter.config.insert("encoder_hidden_size".into(), json!(hidden));
    }
    adapter.tensors.insert("prompt_embeddings".into(), tensor(&rows)?);
    if let Some(head) = &job.head {
        for (name, var) in head.weights() {
            adapter.tensors.insert(format!("base_model.{name}"), tensor(var)?);
        }
        adapter.config.insert("modules_to_save".into(), json!(["classifier", "score"]));
    }
    Ok(adapter)
}

fn tensor(t: &Tensor) -> Result<SavedTensor> {
    Ok(SavedTensor::f32(t.dims().to_vec(), &t.flatten_all()?.to_vec1::<f32>()?))
}
