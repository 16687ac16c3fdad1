//! A tokenizer out of the metadata is the `tokenizer.json` that the metadata came from.
use super::convert::vocabulary;
use super::write::{Entry, Gguf, Value};
use crate::support::data;
use prefixd::tokenizer::Tokenizer;
use serde_json::{Value as Json, json};
use std::path::Path;

const ODD: [&str; 14] = [
    "",
    " ",
    "   three spaces,\ttabs\t\tand\n\nlines\r\n \n  ",
    "I'll say we've it's DON'T",
    "1 22 333 4444 55555 3.14159e-10 ٣٤٥ ⅷ ²",
    "naïve Zoë e\u{301}\u{323} \u{1E69} ﬁ ǅ",
    "日本語と한국어 ไทย हिन्दी עברית عربى",
    "\u{1F600}\u{1F468}\u{200D}\u{1F469}\u{200D}\u{1F467} \u{FFFD} \u{0} \u{7f} \u{FEFF}",
    "<s> </s> <unk> <pad> <0x41> ▁ Ġ",
    "fn main() { println!(\"{:?}\", x+=1); } // $a<=b^~|`",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "…— «quoted» “so” ‘it’s’ 5 °C 10€",
    "UPPERlowerUPPER snake_case-kebab/path\\back",
    "\u{1d538}\u{10ffff}\u{e000}",
];

/// A base that has only what a vocabulary needs.
fn file(vocab: usize) -> Gguf {
    let mut gguf = Gguf::new();
    gguf.set("general.architecture", "llama".into());
    for (key, n) in [
        ("embedding_length", 2),
        ("block_count", 1),
        ("context_length", 8),
        ("feed_forward_length", 2),
        ("attention.head_count", 1),
    ] {
        gguf.set(&format!("llama.{key}"), Value::U32(n));
    }
    gguf.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    gguf.tensors.push(Entry::floats("token_embd.weight", &[vocab, 2], &vec![0.0; 2 * vocab]));
    gguf
}

fn read(gguf: &Gguf) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    let files = prefixd::model::source::resolve(gguf.write(dir.path()).to_str().unwrap()).unwrap();
    Tokenizer::from_bytes(&files.tokenizer).unwrap()
}

/// The tokenizer of a folder, and the one of the metadata that stands for it.
fn both(dir: &Path) -> [Tokenizer; 2] {
    let bytes = std::fs::read(dir.join("tokenizer.json")).unwrap();
    let json: Json = serde_json::from_slice(&bytes).unwrap();
    let config: Json = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    let mut gguf = file(json["model"]["vocab"].as_object().unwrap().len());
    vocabulary(&mut gguf, &json, &config);
    [Tokenizer::from_bytes(&bytes).unwrap(), read(&gguf)]
}

/// Ids and back, with and without special tokens; how many tokens.
fn same([want, got]: &[Tokenizer; 2], text: &str) -> usize {
    let mut count = 0;
    for special in [true, false] {
        let (ids, other) = (want.encode(text, special).unwrap(), got.encode(text, special).unwrap());
        assert_eq!(ids, other, "{text:?}");
        assert_eq!(want.decode(&ids).unwrap(), got.decode(&ids).unwrap(), "{text:?}");
        ids.iter().take(50).for_each(|id| assert_eq!(want.token_text(*id), got.token_text(*id), "{id}"));
        count += ids.len();
    }
    count
}

#[test]
fn the_metadata_gives_the_same_tokens() {
    let shared = ["stories260K", "peft/llama_gqa", "peft/qwen2_tied", "peft/gpt2"];
    let dirs = shared.into_iter().filter_map(data).chain([Path::new("models/demo").to_owned()]);
    let books = data("corpora/gutenberg");
    for dir in dirs {
        let pair = both(&dir);
        let mut count: usize = ODD.iter().map(|text| same(&pair, text)).sum();
        for book in books.iter().flat_map(|b| std::fs::read_dir(b).unwrap().map(|e| e.unwrap().path())) {
            let bytes = std::fs::read(book).unwrap();
            let text = String::from_utf8_lossy(&bytes[..bytes.len().min(60_000)]).into_owned();
            // As one text, and in lines: SentencePiece puts a space before each.
            count += same(&pair, &text[..text.floor_char_boundary(20_000)]);
            count += text.lines().take(500).map(|line| same(&pair, line)).sum::<usize>();
        }
        println!("{}: {count} tokens alike", dir.display());
    }
}

/// Bytes as a byte-level BPE writes them.
fn letters() -> Vec<String> {
    let plain = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut shifted = 0x100;
    (0..0x100)
        .map(|b| {
            if plain(b) {
                return char::from_u32(b).unwrap().to_string();
            }
            shifted += 1;
            char::from_u32(shifted - 1).unwrap().to_string()
        })
        .collect()
}

/// A byte-level vocabulary that merges all neighbours in `text`, so that tokens are whole words of the cut.
fn merging(pre: &str, text: &str) -> Tokenizer {
    let mut texts = letters();
    let byte = |b: u8| letters()[b as usize].clone();
    let mut merges = Vec::new();
    // Every stretch of the text up to 12 bytes is a token, made from the left.
    let bytes: Vec<String> = text.bytes().map(byte).collect();
    for start in 0..bytes.len() {
        for len in 2..=12.min(bytes.len() - start) {
            let whole = bytes[start..start + len].concat();
            if !texts.contains(&whole) {
                texts.push(whole);
                merges.push(format!("{} {}", bytes[start..start + len - 1].concat(), bytes[start + len - 1]));
            }
        }
    }
    let mut gguf = file(texts.len());
    gguf.set("tokenizer.ggml.model", "gpt2".into());
    gguf.set("tokenizer.ggml.pre", pre.into());
    gguf.set("tokenizer.ggml.tokens", Value::Texts(texts));
    gguf.set("tokenizer.ggml.merges", Value::Texts(merges));
    gguf.set("tokenizer.ggml.add_bos_token", Value::Bool(false));
    read(&gguf)
}

/// What each name of a cut does to one text, as the regular expressions of those models say.
#[test]
fn cuts_into_words_are_those_of_their_names() {
    let text = "I'LL  go 12345!!\n\nOkNow";
    let cut = |pre| -> Vec<String> {
        let tokenizer = merging(pre, text);
        tokenizer.encode(text, false).unwrap().iter().map(|id| tokenizer.token_text(*id)).collect()
    };
    assert_eq!(cut("gpt-2"), ["I", "'", "LL", " ", " go", " 12345", "!!", "\n", "\n", "OkNow"]);
    assert_eq!(cut("smollm"), ["I", "'", "LL", " ", " go", " ", "1", "2", "3", "4", "5", "!!", "\n", "\n", "OkNow"]);
    assert_eq!(cut("llama-bpe"), ["I", "'LL", " ", " go", " ", "123", "45", "!!\n\n", "OkNow"]);
    assert_eq!(cut("qwen2"), ["I", "'LL", " ", " go", " ", "1", "2", "3", "4", "5", "!!\n\n", "OkNow"]);
    assert_eq!(cut("tekken"), ["I", "'LL", " ", " go", " ", "1", "2", "3", "4", "5", "!!\n\n", "Ok", "Now"]);
    assert_eq!(cut("gpt-4o"), ["I'LL", " ", " go", " ", "123", "45", "!!\n\n", "Ok", "Now"]);
    assert_eq!(cut("default"), ["I", "'", "LL", " ", " go", " ", "123", "45", "!!", "\n", "\n", "OkNow"]);
    // Qwen's text is composed first.
    let back = |pre| {
        let tokenizer = merging(pre, "e\u{301}");
        tokenizer.decode(&tokenizer.encode("e\u{301}", false).unwrap()).unwrap()
    };
    assert_eq!((back("qwen2").as_str(), back("llama-bpe").as_str()), ("é", "e\u{301}"));
}

/// A vocabulary of SentencePiece: the neighbours with the highest score are joined, wherever they stand; bytes stand in for what
/// no token covers; text that is one token stays one.
#[test]
fn sentencepiece_joins_by_score() {
    let mut texts: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    let mut kinds = vec![2, 3, 3];
    let mut scores = vec![0.0f32; 3];
    for b in 0..256 {
        texts.push(format!("<0x{b:02X}>"));
        kinds.push(6);
        scores.push(0.0);
    }
    for (text, score) in
        [("▁", -9.0), ("a", -9.0), ("b", -9.0), ("c", -9.0), ("ab", -2.0), ("bc", -1.0), ("▁a", -3.0), ("abc", -4.0)]
    {
        texts.push(text.into());
        kinds.push(1);
        scores.push(score);
    }
    texts.extend(["  ".into(), "<end_of_turn>".into()]);
    kinds.extend([4, 3]);
    scores.extend([0.0, 0.0]);
    let mut gguf = file(texts.len());
    gguf.set("tokenizer.ggml.model", "llama".into());
    gguf.set("tokenizer.ggml.tokens", Value::Texts(texts.clone()));
    gguf.set("tokenizer.ggml.token_type", Value::Ints(kinds));
    gguf.set("tokenizer.ggml.scores", Value::Floats(scores));
    let cut = |gguf: &Gguf, text: &str| -> Vec<String> {
        let tokenizer = read(gguf);
        let ids = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokenizer.decode(&ids).unwrap().trim_start(), text.replace("<end_of_turn>", "").trim_start());
        ids.iter().map(|id| texts[*id as usize].clone()).collect()
    };
    assert_eq!(cut(&gguf, "abc"), ["<s>", "▁a", "bc"]);
    assert_eq!(cut(&gguf, "é"), ["<s>", "▁", "<0xC3>", "<0xA9>"]);
    assert_eq!(cut(&gguf, "c<end_of_turn>"), ["<s>", "▁", "c", "<end_of_turn>"]);
    gguf.set("tokenizer.ggml.add_space_prefix", Value::Bool(false));
    gguf.set("tokenizer.ggml.add_eos_token", Value::Bool(true));
    assert_eq!(cut(&gguf, "abc"), ["<s>", "abc", "</s>"]);
    assert_eq!(cut(&gguf, "a  b"), ["<s>", "a", "  ", "b", "</s>"]);
}

/// Texts end at what the metadata names and at the usual names of turns' ends; the chat template knows the tokens.
#[test]
fn ends_and_templates_come_from_the_metadata() {
    let texts = ["<unk>", "<s>", "</s>", "a", "<|eot_id|>", "<|im_end|>", "<|end|>"].map(String::from).to_vec();
    let mut gguf = file(texts.len());
    gguf.set("tokenizer.ggml.model", "llama".into());
    gguf.set("tokenizer.ggml.tokens", Value::Texts(texts));
    gguf.set("tokenizer.ggml.token_type", Value::Ints(vec![2, 3, 3, 1, 3, 1, 4]));
    gguf.set("tokenizer.ggml.scores", Value::Floats(vec![0.0; 7]));
    gguf.set("tokenizer.ggml.eot_token_id", Value::U32(3));
    gguf.set("tokenizer.chat_template", "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}".into());
    let dir = tempfile::tempdir().unwrap();
    let files = prefixd::model::source::resolve(gguf.write(dir.path()).to_str().unwrap()).unwrap();
    let ends: Json = serde_json::from_slice(files.generation_config.as_deref().unwrap()).unwrap();
    // `<|im_end|>` is plain text there.
    assert_eq!(ends, json!({ "eos_token_id": [2, 3, 4, 6] }));
    let config: Json = serde_json::from_slice(files.tokenizer_config.as_deref().unwrap()).unwrap();
    assert_eq!((&config["bos_token"], &config["eos_token"]), (&json!("<s>"), &json!("</s>")));
    assert!(config["chat_template"].as_str().unwrap().starts_with("{{ bos_token }}"));
}
