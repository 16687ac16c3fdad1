//! Hugging Face folders as GGUF: what llama.cpp's converter does to names, rows, norms, numbers and vocabularies.
use super::write::{Entry, Gguf, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use serde_json::Value as Json;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// What a folder is called there, or why the format cannot say it.
pub fn convert(dir: &Path, matrices: GgmlDType) -> Result<Gguf, String> {
    let config: Json = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let architecture = match config["architectures"][0].as_str().unwrap() {
        "LlamaForCausalLM" | "MistralForCausalLM" => "llama",
        "Qwen2ForCausalLM" => "qwen2",
        "Qwen3ForCausalLM" => "qwen3",
        "GemmaForCausalLM" => "gemma",
        "Gemma2ForCausalLM" => "gemma2",
        "Gemma3ForCausalLM" => "gemma3",
        "Phi3ForCausalLM" => "phi3",
        "GPT2LMHeadModel" => "gpt2",
        other => return Err(format!("{other} is not served from GGUF")),
    };
    let mut out = Gguf::new();
    out.set("general.architecture", architecture.into());
    numbers(&mut out, &config, architecture)?;
    tensors(&mut out, dir, &config, architecture, matrices);
    if let Some(json) = std::fs::read(dir.join("tokenizer.json")).ok().map(|t| serde_json::from_slice(&t).unwrap()) {
        vocabulary(&mut out, &json, &config);
    }
    Ok(out)
}

fn size(config: &Json, keys: &[&str]) -> Option<u32> {
    keys.iter().find_map(|k| config[*k].as_u64()).map(|n| n as u32)
}

fn numbers(out: &mut Gguf, c: &Json, architecture: &str) -> Result<(), String> {
    let hidden = size(c, &["hidden_size", "n_embd"]).unwrap();
    let heads = size(c, &["num_attention_heads", "n_head"]).unwrap();
    let positions = size(c, &["max_position_embeddings", "n_positions"]).unwrap();
    let layers = size(c, &["num_hidden_layers", "n_layer"]).unwrap();
    let head_dim = size(c, &["head_dim"]).unwrap_or(hidden / heads);
    let mut put = |key: &str, value: Value| out.set(&format!("{architecture}.{key}"), value);
    put("embedding_length", Value::U32(hidden));
    put("block_count", Value::U32(layers));
    put("context_length", Value::U32(positions));
    put("feed_forward_length", Value::U32(size(c, &["intermediate_size", "n_inner"]).unwrap_or(4 * hidden)));
    put("attention.head_count", Value::U32(heads));
    put("attention.head_count_kv", Value::U32(size(c, &["num_key_value_heads"]).unwrap_or(heads)));
    if let Some(eps) = c["rms_norm_eps"].as_f64() {
        put("attention.layer_norm_rms_epsilon", Value::F32(eps as f32));
    }
    if let Some(eps) = c["layer_norm_epsilon"].as_f64() {
        put("attention.layer_norm_epsilon", Value::F32(eps as f32));
    }
    if c["scale_attn_by_inverse_layer_idx"] == true {
        return Err("scale_attn_by_inverse_layer_idx has no key".into());
    }
    if architecture == "gpt2" {
        return Ok(());
    }
    put("attention.key_length", Value::U32(head_dim));
    put("attention.value_length", Value::U32(head_dim));
    if let Some(scalar) = c["query_pre_attn_scalar"].as_f64() {
        put("attention.scale", Value::F32(scalar.powf(-0.5) as f32));
    }
    for (key, name) in
        [("attn_logit_softcapping", "attn_logit_softcapping"), ("final_logit_softcapping", "final_logit_softcapping")]
    {
        if let Some(cap) = c[name].as_f64() {
            put(key, Value::F32(cap as f32));
        }
    }
    if c["use_sliding_window"] == true {
        return Err("windows of Qwen have no key".into());
    }
    if let Some(window) = size(c, &["sliding_window"]).filter(|_| !architecture.starts_with("qwen")) {
        put("attention.sliding_window", Value::U32(window));
    }
    if let Some(types) = c["layer_types"].as_array().filter(|_| architecture == "gemma3") {
        let slides = types.iter().map(|t| t == "sliding_attention").collect();
        put("attention.sliding_window_pattern", Value::Bools(slides));
    }
    if let Some(every) = size(c, &["sliding_window_pattern"]) {
        put("attention.sliding_window_pattern", Value::U32(every));
    }
    rope(out, c, architecture, head_dim, positions)
}

fn rope(out: &mut Gguf, c: &Json, architecture: &str, head_dim: u32, positions: u32) -> Result<(), String> {
    let given = ["rope_parameters", "rope_scaling"].into_iter().map(|k| &c[k]).find(|v| v.is_object());
    let given = given.cloned().unwrap_or(Json::Null);
    let by_kind = given["full_attention"].is_object();
    let p = if by_kind { given["full_attention"].clone() } else { given.clone() };
    let mut put = |key: &str, value: Value| out.set(&format!("{architecture}.{key}"), value);
    let number = |v: &Json| v.as_f64().map(|x| x as f32);
    let theta = number(&p["rope_theta"]).or(number(&c["rope_theta"])).unwrap_or(1e4);
    put("rope.freq_base", Value::F32(theta));
    let local = number(&given["sliding_attention"]["rope_theta"]).or(number(&c["rope_local_base_freq"]));
    if let Some(local) = local {
        put("rope.freq_base_swa", Value::F32(local));
    }
    let share = p["partial_rotary_factor"].as_f64().or(c["partial_rotary_factor"].as_f64()).unwrap_or(1.0);
    let dim = (f64::from(head_dim) * share) as u32;
    put("rope.dimension_count", Value::U32(dim));
    let original = size(&p, &["original_max_position_embeddings"]);
    let original = size(c, &["original_max_position_embeddings"]).or(original);
    let kind = p["rope_type"].as_str().or(p["type"].as_str()).unwrap_or("default");
    let factor = p["factor"].as_f64();
    let list = |key: &str| p[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect::<Vec<_>>();
    match kind {
        // Within the model's own length, dynamic scaling changes nothing.
        "default" | "dynamic" => {}
        "linear" => {
            put("rope.scaling.type", "linear".into());
            put("rope.scaling.factor", Value::F32(factor.unwrap() as f32));
        }
        "yarn" => {
            let odd = ["attention_factor", "mscale", "truncate"].into_iter().find(|k| !p[*k].is_null());
            if let Some(key) = odd {
                return Err(format!("yarn's {key} has no key"));
            }
            put("rope.scaling.type", "yarn".into());
            put("rope.scaling.factor", Value::F32(factor.unwrap() as f32));
            put("rope.scaling.original_context_length", Value::U32(original.unwrap()));
        }
        "longrope" => {
            let original = original.unwrap();
            let ratio = f64::from(positions) / f64::from(original);
            let scale = (1.0 + ratio.ln() / f64::from(original).ln()).sqrt();
            put("rope.scaling.attn_factor", Value::F32(if ratio <= 1.0 { 1.0 } else { scale as f32 }));
            put("rope.scaling.original_context_length", Value::U32(original));
            for (name, values) in [("short", list("short_factor")), ("long", list("long_factor"))] {
                out.tensors.push(Entry::floats(&format!("rope_factors_{name}.weight"), &[values.len()], &values));
            }
        }
        "llama3" => {
            let of = |key: &str| p[key].as_f64().unwrap() as f32;
            let (factor, low, high) = (of("factor"), of("low_freq_factor"), of("high_freq_factor"));
            let original = original.unwrap() as f32;
            let divisor = |i: u32| {
                let wavelength = 2.0 * std::f32::consts::PI * theta.powf(2.0 * i as f32 / dim as f32);
                if wavelength < original / high {
                    return 1.0;
                }
                if wavelength > original / low {
                    return factor;
                }
                let smooth = (original / wavelength - low) / (high - low);
                1.0 / ((1.0 - smooth) / factor + smooth)
            };
            let values: Vec<f32> = (0..dim / 2).map(divisor).collect();
            out.tensors.push(Entry::floats("rope_freqs.weight", &[values.len()], &values));
        }
        other => return Err(format!("{other} has no key")),
    }
    Ok(())
}

/// Parts of names, there and here.
const NAMES: &[(&str, &str)] = &[
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
    ("transformer.wte", "token_embd"),
    ("transformer.wpe", "position_embd"),
    ("transformer.ln_f", "output_norm"),
    ("model.layers.", "blk."),
    ("transformer.h.", "blk."),
    (".self_attn.q_norm", ".attn_q_norm"),
    (".self_attn.k_norm", ".attn_k_norm"),
    (".self_attn.q_proj", ".attn_q"),
    (".self_attn.k_proj", ".attn_k"),
    (".self_attn.v_proj", ".attn_v"),
    (".self_attn.o_proj", ".attn_output"),
    (".self_attn.qkv_proj", ".attn_qkv"),
    (".mlp.gate_up_proj", ".ffn_up"),
    (".mlp.gate_proj", ".ffn_gate"),
    (".mlp.up_proj", ".ffn_up"),
    (".mlp.down_proj", ".ffn_down"),
    (".attn.c_attn", ".attn_qkv"),
    (".attn.c_proj", ".attn_output"),
    (".mlp.c_fc", ".ffn_up"),
    (".mlp.c_proj", ".ffn_down"),
    (".input_layernorm", ".attn_norm"),
    (".pre_feedforward_layernorm", ".ffn_norm"),
    (".post_feedforward_layernorm", ".post_ffw_norm"),
    (".ln_1", ".attn_norm"),
    (".ln_2", ".ffn_norm"),
];

fn rename(name: &str, architecture: &str) -> String {
    let mut name = name.to_owned();
    if !name.starts_with("model.") && !name.starts_with("lm_head") && !name.starts_with("transformer.") {
        name = format!("transformer.{name}");
    }
    let four_norms = matches!(architecture, "gemma2" | "gemma3");
    let second = if four_norms { ".post_attention_norm" } else { ".ffn_norm" };
    name = name.replace(".post_attention_layernorm", second);
    NAMES.iter().fold(name, |name, (here, there)| name.replace(here, there))
}

/// All tensors of a folder as f32.
pub fn weights(dir: &Path) -> BTreeMap<String, Tensor> {
    let mut all = HashMap::new();
    for file in std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()) {
        if file.extension().is_some_and(|e| e == "safetensors") {
            all.extend(candle_core::safetensors::load(file, &Device::Cpu).unwrap());
        }
    }
    all.into_iter().map(|(name, t)| (name, t.to_dtype(DType::F32).unwrap())).collect()
}

fn tensors(out: &mut Gguf, dir: &Path, c: &Json, architecture: &str, matrices: GgmlDType) {
    let gemma = architecture.starts_with("gemma");
    let all = weights(dir);
    let tied = c["tie_word_embeddings"].as_bool().unwrap_or(gemma || architecture == "gpt2");
    for (name, mut t) in all {
        if name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias") || (tied && name == "lm_head.weight") {
            continue;
        }
        if gemma && name.ends_with("norm.weight") {
            t = (t + 1.0).unwrap();
        }
        if architecture == "gpt2" && name.contains(".c_") && name.ends_with(".weight") {
            t = t.t().unwrap().contiguous().unwrap();
        }
        let heads = [("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")];
        for (part, key) in heads {
            if architecture == "llama" && name.contains(part) {
                t = pair(&t, c[key].as_u64().or(c["num_attention_heads"].as_u64()).unwrap() as usize);
            }
        }
        out.tensors.push(stored(&rename(&name, architecture), &t, matrices));
    }
}

/// llama.cpp's `permute`: the halves of each head interleaved.
fn pair(t: &Tensor, heads: usize) -> Tensor {
    let shape = t.shape().clone();
    let rows = shape.dims()[0];
    let width = t.elem_count() / rows;
    let halves = t.reshape((heads, 2, rows / heads / 2, width)).unwrap();
    halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape(shape).unwrap()
}

/// Matrices in `matrices`, vectors in f32.
pub fn stored(name: &str, t: &Tensor, matrices: GgmlDType) -> Entry {
    let kind = if t.rank() > 1 { matrices } else { GgmlDType::F32 };
    let bytes = QTensor::quantize(t, kind).unwrap().data().unwrap().to_vec();
    let shape = t.dims().iter().map(|n| *n as u64).collect();
    Entry { name: name.into(), shape, kind: number(kind), bytes, offset: None }
}

fn number(kind: GgmlDType) -> u32 {
    match kind {
        GgmlDType::F32 => 0,
        GgmlDType::F16 => 1,
        GgmlDType::Q4_0 => 2,
        GgmlDType::Q4_1 => 3,
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q5_1 => 7,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q2K => 10,
        GgmlDType::Q3K => 11,
        GgmlDType::Q4K => 12,
        GgmlDType::Q5K => 13,
        GgmlDType::Q6K => 14,
        GgmlDType::BF16 => 30,
        other => panic!("{other:?}"),
    }
}

/// BPE vocabularies, byte-level or SentencePiece's; of others nothing is said.
pub fn vocabulary(out: &mut Gguf, json: &Json, config: &Json) {
    if json["model"]["type"] != "BPE" {
        return;
    }
    let ids = json["model"]["vocab"].as_object().unwrap();
    let mut texts = vec![String::new(); ids.len()];
    ids.iter().for_each(|(text, id)| texts[id.as_u64().unwrap() as usize] = text.clone());
    let mut kinds = vec![1i32; texts.len()];
    for token in json["added_tokens"].as_array().unwrap() {
        let unknown = token["content"] == json["model"]["unk_token"];
        let special = token["special"] == true;
        kinds[token["id"].as_u64().unwrap() as usize] = if unknown {
            2
        } else if special {
            3
        } else {
            4
        };
    }
    let pair = |m: &Json| match m {
        Json::String(s) => s.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap(),
        m => (m[0].as_str().unwrap().to_owned(), m[1].as_str().unwrap().to_owned()),
    };
    let merges: Vec<_> = json["model"]["merges"].as_array().unwrap().iter().map(pair).collect();
    if json["model"]["byte_fallback"] == true {
        out.set("tokenizer.ggml.model", "llama".into());
        // Scores that give the merges their order; what no merge makes comes last.
        let mut scores = vec![-1e9f32; texts.len()];
        for (rank, (a, b)) in merges.iter().enumerate().rev() {
            scores[ids[&format!("{a}{b}")].as_u64().unwrap() as usize] = -(rank as f32);
        }
        out.set("tokenizer.ggml.scores", Value::Floats(scores));
        texts.iter().zip(&mut kinds).filter(|(t, _)| t.starts_with("<0x")).for_each(|(_, k)| *k = 6);
        let prefixed = json["normalizer"].to_string().contains("Prepend");
        out.set("tokenizer.ggml.add_space_prefix", Value::Bool(prefixed));
    } else {
        out.set("tokenizer.ggml.model", "gpt2".into());
        let digits = json["pre_tokenizer"].to_string().contains("Digits");
        out.set("tokenizer.ggml.pre", if digits { "smollm" } else { "gpt-2" }.into());
        out.set("tokenizer.ggml.merges", Value::Texts(merges.iter().map(|(a, b)| format!("{a} {b}")).collect()));
    }
    let bos = json["post_processor"]["single"][0]["SpecialToken"].is_object();
    out.set("tokenizer.ggml.add_bos_token", Value::Bool(bos));
    out.set("tokenizer.ggml.tokens", Value::Texts(texts));
    out.set("tokenizer.ggml.token_type", Value::Ints(kinds));
    for (name, key) in [("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")] {
        if let Some(id) = size(config, &[key]) {
            out.set(&format!("tokenizer.ggml.{name}_token_id"), Value::U32(id));
        }
    }
}
