//! Bases of known shapes with random weights, made in memory: what the figures of the README are measured on.
#![allow(clippy::unwrap_used, missing_docs, dead_code)]
use prefixd::model::source::{self, Bytes, ModelFiles, WeightFile};

/// Facts of a config.json. One with a tied head is a Qwen2, with biases; any other a Llama.
#[derive(Clone, Copy)]
pub struct Shape {
    pub name: &'static str,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub inner: usize,
    pub vocab: usize,
    pub tied: bool,
}

pub const HALF_B: Shape = Shape {
    name: "Qwen2-0.5B",
    hidden: 896,
    layers: 24,
    heads: 14,
    kv_heads: 2,
    inner: 4864,
    vocab: 151_936,
    tied: true,
};
pub const EIGHT_B: Shape = Shape {
    name: "Llama 8B",
    hidden: 4096,
    layers: 32,
    heads: 32,
    kv_heads: 8,
    inner: 14336,
    vocab: 128_256,
    tied: false,
};

/// Values that all weights are made of, over and over: a prime, so that no two rows begin alike.
const NOISE: usize = 16_777_213;

impl Shape {
    pub fn head_dim(&self) -> usize {
        self.hidden / self.heads
    }

    /// Names and shapes in the checkpoint.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let Shape { hidden, inner, .. } = *self;
        let kv = self.kv_heads * self.head_dim();
        let mut all = vec![
            ("model.embed_tokens.weight".into(), vec![self.vocab, hidden]),
            ("model.norm.weight".into(), vec![hidden]),
        ];
        if !self.tied {
            all.push(("lm_head.weight".into(), vec![self.vocab, hidden]));
        }
        for i in 0..self.layers {
            for (name, shape) in [
                ("input_layernorm.weight", vec![hidden]),
                ("post_attention_layernorm.weight", vec![hidden]),
                ("self_attn.q_proj.weight", vec![hidden, hidden]),
                ("self_attn.q_proj.bias", vec![hidden]),
                ("self_attn.k_proj.weight", vec![kv, hidden]),
                ("self_attn.k_proj.bias", vec![kv]),
                ("self_attn.v_proj.weight", vec![kv, hidden]),
                ("self_attn.v_proj.bias", vec![kv]),
                ("self_attn.o_proj.weight", vec![hidden, hidden]),
                ("mlp.gate_proj.weight", vec![inner, hidden]),
                ("mlp.up_proj.weight", vec![inner, hidden]),
                ("mlp.down_proj.weight", vec![hidden, inner]),
            ] {
                if self.tied || !name.ends_with("bias") {
                    all.push((format!("model.layers.{i}.{name}"), shape));
                }
            }
        }
        all
    }

    /// Parameters that a step reads whole: all, the tied table counted once. Of a table that is no head it reads its rows alone.
    pub fn parameters(&self) -> usize {
        let all: usize = self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
        all - if self.tied { 0 } else { self.vocab * self.hidden }
    }

    /// config.json, the embedded tokenizer, and bf16 weights: uniform with a deviation of 0.02, norms 1.
    pub fn files(&self) -> ModelFiles {
        let config = serde_json::json!({
            "architectures": [if self.tied { "Qwen2ForCausalLM" } else { "LlamaForCausalLM" }],
            "model_type": if self.tied { "qwen2" } else { "llama" }, "hidden_size": self.hidden, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "intermediate_size": self.inner,
            "vocab_size": self.vocab, "tie_word_embeddings": self.tied, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6, "hidden_act": "silu", "torch_dtype": "bfloat16",
        });
        let tensors = self.tensors();
        let (mut header, mut offset) = (serde_json::Map::new(), 0);
        for (name, shape) in &tensors {
            let end = offset + 2 * shape.iter().product::<usize>();
            header.insert(
                name.clone(),
                serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}),
            );
            offset = end;
        }
        let header = serde_json::to_vec(&header).unwrap();
        let mut bytes = Vec::with_capacity(8 + header.len() + offset);
        bytes.extend((header.len() as u64).to_le_bytes());
        bytes.extend(header);
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut draw = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            half::bf16::from_f32(((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * 0.0346).to_le_bytes()
        };
        let noise: Vec<u8> = (0..NOISE).flat_map(|_| draw()).collect();
        let mut from = 0;
        for (name, shape) in &tensors {
            let mut left = 2 * shape.iter().product::<usize>();
            if name.contains("norm") {
                (0..left / 2).for_each(|_| bytes.extend(half::bf16::ONE.to_le_bytes()));
                continue;
            }
            while left > 0 {
                let some = left.min(noise.len() - from);
                bytes.extend(&noise[from..from + some]);
                (from, left) = ((from + some) % noise.len(), left - some);
            }
        }
        ModelFiles {
            name: format!("random, the shape of {}", self.name),
            config: Bytes::Owned(serde_json::to_vec(&config).unwrap()),
            generation_config: None,
            tokenizer: source::resolve("embedded").unwrap().tokenizer,
            tokenizer_config: None,
            chat_template: None,
            weights: vec![WeightFile { name: "model.safetensors".into(), bytes: Bytes::Owned(bytes) }],
        }
    }
}

/// Median of the seconds that `f` takes, `tries` times after one that does not count.
pub fn median(tries: usize, mut f: impl FnMut()) -> f64 {
    f();
    let mut seconds: Vec<f64> = (0..tries)
        .map(|_| {
            let began = std::time::Instant::now();
            f();
            began.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}
