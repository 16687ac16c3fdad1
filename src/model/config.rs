//! What a `config.json` says, read by the facts of its family.
//!
//! A family is one row of [`FAMILIES`]; everything that differs between two models of a family is a number or a list
//! in [`ModelConfig`].
mod family;
mod rope;
#[cfg(test)]
mod tests;

pub use family::{FAMILIES, Family, Names, NormKind, Positions, Qkv, Residual, Up, Windows};
pub use rope::{Rope, RopeScaling};

use crate::error::{Context, Error, Kind, Result};
use crate::ops::activation::Function;
use crate::ops::prefix_attention::{Attention, MAX_HEAD_DIM};
use family::Switch;
use rope::Defaults;
use serde_json::Value;

/// The numbers of one model.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct ModelConfig {
    pub family: &'static Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// Positions that are served unless more is asked for.
    pub default_positions: usize,
    /// Positions that can be served.
    pub max_positions: usize,
    pub norm_eps: f64,
    pub activation: Function,
    pub residual: Residual,
    /// Frequencies that the layers choose from.
    pub ropes: Vec<Rope>,
    pub layers: Vec<LayerConfig>,
    /// Logits s become c tanh(s / c).
    pub logit_cap: Option<f64>,
    /// The head is the embedding table.
    pub tied: bool,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    /// Rows of the token type table; the first is added to every token.
    pub token_types: usize,
    /// Names of the classes of the base's own head.
    pub labels: Vec<String>,
    /// Tokens that end a text, from `config.json`; `generation_config.json` may say otherwise.
    pub eos_token_ids: Vec<u32>,
}

/// What one layer does differently.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// How it attends.
    pub attention: Attention,
    /// Index into [`ModelConfig::ropes`]; `None`: nothing turns.
    pub rope: Option<usize>,
}

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// `FailedPrecondition` for what is well-formed but not served, `InvalidArgument` for the rest; both name the key.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let v: Value = serde_json::from_slice(json).or_kind(Kind::InvalidArgument, "config.json")?;
        let family = family::of(&v)?;
        let v = Keys(&v);
        let keys = family.keys;
        let hidden_size = v.size(keys.hidden, 1 << 16)?;
        let num_heads = v.size(keys.heads, 1 << 10)?;
        let num_layers = v.size(keys.layers, 1 << 10)?;
        let head_dim = v.optional_size("head_dim", MAX_HEAD_DIM)?.unwrap_or(hidden_size / num_heads);
        let num_kv_heads = v.optional_size("num_key_value_heads", 1 << 10)?.unwrap_or(num_heads);
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
            return Err(bad("head_dim", head_dim, format!("must be even, from 2 to {MAX_HEAD_DIM}")));
        }
        if !num_heads.is_multiple_of(num_kv_heads) {
            let rule = format!("must divide num_attention_heads ({num_heads})");
            return Err(bad("num_key_value_heads", num_kv_heads, rule));
        }
        refuse_unserved(v, family)?;
        let positions = v.size(keys.positions, 1 << 24)?;
        let ropes = ropes(v, family, head_dim, positions)?;
        let mut config = ModelConfig {
            family,
            vocab_size: v.size("vocab_size", 1 << 22)?,
            hidden_size,
            intermediate_size: v.optional_size(keys.intermediate, 1 << 18)?.unwrap_or(4 * hidden_size),
            num_heads,
            num_kv_heads,
            head_dim,
            default_positions: positions,
            max_positions: positions,
            norm_eps: v.number(keys.norm_eps).unwrap_or(1e-6),
            activation: activation(v, family)?,
            residual: family.residual,
            layers: layers(v, family, num_layers, head_dim)?,
            logit_cap: v.cap("final_logit_softcapping")?,
            tied: v.flag("tie_word_embeddings", family.tied),
            qkv_bias: v.switch(&family.qkv_bias),
            o_bias: v.switch(&family.o_bias),
            mlp_bias: v.switch(&family.mlp_bias),
            token_types: if family.encoder { v.optional_size("type_vocab_size", 1 << 10)?.unwrap_or(2) } else { 0 },
            labels: labels(v),
            eos_token_ids: token_ids(&v.0["eos_token_id"]),
            ropes,
        };
        if config.residual == Residual::Parallel && !v.flag("use_parallel_residual", true) {
            config.residual = Residual::Sequential;
        }
        if let Positions::Learned(offset) = family.positions {
            let left = positions.checked_sub(offset).filter(|left| *left > 0);
            let left = left.ok_or_else(|| bad(keys.positions, positions, format!("must be above {offset}")))?;
            (config.default_positions, config.max_positions) = (left, left);
        }
        for rope in &config.ropes {
            let (most, usual) = rope.reach(positions);
            config.max_positions = config.max_positions.max(most);
            config.default_positions = config.default_positions.min(usual);
        }
        Ok(config)
    }

    /// Decoder layers.
    pub fn num_layers(&self) -> usize {
        self.layers.len()
    }
}

fn refuse_unserved(v: Keys<'_>, family: &Family) -> Result<()> {
    let is = |key: &str| v.flag(key, false);
    if family.encoder && (is("is_decoder") || is("add_cross_attention")) {
        return Err(unserved("is_decoder", &true.into(), "only encoders of this family are served"));
    }
    if is("use_bidirectional_attention") || is("add_cross_attention") {
        let key = if is("add_cross_attention") { "add_cross_attention" } else { "use_bidirectional_attention" };
        return Err(unserved(key, &true.into(), "only causal decoders of this family are served"));
    }
    let kind = v.0.get("position_embedding_type").and_then(Value::as_str).unwrap_or("absolute");
    if kind != "absolute" {
        return Err(unserved("position_embedding_type", &kind.into(), "only absolute is served"));
    }
    Ok(())
}

fn activation(v: Keys<'_>, family: &Family) -> Result<Function> {
    let keys = family.keys;
    let name = v.0.get(keys.activation).and_then(Value::as_str).unwrap_or(keys.default_activation);
    let served = "served are silu, gelu, gelu_new, gelu_pytorch_tanh, relu";
    Function::parse(name).ok_or_else(|| unserved(keys.activation, &name.into(), served))
}

/// The rotary parameters, one set for each kind of layer: `[full]`, or `[full, sliding]`.
fn ropes(v: Keys<'_>, family: &Family, head_dim: usize, positions: usize) -> Result<Vec<Rope>> {
    // transformers 5 writes `rope_parameters`, older ones `rope_theta` and `rope_scaling`.
    let given = |key| v.0.get(key).filter(|p: &&Value| !p.is_null());
    let own = given("rope_scaling").or_else(|| given("rope_parameters"));
    let defaults = |theta: Option<f64>, fallback, share| Defaults {
        theta: theta.unwrap_or(fallback),
        share: v.number("partial_rotary_factor").or_else(|| v.number("rotary_pct")).unwrap_or(share),
        head_dim,
        positions,
    };
    match family.positions {
        Positions::Learned(_) => Ok(Vec::new()),
        Positions::Rotary(share) => {
            let theta = v.number("rope_theta").or_else(|| v.number("rotary_emb_base"));
            Ok(vec![Rope::parse(v, own, defaults(theta, 1e4, share))?])
        }
        Positions::RotaryByLayer => {
            let of = |kind: &str| own.and_then(|p| p.get(kind)).filter(|p| !p.is_null());
            // Old configs scale the full layers alone.
            let full = of("full_attention").or(own.filter(|_| of("sliding_attention").is_none()));
            Ok(vec![
                Rope::parse(v, full, defaults(v.number("rope_theta"), 1e6, 1.0))?,
                Rope::parse(v, of("sliding_attention"), defaults(v.number("rope_local_base_freq"), 1e4, 1.0))?,
            ])
        }
    }
}

fn layers(v: Keys<'_>, family: &Family, num_layers: usize, head_dim: usize) -> Result<Vec<LayerConfig>> {
    let listed = v.0.get("layer_types").and_then(Value::as_array);
    if let Some(n) = listed.map(Vec::len).filter(|n| *n != num_layers) {
        return Err(bad("layer_types", format!("{n} entries"), format!("must have {num_layers}, one for each layer")));
    }
    let window = v.optional_size("sliding_window", 1 << 24)?;
    let upper = v.optional_size("max_window_layers", 1 << 10)?.unwrap_or(28);
    let slides = |i: usize| -> Result<bool> {
        let by_rule = match family.windows {
            Windows::Never => return Ok(false),
            Windows::Always => return Ok(true),
            Windows::Upper if !v.flag("use_sliding_window", false) => return Ok(false),
            Windows::Upper => i >= upper,
            Windows::AllBut(n) => {
                let n = v.optional_size("sliding_window_pattern", 1 << 10)?.unwrap_or(n);
                !(i + 1).is_multiple_of(n)
            }
        };
        match listed.map(|types| types[i].as_str().unwrap_or("")) {
            None => Ok(by_rule),
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            Some(other) => {
                let served = "served are full_attention, sliding_attention";
                Err(unserved("layer_types", &other.into(), served))
            }
        }
    };
    let mut scale = v.number("query_pre_attn_scalar").unwrap_or(head_dim as f64).powf(-0.5);
    if !v.flag("scale_attn_weights", true) {
        scale = 1.0;
    }
    if !(scale.is_finite() && scale > 0.0) {
        return Err(bad("query_pre_attn_scalar", &v.0["query_pre_attn_scalar"], "must be above 0"));
    }
    let by_layer = v.flag("scale_attn_by_inverse_layer_idx", false);
    let soft_cap = v.cap("attn_logit_softcapping")?;
    (0..num_layers)
        .map(|i| {
            let slides = slides(i)?;
            let attention = Attention {
                scale: if by_layer { scale / (i + 1) as f64 } else { scale } as f32,
                soft_cap: soft_cap.map(|c| c as f32),
                window: window.filter(|_| slides),
                causal: !family.encoder,
            };
            let rope = match family.positions {
                Positions::Learned(_) => None,
                Positions::Rotary(_) => Some(0),
                Positions::RotaryByLayer => Some(usize::from(slides)),
            };
            Ok(LayerConfig { attention, rope })
        })
        .collect()
}

/// `id2label` in the order of its ids.
fn labels(v: Keys<'_>) -> Vec<String> {
    let map = v.0["id2label"].as_object().into_iter().flatten();
    let mut labels: Vec<(u32, String)> =
        map.filter_map(|(id, label)| Some((id.parse().ok()?, label.as_str()?.to_owned()))).collect();
    labels.sort();
    labels.into_iter().map(|(_, label)| label).collect()
}

/// `eos_token_id` of a config: a number, a list, or nothing.
pub fn token_ids(v: &Value) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    v.as_array().map_or_else(|| id(v).into_iter().collect(), |a| a.iter().filter_map(id).collect())
}

/// The object of a `config.json`. The bounds of sizes keep a hostile file from asking for absurd memory.
#[derive(Clone, Copy)]
struct Keys<'a>(&'a Value);

impl Keys<'_> {
    fn optional_size(self, key: &'static str, most: usize) -> Result<Option<usize>> {
        let Some(v) = self.0.get(key).filter(|v| !v.is_null()) else { return Ok(None) };
        match v.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=most).contains(&n) => Ok(Some(n)),
            _ => Err(bad(key, v, format!("must be a whole number from 1 to {most}"))),
        }
    }

    fn size(self, key: &'static str, most: usize) -> Result<usize> {
        let missing = || bad(key, "missing", format!("must be a whole number from 1 to {most}"));
        self.optional_size(key, most)?.ok_or_else(missing)
    }

    fn number(self, key: &str) -> Option<f64> {
        self.0.get(key).and_then(Value::as_f64)
    }

    /// A soft cap: missing, null, or above 0.
    fn cap(self, key: &'static str) -> Result<Option<f64>> {
        match self.number(key) {
            Some(c) if !(c.is_finite() && c > 0.0) => Err(bad(key, c, "must be above 0")),
            cap => Ok(cap),
        }
    }

    fn flag(self, key: &str, default: bool) -> bool {
        self.0.get(key).and_then(Value::as_bool).unwrap_or(default)
    }

    fn switch(self, s: &Switch) -> bool {
        match s {
            Switch::On => true,
            Switch::Off => false,
            Switch::Key(key, default) => self.flag(key, *default),
        }
    }
}

fn bad(key: &'static str, value: impl std::fmt::Display, rule: impl std::fmt::Display) -> Error {
    Error::invalid(key, value, rule).context("config.json")
}

fn unserved(key: &str, value: &Value, what: &str) -> Error {
    Error::precondition(format!("config.json: `{key}` is {value}, {what}"))
}
