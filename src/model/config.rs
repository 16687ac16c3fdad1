//! What a `config.json` says, read by the facts of its family.
//!
//! A family is one row of [`FAMILIES`]: which architectures it answers to, where its biases are and how its weights
//! are named. Everything else is a number in [`ModelConfig`].
use crate::error::{Context, Error, Kind, Result};
use serde_json::Value;

/// How a model family differs from the decoder's default.
#[derive(Debug, PartialEq)]
pub struct Family {
    /// Short name, also `model_type` in `config.json`.
    pub name: &'static str,
    /// Entries of `architectures` that it serves.
    pub architectures: &'static [&'static str],
    /// Biases of q, k, v.
    pub qkv_bias: Switch,
    /// Bias of the attention's output projection.
    pub o_bias: Switch,
    /// Biases of the feed-forward layers.
    pub mlp_bias: Switch,
    /// Names of its tensors.
    pub names: &'static Names,
}

/// A fact of the family, or a key of `config.json` (false where missing).
#[derive(Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Switch {
    On,
    Off,
    Key(&'static str),
}

/// Names of the weights; `{}` stands for the layer's number.
#[derive(Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Names {
    pub embed: &'static str,
    pub norm: &'static str,
    pub head: &'static str,
    pub attention_norm: &'static str,
    pub mlp_norm: &'static str,
    pub q: &'static str,
    pub k: &'static str,
    pub v: &'static str,
    pub o: &'static str,
    pub gate: &'static str,
    pub up: &'static str,
    pub down: &'static str,
}

const LLAMA_NAMES: Names = Names {
    embed: "model.embed_tokens",
    norm: "model.norm",
    head: "lm_head",
    attention_norm: "model.layers.{}.input_layernorm",
    mlp_norm: "model.layers.{}.post_attention_layernorm",
    q: "model.layers.{}.self_attn.q_proj",
    k: "model.layers.{}.self_attn.k_proj",
    v: "model.layers.{}.self_attn.v_proj",
    o: "model.layers.{}.self_attn.o_proj",
    gate: "model.layers.{}.mlp.gate_proj",
    up: "model.layers.{}.mlp.up_proj",
    down: "model.layers.{}.mlp.down_proj",
};

/// The families that prefixd serves.
pub const FAMILIES: &[Family] = &[
    Family {
        name: "llama",
        architectures: &["LlamaForCausalLM"],
        qkv_bias: Switch::Key("attention_bias"),
        o_bias: Switch::Key("attention_bias"),
        mlp_bias: Switch::Key("mlp_bias"),
        names: &LLAMA_NAMES,
    },
    Family {
        name: "qwen2",
        architectures: &["Qwen2ForCausalLM"],
        qkv_bias: Switch::On,
        o_bias: Switch::Off,
        mlp_bias: Switch::Off,
        names: &LLAMA_NAMES,
    },
];

/// The numbers of one model.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct ModelConfig {
    pub family: &'static Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// Positions the model was made for.
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope: Rope,
    /// The head is the embedding table.
    pub tied: bool,
    pub qkv_bias: bool,
    pub o_bias: bool,
    pub mlp_bias: bool,
    /// Tokens that end a text, from `config.json`; `generation_config.json` may say otherwise.
    pub eos_token_ids: Vec<u32>,
}

/// Rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the geometric series.
    pub theta: f64,
    /// What is done to the series.
    pub scaling: RopeScaling,
}

/// transformers' `rope_type`.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum RopeScaling {
    Default,
    /// Positions divided by `factor`.
    Linear {
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_positions: f64,
    },
}

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// `FailedPrecondition` for what is well-formed but not served, `InvalidArgument` for the rest; both name the key.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let v: Value = serde_json::from_slice(json).or_kind(Kind::InvalidArgument, "config.json")?;
        let family = family(&v)?;
        let v = Keys(&v);
        let hidden_size = v.size("hidden_size")?;
        let num_heads = v.size("num_attention_heads")?;
        let switch = |s: &Switch| match s {
            Switch::On => true,
            Switch::Off => false,
            Switch::Key(key) => v.flag(key),
        };
        if v.0.get("hidden_act").and_then(Value::as_str).is_some_and(|a| a != "silu") {
            return Err(unserved("hidden_act", &v.0["hidden_act"], "only silu is served for this family"));
        }
        if v.flag("use_sliding_window") {
            return Err(unserved("use_sliding_window", &true.into(), "sliding windows are not served"));
        }
        let config = ModelConfig {
            family,
            vocab_size: v.size("vocab_size")?,
            hidden_size,
            intermediate_size: v.size("intermediate_size")?,
            num_layers: v.size("num_hidden_layers")?,
            num_heads,
            num_kv_heads: v.optional_size("num_key_value_heads")?.unwrap_or(num_heads),
            head_dim: v.optional_size("head_dim")?.unwrap_or(hidden_size / num_heads),
            max_position_embeddings: v.size("max_position_embeddings")?,
            rms_norm_eps: v.0.get("rms_norm_eps").and_then(Value::as_f64).unwrap_or(1e-6),
            rope: rope(v)?,
            tied: v.flag("tie_word_embeddings"),
            qkv_bias: switch(&family.qkv_bias),
            o_bias: switch(&family.o_bias),
            mlp_bias: switch(&family.mlp_bias),
            eos_token_ids: token_ids(&v.0["eos_token_id"]),
        };
        config.check()?;
        Ok(config)
    }

    /// Bounds that keep a hostile file from asking for absurd memory, and what the ops rely on.
    fn check(&self) -> Result<()> {
        let bound = |key, value: usize, high: usize| {
            if value <= high { Ok(()) } else { Err(bad(key, value, format!("must be at most {high}"))) }
        };
        bound("hidden_size", self.hidden_size, 1 << 16)?;
        bound("intermediate_size", self.intermediate_size, 1 << 18)?;
        bound("num_hidden_layers", self.num_layers, 1 << 10)?;
        bound("num_attention_heads", self.num_heads, 1 << 10)?;
        bound("vocab_size", self.vocab_size, 1 << 22)?;
        bound("max_position_embeddings", self.max_position_embeddings, 1 << 24)?;
        bound("head_dim", self.head_dim, crate::ops::prefix_attention::MAX_HEAD_DIM)?;
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let rule = format!("must divide num_attention_heads ({})", self.num_heads);
            return Err(bad("num_key_value_heads", self.num_kv_heads, rule));
        }
        if self.head_dim == 0 || !self.head_dim.is_multiple_of(2) {
            return Err(bad("head_dim", self.head_dim, "must be even and above 0"));
        }
        Ok(())
    }

    /// Rotary frequencies in radians a position, `[head_dim / 2]`.
    pub fn inv_freq(&self) -> Vec<f32> {
        let dim = self.head_dim as f32;
        let base = (0..self.head_dim / 2).map(|i| 1.0 / (self.rope.theta as f32).powf(2.0 * i as f32 / dim));
        match self.rope.scaling {
            RopeScaling::Default => base.collect(),
            RopeScaling::Linear { factor } => base.map(|f| f / factor as f32).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_positions } => {
                let (low, high) = (original_positions / low_freq_factor, original_positions / high_freq_factor);
                let scale = |f: f32| {
                    let wavelength = 2.0 * std::f64::consts::PI / f64::from(f);
                    if wavelength < high {
                        return f;
                    }
                    if wavelength > low {
                        return f / factor as f32;
                    }
                    let smooth =
                        (original_positions / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    ((1.0 - smooth) * f64::from(f) / factor + smooth * f64::from(f)) as f32
                };
                base.map(scale).collect()
            }
        }
    }
}

/// `eos_token_id` of a config: a number, a list, or nothing.
pub fn token_ids(v: &Value) -> Vec<u32> {
    let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    v.as_array().map_or_else(|| id(v).into_iter().collect(), |a| a.iter().filter_map(id).collect())
}

fn family(v: &Value) -> Result<&'static Family> {
    let listed: Vec<&str> = v["architectures"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let kind = v["model_type"].as_str();
    let found = FAMILIES.iter().find(|f| match listed.as_slice() {
        [] => kind == Some(f.name),
        listed => listed.iter().any(|a| f.architectures.contains(a)),
    });
    found.ok_or_else(|| {
        let served: Vec<_> = FAMILIES.iter().flat_map(|f| f.architectures).copied().collect();
        let given = if listed.is_empty() { kind.unwrap_or("missing").to_owned() } else { listed.join(", ") };
        Error::precondition(format!(
            "config.json: architecture {given} is not served; served are {}",
            served.join(", ")
        ))
    })
}

fn rope(v: Keys<'_>) -> Result<Rope> {
    // transformers 5 writes `rope_parameters`, older ones `rope_theta` and `rope_scaling`.
    let own = v.0.get("rope_parameters").or_else(|| v.0.get("rope_scaling")).filter(|p| !p.is_null());
    let number = |key: &str| own.and_then(|p| p.get(key)).and_then(Value::as_f64);
    let theta = number("rope_theta").or_else(|| v.0.get("rope_theta").and_then(Value::as_f64)).unwrap_or(10_000.0);
    let kind = own.and_then(|p| p.get("rope_type").or_else(|| p.get("type"))).and_then(Value::as_str);
    let need = |key: &'static str| {
        let valid = number(key).filter(|f| *f > 0.0);
        valid.ok_or_else(|| bad(key, own.map_or(&Value::Null, |p| &p[key]), "must be a number above 0"))
    };
    let scaling = match kind.unwrap_or("default") {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_positions: need("original_max_position_embeddings")?,
        },
        other => return Err(unserved("rope_type", &other.into(), "served are default, linear, llama3")),
    };
    if !(theta.is_finite() && theta > 0.0) {
        return Err(bad("rope_theta", theta, "must be above 0"));
    }
    Ok(Rope { theta, scaling })
}

#[derive(Clone, Copy)]
struct Keys<'a>(&'a Value);

impl Keys<'_> {
    fn optional_size(self, key: &'static str) -> Result<Option<usize>> {
        match self.0.get(key).filter(|v| !v.is_null()) {
            None => Ok(None),
            Some(v) => match v.as_u64() {
                Some(n) if n > 0 => Ok(Some(n as usize)),
                _ => Err(bad(key, v, "must be a whole number above 0")),
            },
        }
    }

    fn size(self, key: &'static str) -> Result<usize> {
        self.optional_size(key)?.ok_or_else(|| bad(key, "missing", "must be a whole number above 0"))
    }

    fn flag(self, key: &str) -> bool {
        self.0.get(key).and_then(Value::as_bool).unwrap_or(false)
    }
}

fn bad(key: &'static str, value: impl std::fmt::Display, rule: impl std::fmt::Display) -> Error {
    Error::invalid(key, value, rule).context("config.json")
}

fn unserved(key: &str, value: &Value, what: &str) -> Error {
    Error::precondition(format!("config.json: `{key}` is {value}, {what}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn config(change: impl FnOnce(&mut Value)) -> Result<ModelConfig> {
        let mut v = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": 10, "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "eos_token_id": [1, 2]
        });
        change(&mut v);
        ModelConfig::parse(v.to_string().as_bytes())
    }

    #[test]
    fn old_and_new_rope_keys() {
        assert_eq!(config(|v| v["rope_theta"] = 5e5.into()).unwrap().rope.theta, 5e5);
        let new = config(|v| v["rope_parameters"] = serde_json::json!({"rope_theta": 7.0, "rope_type": "default"}));
        assert_eq!(new.unwrap().rope, Rope { theta: 7.0, scaling: RopeScaling::Default });
        let linear = config(|v| v["rope_scaling"] = serde_json::json!({"type": "linear", "factor": 4.0})).unwrap();
        assert_eq!(linear.inv_freq()[0], 0.25);
    }

    #[test]
    fn refusals_name_the_key() {
        let message = |change: fn(&mut Value)| config(change).unwrap_err().to_string();
        assert!(message(|v| v["architectures"] = vec!["T5Model"].into()).contains("T5Model"));
        assert!(message(|v| v["num_key_value_heads"] = 3.into()).contains("num_key_value_heads"));
        assert!(message(|v| v["hidden_size"] = (1u64 << 40).into()).contains("hidden_size"));
        assert!(message(|v| v["vocab_size"] = (-1).into()).contains("vocab_size"));
        assert!(message(|v| v["rope_scaling"] = serde_json::json!({"rope_type": "yarn"})).contains("yarn"));
        assert!(message(|v| v["hidden_act"] = "gelu".into()).contains("gelu"));
        assert!(ModelConfig::parse(b"[]").is_err());
    }

    #[test]
    fn qwen2_has_biases_on_qkv_alone() {
        let c = config(|v| v["architectures"] = vec!["Qwen2ForCausalLM"].into()).unwrap();
        assert_eq!((c.family.name, c.qkv_bias, c.o_bias, c.mlp_bias), ("qwen2", true, false, false));
    }
}
