//! What is trained: the weights that become virtual tokens or stored K and V, as PEFT's prompt encoders hold them.
use crate::error::{Error, Result};
use crate::ops::lstm::lstm;
use candle_core::{Tensor, Var};
use std::collections::BTreeMap;

/// How weights become rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncoderKind {
    /// The rows themselves: prompt tuning, P-tuning v2 (deep prefixes without reparametrisation).
    Embedding,
    /// P-tuning: embedding -> Linear, ReLU, Linear, ReLU, Linear (`mlp_head.{0,2,4}`).
    Mlp,
    /// P-tuning: embedding -> bidirectional LSTM (`lstm_head`), then Linear, ReLU, Linear (`mlp_head.{0,2}`).
    Lstm,
    /// Prefix-tuning with reparametrisation: embedding -> Linear, tanh, Linear (`transform.{0,2}`).
    Projection,
    /// Multitask prompt tuning: prompt of task t = embedding * (`prefix_task_cols`\[t\] @ `prefix_task_rows`\[t\]); the
    /// rows of all tasks, one after the other.
    Multitask,
}

/// Trainable weights under PEFT's names, and the rows that they stand for. Clones share the weights.
#[derive(Clone)]
pub struct PromptEncoder {
    kind: EncoderKind,
    weights: BTreeMap<String, Var>,
}

impl PromptEncoder {
    /// From weights by PEFT's names, f32.
    ///
    /// # Errors
    /// `InvalidArgument` naming a weight that is missing, or whose shape does not go with the others.
    pub fn new(kind: EncoderKind, weights: BTreeMap<String, Tensor>) -> Result<Self> {
        let weights = weights.into_iter().map(|(name, t)| Ok((name, Var::from_tensor(&t)?))).collect::<Result<_>>()?;
        let encoder = PromptEncoder { kind, weights };
        let rows = encoder.rows(&[0])?;
        if rows.dims().len() != 2 {
            return Err(Error::invalid(
                "embedding.weight",
                format!("{:?}", rows.dims()),
                "must give rows of one width",
            ));
        }
        Ok(encoder)
    }

    /// How weights become rows.
    pub fn kind(&self) -> EncoderKind {
        self.kind
    }

    /// Tasks that share the rows: 1 unless the prompt is a multitask one.
    pub fn tasks(&self) -> usize {
        let cols = self.weights.get("prefix_task_cols").filter(|_| self.kind == EncoderKind::Multitask);
        cols.map_or(1, |cols| cols.dims()[0].max(1))
    }

    /// The trainable weights by PEFT's names, always in the same order.
    pub fn weights(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.weights.iter().map(|(name, var)| (name.as_str(), var))
    }

    /// The rows `[num_virtual_tokens, width]`, with their gradient: what PEFT saves as `prompt_embeddings`. A multitask prompt has as
    /// many for each of `tasks`, one task after the other: a job of many never makes those that a batch does not use.
    ///
    /// # Errors
    /// `InvalidArgument` for a task that there is not.
    pub fn rows(&self, tasks: &[u32]) -> Result<Tensor> {
        let most = self.tasks();
        if let Some(task) = tasks.iter().find(|task| **task as usize >= most) {
            return Err(Error::invalid("task_id", task, format!("the job has {most} tasks, counted from 0")));
        }
        let embedding = self.weight("embedding.weight")?.as_tensor().clone();
        match self.kind {
            EncoderKind::Embedding => Ok(embedding),
            EncoderKind::Mlp => {
                let x = self.linear("mlp_head.0", &embedding)?.relu()?;
                let x = self.linear("mlp_head.2", &x)?.relu()?;
                self.linear("mlp_head.4", &x)
            }
            EncoderKind::Projection => {
                let x = self.linear("transform.0", &embedding)?.tanh()?;
                self.linear("transform.2", &x)
            }
            EncoderKind::Multitask => {
                let tasks = Tensor::new(tasks, embedding.device())?;
                let of = |name: &str| -> Result<Tensor> { Ok(self.weight(name)?.index_select(&tasks, 0)?) };
                let scales = of("prefix_task_cols")?.matmul(&of("prefix_task_rows")?)?; // [tasks, n, width]
                Ok(scales.broadcast_mul(&embedding)?.flatten(0, 1)?)
            }
            EncoderKind::Lstm => {
                let mut x = embedding;
                for layer in 0.. {
                    if layer > 0 && !self.weights.contains_key(&format!("lstm_head.weight_ih_l{layer}")) {
                        break;
                    }
                    let there = self.lstm(&format!("l{layer}"), &x, false)?;
                    let back = self.lstm(&format!("l{layer}_reverse"), &x, true)?;
                    x = Tensor::cat(&[there, back], 1)?;
                }
                let x = self.linear("mlp_head.0", &x)?.relu()?;
                self.linear("mlp_head.2", &x)
            }
        }
    }

    /// One weight by its name.
    ///
    /// # Errors
    /// `InvalidArgument` naming one that is not there.
    pub fn weight(&self, name: &str) -> Result<&Var> {
        self.weights.get(name).ok_or_else(|| Error::invalid("prompt encoder", name, "is missing"))
    }

    /// x `[n, in]` -> `[n, out]` by `name.weight` `[out, in]` and `name.bias` `[out]`.
    fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let (weight, bias) = (self.weight(&format!("{name}.weight"))?, self.weight(&format!("{name}.bias"))?);
        Ok(x.matmul(&weight.t()?)?.broadcast_add(bias)?)
    }

    /// One direction of one layer: x `[n, in]` -> `[n, h]`, from a zero state.
    fn lstm(&self, which: &str, x: &Tensor, back: bool) -> Result<Tensor> {
        let weight = |name: &str| self.weight(&format!("lstm_head.{name}_{which}"));
        let bias = (weight("bias_ih")?.as_tensor() + weight("bias_hh")?.as_tensor())?;
        let gates = x.matmul(&weight("weight_ih")?.t()?)?.broadcast_add(&bias)?; // [n, 4h]
        Ok(lstm(&gates, weight("weight_hh")?, back)?)
    }
}
