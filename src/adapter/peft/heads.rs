//! The trained classifier beside a prompt: PEFT's `modules_to_save` for `task_type` SEQ_CLS.
//!
//! `classifier` alone is BERT's (its pooler is the base's own), `classifier.dense` with `classifier.out_proj` RoBERTa's,
//! `score` a decoder's. PEFT saves prompts' heads as `base_model.classifier.weight`; other versions and tuners write
//! `base_model.model.` in front or the wrapper's `modules_to_save.default` in between.
use super::WEIGHTS_FILE;
use super::weights::Weights;
use crate::adapter::{BaseShape, Head, TaskCard};
use crate::error::{Context, Error, Kind, Result};
use crate::ops::Linear;
use candle_core::{DType, Device, Tensor};

/// The tensors' names in the file, by what they are.
#[derive(Debug, Default)]
pub(super) struct HeadNames {
    /// Weight and bias of the hidden layer.
    dense: [Option<String>; 2],
    /// Weight and bias of the layer that gives the labels.
    out: [Option<String>; 2],
}

/// The module of a head's tensor and whether it is a bias, whatever PEFT put around it: `None` for another tensor.
pub(in crate::adapter) fn module(name: &str) -> Option<(&'static str, bool)> {
    let wrappers = ["base_model", "model", "modules_to_save", "default"];
    let parts: Vec<&str> = name.split('.').filter(|part| !wrappers.contains(part)).collect();
    let (last, module) = parts.split_last()?;
    let modules = ["classifier", "classifier.dense", "classifier.out_proj", "score"];
    let module = modules.into_iter().find(|known| *known == module.join("."))?;
    match *last {
        "weight" => Some((module, false)),
        "bias" => Some((module, true)),
        _ => None,
    }
}

impl HeadNames {
    /// Finds the head's tensors among `names`.
    ///
    /// # Errors
    /// `InvalidArgument` for two of one kind, and for a head without its last weight.
    pub fn find(names: &[String]) -> Result<Self> {
        let mut found = HeadNames::default();
        for name in names {
            let Some((module, bias)) = module(name) else { continue };
            let layer = if module == "classifier.dense" { &mut found.dense } else { &mut found.out };
            if let Some(other) = layer[usize::from(bias)].replace(name.clone()) {
                return Err(malformed(format!("`{other}` and `{name}` are both the same part of a head")));
            }
        }
        let incomplete = |[weight, bias]: &[Option<String>; 2]| weight.is_none() && bias.is_some();
        if found.out[0].is_none() && found.count() > 0 || incomplete(&found.dense) {
            return Err(malformed(
                "a head's bias or dense layer is there, the weight that belongs to it is missing".into(),
            ));
        }
        Ok(found)
    }

    fn count(&self) -> usize {
        self.dense.iter().chain(&self.out).flatten().count()
    }

    /// Whether the head has this tensor.
    pub fn has(&self, name: &str) -> bool {
        self.dense.iter().chain(&self.out).flatten().any(|own| own == name)
    }

    /// Reads the head; `None` where the file has none.
    ///
    /// # Errors
    /// `FailedPrecondition` for shapes that do not fit the base, `InvalidArgument` where the card's labels are of
    /// another number, or where it has verbalizers, which a head has no use for.
    pub fn load(&self, weights: &Weights, card: &TaskCard, shape: &BaseShape) -> Result<Option<Head>> {
        let Some(out) = &self.out[0] else { return Ok(None) };
        let hidden = shape.hidden_size;
        let rows = weights.dims(out).and_then(|dims| dims.first().copied()).unwrap_or(0).max(1);
        if !card.labels.is_empty() && card.labels.len() != rows {
            let n = card.labels.len();
            return Err(malformed(format!(
                "`{out}` has {rows} rows, task.toml: `labels` has {n} entries; one for each"
            )));
        }
        if card.has_verbalizers() {
            return Err(malformed(format!(
                "`{out}` answers Classify, so task.toml: `verbalizers`, which a language model would write, mean nothing"
            )));
        }
        let mut layers = Vec::new();
        if let [Some(weight), bias] = &self.dense {
            layers.push(layer(
                weights,
                weight,
                bias.as_deref(),
                [hidden, hidden],
                "[hidden_size, hidden_size]",
                shape,
            )?);
        }
        layers.push(layer(weights, out, self.out[1].as_deref(), [rows, hidden], "[labels, hidden_size]", shape)?);
        Ok(Some(Head::new(layers)))
    }
}

/// One layer, `[n, k]` as `dims` say.
fn layer(
    weights: &Weights,
    weight: &str,
    bias: Option<&str>,
    dims: [usize; 2],
    rule: &str,
    shape: &BaseShape,
) -> Result<Linear> {
    let read = |name: &str, rule: &str, dims: &[usize]| {
        let values = weights.floats(name, rule, DType::F32, |found| Weights::same(name, found, dims))?;
        Tensor::from_vec(values, dims, &Device::Cpu).or_kind(Kind::Internal, name)
    };
    let bias = bias.map(|name| read(name, "[labels or hidden_size]", &dims[..1])).transpose()?;
    let weight = read(weight, rule, &dims)?;
    Linear::new(&[weight], &[bias], &shape.machine).or_kind(Kind::Internal, "head")
}

fn malformed(message: String) -> Error {
    Error::new(Kind::InvalidArgument, format!("{WEIGHTS_FILE}: {message}"))
}
