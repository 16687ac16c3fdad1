use super::*;
use candle_core::{Device, Tensor};

/// A SEQ_CLS prompt with these tensors beside it: name and dimensions; all values 1, biases count up.
fn classifier(tensors: &[(&str, &[usize])]) -> Folder {
    let config = r#"{"peft_type": "P_TUNING", "num_virtual_tokens": 1, "task_type": "SEQ_CLS"}"#;
    let values = |name: &str, n| if name.ends_with("bias") { counting(n) } else { vec![1.0; n] };
    let mut all: Vec<(&str, &[usize], Vec<f32>)> = vec![("prompt_embeddings", &[1, 8], counting(8))];
    all.extend(tensors.iter().map(|(name, dims)| (*name, *dims, values(name, dims.iter().product()))));
    Folder::new().file(CONFIG_FILE, config).weights(&all)
}

/// What the head makes of a row of 0.5.
fn logits(loaded: &Loaded) -> Vec<f32> {
    let row = Tensor::full(0.5f32, (1, 8), &Device::Cpu).unwrap();
    loaded.head.as_ref().unwrap().forward(&row).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn every_spelling_of_a_head_is_found() {
    for (weight, bias) in [
        ("base_model.classifier.weight", "base_model.classifier.bias"),
        ("base_model.score.weight", "base_model.score.bias"),
        ("base_model.model.classifier.weight", "base_model.model.classifier.bias"),
        (
            "base_model.model.score.modules_to_save.default.weight",
            "base_model.model.score.modules_to_save.default.bias",
        ),
        ("base_model.classifier.modules_to_save.weight", "base_model.classifier.modules_to_save.bias"),
        ("classifier.weight", "classifier.bias"),
    ] {
        let loaded = classifier(&[(weight, &[3, 8]), (bias, &[3])]).load().unwrap();
        assert_eq!(logits(&loaded), [4.0, 5.0, 6.0], "{weight}");
    }
    let loaded = classifier(&[("base_model.score.weight", &[2, 8])]).load().unwrap();
    assert_eq!(logits(&loaded), [4.0, 4.0]);
    assert!(classifier(&[]).load().unwrap().head.is_none());
}

#[test]
fn robertas_head_is_dense_tanh_out() {
    let loaded = classifier(&[
        ("base_model.classifier.out_proj.weight", &[2, 8]),
        ("base_model.classifier.out_proj.bias", &[2]),
        ("base_model.classifier.dense.weight", &[8, 8]),
        ("base_model.classifier.dense.bias", &[8]),
    ])
    .load_encoder()
    .unwrap();
    let pooled: f32 = (0..8).map(|i| (4.0 + i as f32).tanh()).sum();
    for (i, logit) in logits(&loaded).into_iter().enumerate() {
        assert!((logit - pooled - i as f32).abs() < 1e-5, "{logit} {pooled}");
    }
}

#[test]
fn heads_that_do_not_fit_are_refused() {
    let (sound, fits) = (Kind::InvalidArgument, Kind::FailedPrecondition);
    let weight = "base_model.classifier.weight";
    let head = || classifier(&[(weight, &[2, 8])]);
    assert_eq!(head().file(CARD_FILE, "labels = ['a', 'b']").load().unwrap().card.labels, ["a", "b"]);
    head().file(CARD_FILE, "labels = ['a']").refused(sound, &[weight, "has 2 rows", "`labels` has 1 entries"]);
    head()
        .file(CARD_FILE, "labels = ['a', 'b']\nverbalizers = ['c', 'd']")
        .refused(sound, &[weight, "`verbalizers`", "mean nothing"]);
    classifier(&[(weight, &[2, 9])]).refused(fits, &["`base_model.classifier.weight` is [2, 9], needs [2, 8]"]);
    classifier(&[(weight, &[8])]).refused(sound, &["rank 1 [8], needs 2: [labels, hidden_size]"]);
    classifier(&[(weight, &[0, 8])]).refused(fits, &["is [0, 8], needs [1, 8]"]);
    classifier(&[(weight, &[2, 8]), ("base_model.classifier.bias", &[3])]).refused(fits, &["is [3], needs [2]"]);
    let dense = "base_model.classifier.dense.weight";
    classifier(&[(dense, &[8, 8])]).refused(sound, &["the weight that belongs to it is missing"]);
    classifier(&[("score.bias", &[2])]).refused(sound, &["the weight that belongs to it is missing"]);
    classifier(&[(weight, &[2, 8]), (dense, &[4, 8])]).refused(fits, &["is [4, 8], needs [8, 8]"]);
    classifier(&[(weight, &[2, 8]), ("score.weight", &[2, 8])]).refused(sound, &[weight, "`score.weight`", "both"]);
    for other in ["base_model.pre_classifier.weight", "base_model.classifier.original_module.weight", "base_model.x"] {
        classifier(&[(weight, &[2, 8]), (other, &[8, 8])]).refused(fits, &[other, "1 tensors", "modules_to_save"]);
    }
    // The head of another task is not served in silence as a classifier.
    let config = r#"{"peft_type": "P_TUNING", "num_virtual_tokens": 1, "task_type": "TOKEN_CLS"}"#;
    head().file(CONFIG_FILE, config).refused(fits, &[weight, "\"TOKEN_CLS\""]);
}
