//! A model folder that is not right is refused with the names of what is wrong.
use crate::support::try_load;
use prefixd::config::DtypeChoice;
use prefixd::error::Kind;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::path::Path;

const FROM: &str = "tests/oracle/results/peft/llama_biases";

/// Name, shape and bytes of every tensor.
type Tensors = Vec<(String, Vec<usize>, Vec<u8>)>;

/// Loads the model after `change`; the error's kind and text.
fn refusal(change: impl FnOnce(&mut Tensors, &mut serde_json::Value)) -> (Kind, String) {
    let from = Path::new(FROM);
    let file = std::fs::read(from.join("model.safetensors")).unwrap();
    let mut tensors: Tensors = SafeTensors::deserialize(&file)
        .unwrap()
        .iter()
        .map(|(name, t)| (name.to_owned(), t.shape().to_vec(), t.data().to_vec()))
        .collect();
    let mut config = serde_json::from_slice(&std::fs::read(from.join("config.json")).unwrap()).unwrap();
    change(&mut tensors, &mut config);
    let dir = tempfile::tempdir().unwrap();
    let views = tensors.iter().map(|(n, s, b)| (n, TensorView::new(Dtype::F32, s.clone(), b).unwrap()));
    std::fs::write(dir.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(from.join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let error = try_load(dir.path().to_str().unwrap(), DtypeChoice::Auto).err().expect("refused");
    (error.kind(), error.to_string())
}

fn says(refusal: (Kind, String), parts: &[&str]) {
    assert_eq!(refusal.0, Kind::FailedPrecondition, "{}", refusal.1);
    parts.iter().for_each(|part| assert!(refusal.1.contains(part), "{part:?} is not in: {}", refusal.1));
}

#[test]
fn a_missing_an_extra_and_a_misshapen_tensor_are_named() {
    let q = "model.layers.1.self_attn.q_proj.weight";
    says(refusal(|tensors, _| tensors.retain(|t| t.0 != q)), &[q, "[32, 32]"]);
    let extra = ("model.layers.0.surprise".to_owned(), vec![1], vec![0; 4]);
    says(refusal(|tensors, _| tensors.push(extra)), &["1 tensors", "model.layers.0.surprise"]);
    let reshape = |t: &mut Tensors| t.iter_mut().filter(|t| t.0 == q).for_each(|t| t.1 = vec![16, 64]);
    says(refusal(|tensors, _| reshape(tensors)), &[q, "[16, 64]", "[32, 32]"]);
    says(refusal(|_, config| config["num_hidden_layers"] = 3.into()), &["model.layers.2."]);
    says(refusal(|_, config| config["num_hidden_layers"] = 1.into()), &["model.layers.1."]);
    says(
        refusal(|_, config| config["architectures"] = vec!["MambaForCausalLM"].into()),
        &["MambaForCausalLM", "Gemma2"],
    );
}
