use super::*;
use serde_json::Value;

/// Keys of a config that this data folder's PEFT wrote, and ours for the same method.
#[test]
fn configs_have_the_keys_that_peft_writes() {
    let Some(data) = test_data("peft/llama_gqa") else { return };
    let mut count = 0;
    for dir in fs::read_dir(&data).unwrap().map(|e| e.unwrap().path()) {
        let Ok(json) = fs::read(dir.join(CONFIG_FILE)) else { continue };
        let Value::Object(theirs) = serde_json::from_slice(&json).unwrap() else { panic!("{}", dir.display()) };
        let text = |key: &str| theirs[key].as_str().unwrap().to_owned();
        let number = |key: &str| Some(theirs[key].as_u64().unwrap() as usize);
        let method = Method::PEFT.into_iter().find(|m| m.as_str() == text("peft_type")).unwrap();
        let base = SavedBase {
            name: Some(text("base_model_name_or_path")),
            num_layers: number("num_layers"),
            num_heads: number("num_attention_heads"),
            token_dim: number("token_dim"),
        };
        let ours = SavedAdapter::new(method, 8, "CAUSAL_LM", &base).unwrap().config;
        assert_eq!(ours.keys().collect::<Vec<_>>(), theirs.keys().collect::<Vec<_>>(), "{}", dir.display());
        for (key, value) in &ours {
            // How it was trained is free.
            let free = ["encoder_hidden_size", "prefix_projection", "encoder_reparameterization_type", "num_tasks"];
            let free =
                free.contains(&key.as_str()) || key.starts_with("prompt_tuning_init") || key.contains("tokenizer");
            assert!(free || *value == theirs[key], "{}: {key} is {value}", dir.display());
        }
        count += 1;
    }
    println!("{count} configs");
    assert!(count > 0);
}

#[test]
fn what_is_saved_loads_and_is_never_written_over() {
    for method in Method::PEFT {
        let width = if method.is_kv() { 32 } else { 8 };
        let mut adapter = SavedAdapter::new(method, 2, "CAUSAL_LM", &SavedBase::default()).unwrap();
        let mut add = |name: &str, dims: &[usize]| {
            let tensor = SavedTensor::f32(dims.to_vec(), &counting(dims.iter().product()));
            adapter.tensors.insert(name.into(), tensor);
        };
        add("prompt_embeddings", &[2, width]);
        if method == Method::MultitaskPromptTuning {
            add("prefix_task_cols", &[1, 2, 1]);
            add("prefix_task_rows", &[1, 1, 8]);
        }
        let folder = Folder::new();
        save(folder.0.path(), &adapter).unwrap();
        let loaded = folder.load().unwrap();
        assert_eq!((loaded.method, loaded.num_virtual_tokens), (method, 2));
        let e = save(folder.0.path(), &adapter).unwrap_err();
        says(e, Kind::AlreadyExists, &[WEIGHTS_FILE, "is there already"]);
    }
    let mut broken = SavedAdapter::default();
    let tensor = SavedTensor { dtype: Dtype::F32, shape: vec![3], bytes: vec![0; 8] };
    broken.tensors.insert("x".into(), tensor);
    says(save(Folder::new().0.path(), &broken).unwrap_err(), Kind::InvalidArgument, &["x: "]);
}

/// The kinds that the data folder has no case of: all keys that PEFT 0.21.2 wrote for them.
#[test]
fn cpt_and_cartridge_have_the_keys_that_peft_writes() {
    let common = "auto_mapping base_model_name_or_path inference_mode modules_to_save num_attention_heads num_layers \
                  num_transformer_submodules num_virtual_tokens peft_type peft_version revision task_type token_dim";
    let cpt = "cpt_mask cpt_token_ids cpt_tokens_type_mask opt_loss_decay_factor opt_projection_epsilon \
               opt_projection_format_epsilon opt_weighted_loss_type tokenizer_name_or_path";
    for (method, own) in [(Method::Cpt, cpt), (Method::Cartridge, "num_frozen_tokens")] {
        let config = SavedAdapter::new(method, 3, "CAUSAL_LM", &SavedBase::default()).unwrap().config;
        let mut keys: Vec<_> = common.split(' ').chain(own.split(' ')).collect();
        keys.sort_unstable();
        assert_eq!(config.keys().collect::<Vec<_>>(), keys);
        assert!(method != Method::Cpt || config["cpt_token_ids"].as_array().unwrap().len() == 3);
    }
}
