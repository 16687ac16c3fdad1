//! The one decoder, of which an encoder is the case where every row sees all: attention over prefix and own pages,
//! a feed-forward part, norms and residuals where the family has them.
mod steps;
mod training;

use super::LoadOptions;
use super::batch::{Batch, Forward};
use super::config::{ModelConfig, Positions, Residual, Up};
use super::layer::{Layer, Loader};
use super::weights::Checkpoint;
use crate::error::{Error, Result};
use crate::kv::KvPool;
use crate::ops::activation::Activation;
use crate::ops::embed::{self, Embedding, RowSource};
use crate::ops::feed_forward::feed_forward;
use crate::ops::float;
use crate::ops::gpu::{Buffer, DeviceRows};
use crate::ops::kv_write::device::{Projection, project};
use crate::ops::linear::Linear;
use crate::ops::norm::Norm;
use crate::ops::prefix_attention::device::{self, DevicePlan, Uploads};
use crate::ops::prefix_attention::{
    Attention, KvLayout, PackedOnDevice, PackedPlan, Plan, packed_attention, prefix_attention,
};
use crate::ops::rope::{self, Frequencies, Heads, Turns};
use crate::ops::sample::device::Sampling;
use crate::ops::{Machine, Vector};
use candle_core::{DType, Device, Tensor};
use std::sync::{Arc, Mutex, PoisonError};
use steps::{Graphs, Steps};

pub use training::PackedRows;

/// Bytes for attention's partial results on a GPU. What finds no room is not split, which changes no bit.
const SCRATCH: usize = 64 << 20;
/// Tokens that a step on a GPU can choose, which the next one's rows can name.
pub const MOST_SAMPLED: usize = 1 << 14;

/// The frozen weights, packed, and what they need to run.
pub struct Decoder {
    /// The table is shared with the head when tied.
    embedding: Embedding,
    /// An encoder has its norm here, a decoder at the end.
    norm: Norm,
    layers: Vec<Layer>,
    /// `None` for an encoder.
    head: Option<Linear>,
    /// Applied to the pooled row before a classification head, then tanh (BERT).
    pooler: Option<Linear>,
    ropes: Vec<Arc<Frequencies>>,
    activation: Activation,
    /// For attention's partial results, on a GPU.
    scratch: Option<Arc<Buffer>>,
    /// Of serving, on a GPU.
    steps: Option<Mutex<Steps>>,
    machine: Arc<Machine>,
    config: ModelConfig,
}

/// What all layers of one pass share.
struct Pass<'a> {
    at: At,
    view: View<'a>,
}

/// What and where the rows of a pass are.
#[derive(Clone)]
enum At {
    /// On the processor: positions, and by how much they turn, by [`ModelConfig::ropes`].
    Host { positions: Arc<[u32]>, turns: Vec<Arc<Turns>> },
    /// On a GPU.
    Device(Arc<DeviceRows>),
}

/// Where the layers' K and V are.
enum View<'a> {
    /// Pages of the pool, for serving.
    Paged { kv: &'a KvPool, plan: Arc<Plan>, slots: Arc<[u32]> },
    /// Pages of a pool on a GPU, for serving: a plan for each sort of attention that layers have.
    Device { kv: &'a KvPool, plans: Vec<(Attention, Arc<DevicePlan>)> },
    /// Packed rows with a gradient, for training: the layer's stored rows `[rows, 2 * kv_heads * head_dim]`, then the own
    /// rows.
    Packed { stored: Option<&'a Tensor>, plan: Arc<PackedPlan>, device: Option<Arc<PackedOnDevice>> },
}

impl Decoder {
    /// Takes every weight out of `checkpoint`. `positions` bounds the longest sequence.
    ///
    /// # Errors
    /// `FailedPrecondition` naming a tensor that is missing or of a wrong shape.
    pub fn load(
        checkpoint: &mut Checkpoint<'_>,
        config: &ModelConfig,
        positions: usize,
        LoadOptions { quantize, enforce_eager, .. }: LoadOptions,
        machine: &Arc<Machine>,
    ) -> Result<Self> {
        let names = config.family.names;
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let mut loader = Loader::new(checkpoint, config, quantize, machine);
        let table = loader.linear(&[(names.embed, vocab)], hidden, false)?;
        let learned = match config.family.positions {
            Positions::Learned(offset) => Some(Vector::new(loader.positions(offset, positions)?, machine)?),
            _ => None,
        };
        let norm = loader.norm(names.norm)?;
        let layers = (0..config.num_layers()).map(|i| loader.layer(i)).collect::<Result<_>>()?;
        let head = match (config.family.encoder, config.tied) {
            (true, _) => None,
            (false, true) => Some(table.clone()),
            (false, false) => Some(loader.linear_at(&[(names.head.to_owned(), vocab)], hidden, false)?),
        };
        let pooler = match names.pooler {
            "" => None,
            name => Some(loader.linear(&[(name, hidden)], hidden, true)?),
        };
        if config.tied {
            // Some savers write the tied copy too.
            checkpoint.forget(&format!("{}.weight", names.head));
        }
        checkpoint.forget_all(names.unused);
        let mut scale = 1.0;
        if config.family.scaled_embedding {
            // The factor is a tensor of the model's type there, and rounded to it.
            scale = (hidden as f32).sqrt();
            if checkpoint.table_dtype() == Some(DType::BF16) {
                scale = float::bf16_to_f32(float::f32_to_bf16(scale));
            }
        }
        let ropes = config.ropes.iter().map(|r| {
            let (inv_freq, scale) = r.frequencies(positions);
            Ok(Arc::new(Frequencies { inv_freq: Vector::new(inv_freq, machine)?, scale }))
        });
        let scratch = machine.gpu().map(|gpu| Buffer::poisoned(gpu, SCRATCH)).transpose()?.map(Arc::new);
        let steps = machine.gpu().zip(scratch.as_ref()).map(|(gpu, scratch)| -> Result<_> {
            let sampled = Arc::new(Buffer::poisoned(gpu, 4 * MOST_SAMPLED)?);
            let (uploads, sampling) = (Uploads::new(gpu, scratch, &sampled)?, Sampling::new(gpu, &sampled)?);
            let (no_soft, graphs) = (machine.rows(&[], hidden)?, (!enforce_eager).then(Graphs::default));
            Ok(Mutex::new(Steps { uploads, no_soft, sampling, graphs }))
        });
        let gated = !matches!(names.up, Up::Plain(_));
        Ok(Decoder {
            embedding: Embedding { table, scale, positions: learned },
            norm,
            layers,
            head,
            pooler,
            ropes: ropes.collect::<Result<_>>()?,
            activation: Activation::new(config.activation, gated, machine),
            scratch,
            steps: steps.transpose()?,
            machine: machine.clone(),
            config: config.clone(),
        })
    }

    /// The threads that it runs on.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// Type of activations, K and V: that of the weights on a GPU, f32 on the processor.
    pub fn activation_dtype(&self) -> DType {
        self.embedding.table.matrix().map_or(DType::F32, |table| table.dtype())
    }

    /// Shape of the K and V rows of a layer.
    pub fn kv_layout(&self) -> KvLayout {
        KvLayout { kv_heads: self.config.num_kv_heads, head_dim: self.config.head_dim }
    }

    /// Runs the batch: writes its K and V into `kv`; what it gives is in [`Forward`].
    pub fn forward(&self, batch: &Batch, kv: &KvPool) -> Result<Forward> {
        if let (Some(gpu), Some(steps)) = (self.machine.gpu(), &self.steps) {
            return self.forward_on(gpu, &mut steps.lock().unwrap_or_else(PoisonError::into_inner), batch, kv);
        }
        let soft = self.machine.rows(&batch.soft, self.config.hidden_size)?;
        let at = self.at(&batch.inputs, &batch.positions)?;
        let (sequences, pages) = (batch.sequences.clone(), batch.pages.clone());
        let plan = Arc::new(Plan::new(sequences, pages, self.kv_layout(), self.config.num_heads));
        let view = View::Paged { kv, plan, slots: batch.slots.as_slice().into() };
        let hidden = self.run(&batch.inputs, &soft, &batch.logit_rows, &Pass { at, view })?;
        Ok(Forward { hidden, chosen: None })
    }

    fn at(&self, inputs: &[RowSource], positions: &[u32]) -> Result<At> {
        Ok(match self.machine.gpu() {
            Some(gpu) => At::Device(Arc::new(DeviceRows::new(gpu, inputs, positions, &[])?)),
            None => {
                let turns = self.ropes.iter().map(|frequencies| frequencies.at(positions)).collect();
                At::Host { positions: positions.into(), turns }
            }
        })
    }

    fn run(&self, inputs: &[RowSource], soft: &Tensor, wanted: &[u32], pass: &Pass<'_>) -> Result<Option<Tensor>> {
        let mut hidden = self.embed(inputs, soft, &pass.at)?;
        let last = self.layers.len() - 1;
        for index in 0..last {
            hidden = self.layer(index, &hidden, pass, None)?;
        }
        if wanted.is_empty() {
            self.attend(last, &hidden, pass)?;
            return Ok(None);
        }
        let rows = self.some(wanted, inputs.len())?;
        Ok(Some(self.finish(&self.layer(last, &hidden, pass, rows.as_ref())?)?))
    }

    /// The numbers of the rows that are `wanted` of so many, where the model runs; `None` for all of them, as in decoding: they need no copy.
    fn some(&self, wanted: &[u32], rows: usize) -> Result<Option<Tensor>> {
        Ok(match self.machine.gpu() {
            _ if wanted.iter().copied().eq(0..rows as u32) => None,
            Some(gpu) => Some(gpu.upload(wanted, wanted.len())?),
            None => Some(Tensor::from_slice(wanted, wanted.len(), &Device::Cpu)?),
        })
    }

    /// Input rows -> `[rows, hidden]`, differentiable in `soft` `[num_soft, hidden]`.
    fn embed(&self, inputs: &[RowSource], soft: &Tensor, at: &At) -> Result<Tensor> {
        let hidden = match (at, self.machine.gpu()) {
            (At::Device(rows), Some(gpu)) => embed::device::embed(gpu, &self.embedding, soft, rows)?,
            (At::Host { positions, .. }, _) => {
                embed::embed(&self.embedding, soft, inputs.to_vec(), positions, &self.machine)?
            }
            (At::Device(_), None) => return Err(Error::internal("rows on a GPU, the model is not")),
        };
        if self.config.family.encoder { Ok(self.norm.forward(&hidden)?) } else { Ok(hidden) }
    }

    /// What tokens enter the first layer as, without learned positions: `[tokens, hidden]` in f32 on the processor.
    pub fn token_rows(&self, tokens: &[u32]) -> Result<Tensor> {
        let bare = Embedding { positions: None, ..self.embedding.clone() };
        let none = self.machine.rows(&[], self.config.hidden_size)?;
        let rows: Vec<_> = tokens.iter().map(|id| RowSource::Token(*id)).collect();
        let positions: Vec<u32> = (0..tokens.len() as u32).collect();
        Ok(match self.machine.gpu() {
            Some(gpu) => {
                let rows = Arc::new(DeviceRows::new(gpu, &rows, &positions, &[])?);
                Machine::to_host(&embed::device::embed(gpu, &bare, &none, &rows)?)?
            }
            None => embed::embed(&bare, &none, rows, &positions.into(), &self.machine)?,
        })
    }

    /// Rows of the last layer's output, with a decoder's final norm.
    pub fn finish(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(if self.config.family.encoder { hidden.clone() } else { self.norm.forward(hidden)? })
    }

    /// Bytes that a row's activations take in one layer while its graph is kept.
    pub fn activation_bytes_per_row(&self) -> usize {
        let c = &self.config;
        let (q, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        // On the processor `feed_forward` keeps what enters its activation alone.
        let between = if self.machine.gpu().is_some() { 3 } else { 2 };
        // Norms, residuals and the layer's input; q, k, v before and after RoPE and apart; what attention gives; up.
        4 * (6 * c.hidden_size + 3 * (q + 2 * kv) + q + between * c.intermediate_size)
    }

    /// Bytes that the activations of a step of `rows` rows take at most on a GPU: what one layer has at once, and the logits of a
    /// block of rows, for steps that are launched and for graphs, which have memory of their own.
    pub fn step_bytes(&self, rows: usize) -> usize {
        let c = &self.config;
        let logits = 4 * c.vocab_size * rows.min(64) * if c.logit_cap.is_some() { 2 } else { 1 };
        2 * rows * self.activation_bytes_per_row() + 2 * logits
    }

    fn vocabulary(&self) -> Result<&Linear> {
        self.head.as_ref().ok_or_else(|| Error::internal("an encoder has no logits"))
    }

    /// x `[rows, hidden]` -> the same after one layer, by the formulas of [`Residual`]. `some`: of these rows alone, as nobody asks for
    /// others behind the last layer; their K and V are written all the same.
    fn layer(&self, index: usize, x: &Tensor, pass: &Pass<'_>, some: Option<&Tensor>) -> Result<Tensor> {
        let layer = &self.layers[index];
        let norms = &layer.norms;
        let attention = self.attend(index, x, pass)?;
        let (attention, x) = match some {
            None => (attention, x.clone()),
            Some(rows) => (attention.index_select(rows, 0)?, x.index_select(rows, 0)?),
        };
        Ok(match self.config.residual {
            Residual::Sequential => {
                let x = layer.o.forward_add(&attention, &x)?;
                self.feed_forward(layer, &norms[1].forward(&x)?, Some(&x))?
            }
            Residual::Parallel => {
                let residual = layer.o.forward_add(&attention, &x)?;
                self.feed_forward(layer, &norms[1].forward(&x)?, Some(&residual))?
            }
            Residual::Sandwich => {
                let x = (norms[1].forward(&layer.o.forward(&attention)?)? + x)?;
                let fed = self.feed_forward(layer, &norms[2].forward(&x)?, None)?;
                (norms[3].forward(&fed)? + x)?
            }
            Residual::Post => {
                let x = norms[0].forward(&layer.o.forward_add(&attention, &x)?)?;
                norms[1].forward(&self.feed_forward(layer, &x, Some(&x))?)?
            }
        })
    }

    /// A layer's input `[rows, hidden]` -> [`Decoder::attention`] of it, normed first where the family does that.
    fn attend(&self, index: usize, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        match self.config.residual {
            Residual::Post => self.attention(index, x, pass),
            _ => self.attention(index, &self.layers[index].norms[0].forward(x)?, pass),
        }
    }

    /// Normed rows `[rows, hidden]` -> what the heads read `[rows, heads * head_dim]`; in pages, K and V go to their slots.
    fn attention(&self, index: usize, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        let (layer, facts) = (&self.layers[index], &self.config.layers[index]);
        let (heads, kv_heads, dim) = (self.config.num_heads, self.config.num_kv_heads, self.config.head_dim);
        let mut qkv = layer.qkv.forward(x)?;
        if let (View::Device { kv, plans }, At::Device(rows), Some(gpu)) = (&pass.view, &pass.at, self.machine.gpu()) {
            let rope = facts.rope.and_then(|i| self.ropes.get(i)).cloned();
            let (slabs, projection) = (kv.device(index)?, Projection { heads, norm: layer.head_norm.clone(), rope });
            let q = project(gpu, &qkv, rows, slabs, &projection)?;
            let plan = plans.iter().find(|(attention, _)| *attention == facts.attention);
            let (_, plan) = plan.ok_or_else(|| Error::internal("a layer without a plan"))?;
            return Ok(device::attend(gpu, &q, slabs, plan)?);
        }
        if let Some(norm) = &layer.head_norm {
            qkv = norm.forward(&qkv)?;
        }
        if let Some(i) = facts.rope {
            qkv = match (&pass.at, self.machine.gpu()) {
                (At::Device(rows), Some(gpu)) => {
                    rope::device::rope(gpu, &qkv, rows, &self.ropes[i], heads, self.kv_layout())?
                }
                (At::Host { turns, .. }, _) => {
                    rope::rope(&qkv, &turns[i], Heads { count: heads + kv_heads, dim }, &self.machine)?
                }
                (At::Device(_), None) => return Err(Error::internal("rows on a GPU, the model is not")),
            };
        }
        match &pass.view {
            View::Device { .. } => Err(Error::internal("a pool on a GPU, rows that are not")),
            View::Paged { kv, plan, slots } => {
                kv.write(index, &qkv, slots, heads * dim)?;
                let (keys, values) = kv.host(index)?;
                Ok(prefix_attention(&qkv, keys, values, plan, facts.attention, &self.machine)?)
            }
            View::Packed { stored, plan, device } => {
                if let (Some(device), Some(gpu)) = (device, self.machine.gpu()) {
                    return Ok(device.attention(gpu, &qkv, *stored, facts.attention)?);
                }
                Ok(packed_attention(&qkv, *stored, plan, facts.attention, &self.machine)?)
            }
        }
    }

    fn feed_forward(&self, layer: &Layer, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        Ok(feed_forward(x, residual, &layer.up, &self.activation, &layer.down)?)
    }

    /// Hidden rows `[n, hidden]` of [`Decoder::forward`] -> logits `[n, vocab]`.
    ///
    /// # Errors
    /// `Internal` for an encoder, which has none.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = self.vocabulary()?.forward_f32(hidden)?;
        Ok(match self.config.logit_cap {
            None => logits,
            Some(cap) => ((logits / cap)?.tanh()? * cap)?,
        })
    }

    /// Hidden rows `[n, hidden]` -> what a classification head reads `[n, hidden]`.
    pub fn pool(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(match &self.pooler {
            None => hidden.clone(),
            Some(pooler) => pooler.forward(hidden)?.tanh()?,
        })
    }
}
