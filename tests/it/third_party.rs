//! Adapters that others made, as they lie on the web: each loads or is refused with a sentence that says what to do.
use crate::support::{data, embedded};
use candle_core::DType;
use prefixd::adapter::convert::convert;
use prefixd::adapter::{BaseShape, Method, load_folder};
use prefixd::error::{Error, Kind};
use prefixd::ops::Machine;
use std::fs;
use std::path::{Path, PathBuf};

fn folders() -> Vec<PathBuf> {
    let Some(root) = data("adapters_third_party") else { return Vec::new() };
    let mut all: Vec<_> = fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_dir()).collect();
    all.sort();
    all
}

/// A base that the TinyLlama test adapters fit: hidden size 64.
fn tiny_llama() -> BaseShape {
    BaseShape {
        name: "tiny-llama".into(),
        num_layers: 2,
        num_kv_heads: 4,
        head_dim: 16,
        hidden_size: 64,
        max_model_len: 128,
        encoder: false,
        input_dtype: DType::F32,
        kv_dtype: DType::F32,
        machine: Machine::new(1),
    }
}

fn says(e: &Error, kind: Kind, parts: &[&str]) {
    assert_eq!(e.kind(), kind, "{e}");
    for part in parts {
        assert!(e.to_string().contains(part), "{part:?} is not in: {e}");
    }
}

/// The folder, and what PEFT would have written beside its weights.
fn with_config(dir: &Path, n: usize) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let weights = "adapter_model.safetensors";
    fs::copy(dir.join(weights), copy.path().join(weights)).unwrap();
    let config = format!(r#"{{"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": {n}}}"#);
    fs::write(copy.path().join("adapter_config.json"), config).unwrap();
    copy
}

/// Whatever lies there: the server loads it or says why not, and never for a reason of its own.
#[test]
fn each_folder_loads_or_is_refused_with_a_sentence() {
    let model = embedded();
    let mut count = 0;
    for dir in folders() {
        let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
        match load_folder(&dir, &model.shape(), model.tokenizer()) {
            Ok(loaded) => println!("{name}: {:?}", loaded.method),
            Err(e) => {
                println!("{name}: {e}");
                assert_ne!(e.kind(), Kind::Internal, "{name}: {e}");
                match name.as_str() {
                    "tinyllama" => says(&e, Kind::InvalidArgument, &["decoder.pt is a pickle", "can run code"]),
                    "tinyllama_peft_adapter" => {
                        says(&e, Kind::InvalidArgument, &["adapter_config.json beside it is missing"]);
                    }
                    _ => {}
                }
            }
        }
        count += 1;
    }
    println!("{count} folders");
}

/// Published without its config; with one it is what its base takes, and no other base does.
#[test]
fn a_peft_adapter_fits_its_own_base_alone() {
    let Some(dir) = folders().into_iter().find(|dir| dir.ends_with("tinyllama_peft_adapter")) else { return };
    let model = embedded();
    let folder = with_config(&dir, 8);
    let loaded = load_folder(folder.path(), &tiny_llama(), model.tokenizer()).unwrap();
    let prefix = loaded.prefix.unwrap();
    assert_eq!((loaded.method, prefix.len(), prefix.soft.len()), (Method::PromptTuning, 8, 8 * 64));
    let e = load_folder(folder.path(), &model.shape(), model.tokenizer()).unwrap_err();
    let columns = format!("has 64 columns, needs {}", model.info().hidden_size);
    says(&e, Kind::FailedPrecondition, &["base `embedded`", &columns, "[num_virtual_tokens, hidden_size]"]);
    let e = load_folder(with_config(&dir, 7).path(), &tiny_llama(), model.tokenizer()).unwrap_err();
    says(&e, Kind::InvalidArgument, &["has 8 rows, `num_virtual_tokens` is 7"]);
}

/// TGIS's bare tensor, converted: the folder loads.
#[test]
fn a_tgis_decoder_is_converted() {
    let Some(dir) = folders().into_iter().find(|dir| dir.join("decoder.pt").is_file()) else { return };
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("converted");
    convert(&dir, &folder, None).unwrap();
    let loaded = load_folder(&folder, &tiny_llama(), embedded().tokenizer()).unwrap();
    assert_eq!((loaded.method, loaded.num_virtual_tokens), (Method::PromptTuning, 7));
    let soft = loaded.prefix.unwrap().soft.clone();
    assert!(soft.len() == 7 * 64 && soft.iter().any(|v| *v != 0.0));
}
