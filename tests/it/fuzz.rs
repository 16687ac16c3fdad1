//! What comes from a file may be anything: never a panic, never much more memory than the file.
//!
//! Each target takes a sound file and harms it: bits, lengths, numbers, cuts, repeats. `cargo test` runs each for about half
//! a second; `PREFIXD_FUZZ_SECONDS` says how long instead. The bound: [`FACTOR`] bytes for each byte of the file, and
//! [`SLACK`] besides.
use allocation_counter::measure;
use bolero::{TypeGenerator, check};
use prefixd::adapter::{TaskCard, load_folder};
use prefixd::config::DtypeChoice;
use prefixd::model::Model;
use prefixd::model::config::ModelConfig;
use prefixd::tokenizer::Tokenizer;
use prefixd::tokenizer::chat::{ChatMessage, ChatTemplate, SpecialTokens};
use std::path::Path;
use std::sync::LazyLock;
use std::time::Duration;

/// Parsed JSON takes 72 bytes for a value that may be two characters long, parsed TOML 102 for a bracket.
const FACTOR: u64 = 128;
/// Errors, path names, the libraries' own tables.
const SLACK: u64 = 4 << 20;

/// A way to harm a file; `at` is a share of its length.
#[derive(Clone, Debug, TypeGenerator)]
enum Harm {
    Flip {
        at: u16,
        bit: u8,
    },
    Set {
        at: u16,
        byte: u8,
    },
    Cut {
        at: u16,
    },
    Remove {
        at: u16,
        len: u8,
    },
    Repeat {
        at: u16,
        len: u8,
        times: u8,
    },
    /// The digits from there on become another number.
    Number {
        at: u16,
        which: u8,
    },
    /// A little-endian length, as at the start of a safetensors file.
    Length {
        at: u16,
        value: u64,
    },
    /// Brackets inside brackets.
    Nest {
        at: u16,
        depth: u16,
    },
}

const NUMBERS: [&str; 11] = [
    "0",
    "-1",
    "1",
    "65536",
    "16777216",
    "4294967296",
    "18446744073709551615",
    "1e308",
    "-0.0",
    "null",
    "99999999999999999999",
];

fn harmed(sound: &[u8], harms: &[Harm]) -> Vec<u8> {
    let mut bytes = sound.to_vec();
    for harm in harms {
        let place = |at: u16, bytes: &[u8]| at as usize * bytes.len() / 65536;
        if bytes.is_empty() {
            break;
        }
        match *harm {
            Harm::Flip { at, bit } => {
                let at = place(at, &bytes);
                bytes[at] ^= 1 << (bit % 8);
            }
            Harm::Set { at, byte } => {
                let at = place(at, &bytes);
                bytes[at] = byte;
            }
            Harm::Cut { at } => bytes.truncate(place(at, &bytes)),
            Harm::Remove { at, len } => {
                let at = place(at, &bytes);
                bytes.drain(at..(at + len as usize).min(bytes.len()));
            }
            Harm::Repeat { at, len, times } => {
                let at = place(at, &bytes);
                let part = bytes[at..(at + len as usize).min(bytes.len())].repeat(times as usize % 16);
                bytes.splice(at..at, part);
            }
            Harm::Number { at, which } => {
                let from = place(at, &bytes);
                let Some(start) = bytes[from..].iter().position(u8::is_ascii_digit).map(|i| from + i) else { continue };
                let end = bytes[start..].iter().position(|b| !b.is_ascii_digit()).map_or(bytes.len(), |i| start + i);
                bytes.splice(start..end, NUMBERS[which as usize % NUMBERS.len()].bytes());
            }
            Harm::Length { at, value } => {
                let at = place(at, &bytes).min(bytes.len().saturating_sub(8));
                let end = bytes.len().min(at + 8);
                bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
            }
            Harm::Nest { at, depth } => {
                let at = place(at, &bytes);
                bytes.splice(at..at, std::iter::repeat_n(b'[', depth as usize));
            }
        }
    }
    bytes
}

/// Runs `load` on harmed copies of `sound`; `load` gets the bytes and says how many bytes of files it read.
fn fuzz(name: &'static str, sound: &[u8], load: impl Fn(&[u8]) -> usize + std::panic::RefUnwindSafe) {
    let seconds = std::env::var("PREFIXD_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(0.5);
    let runs = std::sync::atomic::AtomicU64::new(0);
    check!().with_test_time(Duration::from_secs_f64(seconds)).with_type::<Vec<Harm>>().for_each(|harms| {
        let bytes = harmed(sound, harms);
        let mut read = 0;
        let peak = measure(|| read = load(&bytes)).bytes_max;
        let most = FACTOR * read as u64 + SLACK;
        assert!(peak <= most, "{name}: {peak} bytes for {read} of files, at most {most}: {harms:?}");
        runs.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    });
    println!("{name}: {} runs", runs.into_inner());
}

/// A tiny model of our own results, and an adapter of it.
fn sound(file: &str) -> Vec<u8> {
    std::fs::read(Path::new("tests/oracle/results/peft/llama_biases").join(file)).unwrap()
}

#[test]
fn config_json() {
    for model in ["gemma3_text", "phi3_longrope", "gpt2_by_layer", "roberta_seqcls", "llama_old_keys"] {
        let path = format!("tests/oracle/results/peft/{model}/config.json");
        fuzz("config.json", &std::fs::read(path).unwrap(), |bytes| {
            let _ = ModelConfig::parse(bytes);
            bytes.len()
        });
    }
}

#[test]
fn tokenizer_json() {
    let small = sound("tokenizer.json");
    let bpe = br###"{"version":"1.0","added_tokens":[{"id":0,"content":"<s>","single_word":false,"lstrip":false,"rstrip":false,
        "normalized":false,"special":true}],"normalizer":{"type":"Replace","pattern":{"Regex":"a+"},"content":"a"},
        "pre_tokenizer":{"type":"ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true},
        "post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<s>","type_id":0}},
        {"Sequence":{"id":"A","type_id":0}}],"pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],
        "special_tokens":{"<s>":{"id":"<s>","ids":[0],"tokens":["<s>"]}}},"decoder":{"type":"ByteLevel"},
        "model":{"type":"BPE","vocab":{"<s>":0,"a":1,"b":2,"ab":3},"merges":[["a","b"]]}}"###;
    for sound in [&small[..], bpe] {
        fuzz("tokenizer.json", sound, |bytes| {
            if let Ok(tokenizer) = Tokenizer::from_bytes(bytes) {
                let ids = tokenizer.encode("ab w3 \u{1F600} <s>", true).unwrap_or_default();
                let _ = tokenizer.decode(&ids);
            }
            bytes.len()
        });
    }
}

#[test]
fn task_card() {
    let card = std::fs::read("adapters/topic/task.toml").unwrap();
    fuzz("task.toml", &card, |bytes| {
        let text = String::from_utf8_lossy(bytes);
        if let Ok(card) = TaskCard::parse(&text) {
            let _ = card.render("an input");
        }
        text.len()
    });
}

#[test]
fn chat_template() {
    let cases: serde_json::Value = serde_json::from_str(include_str!("chat.json")).unwrap();
    let message = |role: &str, content: &str| ChatMessage { role: role.into(), content: content.into() };
    let messages = [message("system", "be brief"), message("user", "hi \u{1F600}\n"), message("assistant", "")];
    for (name, template) in cases["templates"].as_object().unwrap() {
        let template = template.as_str().unwrap();
        fuzz("chat template", template.as_bytes(), |bytes| {
            let text = String::from_utf8_lossy(bytes);
            if let Ok(template) = ChatTemplate::new(&text, SpecialTokens::default()) {
                let _ = template.render(&messages, true);
            }
            text.len()
        });
        println!("{name}");
    }
}

/// One file of the adapter is harmed, the other is sound.
fn adapter(harmed: &'static str) {
    static MODEL: LazyLock<Model> =
        LazyLock::new(|| crate::support::load("tests/oracle/results/peft/llama_biases", DtypeChoice::Auto));
    let (shape, tokenizer) = (MODEL.shape(), MODEL.tokenizer().clone());
    let dir = tempfile::tempdir().unwrap();
    let files = ["adapter_config.json", "adapter_model.safetensors"];
    files.iter().for_each(|f| std::fs::write(dir.path().join(f), sound(&format!("prefix/{f}"))).unwrap());
    let size = |f: &str| std::fs::metadata(dir.path().join(f)).unwrap().len() as usize;
    let load = std::panic::AssertUnwindSafe(|bytes: &[u8]| {
        std::fs::write(dir.path().join(harmed), bytes).unwrap();
        let _ = load_folder(dir.path(), &shape, &tokenizer);
        files.iter().map(|f| size(f)).sum()
    });
    fuzz(harmed, &sound(&format!("prefix/{harmed}")), |bytes| load(bytes));
}

#[test]
fn adapter_config() {
    adapter("adapter_config.json");
}

#[test]
fn adapter_weights() {
    adapter("adapter_model.safetensors");
}

/// A whole model: header and weights harmed, or its config while the weights are sound.
fn model(harmed: &'static str) {
    let dir = tempfile::tempdir().unwrap();
    let files = ["config.json", "model.safetensors", "tokenizer.json"];
    files.iter().for_each(|f| std::fs::write(dir.path().join(f), sound(f)).unwrap());
    let size = |f: &str| std::fs::metadata(dir.path().join(f)).unwrap().len() as usize;
    let load = std::panic::AssertUnwindSafe(|bytes: &[u8]| {
        std::fs::write(dir.path().join(harmed), bytes).unwrap();
        let _ = crate::support::try_load(dir.path().to_str().unwrap(), DtypeChoice::Auto);
        files.iter().map(|f| size(f)).sum()
    });
    fuzz(harmed, &sound(harmed), |bytes| load(bytes));
}

#[test]
fn model_weights() {
    model("model.safetensors");
}

/// A base in one file: header, vocabulary and blocks.
#[test]
fn gguf() {
    for sentencepiece in [false, true] {
        let sound = crate::gguf::tiny(sentencepiece);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.gguf");
        std::fs::write(&path, &sound).unwrap();
        crate::support::load(path.to_str().unwrap(), DtypeChoice::Auto);
        let load = std::panic::AssertUnwindSafe(|bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            if let Ok(model) = crate::support::try_load(path.to_str().unwrap(), DtypeChoice::Auto) {
                let ids = model.tokenizer().encode("ab w3 \u{1F600} <s>", true).unwrap_or_default();
                let _ = model.tokenizer().decode(&ids);
            }
            bytes.len()
        });
        fuzz("model.gguf", &sound, |bytes| load(bytes));
    }
}

/// A context of 16 million tokens costs nothing until somebody uses it.
#[test]
fn claimed_positions_take_no_memory() {
    let dir = tempfile::tempdir().unwrap();
    ["model.safetensors", "tokenizer.json"].iter().for_each(|f| std::fs::write(dir.path().join(f), sound(f)).unwrap());
    let mut config: serde_json::Value = serde_json::from_slice(&sound("config.json")).unwrap();
    config["max_position_embeddings"] = (1 << 24).into();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let mut loaded = false;
    let load = || loaded = crate::support::try_load(dir.path().to_str().unwrap(), DtypeChoice::Auto).is_ok();
    let peak = measure(load).bytes_max;
    assert!(loaded && peak < SLACK, "{peak}");
}

#[test]
fn model_config() {
    model("config.json");
}
