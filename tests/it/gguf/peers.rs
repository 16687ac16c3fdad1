//! candle-transformers' own readers of GGUF on the same files.
use super::convert::convert;
use super::write_folder;
use crate::support::{Draws, apart, load, logits};
use candle_core::quantized::{GgmlDType, gguf_file};
use candle_core::{Device, Tensor};
use candle_transformers::models::{quantized_llama, quantized_qwen2};
use prefixd::config::DtypeChoice;
use std::collections::HashMap;
use std::path::Path;

const TOKENS: [u32; 24] = [1, 17, 5, 39, 3, 3, 42, 25, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 20, 21, 22, 47, 46, 45];

/// Logits of the last of [`TOKENS`] there.
fn theirs(path: &Path, architecture: &str) -> Vec<f32> {
    let mut file = std::fs::File::open(path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let input = Tensor::new(&TOKENS, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let logits = if architecture == "llama" {
        let mut model = quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
        model.forward(&input, 0).unwrap()
    } else {
        let mut model = quantized_qwen2::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();
        model.forward(&input, 0).unwrap()
    };
    logits.flatten_all().unwrap().to_vec1().unwrap()
}

/// In f32 both compute the same sums. With blocks candle rounds the input of each product to 8 bits as well, which prefixd does
/// not: an error of about 0.6 % of each input, in 14 products one after the other, which attention and gates make larger.
fn agrees(architecture: &str, config: &serde_json::Value, tensors: &HashMap<String, Tensor>) {
    for (kind, bound) in [(GgmlDType::F32, 1e-5), (GgmlDType::Q8_0, 0.2), (GgmlDType::Q4K, 0.2), (GgmlDType::Q6K, 0.2)]
    {
        let plain = tempfile::tempdir().unwrap();
        write_folder(plain.path(), config, tensors);
        let mut gguf = convert(plain.path(), kind).unwrap();
        gguf.metadata.retain(|(key, _)| !key.starts_with("tokenizer."));
        let path = gguf.write(plain.path());
        let ours = logits(&load(path.to_str().unwrap(), DtypeChoice::F32), None, &TOKENS);
        let ours = ours.last().unwrap().clone();
        let off = apart(&[ours], &[theirs(&path, architecture)]);
        println!("{architecture} {kind:?}: logits off by {off:.1e} of their deviation");
        assert!(off < bound, "{architecture} {kind:?}: {off}");
    }
}

#[test]
fn llama_agrees_with_candle_transformers() {
    let (config, tensors) = super::wide();
    agrees("llama", &config, &tensors);
}

#[test]
fn qwen2_agrees_with_candle_transformers() {
    let ((mut config, mut tensors), mut draws) = (super::wide(), Draws::new(2));
    config["architectures"] = vec!["Qwen2ForCausalLM"].into();
    for i in 0..2 {
        for (name, rows) in [("q", 256), ("k", 64), ("v", 64)] {
            tensors.insert(format!("model.layers.{i}.self_attn.{name}_proj.bias"), draws.normal(0.5, &[rows]));
        }
    }
    agrees("qwen2", &config, &tensors);
}
