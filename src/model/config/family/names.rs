//! What families call their config keys and tensors.
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
    /// The norms of a layer in the order of [`Residual`](super::Residual)'s formulas.
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

pub(super) const LLAMA_KEYS: KeyNames = KeyNames {
    hidden: "hidden_size",
    layers: "num_hidden_layers",
    heads: "num_attention_heads",
    positions: "max_position_embeddings",
    intermediate: "intermediate_size",
    norm_eps: "rms_norm_eps",
    activation: "hidden_act",
    default_activation: "silu",
};

pub(super) const GEMMA_KEYS: KeyNames =
    KeyNames { activation: "hidden_activation", default_activation: "gelu_pytorch_tanh", ..LLAMA_KEYS };

pub(super) const BERT_KEYS: KeyNames =
    KeyNames { norm_eps: "layer_norm_eps", default_activation: "gelu", ..LLAMA_KEYS };

pub(super) const GPT2_KEYS: KeyNames = KeyNames {
    hidden: "n_embd",
    layers: "n_layer",
    heads: "n_head",
    positions: "n_positions",
    intermediate: "n_inner",
    norm_eps: "layer_norm_epsilon",
    activation: "activation_function",
    default_activation: "gelu_new",
};

pub(super) const LLAMA_NAMES: Names = Names {
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

pub(super) const GEMMA2_NAMES: Names = Names {
    norms: &[
        "layers.{}.input_layernorm",
        "layers.{}.post_attention_layernorm",
        "layers.{}.pre_feedforward_layernorm",
        "layers.{}.post_feedforward_layernorm",
    ],
    ..LLAMA_NAMES
};

pub(super) const PHI3_NAMES: Names = Names {
    qkv: Qkv::Fused("layers.{}.self_attn.qkv_proj"),
    up: Up::Fused("layers.{}.mlp.gate_up_proj"),
    ..LLAMA_NAMES
};

pub(super) const GPT2_NAMES: Names = Names {
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

pub(super) const NEOX_NAMES: Names = Names {
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

pub(super) const BERT_NAMES: Names = Names {
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

pub(super) const ROBERTA_NAMES: Names = Names {
    roots: &["roberta.", ""],
    pooler: "",
    classifier: &["classifier.dense", "classifier.out_proj"],
    unused: &["lm_head.", "roberta.pooler.", "pooler.", ".position_ids"],
    ..BERT_NAMES
};
