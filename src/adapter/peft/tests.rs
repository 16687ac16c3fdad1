#![allow(clippy::unwrap_used)]
mod heads;
mod placing;
mod saving;

use super::*;
use crate::adapter::InputRow;
use crate::ops::Machine;
use candle_core::DType;
use safetensors::{Dtype, tensor::TensorView};
use std::fs;
use std::path::PathBuf;

/// 2 layers, 2 KV heads of 4: a KV row has 32 columns, a soft row 8.
fn shape() -> BaseShape {
    BaseShape {
        name: "tiny".into(),
        num_layers: 2,
        num_kv_heads: 2,
        head_dim: 4,
        hidden_size: 8,
        max_model_len: 16,
        encoder: false,
        input_dtype: DType::F32,
        kv_dtype: DType::F32,
        machine: Machine::new(1),
    }
}

/// Words by white space; `<s>` is put in front as the special token.
fn tokenizer() -> Tokenizer {
    let words = ["<unk>", "<s>", "good", "bad", "<json>", "review"];
    let vocab: serde_json::Map<_, _> = words.iter().enumerate().map(|(i, w)| ((*w).into(), i.into())).collect();
    let special = |id: usize| {
        serde_json::json!({ "id": id, "content": words[id], "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true })
    };
    let json = serde_json::json!({
        "version": "1.0",
        "added_tokens": [special(0), special(1), special(4)],
        "pre_tokenizer": { "type": "WhitespaceSplit" },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 0 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } }
        },
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "<unk>" }
    });
    Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
}

/// A folder with the given files.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Folder(tempfile::tempdir().unwrap())
    }

    fn file(self, name: &str, bytes: impl AsRef<[u8]>) -> Self {
        fs::write(self.0.path().join(name), bytes).unwrap();
        self
    }

    fn config(self, peft_type: &str, n: i64) -> Self {
        let json = serde_json::json!({ "peft_type": peft_type, "num_virtual_tokens": n, "token_dim": null,
            "task_type": "CAUSAL_LM", "base_model_name_or_path": "else/where", "unknown": [1] });
        self.file(CONFIG_FILE, json.to_string())
    }

    fn weights(self, tensors: &[(&str, &[usize], Vec<f32>)]) -> Self {
        let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| t.2.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
        let views = tensors
            .iter()
            .zip(&bytes)
            .map(|((name, dims, _), bytes)| (*name, TensorView::new(Dtype::F32, dims.to_vec(), bytes).unwrap()));
        let file = safetensors::serialize(views, None).unwrap();
        self.file(WEIGHTS_FILE, file)
    }

    /// `prompt_embeddings [n, d]` counting up from 0.
    fn prompt(self, n: usize, d: usize) -> Self {
        self.weights(&[("prompt_embeddings", &[n, d], counting(n * d))])
    }

    fn load(&self) -> Result<Loaded> {
        load(self.0.path(), &shape(), &tokenizer())
    }

    /// The same on an encoder.
    fn load_encoder(&self) -> Result<Loaded> {
        load(self.0.path(), &BaseShape { encoder: true, ..shape() }, &tokenizer())
    }

    fn refused(&self, kind: Kind, parts: &[&str]) {
        says(self.load().unwrap_err(), kind, parts);
    }

    fn refused_by_encoder(&self, kind: Kind, parts: &[&str]) {
        says(self.load_encoder().unwrap_err(), kind, parts);
    }
}

fn says(e: Error, kind: Kind, parts: &[&str]) {
    assert_eq!(e.kind(), kind, "{e}");
    for part in parts {
        assert!(e.to_string().contains(part), "{part:?} is not in: {e}");
    }
}

fn counting(n: usize) -> Vec<f32> {
    (0..n).map(|i| i as f32).collect()
}

fn tokens(ids: &[u32]) -> Vec<InputRow> {
    ids.iter().map(|&id| InputRow::Token(id)).collect()
}

#[test]
fn soft_prompts_become_input_rows() {
    for (name, method) in [Method::PromptTuning, Method::PTuning, Method::Cpt].map(|method| (method.as_str(), method)) {
        let loaded = Folder::new().config(name, 3).prompt(3, 8).load().unwrap();
        let prefix = loaded.prefix.unwrap();
        assert_eq!((loaded.method, loaded.num_virtual_tokens, prefix.len()), (method, 3, 3));
        assert_eq!(prefix.rows, [0, 1, 2].map(InputRow::Soft));
        assert_eq!(&prefix.soft[..], counting(24));
    }
}

#[test]
fn kv_prefixes_keep_their_rows() {
    for (name, method) in [("PREFIX_TUNING", Method::PrefixTuning), ("CARTRIDGE", Method::Cartridge)] {
        let loaded = Folder::new().config(name, 3).prompt(3, 32).load().unwrap();
        let prefix = loaded.prefix.unwrap();
        assert_eq!((loaded.method, prefix.kv_len(), prefix.rows.len()), (method, 3, 0));
        assert_eq!(&prefix.kv.as_ref().unwrap().data[..], counting(96));
    }
}

#[test]
fn a_multitask_prompt_is_scaled_to_the_cards_task() {
    let (cols, rows) = (vec![1.0, 1.0, 2.0, 3.0], [[1.0; 8], [0.5; 8]].concat());
    let folder = || {
        Folder::new().config("MULTITASK_PROMPT_TUNING", 2).weights(&[
            ("prompt_embeddings", &[2, 8], counting(16)),
            ("prefix_task_cols", &[2, 2, 1], cols.clone()),
            ("prefix_task_rows", &[2, 1, 8], rows.clone()),
        ])
    };
    let soft = |f: Folder| f.load().unwrap().prefix.unwrap().soft.to_vec();
    assert_eq!(soft(folder()), counting(16));
    // Task 1: row 0 times 2 * 0.5, row 1 times 3 * 0.5.
    let expected: Vec<f32> = (0..16).map(|i| i as f32 * if i < 8 { 1.0 } else { 1.5 }).collect();
    assert_eq!(soft(folder().file(CARD_FILE, "task_id = 1")), expected);
    folder().file(CARD_FILE, "task_id = 2").refused(Kind::FailedPrecondition, &["`task_id` is 2", "2 tasks"]);
    let config = || Folder::new().config("MULTITASK_PROMPT_TUNING", 2);
    config().prompt(2, 8).refused(Kind::InvalidArgument, &["`prefix_task_cols` [tasks,", "missing"]);
    let parts = |rows: &'static [usize]| {
        config().weights(&[
            ("prompt_embeddings", &[2, 8], counting(16)),
            ("prefix_task_cols", &[1, 2, 1], counting(2)),
            ("prefix_task_rows", rows, vec![f32::MAX; rows.iter().product()]),
        ])
    };
    parts(&[1, 1, 9]).refused(Kind::FailedPrecondition, &["[1, 1, 9], needs [1, 1, 8]"]);
    parts(&[1, 8]).refused(Kind::InvalidArgument, &["rank 2 [1, 8], needs 3"]);
    parts(&[1, 1, 8]).refused(Kind::InvalidArgument, &["task 0 at [1, 0] is inf"]);
}

#[test]
fn card_text_follows_virtual_tokens_and_alone_starts_with_bos() {
    let card = "prefix = 'good review'\ncontrol_tokens = ['<json>']";
    let soft = Folder::new().config("PROMPT_TUNING", 1).prompt(1, 8).file(CARD_FILE, card).load().unwrap();
    let rows = &soft.prefix.unwrap().rows;
    assert_eq!((rows[0], &rows[1..]), (InputRow::Soft(0), &tokens(&[2, 5, 4])[..]));
    let kv = Folder::new().config("PREFIX_TUNING", 1).prompt(1, 32).file(CARD_FILE, card).load().unwrap();
    let kv = kv.prefix.unwrap();
    assert_eq!((kv.kv_len(), &kv.rows), (1, &tokens(&[2, 5, 4])));
    let text = Folder::new().file(CARD_FILE, card).load().unwrap();
    assert_eq!(text.prefix.unwrap().rows, tokens(&[1, 2, 5, 4]));
    assert_eq!((text.method, text.num_virtual_tokens), (Method::Text, 0));
    let none = Folder::new().file(CARD_FILE, "template = '{{ input }}?'").load().unwrap();
    assert!(none.prefix.is_none());
    Folder::new()
        .file(CARD_FILE, "control_tokens = ['<json>', 'good bad review']")
        .refused(Kind::FailedPrecondition, &["`control_tokens[1]` is \"good bad review\"", "takes 3"]);
}

#[test]
fn half_floats_are_widened() {
    let values = [1.5f32, -2.0, 0.25, 0.0, 3.0, -0.5, 8.0, 1.0];
    for dtype in [Dtype::F16, Dtype::BF16, Dtype::F64, Dtype::I16] {
        let bytes: Vec<u8> = match dtype {
            Dtype::F16 => values.iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect(),
            Dtype::F64 => values.iter().flat_map(|&v| (v as f64).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        };
        let view = TensorView::new(dtype, vec![1, 8], &bytes).unwrap();
        let file = safetensors::serialize([("prompt_embeddings", view)], None).unwrap();
        let folder = Folder::new().config("PROMPT_TUNING", 1).file(WEIGHTS_FILE, file);
        if matches!(dtype, Dtype::F16 | Dtype::BF16) {
            assert_eq!(&folder.load().unwrap().prefix.unwrap().soft[..], values);
        } else {
            folder.refused(Kind::InvalidArgument, &["must be F32, F16 or BF16", &format!("{dtype:?}")]);
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused_with_numbers() {
    let (fits, sound) = (Kind::FailedPrecondition, Kind::InvalidArgument);
    let soft = |n| Folder::new().config("PROMPT_TUNING", n);
    let kv = |n| Folder::new().config("PREFIX_TUNING", n);
    soft(2).prompt(2, 12).refused(fits, &["base `tiny`", "12 columns, needs 8", "else/where"]);
    kv(2).prompt(2, 64).refused(fits, &["64 columns, needs 32", "2 layers * 2 KV heads * 4 head_dim"]);
    soft(2).prompt(3, 8).refused(sound, &["3 rows", "`num_virtual_tokens` is 2"]);
    soft(0).prompt(0, 8).refused(sound, &["`num_virtual_tokens` is 0, must be at least 1"]);
    soft(-1).prompt(1, 8).refused(sound, &["is -1"]);
    soft(16).prompt(16, 8).refused(fits, &["is 16, must be less than 16"]);
    kv(99).prompt(99, 32).refused(fits, &["is 99, must be less than 16"]);
    soft(2).weights(&[("prompt_embeddings", &[16], counting(16))]).refused(sound, &["rank 1 [16], needs 2"]);
    soft(2).weights(&[]).refused(sound, &["`prompt_embeddings`", "missing"]);
    soft(10)
        .prompt(10, 8)
        .file(CARD_FILE, format!("prefix = '{}'", "good ".repeat(6)))
        .refused(fits, &["16 positions (10 virtual tokens, 6 of text)", "base `tiny` has 16"]);
    let config = r#"{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 1, "KEY": 4}"#;
    for key in ["num_layers", "num_attention_heads"] {
        let folder = Folder::new().file(CONFIG_FILE, config.replace("KEY", key)).prompt(1, 32);
        folder.refused(fits, &[&format!("`{key}` is 4, the base has 2")]);
    }
}

#[test]
fn values_that_are_not_finite_are_named() {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut values = counting(16);
        values[11] = bad;
        Folder::new()
            .config("PROMPT_TUNING", 2)
            .weights(&[("prompt_embeddings", &[2, 8], values)])
            .refused(Kind::InvalidArgument, &["`prompt_embeddings` at [1, 3]", &bad.to_string(), "finite"]);
    }
}

/// A value that only f32 has, on a base that holds K and V, or virtual tokens, in less.
#[test]
fn values_that_the_base_cannot_hold_are_named() {
    let narrow = BaseShape { input_dtype: DType::F16, kv_dtype: DType::BF16, ..shape() };
    let folder = |method: &str, width: usize, last: f32| {
        let mut values = counting(2 * width);
        values[2 * width - 1] = last;
        Folder::new().config(method, 2).weights(&[("prompt_embeddings", &[2, width], values)])
    };
    for (method, width, last, rule) in [
        ("PROMPT_TUNING", 8, -65505.0, "65504 at most: it is held in f16"),
        ("PREFIX_TUNING", 32, f32::MAX, "at most: it is held in bf16"),
    ] {
        let e = load(folder(method, width, last).0.path(), &narrow, &tokenizer()).unwrap_err();
        assert_eq!(e.kind(), Kind::InvalidArgument);
        let e = e.to_string();
        assert!(e.contains(&format!("at [1, {}] is {last}", width - 1)) && e.contains(rule), "{e}");
        load(folder(method, width, last).0.path(), &shape(), &tokenizer()).unwrap();
        load(folder(method, width, 65504.0).0.path(), &narrow, &tokenizer()).unwrap();
    }
}

#[test]
fn other_tensors_are_ignored_or_refused_never_lost() {
    let with = |name: &str| {
        Folder::new()
            .config("P_TUNING", 1)
            .weights(&[("prompt_embeddings", &[1, 8], counting(8)), (name, &[1], vec![1.0])])
    };
    for name in ["prompt_encoder.default.mlp_head.0.weight", "mlp_head.0.bias", "embedding.weight"] {
        with(name).load().unwrap();
    }
    for name in ["base_model.classifier.weight", "score.weight", "prefix_task_cols"] {
        with(name).refused(Kind::FailedPrecondition, &[name, "1 tensors", "modules_to_save"]);
    }
}

#[test]
fn other_methods_and_encoder_decoders_are_refused() {
    let served = "prefixd serves PROMPT_TUNING, P_TUNING, PREFIX_TUNING, CARTRIDGE, CPT and MULTITASK_PROMPT_TUNING";
    for (name, why) in [
        ("LORA", "changes weights of the base"),
        ("ADALORA", "changes weights of the base"),
        ("BOFT", "rotates or reflects weights"),
        ("XLORA", "mixes changes"),
        ("IA3", "scales keys, values"),
        ("LN_TUNING", "the base's own norms"),
        ("TRAINABLE_TOKENS", "rows of the base's token table"),
        ("ADAPTION_PROMPT", "a gated attention of its own"),
        ("PROMPT_TUNINGS", "none of PEFT's types"),
        ("", "none of PEFT's types"),
    ] {
        let quoted = format!("`peft_type` is {name:?}: ");
        Folder::new().config(name, 1).prompt(1, 8).refused(Kind::FailedPrecondition, &[&quoted, why, served]);
    }
    for frozen in [-1, 3] {
        let config = format!(r#"{{"peft_type": "CARTRIDGE", "num_virtual_tokens": 2, "num_frozen_tokens": {frozen}}}"#);
        let folder = Folder::new().file(CONFIG_FILE, config).prompt(2, 32);
        folder.refused(Kind::InvalidArgument, &[&format!("`num_frozen_tokens` is {frozen}, must be 0 to"), "(2)"]);
    }
    for config in [
        r#"{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 1, "num_transformer_submodules": 2}"#,
        r#"{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 1, "task_type": "SEQ_2_SEQ_LM"}"#,
    ] {
        let folder = Folder::new().file(CONFIG_FILE, config).prompt(1, 8);
        folder.refused(Kind::FailedPrecondition, &["encoder-decoder"]);
    }
}

#[test]
fn pickles_and_missing_files_are_refused() {
    for name in ["adapter_model.bin", "decoder.pt", "x.PTH", "y.ckpt", "z.pkl"] {
        for folder in [Folder::new().config("PROMPT_TUNING", 1), Folder::new()] {
            folder.file(name, "x").refused(Kind::InvalidArgument, &[name, "can run code", "save_file"]);
        }
    }
    Folder::new().config("PROMPT_TUNING", 1).refused(Kind::InvalidArgument, &[WEIGHTS_FILE, "missing"]);
    Folder::new().prompt(1, 8).refused(Kind::InvalidArgument, &[CONFIG_FILE, "missing"]);
    Folder::new().refused(Kind::NotFound, &[CONFIG_FILE, CARD_FILE]);
    Folder::new().config("PROMPT_TUNING", 1).prompt(1, 8).file("old.bin", "x").load().unwrap();
}

#[test]
fn broken_files_are_refused_before_memory_is_taken() {
    let soft = || Folder::new().config("PROMPT_TUNING", 1);
    let broken = Kind::InvalidArgument;
    soft().file(WEIGHTS_FILE, "abc").refused(broken, &["3 bytes", "takes 8"]);
    soft().file(WEIGHTS_FILE, u64::MAX.to_le_bytes()).refused(broken, &["claims 18446744073709551615", "at most 0"]);
    soft().file(WEIGHTS_FILE, [b"\x10\0\0\0\0\0\0\0{}".as_slice(), &[0; 14]].concat()).refused(broken, &[WEIGHTS_FILE]);
    let overlong = br#"{"prompt_embeddings":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}"#;
    let mut bytes = (overlong.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(overlong);
    soft().file(WEIGHTS_FILE, bytes).refused(broken, &[WEIGHTS_FILE]);
    // Sparse: costs no disk, and must cost no memory.
    let huge = soft().file(WEIGHTS_FILE, "");
    fs::File::options().write(true).open(huge.0.path().join(WEIGHTS_FILE)).unwrap().set_len(1 << 40).unwrap();
    let limit = (16 * 8 * 4 + (16 << 20)).to_string();
    huge.refused(broken, &["1099511627776 bytes", &limit]);
    let config = |text: &str| Folder::new().file(CONFIG_FILE, text).prompt(1, 8);
    config("{").refused(broken, &[CONFIG_FILE]);
    config("{}").refused(broken, &[CONFIG_FILE, "peft_type"]);
    config(r#"{"peft_type": "P_TUNING"}"#).refused(broken, &["`num_virtual_tokens` is missing"]);
    config(&" ".repeat((1 << 20) + 1)).refused(broken, &[CONFIG_FILE, "more than 1048576 bytes"]);
    soft().prompt(1, 8).file(CARD_FILE, [0xff]).refused(broken, &[CARD_FILE, "utf-8"]);
    soft().prompt(1, 8).file(CARD_FILE, "x = 1").refused(broken, &["task.toml: line 1 (`x = 1`)"]);
}

/// The data folder's `path`, or a printed reason to skip.
fn test_data(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("PREFIXD_TEST_DATA").map_or_else(|| "../shared/data".into(), PathBuf::from);
    let dir = root.join(path);
    if !dir.is_dir() {
        println!("skipped: {} is absent (PREFIXD_TEST_DATA)", dir.display());
        return None;
    }
    Some(dir)
}

#[test]
fn adapters_saved_by_peft_load() {
    let Some(data) = test_data("peft/llama_gqa") else { return };
    let json: serde_json::Value = serde_json::from_slice(&fs::read(data.join("config.json")).unwrap()).unwrap();
    let number = |key: &str| json[key].as_u64().unwrap() as usize;
    let shape = BaseShape {
        name: "llama_gqa".into(),
        num_layers: number("num_hidden_layers"),
        num_kv_heads: number("num_key_value_heads"),
        head_dim: number("head_dim"),
        hidden_size: number("hidden_size"),
        max_model_len: number("max_position_embeddings"),
        encoder: false,
        input_dtype: DType::F32,
        kv_dtype: DType::F32,
        machine: Machine::new(1),
    };
    let tokenizer = Tokenizer::from_bytes(&fs::read(data.join("tokenizer.json")).unwrap()).unwrap();
    let mut count = 0;
    for dir in fs::read_dir(&data).unwrap().map(|e| e.unwrap().path()) {
        if !dir.join(CONFIG_FILE).is_file() {
            continue;
        }
        let loaded = load(&dir, &shape, &tokenizer).unwrap();
        let prefix = loaded.prefix.unwrap();
        assert_eq!((loaded.num_virtual_tokens, prefix.len()), (8, 8), "{}", dir.display());
        assert_eq!(loaded.method == Method::PrefixTuning, prefix.kv_len() == 8, "{}", dir.display());
        count += 1;
    }
    println!("{count} adapters");
    assert!(count > 0);
}
