//! The families that prefixd serves, one row of facts each: what a `config.json` calls things, how the weights are
//! named and stored, and which of the decoder's switches are on. A new family is a new row.
use crate::error::{Error, Result};
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

/// `model.config` key names.
#[derive(Debug, PartialEq)]
#[allow(missing_docs)]
pub struct KeyNames {
    pub hidden: &'static str,
    pub layers: &'static str,
    pub heads: &'static str,
    pub positions: &'static str,
    /// Missing or null: four times hidden.
    pub intermediate: &'static str,
    pub norm_eps: &'static str,
    pub activation: &'static str,
    /// Where the key is missing.
    pub default_activation: &'static str,
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

/// Names of the weights below a root; `{}` stands for the layer's number.
#[derive(Debug, PartialEq)]
#[allow(missing_docs)]
pub struct Names {
    /// What the names may start with; the first one under which `embed` is found.
    pub roots: &'static [&'static str],
    pub embed: &'static str,
    /// The final norm; an encoder has its norm after the embedding instead.
    pub norm: &'static str,
    /// Full name, without a root.
    pub head: &'static str,
    /// Learned positions, if there are any.
    pub positions: &'static str,
    /// The norms of a layer in the order of [`Residual`]'s formulas.
    pub norms: &'static [&'static str],
    pub qkv: Qkv,
    pub o: &'static str,
    pub up: Up,
    pub down: &'static str,
    /// Applied to the pooled row before a classification head.
    pub pooler: &'static str,
    /// Layers of the base's own classification head, full names, the last one giving the labels.
    pub classifier: &'static [&'static str],
    /// Layers are stored `[in, out]` (`Conv1D`).
    pub transposed: bool,
    /// Tensors that are known and not needed: full names start or end so.
    pub unused: &'static [&'static str],
}

/// How q, k and v are stored.
#[derive(Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Qkv {
    Apart {
        q: &'static str,
        k: &'static str,
        v: &'static str,
    },
    /// One tensor with the rows `[q | k | v]`.
    Fused(&'static str),
    /// One tensor with the rows `[heads, (q, k, v), head_dim]` (GPT-NeoX).
    ByHead(&'static str),
}

/// How the first layer of the feed-forward part is stored.
#[derive(Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Up {
    /// Not gated.
    Plain(&'static str),
    Gated {
        gate: &'static str,
        up: &'static str,
    },
    /// One tensor with the rows `[gate | up]`.
    Fused(&'static str),
}

const LLAMA_KEYS: KeyNames = KeyNames {
    hidden: "hidden_size",
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    positions: "max_position_embeddings",
    intermediate: "intermediate_size",
    norm_eps: "rms_norm_eps",
    activation: "hidden_act",
    default_activation: "silu",
};

const GEMMA_KEYS: KeyNames =
    KeyNames { activation: "hidden_activation", default_activation: "gelu_pytorch_tanh", ..LLAMA_KEYS };

const BERT_KEYS: KeyNames = KeyNames { norm_eps: "layer_norm_eps", default_activation: "gelu", ..LLAMA_KEYS };

const GPT2_KEYS: KeyNames = KeyNames {
    hidden: "n_embd",
    layers: "n_layer",
    heads: "n_head",
    positions: "n_positions",
    intermediate: "n_inner",
    norm_eps: "layer_norm_epsilon",
    activation: "activation_function",
    default_activation: "gelu_new",
};

const LLAMA_NAMES: Names = Names {
    roots: &["model."],
    embed: "embed_tokens",
    norm: "norm",
    head: "lm_head",
    positions: "",
    norms: &["layers.{}.input_layernorm", "layers.{}.post_attention_layernorm"],
    qkv: Qkv::Apart {
        q: "layers.{}.self_attn.q_proj",
        k: "layers.{}.self_attn.k_proj",
        v: "layers.{}.self_attn.v_proj",
    },
    o: "layers.{}.self_attn.o_proj",
    up: Up::Gated { gate: "layers.{}.mlp.gate_proj", up: "layers.{}.mlp.up_proj" },
    down: "layers.{}.mlp.down_proj",
    pooler: "",
    classifier: &[],
    transposed: false,
    unused: &[".rotary_emb.inv_freq"],
};

const GEMMA2_NAMES: Names = Names {
    norms: &[
        "layers.{}.input_layernorm",
        "layers.{}.post_attention_layernorm",
        "layers.{}.pre_feedforward_layernorm",
        "layers.{}.post_feedforward_layernorm",
    ],
    ..LLAMA_NAMES
};

const PHI3_NAMES: Names = Names {
    qkv: Qkv::Fused("layers.{}.self_attn.qkv_proj"),
    up: Up::Fused("layers.{}.mlp.gate_up_proj"),
    ..LLAMA_NAMES
};

const GPT2_NAMES: Names = Names {
    roots: &["transformer.", ""],
    embed: "wte",
    norm: "ln_f",
    head: "lm_head",
    positions: "wpe",
    norms: &["h.{}.ln_1", "h.{}.ln_2"],
    qkv: Qkv::Fused("h.{}.attn.c_attn"),
    o: "h.{}.attn.c_proj",
    up: Up::Plain("h.{}.mlp.c_fc"),
    down: "h.{}.mlp.c_proj",
    pooler: "",
    classifier: &[],
    transposed: true,
    // The causal masks, stored by old versions.
    unused: &[".attn.bias", ".attn.masked_bias"],
};

const NEOX_NAMES: Names = Names {
    roots: &["gpt_neox."],
    embed: "embed_in",
    norm: "final_layer_norm",
    head: "embed_out",
    positions: "",
    norms: &["layers.{}.input_layernorm", "layers.{}.post_attention_layernorm"],
    qkv: Qkv::ByHead("layers.{}.attention.query_key_value"),
    o: "layers.{}.attention.dense",
    up: Up::Plain("layers.{}.mlp.dense_h_to_4h"),
    down: "layers.{}.mlp.dense_4h_to_h",
    pooler: "",
    classifier: &[],
    transposed: false,
    unused: &[".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"],
};

const BERT_NAMES: Names = Names {
    roots: &["bert.", ""],
    embed: "embeddings.word_embeddings",
    norm: "embeddings.LayerNorm",
    head: "",
    positions: "embeddings.position_embeddings",
    norms: &["encoder.layer.{}.attention.output.LayerNorm", "encoder.layer.{}.output.LayerNorm"],
    qkv: Qkv::Apart {
        q: "encoder.layer.{}.attention.self.query",
        k: "encoder.layer.{}.attention.self.key",
        v: "encoder.layer.{}.attention.self.value",
    },
    o: "encoder.layer.{}.attention.output.dense",
    up: Up::Plain("encoder.layer.{}.intermediate.dense"),
    down: "encoder.layer.{}.output.dense",
    pooler: "pooler.dense",
    classifier: &["classifier"],
    transposed: false,
    // The heads of pretraining, and a buffer.
    unused: &["cls.", ".position_ids"],
};

const ROBERTA_NAMES: Names = Names {
    roots: &["roberta.", ""],
    pooler: "",
    classifier: &["classifier.dense", "classifier.out_proj"],
    unused: &["lm_head.", "roberta.pooler.", "pooler.", ".position_ids"],
    ..BERT_NAMES
};

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
