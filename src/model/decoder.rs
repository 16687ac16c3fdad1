//! The one decoder: pre-norm, rotary grouped-query attention over prefix and own pages, gated feed-forward.
use super::batch::Batch;
use super::config::ModelConfig;
use super::weights::Checkpoint;
use crate::error::Result;
use crate::kv::KvPool;
use crate::ops::embed::embed;
use crate::ops::gated_mlp::GatedMlp;
use crate::ops::linear::{Cpu, Linear, Packed};
use crate::ops::norm::RmsNorm;
use crate::ops::prefix_attention::{KvLayout, Plan, prefix_attention};
use crate::ops::rope::{RopeTable, rope};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

/// The frozen weights, packed, and what they need to run.
pub struct Decoder {
    /// `[vocab, hidden]`, shared with the head when tied.
    table: Arc<Packed>,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
    rope: Arc<RopeTable>,
    gated_mlp: GatedMlp,
    cpu: Arc<Cpu>,
    config: ModelConfig,
}

struct Layer {
    attention_norm: RmsNorm,
    /// `[q | k | v]`
    qkv: Linear,
    o: Linear,
    mlp_norm: RmsNorm,
    /// `[gate | up]`
    gate_up: Linear,
    down: Linear,
}

impl Decoder {
    /// Takes every weight out of `checkpoint`. `positions` bounds the longest sequence; `progress` hears of each layer.
    ///
    /// # Errors
    /// `FailedPrecondition` naming a tensor that is missing, left over, or of a wrong shape.
    pub fn load(
        checkpoint: &mut Checkpoint<'_>,
        config: &ModelConfig,
        positions: usize,
        cpu: &Arc<Cpu>,
    ) -> Result<Self> {
        let names = config.family.names;
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let mut loader = Loader { checkpoint, cpu, layer: String::new() };
        let table = loader.linear(&[(names.embed, vocab)], hidden, false)?;
        let layers = (0..config.num_layers).map(|i| loader.layer(i, config)).collect::<Result<_>>()?;
        let norm = loader.norm(names.norm, config)?;
        let head = if config.tied {
            // Some savers write the tied copy too.
            loader.checkpoint.forget(&format!("{}.weight", names.head));
            table.clone()
        } else {
            loader.linear(&[(names.head, vocab)], hidden, false)?
        };
        Ok(Decoder {
            table: table.weight().clone(),
            layers,
            norm,
            head,
            rope: Arc::new(RopeTable::new(&config.inv_freq(), positions, 1.0)),
            gated_mlp: GatedMlp::new(cpu),
            cpu: cpu.clone(),
            config: config.clone(),
        })
    }

    /// The threads that it runs on.
    pub fn cpu(&self) -> &Arc<Cpu> {
        &self.cpu
    }

    /// Shape of the K and V rows of a layer.
    pub fn kv_layout(&self) -> KvLayout {
        KvLayout { kv_heads: self.config.num_kv_heads, head_dim: self.config.head_dim }
    }

    /// Runs the batch: writes its K and V into `kv` and returns the hidden rows of `batch.logit_rows`
    /// `[logit_rows, hidden]`, final norm applied; `None` if no logits are wanted.
    pub fn forward(&self, batch: &Batch, kv: &KvPool) -> Result<Option<Tensor>> {
        let config = &self.config;
        let width = config.hidden_size;
        let (heads, kv_heads, dim) = (config.num_heads, config.num_kv_heads, config.head_dim);
        let soft = Tensor::from_slice(&batch.soft, (batch.soft.len() / width, width), &Device::Cpu)?;
        let positions: Arc<[u32]> = batch.positions.as_slice().into();
        let slots: Arc<[u32]> = batch.slots.as_slice().into();
        let scale = 1.0 / (dim as f32).sqrt();
        let plan = Plan::new(batch.sequences.clone(), batch.pages.clone(), self.kv_layout(), heads, scale);
        let plan = Arc::new(plan);

        let mut hidden = embed(&self.table, &soft, batch.inputs.clone())?; // [rows, hidden]
        for (i, layer) in self.layers.iter().enumerate() {
            let qkv = layer.qkv.forward(&layer.attention_norm.forward(&hidden)?)?;
            let qkv = rope(&qkv, &self.rope, &positions, heads + kv_heads)?;
            kv.write(i, &qkv, &slots, heads * dim)?;
            let (keys, values) = kv.layer(i);
            let attention = prefix_attention(&qkv, keys, values, &plan, &self.cpu)?;
            hidden = layer.o.forward_add(&attention, &hidden)?;
            let gate_up = layer.gate_up.forward(&layer.mlp_norm.forward(&hidden)?)?;
            hidden = layer.down.forward_add(&self.gated_mlp.forward(&gate_up)?, &hidden)?;
        }
        if batch.logit_rows.is_empty() {
            return Ok(None);
        }
        let rows = Tensor::from_slice(&batch.logit_rows, batch.logit_rows.len(), &Device::Cpu)?;
        Ok(Some(self.norm.forward(&hidden.index_select(&rows, 0)?)?))
    }

    /// Hidden rows `[n, hidden]` of [`Decoder::forward`] -> logits `[n, vocab]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.head.forward(hidden)?)
    }
}

/// Takes tensors by the family's names.
struct Loader<'l, 'c> {
    checkpoint: &'l mut Checkpoint<'c>,
    cpu: &'l Arc<Cpu>,
    /// What `{}` in a name stands for.
    layer: String,
}

impl Loader<'_, '_> {
    fn layer(&mut self, index: usize, c: &ModelConfig) -> Result<Layer> {
        let names = c.family.names;
        self.layer = index.to_string();
        let (q, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        Ok(Layer {
            attention_norm: self.norm(names.attention_norm, c)?,
            qkv: self.linear(&[(names.q, q), (names.k, kv), (names.v, kv)], c.hidden_size, c.qkv_bias)?,
            o: self.linear(&[(names.o, c.hidden_size)], q, c.o_bias)?,
            mlp_norm: self.norm(names.mlp_norm, c)?,
            gate_up: {
                let parts = [(names.gate, c.intermediate_size), (names.up, c.intermediate_size)];
                self.linear(&parts, c.hidden_size, c.mlp_bias)?
            },
            down: self.linear(&[(names.down, c.hidden_size)], c.intermediate_size, c.mlp_bias)?,
        })
    }

    /// The parts `(name, rows)`, each `[rows, k]`, packed one after the other.
    fn linear(&mut self, parts: &[(&str, usize)], k: usize, bias: bool) -> Result<Linear> {
        let (mut weights, mut biases) = (Vec::new(), Vec::new());
        for (name, rows) in parts {
            let name = name.replace("{}", &self.layer);
            weights.push(self.checkpoint.take(&format!("{name}.weight"), &[*rows, k])?);
            let bias = bias.then(|| self.checkpoint.take(&format!("{name}.bias"), &[*rows]));
            biases.push(bias.transpose()?);
        }
        Ok(Linear::new(&weights, &biases, self.cpu)?)
    }

    fn norm(&mut self, name: &str, c: &ModelConfig) -> Result<RmsNorm> {
        let name = format!("{}.weight", name.replace("{}", &self.layer));
        let weight = self.checkpoint.take(&name, &[c.hidden_size])?;
        Ok(RmsNorm::new(weight.to_dtype(DType::F32)?.to_vec1()?, c.rms_norm_eps))
    }
}
