//! A classification head: what a pooled hidden row becomes.
use crate::ops::Linear;
use candle_core::{Result, Tensor};

/// Dense layers with tanh between them: `BertForSequenceClassification` has pooler and classifier,
/// `RobertaClassificationHead` dense and out_proj, a decoder's `score` one alone.
#[derive(Clone)]
pub struct Head {
    layers: Vec<Linear>,
}

impl Head {
    /// `layers` `[hidden, hidden]`..., the last `[labels, hidden]`; at least one.
    pub fn new(layers: Vec<Linear>) -> Self {
        Head { layers }
    }

    /// Number of labels.
    pub fn labels(&self) -> usize {
        self.layers.last().map_or(0, |l| l.n())
    }

    /// Pooled rows `[m, hidden]` -> `[m, labels]`.
    pub fn forward(&self, pooled: &Tensor) -> Result<Tensor> {
        let (mut x, mut layers) = (pooled.clone(), self.layers.iter());
        if let Some(first) = layers.next() {
            x = first.forward(&x)?;
        }
        for layer in layers {
            x = layer.forward(&x.tanh()?)?;
        }
        Ok(x)
    }
}

impl std::fmt::Debug for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Head({} layers, {} labels)", self.layers.len(), self.labels())
    }
}
