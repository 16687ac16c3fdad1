//! A classification head in training: the same layers as [`crate::adapter::Head`], as variables.
use crate::error::{Error, Result};
use candle_core::{Tensor, Var};

/// Dense layers with tanh between them, under the names that PEFT's `modules_to_save` gives them. Clones share the weights.
#[derive(Clone)]
pub struct TrainedHead {
    /// Name, weight `[n, k]`, bias `[n]`.
    layers: Vec<(String, Var, Option<Var>)>,
    /// `(layer, is the bias)` by name order: how the weights are listed.
    names: Vec<(String, Var)>,
}

impl TrainedHead {
    /// From the modules' names in their order, weight `[n, k]` and bias `[n]` of each.
    pub fn new(layers: Vec<(String, Tensor, Option<Tensor>)>) -> Result<Self> {
        let layers = layers.into_iter().map(|(name, weight, bias)| {
            Ok((name, Var::from_tensor(&weight)?, bias.map(|b| Var::from_tensor(&b)).transpose()?))
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let mut names = Vec::new();
        for (name, weight, bias) in &layers {
            names.push((format!("{name}.weight"), weight.clone()));
            names.extend(bias.iter().map(|bias| (format!("{name}.bias"), bias.clone())));
        }
        Ok(TrainedHead { layers, names })
    }

    /// The trainable weights, always in the same order.
    pub fn weights(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.names.iter().map(|(name, var)| (name.as_str(), var))
    }

    /// Number of classes.
    pub fn labels(&self) -> usize {
        self.layers.last().map_or(0, |(_, weight, _)| weight.dims()[0])
    }

    /// Pooled rows `[m, hidden]` -> logits `[m, labels]`.
    pub fn forward(&self, pooled: &Tensor) -> Result<Tensor> {
        let mut x = pooled.clone();
        for (i, (_, weight, bias)) in self.layers.iter().enumerate() {
            if i > 0 {
                x = x.tanh()?;
            }
            x = x.matmul(&weight.t()?)?;
            if let Some(bias) = bias {
                x = x.broadcast_add(bias)?;
            }
        }
        if self.layers.is_empty() { Err(Error::internal("a head without layers")) } else { Ok(x) }
    }
}
