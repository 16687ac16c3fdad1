//! GGUF bases: the same model as the Hugging Face folder they were made from, to the bit where nothing is rounded.
mod convert;
mod files;
mod peers;
mod refusals;
mod vocabularies;
pub mod write;

use crate::oracle::{Case, LOGIT_TOLERANCE, models};
use crate::support::{Draws, apart, ask_all, data, engine, load, logits, request};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use convert::{convert, weights};
use prefixd::config::{DtypeChoice, Quantize};
use prefixd::model::{LoadOptions, Model, source};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A folder with the GGUF alone, and the tokenizer where the metadata has none.
fn folder(from: &Path, matrices: GgmlDType) -> Result<TempDir, String> {
    let gguf = convert(from, matrices)?;
    let dir = tempfile::tempdir().unwrap();
    gguf.write(dir.path());
    if !gguf.metadata.iter().any(|(key, _)| key == "tokenizer.ggml.model") {
        std::fs::copy(from.join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    }
    Ok(dir)
}

fn load_gguf(dir: &Path, dtype: DtypeChoice) -> Model {
    load(dir.join("model.gguf").to_str().unwrap(), dtype)
}

fn with(dir: &Path, dtype: DtypeChoice, quantize: Quantize) -> Model {
    let options = LoadOptions { dtype, quantize, threads: 2, ..LoadOptions::default() };
    Model::load(&source::resolve(dir.to_str().unwrap()).unwrap(), options).unwrap()
}

fn bits(rows: &[Vec<f32>]) -> Vec<u32> {
    rows.iter().flatten().map(|x| x.to_bits()).collect()
}

fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Every model that the format can say: the logits of its folder, and PEFT's with every adapter.
#[test]
fn oracle_f32_is_the_folder() {
    let (mut equal, mut cases) = (Vec::new(), 0);
    for dir in models() {
        let name = dir.file_name().unwrap().to_str().unwrap().to_owned();
        let gguf = match folder(&dir, GgmlDType::F32) {
            Ok(gguf) => gguf,
            Err(why) => {
                println!("{name}: skipped: {why}");
                continue;
            }
        };
        let (whole, model) =
            (load(dir.to_str().unwrap(), DtypeChoice::F32), load(gguf.path().to_str().unwrap(), DtypeChoice::F32));
        let facts = |m: &Model| {
            let i = m.info().clone();
            (i.num_parameters, i.num_layers, i.head_dim, i.vocab_size, i.family, i.max_model_len, i.dtype)
        };
        assert_eq!(facts(&whole), facts(&model), "{name}");
        let tokens: Vec<u32> = (0..40).map(|i| (i * 7 + 3) % whole.info().vocab_size as u32).collect();
        let (want, got) = (logits(&whole, None, &tokens), logits(&model, None, &tokens));
        // Llama 3's frequencies are f32 quotients in the file, f64 ones in transformers.
        if bits(&want) == bits(&got) {
            equal.push(name.clone());
        } else {
            assert!(name.contains("llama3") && worst(&want, &got) < 1e-5, "{name}: {}", worst(&want, &got));
        }
        for case in Case::all(&model, &dir).iter().filter(|case| !case.writes_classes()) {
            let prefix = case.loaded.as_ref().and_then(|l| l.prefix.as_deref());
            let (_, worst) = case.compare(|tokens| logits(&model, prefix, tokens));
            assert!(worst < LOGIT_TOLERANCE, "{}: {worst}", case.dir.display());
            cases += 1;
        }
    }
    println!("bit-equal from GGUF: {}; {cases} adapters and bases give PEFT's logits", equal.join(", "));
    for family in
        ["llama_old_keys", "llama_biases", "llama_yarn", "mistral", "qwen3", "gemma2", "gemma3_old_keys", "phi3"]
    {
        assert!(equal.iter().any(|n| n == family), "{family}");
    }
}

#[test]
fn oracle_stories260k_writes_its_text() {
    let Some(dir) = data("stories260K") else { return };
    let golden = std::fs::read_to_string(dir.join("golden_greedy.txt")).unwrap();
    let gguf = folder(&dir, GgmlDType::F32).unwrap();
    assert!(!gguf.path().join("tokenizer.json").exists());
    let model = load(gguf.path().to_str().unwrap(), DtypeChoice::F32);
    assert_eq!(model.eos_token_ids(), [2]);
    let bos = model.tokenizer().encode("", true).unwrap();
    let engine = engine(model, 1024);
    let answer = ask_all(&engine.handle(), vec![request(None, &bos, 511)]).remove(0);
    let equal = golden.chars().zip(answer.text.trim_start().chars()).take_while(|(a, b)| a == b).count();
    assert!(equal >= 564, "{equal}\n{}", answer.text);
}

/// A llama whose rows hold whole blocks of every type, with weights that bf16 and f32 both say, and its config.
fn wide() -> (serde_json::Value, HashMap<String, Tensor>) {
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "vocab_size": 48, "hidden_size": 256, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": 2
    });
    let (mut tensors, mut draws) = (HashMap::new(), Draws::new(1));
    let mut put = |name: String, shape: &[usize]| {
        let t = match shape.len() {
            1 => draws.uniform(0.5..1.5, shape),
            _ => draws.normal(0.1, shape),
        };
        let t = t.to_dtype(candle_core::DType::BF16).unwrap();
        tensors.insert(name, t.to_dtype(candle_core::DType::F32).unwrap());
    };
    put("model.embed_tokens.weight".into(), &[48, 256]);
    put("model.norm.weight".into(), &[256]);
    put("lm_head.weight".into(), &[48, 256]);
    for i in 0..2 {
        let mut at = |name: &str, shape: &[usize]| put(format!("model.layers.{i}.{name}.weight"), shape);
        for (name, rows) in [("q", 256), ("k", 64), ("v", 64), ("o", 256)] {
            at(&format!("self_attn.{name}_proj"), &[rows, 256]);
        }
        ["gate", "up", "down"].into_iter().for_each(|name| at(&format!("mlp.{name}_proj"), &[256, 256]));
        at("input_layernorm", &[256]);
        at("post_attention_layernorm", &[256]);
    }
    (config, tensors)
}

fn write_folder(dir: &Path, config: &serde_json::Value, tensors: &HashMap<String, Tensor>) {
    candle_core::safetensors::save(tensors, dir.join("model.safetensors")).unwrap();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::copy("models/demo/tokenizer.json", dir.join("tokenizer.json")).unwrap();
}

/// A file of a few kilobytes, mostly header: one layer in blocks or not, with a vocabulary of SentencePiece or of bytes.
pub fn tiny(sentencepiece: bool) -> Vec<u8> {
    use write::{Gguf, Value};
    let kind = if sentencepiece { GgmlDType::Q8_0 } else { GgmlDType::F32 };
    let width = if sentencepiece { 32 } else { 4 };
    let texts = ["<unk>", "<s>", "</s>", "a", "b", "ab", "<0x41>", "▁", "▁a", "  "].map(String::from).to_vec();
    let mut gguf = Gguf::new();
    gguf.set("general.architecture", "llama".into());
    for (key, n) in [
        ("embedding_length", width),
        ("block_count", 1),
        ("context_length", 16),
        ("feed_forward_length", width),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("rope.dimension_count", width / 2),
    ] {
        gguf.set(&format!("llama.{key}"), Value::U32(n));
    }
    gguf.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    gguf.set("llama.rope.freq_base", Value::F32(1e4));
    gguf.set("tokenizer.ggml.model", if sentencepiece { "llama" } else { "gpt2" }.into());
    gguf.set("tokenizer.ggml.pre", "llama-bpe".into());
    gguf.set("tokenizer.ggml.token_type", Value::Ints(vec![2, 3, 3, 1, 1, 1, 6, 1, 1, 4]));
    gguf.set("tokenizer.ggml.scores", Value::Floats((0..10).map(|i| -(i as f32)).collect()));
    gguf.set("tokenizer.ggml.merges", Value::Texts(vec!["a b".into(), "▁ a".into()]));
    gguf.set("tokenizer.ggml.bos_token_id", Value::U32(1));
    gguf.set("tokenizer.ggml.eos_token_id", Value::U32(2));
    gguf.set("tokenizer.ggml.tokens", Value::Texts(texts));
    gguf.set("tokenizer.chat_template", "{{ messages[0].content }}".into());
    let width = width as usize;
    let mut put = |name: &str, shape: &[usize]| {
        let t = Tensor::ones(shape, candle_core::DType::F32, &Device::Cpu).unwrap();
        gguf.tensors.push(convert::stored(name, &t, kind));
    };
    put("token_embd.weight", &[10, width]);
    ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"].iter().for_each(|n| put(&format!("{n}.weight"), &[width]));
    for (name, rows) in [("attn_q", width), ("attn_k", width / 2), ("attn_v", width / 2), ("attn_output", width)] {
        put(&format!("blk.0.{name}.weight"), &[rows, width]);
    }
    ["ffn_gate", "ffn_up", "ffn_down"].iter().for_each(|n| put(&format!("blk.0.{n}.weight"), &[width, width]));
    gguf.bytes()
}

/// Two folders: the GGUF in blocks of `kind`, and safetensors of what candle makes of those blocks.
fn blocks(kind: GgmlDType) -> (TempDir, TempDir) {
    let (config, tensors) = wide();
    let plain = tempfile::tempdir().unwrap();
    write_folder(plain.path(), &config, &tensors);
    let mut gguf = convert(plain.path(), kind).unwrap();
    // The demo's vocabulary is larger than this table: these tests give ids.
    gguf.metadata.retain(|(key, _)| !key.starts_with("tokenizer."));
    let blocks = tempfile::tempdir().unwrap();
    gguf.write(blocks.path());
    std::fs::copy("models/demo/tokenizer.json", blocks.path().join("tokenizer.json")).unwrap();
    // Rows go into blocks one by one: in another order they hold the same.
    let decoded = tensors.into_iter().map(|(name, t)| {
        let kind = if t.rank() > 1 { kind } else { GgmlDType::F32 };
        (name, QTensor::quantize(&t, kind).unwrap().dequantize(&Device::Cpu).unwrap())
    });
    write_folder(plain.path(), &config, &decoded.collect());
    (blocks, plain)
}

const KINDS: [GgmlDType; 13] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

/// Blocks become what `--dtype` says, bf16 by default, and are rounded once for int8: the same bits as a folder of the decoded
/// weights.
#[test]
fn blocks_are_decoded_then_rounded_once() {
    let tokens: Vec<u32> = (0..30).map(|i| i * 11 % 48).collect();
    for kind in KINDS {
        let (blocks, plain) = blocks(kind);
        let same = |a: Model, b: Model, what: &str| {
            assert_eq!(a.info().dtype, b.info().dtype, "{kind:?} {what}");
            assert!(bits(&logits(&a, None, &tokens)) == bits(&logits(&b, None, &tokens)), "{kind:?} {what}");
        };
        let pair = |dtype, quantize| (with(blocks.path(), dtype, quantize), with(plain.path(), dtype, quantize));
        let (a, b) = pair(DtypeChoice::F32, Quantize::None);
        same(a, b, "f32");
        let (a, b) = pair(DtypeChoice::Bf16, Quantize::None);
        same(a, b, "bf16");
        let default = with(blocks.path(), DtypeChoice::Auto, Quantize::None);
        let (own, name) = match kind {
            GgmlDType::F32 => (DtypeChoice::F32, "f32"),
            GgmlDType::F16 => (DtypeChoice::F16, "f16"),
            _ => (DtypeChoice::Bf16, "bf16"),
        };
        assert_eq!(default.info().dtype, name, "{kind:?}");
        same(default, with(plain.path(), own, Quantize::None), "by default");
        let int8 = with(blocks.path(), DtypeChoice::Auto, Quantize::Int8);
        same(int8, with(plain.path(), DtypeChoice::F32, Quantize::Int8), "int8");
    }
}

/// A file of several types, as Q4_K_M is: each tensor is what its own blocks say.
#[test]
fn types_may_be_mixed() {
    let (config, tensors) = wide();
    let plain = tempfile::tempdir().unwrap();
    write_folder(plain.path(), &config, &tensors);
    let mut gguf = convert(plain.path(), GgmlDType::Q4K).unwrap();
    gguf.metadata.retain(|(key, _)| !key.starts_with("tokenizer."));
    let mut decoded = HashMap::new();
    for (i, (name, t)) in weights(plain.path()).into_iter().enumerate() {
        let kind = if t.rank() > 1 { KINDS[i % KINDS.len()] } else { GgmlDType::F32 };
        decoded.insert(name, QTensor::quantize(&t, kind).unwrap().dequantize(&Device::Cpu).unwrap());
    }
    for (i, entry) in gguf.tensors.iter_mut().enumerate().filter(|(_, e)| e.shape.len() > 1) {
        let other = convert(plain.path(), KINDS[i % KINDS.len()]).unwrap();
        *entry = other.tensors[i].clone();
    }
    write_folder(plain.path(), &config, &decoded);
    let dir = tempfile::tempdir().unwrap();
    gguf.write(dir.path());
    std::fs::copy("models/demo/tokenizer.json", dir.path().join("tokenizer.json")).unwrap();
    let tokens: Vec<u32> = (0..30).map(|i| i * 11 % 48).collect();
    let of = |dir: &Path, dtype| bits(&logits(&with(dir, dtype, Quantize::None), None, &tokens));
    assert!(of(dir.path(), DtypeChoice::F32) == of(plain.path(), DtypeChoice::F32));
    assert!(of(dir.path(), DtypeChoice::Auto) == of(plain.path(), DtypeChoice::Bf16));
}

/// Files that gguf-py wrote (`tests/oracle/to_gguf.py`), `MODEL.TYPE.gguf`: those of the repository, and those of
/// `PREFIXD_TEST_GGUF`.
fn written() -> Vec<(PathBuf, PathBuf, String)> {
    let given = std::env::var("PREFIXD_TEST_GGUF").ok().map(PathBuf::from);
    let folders = [Some(PathBuf::from("tests/oracle/results/gguf")), given];
    let files = folders.into_iter().flatten().flat_map(|d| std::fs::read_dir(d).unwrap().map(|e| e.unwrap().path()));
    let mut bases = models();
    bases.extend(data("stories260K"));
    let case = |file: PathBuf| {
        let name = file.file_name()?.to_str()?.strip_suffix(".gguf")?.to_owned();
        let (model, kind) = name.rsplit_once('.')?;
        let base = bases.iter().find(|b| b.ends_with(model))?.clone();
        Some((file, base, kind.to_owned()))
    };
    files.filter_map(case).collect()
}

/// Another program's names, orders, blocks and vocabularies.
#[test]
fn oracle_gguf_py() {
    let mut seen = 0;
    for (file, base, kind) in written() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(&file, dir.path().join("model.gguf")).unwrap();
        let whole = load(base.to_str().unwrap(), DtypeChoice::F32);
        if !has_vocabulary(&base) {
            std::fs::copy(base.join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
        }
        let model = load_gguf(dir.path(), DtypeChoice::F32);
        let tokens: Vec<u32> = (0..40).map(|i| (i * 7 + 3) % whole.info().vocab_size as u32).collect();
        let (want, got) = (logits(&whole, None, &tokens), logits(&model, None, &tokens));
        let off = apart(&want, &got);
        println!("{}: logits off by {off:.1e} of their deviation", file.display());
        // What rounding each weight to 11, 8, about 7 and 5 bits does to these small, loud models; a row out of place does more than
        // any. The values of blocks are compared to the bit elsewhere.
        let bound = match kind.as_str() {
            "f32" => f64::MIN_POSITIVE,
            "f16" => 1e-2,
            "bf16" | "q8_0" => 0.1,
            _ => 0.6,
        };
        assert!(off < bound && (kind == "f32" || off > 0.0), "{}: {off}", file.display());
        let texts = ["Once upon a time", " two  spaces", "Zoë 東京 \u{1F600}\n\n12345"];
        for text in texts.iter().filter(|_| has_vocabulary(&base)) {
            let ids = |m: &Model| m.tokenizer().encode(text, true).unwrap();
            assert_eq!(ids(&whole), ids(&model), "{}: {text:?}", file.display());
        }
        seen += 1;
    }
    println!("{seen} files of gguf-py");
    assert!(seen >= 3, "{seen}");
}

/// The vocabularies that the format has words for.
fn has_vocabulary(base: &Path) -> bool {
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(base.join("tokenizer.json")).unwrap()).unwrap();
    json["model"]["type"] == "BPE"
}
