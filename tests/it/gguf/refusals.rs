//! What is wrong with a file is said by name, with the value and the limit; never a panic.
use super::convert::{convert, stored};
use super::write::{Entry, Gguf, Value};
use candle_core::quantized::GgmlDType;
use prefixd::error::{Error, Kind};
use prefixd::model::{LoadOptions, Model, source};
use std::path::Path;

/// A sound little file with a vocabulary of each sort.
fn sound() -> Gguf {
    let mut gguf = convert(Path::new("tests/oracle/results/peft/llama_biases"), GgmlDType::F32).unwrap();
    let mut texts: Vec<String> = (0..64).map(|i| format!("t{i}")).collect();
    texts[60..].clone_from_slice(&["a", "b", "ab", "</s>"].map(String::from));
    gguf.set("tokenizer.ggml.model", "gpt2".into());
    gguf.set("tokenizer.ggml.pre", "gpt-2".into());
    gguf.set("tokenizer.ggml.tokens", Value::Texts(texts));
    gguf.set("tokenizer.ggml.merges", Value::Texts(vec!["a b".into()]));
    gguf.set("tokenizer.ggml.eos_token_id", Value::U32(63));
    gguf
}

fn load(bytes: &[u8]) -> Result<Model, Error> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Model::load(&source::resolve(path.to_str().unwrap())?, LoadOptions { threads: 1, ..LoadOptions::default() })
}

/// The error of a file that was `change`d says all of `parts`.
fn says(kind: Kind, change: impl FnOnce(&mut Gguf), parts: &[&str]) {
    let mut gguf = sound();
    change(&mut gguf);
    check(load(&gguf.bytes()).err(), kind, parts);
}

fn check(error: Option<Error>, kind: Kind, parts: &[&str]) {
    let error = error.unwrap_or_else(|| panic!("loaded; should say {parts:?}"));
    println!("{error}");
    parts.iter().for_each(|part| assert!(error.to_string().contains(part), "{part:?} is not in: {error}"));
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains("model.gguf"), "{error}");
}

use Kind::{FailedPrecondition as Unserved, InvalidArgument as Broken};

#[test]
fn the_sound_file_is_sound() {
    load(&sound().bytes()).unwrap();
}

#[test]
fn wrong_starts_and_versions() {
    says(Broken, |g| g.magic = *b"GGML", &["\"GGML\"", "GGUF"]);
    says(Unserved, |g| g.version = 1, &["version 1", "2 and 3"]);
    says(Unserved, |g| g.version = 4, &["version 4", "2 and 3"]);
    says(Unserved, |g| g.version = 3u32.swap_bytes(), &["big-endian"]);
    says(Broken, |g| g.counts[0] = Some(u64::MAX), &["18446744073709551615 tensors", "room for"]);
    says(Broken, |g| g.counts[1] = Some(1 << 40), &["1099511627776 metadata entries", "room for"]);
    for bytes in [&b""[..], b"GGU", b"GGUF", b"GGUF\x03\0\0\0", b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0"] {
        let error = load(bytes).err().unwrap();
        assert_eq!(error.kind(), Broken, "{error}");
        assert!(error.to_string().contains("bytes"), "{error}");
    }
}

/// Wherever a file is cut, the place is told.
#[test]
fn cut_files() {
    let bytes = sound().bytes();
    let header = bytes.windows(17).position(|w| w == b"token_embd.weight").unwrap() + 64;
    let lengths = (0..header).step_by(37).chain((header..bytes.len()).step_by(4001)).chain([bytes.len() - 1]);
    let mut seen = 0;
    for length in lengths {
        let error = load(&bytes[..length]).err().unwrap_or_else(|| panic!("{length} of {} bytes load", bytes.len()));
        assert_eq!(error.kind(), Broken, "{length}: {error}");
        seen += 1;
    }
    println!("{seen} cuts");
    says(Broken, |g| g.tensors.last_mut().unwrap().bytes.truncate(8), &["takes", "bytes from offset", "the file has"]);
}

#[test]
fn tensors_out_of_place() {
    let q = "blk.1.attn_q.weight";
    says(Broken, |g| g.tensor(q).offset = Some(1 << 50), &[q, "1125899906842624", "the file has"]);
    says(Broken, |g| g.tensor(q).offset = Some(u64::MAX - 31), &[q, "the file has"]);
    says(Broken, |g| g.tensor(q).offset = Some(33), &[q, "33", "multiple of 32"]);
    says(Broken, |g| g.tensor(q).offset = Some(0), &["starts at offset 0", "inside"]);
    says(Broken, |g| g.tensor(q).shape = vec![u64::MAX, 32], &[q, "dimensions"]);
    says(Broken, |g| g.tensor(q).shape = vec![1 << 62, 4], &[q, "dimensions"]);
    says(Broken, |g| g.tensor(q).shape = vec![0, 32], &[q, "dimensions"]);
    says(Broken, |g| g.tensor(q).shape = vec![1 << 40, 32], &[q, "the file has"]);
    says(Broken, |g| g.tensor(q).shape = vec![1; 5], &[q, "5 dimensions", "1 to 4"]);
    says(Broken, |g| g.tensor(q).shape = vec![], &[q, "0 dimensions"]);
    says(Broken, |g| g.tensor(q).kind = 12, &[q, "32 elements", "Q4_K", "256"]);
    says(Broken, |g| g.tensor("blk.1.attn_k.weight").name = q.into(), &[q, "twice"]);
    says(
        Broken,
        |g| g.metadata.push(("general.architecture".into(), "llama".into())),
        &["general.architecture", "twice"],
    );
    says(Broken, |g| g.set("general.alignment", Value::U32(3)), &["general.alignment", "3", "power of two"]);
    says(Broken, |g| g.set("general.alignment", Value::U32(1 << 30)), &["general.alignment", "1048576"]);
}

#[test]
fn types_that_are_not_served() {
    let q = "blk.1.attn_q.weight";
    says(Unserved, |g| g.tensor(q).kind = 23, &[q, "IQ4_XS", "Q4_K"]);
    says(Unserved, |g| g.tensor(q).kind = 26, &[q, "I32"]);
    says(Unserved, |g| g.tensor(q).kind = 4, &[q, "type 4"]);
    says(Unserved, |g| g.tensor(q).kind = 999, &[q, "999"]);
}

#[test]
fn tensors_that_are_missing_or_of_another_shape() {
    let q = "blk.1.attn_q.weight";
    says(Unserved, |g| g.tensors.retain(|t| t.name != q), &[q, "[32, 32]"]);
    says(Unserved, |g| g.tensors.retain(|t| t.name != "token_embd.weight"), &["token_embd.weight"]);
    says(Unserved, |g| g.tensor(q).shape = vec![16, 64], &[q, "[16, 64]", "[32, 32]"]);
    says(Unserved, |g| g.tensor(q).shape = vec![1024], &[q, "[1024]"]);
    let extra = Entry::floats("blk.0.ffn_gate_exps.weight", &[4], &[0.0; 4]);
    says(Unserved, |g| g.tensors.push(extra), &["1 tensors", "blk.0.ffn_gate_exps.weight"]);
    says(Unserved, |g| g.set("llama.block_count", Value::U32(3)), &["blk.2."]);
    says(Unserved, |g| g.set("llama.block_count", Value::U32(1)), &["blk.1."]);
    // A second name of a layer is another tensor.
    says(
        Unserved,
        |g| g.tensor("blk.1.attn_norm.weight").name = "blk.01.attn_norm.weight".into(),
        &["blk.1.attn_norm"],
    );
    // A head of its own is found by its name; without one the table serves, and nothing is left over.
    says(Unserved, |g| g.tensor("output.weight").name = "head.weight".into(), &["head.weight"]);
    let mut tied = sound();
    tied.tensors.retain(|t| t.name != "output.weight");
    load(&tied.bytes()).unwrap();
}

#[test]
fn architectures_and_parts() {
    says(Unserved, |g| g.set("general.architecture", "mamba".into()), &["mamba", "llama, qwen2, qwen3, gemma"]);
    says(Broken, |g| g.remove("general.architecture"), &["general.architecture"]);
    says(Unserved, |g| g.set("general.architecture", Value::U32(7)), &["general.architecture", "7"]);
    says(Unserved, |g| g.set("split.count", Value::U32(4)), &["`split.count` 4", "part 0 of 1"]);
    says(Unserved, |g| g.set("llama.expert_count", Value::U32(8)), &["llama.expert_count", "8"]);
    says(Unserved, |g| g.set("llama.logit_scale", Value::F32(0.5)), &["llama.logit_scale", "0.5"]);
    says(Unserved, |g| g.set("llama.attention.causal", Value::Bool(false)), &["llama.attention.causal"]);
    says(
        Unserved,
        |g| g.set("llama.attention.value_length", Value::U32(4)),
        &["llama.attention.value_length", "4", "8"],
    );
}

#[test]
fn numbers_that_are_missing_or_absurd() {
    let keys = [
        ("embedding_length", "65536"),
        ("block_count", "1024"),
        ("context_length", "16777216"),
        ("feed_forward_length", "262144"),
        ("attention.head_count", "1024"),
    ];
    for (key, most) in keys {
        let key = format!("llama.{key}");
        says(Broken, |g| g.remove(&key), &[&key]);
        says(Broken, |g| g.set(&key, Value::U32(u32::MAX)), &[&key, "4294967295", most]);
        says(Broken, |g| g.set(&key, Value::U32(0)), &[&key, "is 0", most]);
        says(Broken, |g| g.set(&key, Value::F32(1.5)), &[&key, "1.5"]);
        says(Broken, |g| g.set(&key, "many".into()), &[&key, "many"]);
    }
    let eps = "llama.attention.layer_norm_rms_epsilon";
    says(Broken, |g| g.remove(eps), &[eps]);
    says(Broken, |g| g.set(eps, Value::F32(f32::NAN)), &[eps, "NaN"]);
    let kv = "llama.attention.head_count_kv";
    says(Unserved, |g| g.set(kv, Value::Ints(vec![2, 1])), &[kv, "differ"]);
    says(Broken, |g| g.set(kv, Value::U32(3)), &["num_key_value_heads", "3", "metadata"]);
    let odd = |g: &mut Gguf| {
        g.set("llama.attention.key_length", Value::U32(7));
        g.remove("llama.attention.value_length");
    };
    says(Broken, odd, &["head_dim", "7", "even"]);
    // Equal numbers, one for each layer, are one number.
    let mut same = sound();
    same.set(kv, Value::Ints(vec![2, 2]));
    load(&same.bytes()).unwrap();
}

#[test]
fn frequencies_that_are_not_served() {
    let kind = "llama.rope.scaling.type";
    says(Unserved, |g| g.set(kind, "spiral".into()), &[kind, "spiral", "yarn"]);
    says(Broken, |g| g.set(kind, Value::U32(1)), &[kind, "1"]);
    says(Broken, |g| g.set(kind, "linear".into()), &["llama.rope.scaling.factor"]);
    says(Unserved, |g| g.set(kind, "longrope".into()), &[kind, "longrope", "rope_factors_short.weight"]);
    let yarn = |key: &'static str, value: f32| {
        move |g: &mut Gguf| {
            g.set(kind, "yarn".into());
            g.set("llama.rope.scaling.factor", Value::F32(2.0));
            g.set(key, Value::F32(value));
        }
    };
    for key in ["llama.rope.scaling.attn_factor", "llama.rope.scaling.yarn_ext_factor"] {
        says(Unserved, yarn(key, 0.5), &[key, "0.5"]);
    }
    let freqs = |values: &[f32]| Entry::floats("rope_freqs.weight", &[values.len()], values);
    says(Broken, |g| g.tensors.push(freqs(&[1.0; 3])), &["short_factor", "3", "4"]);
    says(Broken, |g| g.tensors.push(freqs(&[1.0, 1.0, 1.0, f32::NAN])), &["short_factor", "3", "4"]);
    says(
        Unserved,
        |g| {
            g.tensors.push(freqs(&[1.0; 4]));
            g.set(kind, "linear".into());
        },
        &[kind, "linear", "rope_freqs.weight"],
    );
}

#[test]
fn vocabularies_that_are_not_served() {
    let (model, pre, tokens) = ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens");
    let merges = "tokenizer.ggml.merges";
    says(Broken, |g| g.remove(model), &[model]);
    says(Unserved, |g| g.set(model, "rwkv".into()), &[model, "rwkv", "gpt2"]);
    says(Broken, |g| g.remove(pre), &[pre, "tokenizer.json"]);
    says(Unserved, |g| g.set(pre, "kimi-k2".into()), &[pre, "kimi-k2", "llama-bpe", "qwen2"]);
    says(Broken, |g| g.remove(tokens), &[tokens]);
    says(Broken, |g| g.set(tokens, Value::Ints(vec![1; 64])), &[tokens, "an array of 64", "texts"]);
    says(Broken, |g| g.set(tokens, "a".into()), &[tokens, "\"a\"", "texts"]);
    says(Broken, |g| g.set(tokens, Value::Texts(vec!["x".into(); 2])), &["eos_token_id", "63", "2"]);
    let twice = |g: &mut Gguf| {
        g.remove("tokenizer.ggml.eos_token_id");
        g.set(tokens, Value::Texts(vec!["x".into(); 2]));
    };
    says(Broken, twice, &[tokens, "\"x\"", "twice", "0", "1"]);
    let many = (0..65).map(|i| format!("t{i}")).collect();
    says(Broken, |g| g.set(tokens, Value::Texts(many)), &[tokens, "65", "64"]);
    says(Broken, |g| g.remove(merges), &[merges]);
    for bad in ["ab", " ", "a", "a x", "b a", ""] {
        says(Broken, |g| g.set(merges, Value::Texts(vec!["a b".into(), bad.into()])), &[merges, "entry 1"]);
    }
    says(Broken, |g| g.set("tokenizer.ggml.token_type", Value::Ints(vec![1; 3])), &["token_type", "64"]);
    says(Broken, |g| g.set("tokenizer.ggml.bos_token_id", Value::U32(64)), &["bos_token_id", "64", "below 64"]);
    says(Broken, |g| g.set("tokenizer.ggml.add_bos_token", Value::U32(1)), &["add_bos_token"]);
    says(Unserved, |g| g.set("tokenizer.ggml.add_bos_token", Value::Bool(true)), &["bos_token_id"]);
    let pieces = |scores: Value| {
        move |g: &mut Gguf| {
            g.set(model, "llama".into());
            g.set("tokenizer.ggml.scores", scores);
        }
    };
    says(Broken, |g| g.set(model, "llama".into()), &["tokenizer.ggml.scores"]);
    says(Broken, pieces(Value::Floats(vec![0.0; 3])), &["tokenizer.ggml.scores", "64"]);
    says(Broken, pieces(Value::Texts(vec!["x".into(); 64])), &["tokenizer.ggml.scores", "64"]);
    let long = |g: &mut Gguf| {
        let mut texts: Vec<String> = (0..64).map(|i| format!("t{i}")).collect();
        texts[5] = "x".repeat(200);
        g.set(tokens, Value::Texts(texts));
        pieces(Value::Floats(vec![0.0; 64]))(g);
    };
    says(Broken, long, &["token 5", "200 letters", "128"]);
}

/// A tokenizer beside the file makes up for a vocabulary that is not served.
#[test]
fn a_tokenizer_beside_the_file_helps() {
    let dir = tempfile::tempdir().unwrap();
    let mut gguf = sound();
    gguf.set("tokenizer.ggml.pre", "kimi-k2".into());
    let path = gguf.write(dir.path());
    assert!(source::resolve(path.to_str().unwrap()).is_err());
    std::fs::copy("tests/oracle/results/peft/llama_biases/tokenizer.json", dir.path().join("tokenizer.json")).unwrap();
    Model::load(&source::resolve(path.to_str().unwrap()).unwrap(), LoadOptions::default()).unwrap();
}

/// A matrix of odd width cannot be in blocks, and the message says so before anything is read.
#[test]
fn rows_must_be_whole_blocks() {
    let t = candle_core::Tensor::zeros((4, 32), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
    let mut entry = stored("blk.1.attn_q.weight", &t, GgmlDType::Q8_0);
    entry.shape = vec![8, 16];
    says(Broken, |g| *g.tensor("blk.1.attn_q.weight") = entry, &["blk.1.attn_q.weight", "16 elements", "Q8_0", "32"]);
}
