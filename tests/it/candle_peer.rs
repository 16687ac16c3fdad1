//! candle-transformers' own Llama and Qwen2 on the same random weights as ours.
use crate::support::{Draws, apart, load, logits};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, qwen2};
use prefixd::config::DtypeChoice;
use std::collections::HashMap;
use std::path::Path;

const TOKENS: [u32; 21] = [1, 17, 5, 99, 3, 3, 42, 250, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 200, 201, 202];

fn config(architecture: &str, tied: bool) -> serde_json::Value {
    serde_json::json!({
        "architectures": [architecture], "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": tied, "hidden_act": "silu",
        "sliding_window": 64, "max_window_layers": 3, "use_sliding_window": false, "bos_token_id": 1, "eos_token_id": 2
    })
}

/// A Hugging Face folder with random weights, large enough that a wrong position or order shows.
fn write_model(dir: &Path, config: &serde_json::Value, qkv_bias: bool) {
    let (mut tensors, mut draws) = (HashMap::new(), Draws::new(1));
    let mut put = |name: String, shape: &[usize]| {
        let t = if name.contains("norm") { draws.uniform(0.5..1.5, shape) } else { draws.normal(0.2, shape) };
        tensors.insert(name, t);
    };
    put("model.embed_tokens.weight".into(), &[300, 64]);
    put("model.norm.weight".into(), &[64]);
    if config["tie_word_embeddings"] == false {
        put("lm_head.weight".into(), &[300, 64]);
    }
    for i in 0..3 {
        let mut at = |name: &str, shape: &[usize]| put(format!("model.layers.{i}.{name}"), shape);
        for (name, rows) in [("q", 64), ("k", 16), ("v", 16)] {
            at(&format!("self_attn.{name}_proj.weight"), &[rows, 64]);
            if qkv_bias {
                at(&format!("self_attn.{name}_proj.bias"), &[rows]);
            }
        }
        at("self_attn.o_proj.weight", &[64, 64]);
        at("mlp.gate_proj.weight", &[96, 64]);
        at("mlp.up_proj.weight", &[96, 64]);
        at("mlp.down_proj.weight", &[64, 96]);
        at("input_layernorm.weight", &[64]);
        at("post_attention_layernorm.weight", &[64]);
    }
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::copy("models/demo/tokenizer.json", dir.join("tokenizer.json")).unwrap();
}

fn weights(dir: &Path) -> VarBuilder<'static> {
    let tensors = candle_core::safetensors::load(dir.join("model.safetensors"), &Device::Cpu).unwrap();
    VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
}

fn assert_close(ours: &[f32], theirs: &Tensor) {
    let theirs = theirs.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let worst = ours.iter().zip(&theirs).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    println!("largest difference {worst:.2e}");
    assert!(ours.len() == theirs.len() && worst < 1e-4, "{worst}");
}

#[test]
fn llama_agrees_with_candle_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let config = config("LlamaForCausalLM", false);
    write_model(dir.path(), &config, false);
    let ours = logits(&load(dir.path().to_str().unwrap(), DtypeChoice::Auto), None, &TOKENS);
    let parsed: llama::LlamaConfig = serde_json::from_value(config).unwrap();
    let parsed = parsed.into_config(false);
    let peer = llama::Llama::load(weights(dir.path()), &parsed).unwrap();
    let mut cache = llama::Cache::new(false, DType::F32, &parsed, &Device::Cpu).unwrap();
    let input = Tensor::new(&TOKENS, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let theirs = peer.forward(&input, 0, &mut cache).unwrap();
    assert_close(ours.last().unwrap(), &theirs);
}

#[test]
fn qwen2_agrees_with_candle_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let config = config("Qwen2ForCausalLM", true);
    write_model(dir.path(), &config, true);
    let ours = logits(&load(dir.path().to_str().unwrap(), DtypeChoice::Auto), None, &TOKENS);
    let parsed: qwen2::Config = serde_json::from_value(config).unwrap();
    let mut peer = qwen2::ModelForCausalLM::new(&parsed, weights(dir.path())).unwrap();
    let input = Tensor::new(&TOKENS, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let theirs = peer.forward(&input, 0).unwrap();
    assert_close(ours.last().unwrap(), &theirs);
}

#[test]
fn a_checkpoint_that_differs_from_its_config_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let message = |config: &serde_json::Value| {
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let files = prefixd::model::source::resolve(path).unwrap();
        prefixd::model::Model::load(&files, Default::default()).err().unwrap().to_string()
    };
    write_model(dir.path(), &config("LlamaForCausalLM", false), false);
    let e = message(&config("Qwen2ForCausalLM", false));
    assert!(e.contains("model.layers.0.self_attn.q_proj.bias"), "{e}");
    let mut changed = config("LlamaForCausalLM", false);
    changed["intermediate_size"] = 97.into();
    let e = message(&changed);
    assert!(e.contains("gate_proj.weight") && e.contains("[96, 64]") && e.contains("[97, 64]"), "{e}");
    changed = config("LlamaForCausalLM", false);
    changed["num_hidden_layers"] = 2.into();
    let e = message(&changed);
    assert!(e.contains("model.layers.2."), "{e}");
}

/// The same weights in two files with an index, and in every type: the same model, up to the type's rounding.
#[test]
fn shards_and_types_are_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    write_model(dir.path(), &config("LlamaForCausalLM", false), false);
    let at = |dtype| logits(&load(path, dtype), None, &TOKENS);
    let whole = at(DtypeChoice::Auto);
    // A row passes ten roundings from embedding to head: f16 keeps 11 bits of each weight, bf16 8 of weight and input.
    let (f16_bound, bf16_bound) = (10.0 * 2f64.powi(-11), 2.0 * 10.0 * 2f64.powi(-8));
    let (f16, bf16) = (apart(&whole, &at(DtypeChoice::F16)), apart(&whole, &at(DtypeChoice::Bf16)));
    println!("in deviations of the logits: f16 {f16:.1e}, bf16 {bf16:.1e}");
    assert!(f16 > 0.0 && f16 < f16_bound && bf16 > f16 && bf16 < bf16_bound);

    let all = candle_core::safetensors::load(dir.path().join("model.safetensors"), &Device::Cpu).unwrap();
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let (first, second): (HashMap<_, _>, HashMap<_, _>) = all.into_iter().partition(|(name, _)| name.contains("mlp"));
    let mut map = serde_json::Map::new();
    for (file, tensors) in [("a.safetensors", first), ("b.safetensors", second)] {
        map.extend(tensors.keys().map(|name| (name.clone(), file.into())));
        candle_core::safetensors::save(&tensors, dir.path().join(file)).unwrap();
    }
    let index = serde_json::json!({ "weight_map": map }).to_string();
    std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    assert_eq!(whole, at(DtypeChoice::Auto));
}
