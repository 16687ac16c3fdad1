//! The weights of one layer, and how a family's tensors become them.
use super::config::{ModelConfig, NormKind, Qkv, Up};
use super::weights::Checkpoint;
use crate::config::Quantize;
use crate::error::Result;
use crate::ops::Machine;
use crate::ops::linear::Linear;
use crate::ops::norm::{HeadNorm, Norm};
use candle_core::{DType, Tensor};
use std::sync::Arc;

/// Packed weights.
pub struct Layer {
    /// In the order of [`super::config::Residual`]'s formulas.
    pub norms: Vec<Norm>,
    /// `[q | k | v]`
    pub qkv: Linear,
    /// Of q and k, before RoPE.
    pub head_norm: Option<HeadNorm>,
    /// After the heads.
    pub o: Linear,
    /// `[gate | up]`, or one alone.
    pub up: Linear,
    /// Back to the residual stream.
    pub down: Linear,
}

/// Takes tensors by the family's names.
pub struct Loader<'l, 'c> {
    checkpoint: &'l mut Checkpoint<'c>,
    config: &'l ModelConfig,
    quantize: Quantize,
    machine: &'l Arc<Machine>,
    /// What the names start with.
    root: &'static str,
    /// What `{}` in a name stands for.
    layer: String,
}

/// Name and rows of a weight `[rows, k]`.
type Part<'a> = (&'a str, usize);

impl<'l, 'c> Loader<'l, 'c> {
    /// Finds out what the names in `checkpoint` start with.
    pub fn new(
        checkpoint: &'l mut Checkpoint<'c>,
        config: &'l ModelConfig,
        quantize: Quantize,
        machine: &'l Arc<Machine>,
    ) -> Self {
        let names = config.family.names;
        let found = names.roots.iter().find(|root| checkpoint.has(&format!("{root}{}.weight", names.embed)));
        let root = found.or(names.roots.first()).copied().unwrap_or("");
        Loader { checkpoint, config, quantize, machine, root, layer: String::new() }
    }

    /// The layer `index`.
    pub fn layer(&mut self, index: usize) -> Result<Layer> {
        let c = self.config;
        let names = c.family.names;
        self.layer = index.to_string();
        let head_norm = if c.family.head_norm {
            let q = self.norm_weight("layers.{}.self_attn.q_norm", c.head_dim)?;
            let k = self.norm_weight("layers.{}.self_attn.k_norm", c.head_dim)?;
            Some(HeadNorm::new(q, k, c.norm_eps, [c.num_heads, c.num_kv_heads], self.machine)?)
        } else {
            None
        };
        Ok(Layer {
            norms: names.norms.iter().map(|name| self.norm(name)).collect::<Result<_>>()?,
            qkv: self.qkv()?,
            head_norm,
            o: self.linear(&[(names.o, c.hidden_size)], c.num_heads * c.head_dim, c.o_bias)?,
            up: {
                let n = c.intermediate_size;
                let parts: &[Part<'_>] = match names.up {
                    Up::Plain(name) => &[(name, n)],
                    Up::Gated { gate, up } => &[(gate, n), (up, n)],
                    Up::Fused(name) => &[(name, 2 * n)],
                };
                self.linear(parts, c.hidden_size, c.mlp_bias)?
            },
            down: self.linear(&[(names.down, c.hidden_size)], c.intermediate_size, c.mlp_bias)?,
        })
    }

    fn qkv(&mut self) -> Result<Linear> {
        let c = self.config;
        let (q, kv) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim);
        match c.family.names.qkv {
            Qkv::Apart { q: wq, k, v } => self.linear(&[(wq, q), (k, kv), (v, kv)], c.hidden_size, c.qkv_bias),
            Qkv::Fused(name) => self.linear(&[(name, q + 2 * kv)], c.hidden_size, c.qkv_bias),
            Qkv::ByHead(name) => {
                let name = self.full(name);
                let (weight, bias) = self.weight(&name, 3 * q, c.hidden_size, c.qkv_bias)?;
                // [heads, 3, head_dim, ...] -> [3, heads, head_dim, ...]
                let regroup = |t: &Tensor, width: usize| -> Result<Tensor> {
                    let t = t.reshape((c.num_heads, 3, c.head_dim, width))?.transpose(0, 1)?.contiguous()?;
                    Ok(t.reshape((3 * q, width))?)
                };
                let bias = bias.map(|b| Ok::<_, crate::error::Error>(regroup(&b, 1)?.flatten_all()?)).transpose()?;
                self.pack(&[regroup(&weight, c.hidden_size)?], &[bias])
            }
        }
    }

    /// The parts below the root, each `[rows, k]`, packed one after the other.
    pub fn linear(&mut self, parts: &[Part<'_>], k: usize, bias: bool) -> Result<Linear> {
        let full: Vec<_> = parts.iter().map(|(name, rows)| (self.full(name), *rows)).collect();
        self.linear_at(&full, k, bias)
    }

    /// The same by full names.
    pub fn linear_at(&mut self, parts: &[(String, usize)], k: usize, bias: bool) -> Result<Linear> {
        let taken: Vec<_> =
            parts.iter().map(|(name, rows)| self.weight(name, *rows, k, bias)).collect::<Result<_>>()?;
        let (weights, biases): (Vec<_>, Vec<_>) = taken.into_iter().unzip();
        self.pack(&weights, &biases)
    }

    fn pack(&self, weights: &[Tensor], biases: &[Option<Tensor>]) -> Result<Linear> {
        Ok(match self.quantize {
            Quantize::None => Linear::new(weights, biases, self.machine)?,
            Quantize::Int8 => Linear::int8(weights, biases, self.machine)?,
        })
    }

    /// `[rows, k]` and, if there is one, `[rows]`.
    fn weight(&mut self, name: &str, rows: usize, k: usize, bias: bool) -> Result<(Tensor, Option<Tensor>)> {
        let at = format!("{name}.weight");
        // The embedding table of a family with transposed layers is none of them.
        let transposed = self.config.family.names.transposed && bias && !self.checkpoint.is_gguf();
        let weight = if transposed {
            self.checkpoint.take(&at, &[k, rows])?.t()?.contiguous()?
        } else {
            self.checkpoint.take(&at, &[rows, k])?
        };
        let bias = bias.then(|| self.checkpoint.take(&format!("{name}.bias"), &[rows]));
        Ok((weight, bias.transpose()?))
    }

    /// The norm `name` below the root, `[hidden]`.
    pub fn norm(&mut self, name: &str) -> Result<Norm> {
        let c = self.config;
        let weight = self.norm_weight(name, c.hidden_size)?;
        Ok(match c.family.norm {
            NormKind::Rms | NormKind::RmsPlusOne => Norm::rms(weight, c.norm_eps, self.machine)?,
            NormKind::Layer => {
                let bias = self.vector(name, ["bias", "beta"], c.hidden_size)?;
                Norm::layer(weight, bias, c.norm_eps, self.machine)?
            }
        })
    }

    fn norm_weight(&mut self, name: &str, width: usize) -> Result<Vec<f32>> {
        let mut weight = self.vector(name, ["weight", "gamma"], width)?;
        if self.config.family.norm == NormKind::RmsPlusOne && !self.checkpoint.is_gguf() {
            weight.iter_mut().for_each(|w| *w += 1.0);
        }
        Ok(weight)
    }

    /// A vector under its present name, or under the one that the first BERT checkpoints have.
    fn vector(&mut self, name: &str, [new, old]: [&str; 2], width: usize) -> Result<Vec<f32>> {
        let name = self.full(name);
        let old = format!("{name}.{old}");
        let name = if self.checkpoint.has(&old) { old } else { format!("{name}.{new}") };
        Ok(self.checkpoint.take(&name, &[width])?.to_dtype(DType::F32)?.to_vec1()?)
    }

    /// Learned positions `[positions, hidden]`, from row `offset` on; an encoder's first token type is added to each.
    pub fn positions(&mut self, offset: usize, positions: usize) -> Result<Vec<f32>> {
        let c = self.config;
        let (hidden, names) = (c.hidden_size, c.family.names);
        let name = format!("{}.weight", self.full(names.positions));
        let table = self.checkpoint.take(&name, &[c.max_positions + offset, hidden])?;
        let mut rows = table.narrow(0, offset, positions)?.to_dtype(DType::F32)?;
        if c.token_types > 0 {
            let name = format!("{}.weight", self.full("embeddings.token_type_embeddings"));
            let types = self.checkpoint.take(&name, &[c.token_types, hidden])?;
            rows = rows.broadcast_add(&types.narrow(0, 0, 1)?.to_dtype(DType::F32)?)?;
        }
        Ok(rows.flatten_all()?.to_vec1()?)
    }

    fn full(&self, name: &str) -> String {
        format!("{}{}", self.root, name.replace("{}", &self.layer))
    }
}
