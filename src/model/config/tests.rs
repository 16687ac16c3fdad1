#![allow(clippy::unwrap_used)]
use super::*;

fn config(change: impl FnOnce(&mut Value)) -> Result<ModelConfig> {
    let mut v = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 10, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "eos_token_id": [1, 2]
    });
    change(&mut v);
    ModelConfig::parse(v.to_string().as_bytes())
}

fn family(name: &str, change: impl FnOnce(&mut Value)) -> ModelConfig {
    let family = FAMILIES.iter().find(|f| f.name == name).unwrap();
    let with = |v: &mut Value| {
        v["architectures"] = vec![family.architectures[0]].into();
        change(v);
    };
    config(with).unwrap()
}

fn windows(c: &ModelConfig) -> Vec<Option<usize>> {
    c.layers.iter().map(|l| l.attention.window).collect()
}

#[test]
fn old_and_new_rope_keys() {
    assert_eq!(config(|v| v["rope_theta"] = 5e5.into()).unwrap().ropes[0].theta, 5e5);
    let new = config(|v| v["rope_parameters"] = serde_json::json!({"rope_theta": 7.0, "rope_type": "default"}));
    assert_eq!(new.unwrap().ropes, [Rope { theta: 7.0, dim: 16, scaling: RopeScaling::Default }]);
    let linear = config(|v| v["rope_scaling"] = serde_json::json!({"type": "linear", "factor": 4.0})).unwrap();
    assert_eq!(linear.ropes[0].frequencies(64).0[0], 0.25);
    let half = config(|v| v["partial_rotary_factor"] = 0.5.into()).unwrap();
    assert_eq!(half.ropes[0].frequencies(64).0.len(), 4);
}

/// Dynamic scaling is the identity within the positions that the model was made for.
#[test]
fn dynamic_scaling_begins_past_the_models_own_length() {
    let scaling = serde_json::json!({"rope_type": "dynamic", "factor": 4.0});
    let c = config(|v| v["rope_scaling"] = scaling).unwrap();
    assert_eq!((c.default_positions, c.max_positions), (64, 256));
    let plain = config(|_| ()).unwrap().ropes[0].frequencies(64);
    assert_eq!(c.ropes[0].frequencies(64), plain);
    let grown = c.ropes[0].frequencies(256).0;
    // base * (4 * 256 / 64 - 3)^(16 / 14)
    let want = 1.0 / (1e4f64 * 13f64.powf(16.0 / 14.0)).powf(2.0 / 16.0);
    assert!((f64::from(grown[1]) - want).abs() < 1e-6, "{grown:?}");
}

#[test]
fn refusals_name_the_key() {
    let message = |change: fn(&mut Value)| config(change).unwrap_err().to_string();
    assert!(message(|v| v["architectures"] = vec!["T5Model"].into()).contains("T5Model"));
    assert!(message(|v| v["num_key_value_heads"] = 3.into()).contains("num_key_value_heads"));
    assert!(message(|v| v["hidden_size"] = (1u64 << 40).into()).contains("hidden_size"));
    assert!(message(|v| v["vocab_size"] = (-1).into()).contains("vocab_size"));
    assert!(message(|v| v["rope_scaling"] = serde_json::json!({"rope_type": "spiral"})).contains("spiral"));
    assert!(message(|v| v["rope_scaling"] = serde_json::json!({"rope_type": "linear"})).contains("factor"));
    assert!(message(|v| v["rope_scaling"] = serde_json::json!({"type": "longrope"})).contains("short_factor"));
    assert!(message(|v| v["hidden_act"] = "mish".into()).contains("mish"));
    assert!(message(|v| v["partial_rotary_factor"] = 1.5.into()).contains("partial_rotary_factor"));
    assert!(ModelConfig::parse(b"[]").is_err());
}

#[test]
fn windows_follow_the_family() {
    let set = |v: &mut Value| v["sliding_window"] = 8.into();
    assert_eq!(windows(&family("llama", set)), [None; 4]);
    assert_eq!(windows(&family("mistral", set)), [Some(8); 4]);
    assert_eq!(windows(&family("mistral", |_| ())), [None; 4]);
    assert_eq!(windows(&family("qwen2", set)), [None; 4]);
    let upper = family("qwen2", |v| {
        set(v);
        v["use_sliding_window"] = true.into();
        v["max_window_layers"] = 3.into();
    });
    assert_eq!(windows(&upper), [None, None, None, Some(8)]);
    assert_eq!(windows(&family("gemma2", set)), [Some(8), None, Some(8), None]);
    let gemma3 = family("gemma3_text", |v| {
        set(v);
        v["sliding_window_pattern"] = 3.into();
        v["query_pre_attn_scalar"] = 4.into();
        v["rope_scaling"] = serde_json::json!({"rope_type": "linear", "factor": 8.0});
    });
    assert_eq!(windows(&gemma3), [Some(8), Some(8), None, Some(8)]);
    assert_eq!(gemma3.layers[0].attention.scale, 0.5);
    // Sliding layers turn by their own, unscaled frequencies.
    assert_eq!(gemma3.layers.iter().map(|l| l.rope).collect::<Vec<_>>(), [Some(1), Some(1), Some(0), Some(1)]);
    assert_eq!(gemma3.ropes[0].scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!((gemma3.ropes[1].theta, &gemma3.ropes[1].scaling), (1e4, &RopeScaling::Default));
    let listed = config(|v| {
        v["architectures"] = vec!["Gemma2ForCausalLM"].into();
        set(v);
        v["layer_types"] = vec!["full_attention"; 3].into();
    });
    assert!(listed.unwrap_err().to_string().contains("layer_types"));
}

#[test]
fn families_have_their_switches() {
    let c = family("qwen2", |_| ());
    assert_eq!((c.qkv_bias, c.o_bias, c.mlp_bias, c.tied), (true, false, false, false));
    assert!(family("gemma", |_| ()).tied && family("gemma", |_| ()).activation == Function::GeluTanh);
    let neox = family("gpt_neox", |v| v["use_parallel_residual"] = false.into());
    assert_eq!((neox.residual, neox.ropes[0].dim, neox.qkv_bias), (Residual::Sequential, 4, true));
    let roberta = family("roberta", |v| v["id2label"] = serde_json::json!({"1": "b", "0": "a"}));
    assert_eq!((roberta.max_positions, roberta.token_types), (62, 2));
    assert_eq!(roberta.labels, ["a", "b"]);
    assert!(!roberta.layers[0].attention.causal);
}
