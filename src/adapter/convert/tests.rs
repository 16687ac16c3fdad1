#![allow(clippy::unwrap_used)]
use super::*;
use crate::adapter::peft::{CONFIG_FILE, WEIGHTS_FILE};
use safetensors::Dtype;
use serde_json::Value;
use std::io::Write;
use zip::write::SimpleFileOptions;

/// A tensor of a pickle: name, torch's storage class, offset, size, stride.
type Pickled<'a> = (&'a str, &'a str, u8, &'a [u8], &'a [u8]);

fn unicode(text: &str) -> Vec<u8> {
    [b"X".as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
}

fn tuple(numbers: &[u8]) -> Vec<u8> {
    let items: Vec<u8> = numbers.iter().flat_map(|&n| [b'K', n]).collect();
    [b"(".as_slice(), &items, b"t"].concat()
}

/// As torch pickles it: `_rebuild_tensor_v2(storage 0, offset, size, stride, False, OrderedDict())`.
fn pickled((_, storage, offset, size, stride): Pickled<'_>) -> Vec<u8> {
    let class = format!("ctorch\n{storage}\n");
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n((".as_slice(),
        &unicode("storage"),
        class.as_bytes(),
        &unicode("0"),
        &unicode("cpu"),
        b"K\x10tQ",
        &[b'K', offset],
        &tuple(size),
        &tuple(stride),
        b"\x89ccollections\nOrderedDict\n)RtR",
    ]
    .concat()
}

fn dict(tensors: &[Pickled<'_>]) -> Vec<u8> {
    let items: Vec<u8> = tensors.iter().flat_map(|t| [unicode(t.0), pickled(*t)].concat()).collect();
    [b"\x80\x02}(".as_slice(), &items, b"u."].concat()
}

/// The archive that torch.save would write; its one storage has the floats 0 to 15.
fn torch_file(path: &Path, pickle: &[u8]) {
    let mut zip = zip::ZipWriter::new(fs::File::create(path).unwrap());
    let floats: Vec<u8> = (0..16).flat_map(|i| (i as f32).to_le_bytes()).collect();
    for (name, bytes) in [("x/data.pkl", pickle), ("x/byteorder", b"little"), ("x/data/0", &floats)] {
        let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
        zip.start_file(name, stored).unwrap();
        zip.write_all(bytes).unwrap();
    }
    zip.finish().unwrap();
}

fn safetensors_file(path: &Path, tensors: &[(&str, &[usize], &[f32])]) {
    let tensors: Vec<_> = tensors.iter().map(|(name, dims, v)| (*name, SavedTensor::f32(dims.to_vec(), v))).collect();
    let views = tensors.iter().map(|(name, t)| {
        let view = safetensors::tensor::TensorView::new(t.dtype, t.shape.clone(), &t.bytes);
        (*name, view.unwrap())
    });
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn shape() -> KvShape {
    KvShape { name: Some("tiny".into()), num_layers: 1, num_kv_heads: 2, head_dim: 2 }
}

fn floats(tensor: &SavedTensor) -> Vec<f32> {
    tensor.bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

fn says(result: Result<SavedAdapter>, kind: Kind, parts: &[&str]) {
    let e = result.unwrap_err();
    assert_eq!(e.kind(), kind, "{e}");
    for part in parts {
        assert!(e.to_string().contains(part), "{part:?} is not in: {e}");
    }
}

const BROKEN: Kind = Kind::InvalidArgument;

#[test]
fn a_bare_tensor_becomes_prompt_tuning() {
    let dir = tempfile::tempdir().unwrap();
    let (src, dst) = (dir.path().join("tgis"), dir.path().join("out/adapter"));
    fs::create_dir(&src).unwrap();
    let bare = [b"\x80\x02".as_slice(), &pickled(("", "FloatStorage", 1, &[2, 3], &[3, 1])), b"."].concat();
    torch_file(&src.join("decoder.pt"), &bare);
    let adapter = convert(&src, &dst, None).unwrap();
    let prompt = &adapter.tensors["prompt_embeddings"];
    assert_eq!((prompt.shape.as_slice(), floats(prompt)), (&[2, 3][..], (1..7).map(|i| i as f32).collect()));
    let config: Value = serde_json::from_slice(&fs::read(dst.join(CONFIG_FILE)).unwrap()).unwrap();
    assert_eq!((&config["peft_type"], &config["num_virtual_tokens"]), (&"PROMPT_TUNING".into(), &2.into()));
    assert!(dst.join(WEIGHTS_FILE).is_file());
    assert_eq!(fs::read_dir(dir.path().join("out")).unwrap().count(), 1, "nothing is left beside it");
    says(convert(&src, &dst, None), Kind::AlreadyExists, &["is there already"]);
    fs::write(src.join("encoder.pt"), "x").unwrap();
    says(convert(&src, &dir.path().join("n"), None), Kind::FailedPrecondition, &["encoder.pt", "encoder-decoder"]);
}

#[test]
fn a_prefix_encoder_becomes_prefix_tuning() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pytorch_model.bin");
    let key = "transformer.prefix_encoder.embedding.weight";
    torch_file(&file, &dict(&[(key, "FloatStorage", 0, &[2, 8], &[8, 1])]));
    let adapter = read(&file, Some(&shape())).unwrap();
    assert_eq!(floats(&adapter.tensors["prompt_embeddings"]), (0..16).map(|i| i as f32).collect::<Vec<_>>());
    let config = &adapter.config;
    let facts = ["num_layers", "num_attention_heads", "token_dim", "num_virtual_tokens"].map(|k| config[k].as_u64());
    assert_eq!(facts, [1, 2, 4, 2].map(Some));
    says(read(&file, None), BROKEN, &[key, "--layers, --kv-heads and --head-dim, or --model"]);
    let other = KvShape { head_dim: 4, ..shape() };
    says(read(&file, Some(&other)), BROKEN, &["gives [2, 8], needs [n, 16, which is 2 * 1 layers * 2 KV heads * 4"]);
}

#[test]
fn a_projection_is_applied_and_a_head_goes_along() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.safetensors");
    let key = |name: &str| format!("prefix_encoder.{name}");
    let names = ["embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"].map(key);
    let w2: Vec<f32> = (0..8).map(|i| i as f32).collect();
    let mut tensors: Vec<(&str, &[usize], &[f32])> = vec![
        (&names[0], &[1, 2], &[1.0, 2.0]),
        (&names[1], &[1, 2], &[0.25, 0.5]),
        (&names[2], &[1], &[-0.5]),
        (&names[3], &[8, 1], &w2),
        (&names[4], &[8], &[1.0; 8]),
        ("classifier.weight", &[1, 2], &[3.0, 4.0]),
    ];
    safetensors_file(&file, &tensors);
    let adapter = read(&file, Some(&shape())).unwrap();
    for (i, value) in floats(&adapter.tensors["prompt_embeddings"]).into_iter().enumerate() {
        assert!((value - (1.0 + i as f32 * 0.75f32.tanh())).abs() < 1e-6, "{i}: {value}");
    }
    assert_eq!(floats(&adapter.tensors["base_model.classifier.weight"]), [3.0, 4.0]);
    assert_eq!(adapter.config["task_type"], "SEQ_CLS");

    tensors.push(("bert.embeddings.word_embeddings.weight", &[1], &[1.0]));
    safetensors_file(&file, &tensors);
    says(read(&file, Some(&shape())), BROKEN, &["1 tensors have no place", "bert.embeddings.word_embeddings.weight"]);
    tensors.pop();
    tensors.remove(2);
    safetensors_file(&file, &tensors);
    says(read(&file, Some(&shape())), BROKEN, &["`prefix_encoder.trans.0.bias` is missing"]);
}

#[test]
fn a_peft_folder_keeps_its_config_and_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let (src, dst) = (dir.path().join("old"), dir.path().join("new"));
    fs::create_dir(&src).unwrap();
    let config = r#"{"peft_type": "P_TUNING", "num_virtual_tokens": 2, "mine": [1], "inference_mode": false}"#;
    fs::write(src.join(CONFIG_FILE), config).unwrap();
    fs::write(src.join("task.toml"), "description = 'x'").unwrap();
    says(read(&src, None), BROKEN, &["neither adapter_model.safetensors nor adapter_model.bin"]);
    let tensors = [
        ("prompt_embeddings", "FloatStorage", 4, [2, 3].as_slice(), [3, 1].as_slice()),
        ("base_model.score.weight", "FloatStorage", 0, &[1, 3], &[99, 1]),
    ];
    torch_file(&src.join(PICKLED_WEIGHTS), &dict(&tensors));
    convert(&src, &dst, None).unwrap();
    assert_eq!(fs::read_to_string(dst.join("task.toml")).unwrap(), "description = 'x'");
    let again = read(&dst, None).unwrap();
    assert_eq!(floats(&again.tensors["prompt_embeddings"]), [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
    assert_eq!(floats(&again.tensors["base_model.score.weight"]), [0.0, 1.0, 2.0]);
    assert_eq!((&again.config["mine"][0], &again.config["inference_mode"]), (&1.into(), &true.into()));

    torch_file(&src.join(PICKLED_WEIGHTS), &dict(&[("base_model.model.q_proj.lora_A", tensors[0].1, 0, &[1], &[1])]));
    says(read(&src, None), BROKEN, &["base_model.model.q_proj.lora_A", "stay with the base"]);
    fs::write(src.join(CONFIG_FILE), config.replace("P_TUNING", "LORA")).unwrap();
    says(read(&src, None), Kind::FailedPrecondition, &["\"LORA\": it changes weights of the base"]);
}

#[test]
fn broken_pickles_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("x.pt");
    let refused = |pickle: &[u8], parts: &[&str]| {
        torch_file(&file, pickle);
        says(read(&file, Some(&shape())), BROKEN, parts);
    };
    let tensor =
        |storage, offset, size: &'static [u8], stride: &'static [u8]| dict(&[("a", storage, offset, size, stride)]);
    refused(&tensor("LongStorage", 0, &[2], &[1]), &["x.pt: `a`: is a LongStorage, must be"]);
    refused(&tensor("FloatStorage", 0, &[2, 2], &[1, 2]), &["`a`: is not contiguous: size [2, 2], stride [1, 2]"]);
    refused(&tensor("FloatStorage", 9, &[8], &[1]), &["`a`: size [8] at offset 9 needs more than the 64 bytes"]);
    refused(&tensor("FloatStorage", 0, &[255; 9], &[1; 9]), &["not contiguous"]);
    let one: Pickled<'_> = ("a", "FloatStorage", 0, &[1], &[1]);
    refused(&dict(&[one, one]), &["`a` is there twice"]);
    refused(&tensor("FloatStorage", 0, &[1], &[1]), &["1 tensors have no place in an adapter: a"]);
    refused(&dict(&[("prompt_embeddings", "FloatStorage", 0, &[1, 4], &[4, 1])]), &["without an adapter_config.json"]);
    refused(b"\x80\x02cos\nsystem\n(X\x04\0\0\0truetR.", &["its one object is no tensor"]);
    refused(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", &["its one object is no tensor"]);
    refused(b"\x80\x02(K\x01", &["data.pkl"]);
    refused(b"\x80\x02}.", &["x.pt: holds no tensor"]);
    fs::write(&file, "x").unwrap();
    says(read(&file, None), BROKEN, &["x.pt: ", "no zip archive"]);
    says(read(dir.path().join("none").as_path(), None), BROKEN, &["no such file or folder"]);
    fs::write(dir.path().join("y.bin"), "x").unwrap();
    says(read(dir.path(), None), BROKEN, &["2 files of weights (x.pt, y.bin); name one"]);
}

#[test]
fn a_type_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("decoder.pt");
    for (storage, dtype) in [("HalfStorage", Dtype::F16), ("BFloat16Storage", Dtype::BF16)] {
        let bare = [b"\x80\x02".as_slice(), &pickled(("", storage, 1, &[2, 3], &[3, 1])), b"."].concat();
        torch_file(&file, &bare);
        let prompt = read(&file, None).unwrap().tensors.remove("prompt_embeddings").unwrap();
        assert_eq!((prompt.dtype, prompt.bytes.len()), (dtype, 12));
    }
}
