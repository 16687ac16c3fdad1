//! The families that prefixd serves, one row of facts each: what a `config.json` calls things, how the weights are
//! named and stored, and which of the decoder's switches are on. A new family is a new row.
mod names;

pub use names::{KeyNames, Names, Qkv, Up};

use crate::error::{Error, Result};
use names::*;
use serde_json::Value;

/// How a model family differs from the decoder's default.
#[derive(Debug, PartialEq)]
pub struct Family {
    /// Short name, also `model_type` in `config.json`.
    pub name: &'static str,
    /// Entries of `architectures` that it serves.
    pub architectures: &'static [&'static str],
    /// Every token sees every other, and the answer is a class.
    pub encoder: bool,
    /// Keys of its `config.json`.
    pub keys: &'static KeyNames,
    /// The head is the embedding table where `tie_word_embeddings` is missing.
    pub tied: bool,
    /// Which norm.
    pub norm: NormKind,
    /// Where the norms stand and how a layer's halves are added.
    pub residual: Residual,
    /// What tells positions apart.
    pub positions: Positions,
    /// Which layers have a sliding window.
    pub windows: Windows,
    /// Query and key heads are normed before RoPE.
    pub head_norm: bool,
    /// Token embeddings are multiplied by sqrt(hidden), virtual tokens are not.
    pub scaled_embedding: bool,
    /// Biases of q, k, v.
    pub qkv_bias: Switch,
    /// Bias of the attention's output projection.
    pub o_bias: Switch,
    /// Biases of the feed-forward layers.
    pub mlp_bias: Switch,
    /// Names of its tensors.
    pub names: &'static Names,
}

/// A fact of the family, or a key of `config.json` with its default.
#[derive(Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Switch {
    On,
    Off,
    Key(&'static str, bool),
}

/// The norm of a family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// RMSNorm.
    Rms,
    /// RMSNorm whose weight w counts as 1 + w (Gemma).
    RmsPlusOne,
    /// LayerNorm with a bias.
    Layer,
}

/// x: the residual stream, A attention, M feed-forward, N the norms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residual {
    /// x += A(N1 x); x += M(N2 x)
    Sequential,
    /// x += N2 A(N1 x); x += N4 M(N3 x) (Gemma 2)
    Sandwich,
    /// x += A(N1 x) + M(N2 x) (GPT-J, GPT-NeoX), unless `use_parallel_residual` is false.
    Parallel,
    /// x = N1(x + A x); x = N2(x + M x) (BERT)
    Post,
}

/// What tells positions apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Positions {
    /// RoPE on this share of a head, if the config names none.
    Rotary(f64),
    /// RoPE, with other frequencies in the layers that have a window (Gemma 3).
    RotaryByLayer,
    /// A learned row each, added to the embedding; position p has row p + offset.
    Learned(usize),
}

/// Which layers have a sliding window, where the config does not list `layer_types`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Windows {
    /// None.
    Never,
    /// All, if `sliding_window` is set.
    Always,
    /// Those from `max_window_layers` on, if `use_sliding_window` is true.
    Upper,
    /// All but every n-th; `sliding_window_pattern` may give another n.
    AllBut(usize),
}

const LLAMA: Family = Family {
    name: "llama",
    architectures: &["LlamaForCausalLM"],
    encoder: false,
    keys: &LLAMA_KEYS,
    tied: false,
    norm: NormKind::Rms,
    residual: Residual::Sequential,
    positions: Positions::Rotary(1.0),
    windows: Windows::Never,
    head_norm: false,
    scaled_embedding: false,
    qkv_bias: Switch::Key("attention_bias", false),
    o_bias: Switch::Key("attention_bias", false),
    mlp_bias: Switch::Key("mlp_bias", false),
    names: &LLAMA_NAMES,
};

const GEMMA: Family = Family {
    name: "gemma",
    architectures: &["GemmaForCausalLM"],
    // The first Gemma read `hidden_act`; later ones `hidden_activation`.
    keys: &KeyNames { activation: "hidden_act", ..GEMMA_KEYS },
    tied: true,
    norm: NormKind::RmsPlusOne,
    scaled_embedding: true,
    mlp_bias: Switch::Off,
    ..LLAMA
};

const BERT: Family = Family {
    name: "bert",
    architectures: &["BertForSequenceClassification", "BertForMaskedLM", "BertForPreTraining", "BertModel"],
    encoder: true,
    keys: &BERT_KEYS,
    norm: NormKind::Layer,
    residual: Residual::Post,
    positions: Positions::Learned(0),
    qkv_bias: Switch::On,
    o_bias: Switch::On,
    mlp_bias: Switch::On,
    names: &BERT_NAMES,
    ..LLAMA
};

/// The families that prefixd serves.
pub const FAMILIES: &[Family] = &[
    LLAMA,
    Family {
        name: "qwen2",
        architectures: &["Qwen2ForCausalLM"],
        windows: Windows::Upper,
        qkv_bias: Switch::On,
        o_bias: Switch::Off,
        mlp_bias: Switch::Off,
        ..LLAMA
    },
    Family {
        name: "qwen3",
        architectures: &["Qwen3ForCausalLM"],
        windows: Windows::Upper,
        head_norm: true,
        mlp_bias: Switch::Off,
        ..LLAMA
    },
    Family {
        name: "mistral",
        architectures: &["MistralForCausalLM"],
        windows: Windows::Always,
        qkv_bias: Switch::Off,
        o_bias: Switch::Off,
        mlp_bias: Switch::Off,
        ..LLAMA
    },
    GEMMA,
    Family {
        name: "gemma2",
        architectures: &["Gemma2ForCausalLM"],
        keys: &GEMMA_KEYS,
        residual: Residual::Sandwich,
        windows: Windows::AllBut(2),
        names: &GEMMA2_NAMES,
        ..GEMMA
    },
    Family {
        name: "gemma3_text",
        architectures: &["Gemma3ForCausalLM"],
        keys: &GEMMA_KEYS,
        residual: Residual::Sandwich,
        positions: Positions::RotaryByLayer,
        windows: Windows::AllBut(6),
        head_norm: true,
        names: &GEMMA2_NAMES,
        ..GEMMA
    },
    Family {
        name: "phi3",
        architectures: &["Phi3ForCausalLM"],
        windows: Windows::Always,
        qkv_bias: Switch::Off,
        o_bias: Switch::Off,
        mlp_bias: Switch::Off,
        names: &PHI3_NAMES,
        ..LLAMA
    },
    Family {
        name: "gpt2",
        architectures: &["GPT2LMHeadModel", "GPT2Model"],
        keys: &GPT2_KEYS,
        tied: true,
        norm: NormKind::Layer,
        positions: Positions::Learned(0),
        qkv_bias: Switch::On,
        o_bias: Switch::On,
        mlp_bias: Switch::On,
        names: &GPT2_NAMES,
        ..LLAMA
    },
    Family {
        name: "gpt_neox",
        architectures: &["GPTNeoXForCausalLM"],
        keys: &KeyNames { norm_eps: "layer_norm_eps", default_activation: "gelu", ..LLAMA_KEYS },
        norm: NormKind::Layer,
        residual: Residual::Parallel,
        positions: Positions::Rotary(0.25),
        qkv_bias: Switch::Key("attention_bias", true),
        o_bias: Switch::Key("attention_bias", true),
        mlp_bias: Switch::On,
        names: &NEOX_NAMES,
        ..LLAMA
    },
    BERT,
    Family {
        name: "roberta",
        architectures: &["RobertaForSequenceClassification", "RobertaForMaskedLM", "RobertaModel"],
        // Row padding_idx is of padding, text starts after it.
        positions: Positions::Learned(2),
        names: &ROBERTA_NAMES,
        ..BERT
    },
];

/// The family of a `config.json`.
///
/// # Errors
/// `FailedPrecondition` naming the architecture and those that are served.
pub fn of(v: &Value) -> Result<&'static Family> {
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
