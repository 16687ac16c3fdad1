//! Where a GGUF may lie, what may lie beside it, and that adapters serve on one.
use super::convert::convert;
use super::folder;
use super::write::{Gguf, Value as FileValue};
use crate::served::{Served, prompt};
use crate::support::{embedded, load, logits, try_load};
use allocation_counter::measure;
use candle_core::quantized::GgmlDType;
use prefixd::config::{Config, DtypeChoice, Quantize};
use prefixd::rpc::proto;
use serde_json::Value;
use std::path::Path;

const DEMO: &str = "models/demo";

/// A file, or the folder that holds it; a tokenizer beside it is read instead of the metadata's.
#[test]
fn a_file_or_its_folder() {
    let dir = folder(Path::new(DEMO), GgmlDType::BF16).unwrap();
    let file = dir.path().join("model.gguf");
    let tokens: Vec<u32> = (0..20).collect();
    let want = logits(&embedded(), None, &tokens);
    for name in [file.to_str().unwrap(), dir.path().to_str().unwrap()] {
        let model = load(name, DtypeChoice::Auto);
        assert_eq!((model.info().name.as_str(), model.info().dtype, model.info().family), (name, "bf16", "llama"));
        assert_eq!(logits(&model, None, &tokens), want);
        assert_eq!(model.eos_token_ids(), embedded().eos_token_ids());
    }
    let model = || load(file.to_str().unwrap(), DtypeChoice::Auto);
    let before = model().tokenizer().encode("Once 12", true).unwrap();
    assert_eq!(before, embedded().tokenizer().encode("Once 12", true).unwrap());
    let other = r#"{"version": "1.0", "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {"?": 0, "Once": 7}, "unk_token": "?"}}"#;
    std::fs::write(dir.path().join("tokenizer.json"), other).unwrap();
    assert_eq!(model().tokenizer().encode("Once 12", true).unwrap(), [7, 0]);
    std::fs::write(dir.path().join("chat_template.jinja"), "{{ bos_token }}hello").unwrap();
    let template = model().chat_template().clone().unwrap();
    assert_eq!(template.render(&[], true).unwrap(), "<s>hello");
}

/// A model in parts, as gguf-split leaves it: the first part has the metadata, and may have no tensor. Named by the first, or by the folder.
#[test]
fn parts_of_a_model() {
    let whole = convert(Path::new(DEMO), GgmlDType::BF16).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = |no: usize| dir.path().join(format!("m-{:05}-of-00003.gguf", no + 1));
    let all = whole.tensors.len();
    let write = |at: usize, no: u32, tensors: std::ops::Range<usize>| {
        let mut part = if no == 0 { whole.clone() } else { Gguf::new() };
        part.tensors = whole.tensors[tensors].to_vec();
        part.set("split.no", FileValue::U32(no));
        part.set("split.count", FileValue::U32(3));
        part.set("split.tensors.count", FileValue::U32(all as u32));
        std::fs::write(path(at), part.bytes()).unwrap();
    };
    let tokens: Vec<u32> = (0..20).collect();
    let want = logits(&embedded(), None, &tokens);
    for first in [0, 5] {
        write(0, 0, 0..first);
        write(1, 1, first..9);
        write(2, 2, 9..all);
        for name in [path(0).to_str().unwrap(), dir.path().to_str().unwrap()] {
            assert_eq!(logits(&load(name, DtypeChoice::Auto), None, &tokens), want);
        }
    }
    let says = |at: usize| try_load(path(at).to_str().unwrap(), DtypeChoice::Auto).err().unwrap().to_string();
    let second = says(1);
    assert!(second.contains("`split.no` is 1") && second.contains("the first one is named"), "{second}");
    write(2, 1, 9..all);
    assert!(says(0).contains("part 2 of 3"), "{}", says(0));
    write(2, 2, 10..all);
    assert!(says(0).contains(&format!("`split.tensors.count` is {all}, the 3 parts have {}", all - 1)), "{}", says(0));
    write(2, 2, 8..all);
    assert!(says(0).contains("which another part has too"), "{}", says(0));
    std::fs::remove_file(path(2)).unwrap();
    assert!(says(0).contains("m-00003-of-00003.gguf"), "{}", says(0));
}

/// The shipped adapters answer on a GGUF of their base as on the base.
#[tokio::test(flavor = "multi_thread")]
async fn adapters_serve_on_it() {
    let dir = folder(Path::new(DEMO), GgmlDType::BF16).unwrap();
    let model = dir.path().join("model.gguf").to_str().unwrap().to_owned();
    let (plain, gguf) = (
        Served::with(Config::default()).await,
        Served::with(Config { model: model.clone(), ..Config::default() }).await,
    );
    let info = gguf.server().await.get_server_info(proto::GetServerInfoRequest {}).await.unwrap().into_inner();
    let info = info.model.unwrap();
    assert_eq!((info.name, info.dtype, info.family), (model, "bf16".into(), "llama".into()));
    let (mut a, mut b) = (plain.inference().await, gguf.inference().await);
    for id in ["sentiment", "slots", "answer", "topic", ""] {
        let examples = std::fs::read_to_string("adapters/sentiment/examples.jsonl").unwrap();
        for line in examples.lines().take(3) {
            let input = serde_json::from_str::<Value>(line).unwrap()["input"].as_str().unwrap().to_owned();
            let text = |r: tonic::Response<proto::GenerateResponse>| r.into_inner().choices[0].text.clone();
            let want = text(a.generate(prompt(id, &input)).await.unwrap());
            assert_eq!(text(b.generate(prompt(id, &input)).await.unwrap()), want, "{id}");
        }
    }
}

/// And on one in blocks of 8 bits, whether decoded to bf16 or rounded to int8: of their 20 examples, at least 18.
#[tokio::test(flavor = "multi_thread")]
async fn adapters_do_their_tasks_on_blocks() {
    let dir = folder(Path::new(DEMO), GgmlDType::Q8_0).unwrap();
    let model = dir.path().to_str().unwrap().to_owned();
    for quantize in [Quantize::None, Quantize::Int8] {
        let served = Served::with(Config { model: model.clone(), quantize, ..Config::default() }).await;
        let mut client = served.inference().await;
        for id in ["sentiment", "slots"] {
            let examples = std::fs::read_to_string(format!("adapters/{id}/examples.jsonl")).unwrap();
            let mut right = 0;
            for line in examples.lines() {
                let example: Value = serde_json::from_str(line).unwrap();
                let answer =
                    client.generate(prompt(id, example["input"].as_str().unwrap())).await.unwrap().into_inner();
                right += usize::from(answer.choices[0].text.trim() == example["target"].as_str().unwrap().trim());
            }
            println!("{quantize:?} {id}: {right} of 20");
            assert!(right >= 18, "{id}: {right}");
        }
    }
}

/// While it loads: the weights, and one layer's tensors on their way. Not the file, not all of it in f32.
#[test]
fn tensors_are_decoded_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = convert(Path::new(DEMO), GgmlDType::Q8_0).unwrap().write(dir.path());
    let weights = 2 * embedded().info().num_parameters;
    let whole = measure(|| drop(embedded())).bytes_max;
    let blocks = measure(|| drop(load(path.to_str().unwrap(), DtypeChoice::Auto))).bytes_max;
    println!("weights {weights} bytes; at most {whole} at once from bf16, {blocks} from blocks");
    // The metadata's vocabulary becomes a text and is parsed from there.
    assert!(blocks < whole + (4 << 20) && blocks < 2 * weights, "{blocks} {whole}");
}
