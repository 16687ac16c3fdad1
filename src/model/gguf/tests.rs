#![allow(clippy::unwrap_used)]
use super::*;
use crate::model::config::ModelConfig;
use candle_core::DType;

/// Blocks of random bits, and what gguf-py decodes them to (`tests/oracle/to_gguf.py`).
#[test]
fn blocks_are_what_gguf_py_decodes() {
    let bytes = std::fs::read("tests/oracle/results/gguf/blocks").unwrap();
    let gguf = Gguf::parse(&bytes).unwrap();
    let mut kinds = 0;
    for (name, stored) in gguf.tensors().filter(|(name, _)| name.ends_with(".weight")) {
        let values = |stored: &Stored<'_>| {
            let t = decode(stored, DType::F32).unwrap();
            t.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        let (got, want) = (values(stored), values(gguf.tensor(&name.replace(".weight", ".bias")).unwrap()));
        assert_eq!((stored.shape.as_slice(), got.len()), (&[3, 256][..], want.len()), "{name}");
        let different = got.iter().zip(&want).filter(|(a, b)| a != b).count();
        assert_eq!(different, 0, "{name}: of {}", got.len());
        let half = decode(stored, DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
        let half = half.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert!(got.iter().zip(&half).all(|(x, h)| half::bf16::from_f32(*x).to_f32() == *h), "{name}");
        kinds += 1;
    }
    assert_eq!(kinds, 10);
}

/// A tensor of a family has one name there and one here, and they find each other.
#[test]
fn names_go_both_ways() {
    for a in ARCHITECTURES {
        let family = a.family(false).unwrap();
        let names = TensorNames::of_family(family, None);
        let full = format!("{}{}", family.names.roots[0], family.names.down.replace("{}", "12"));
        let full = format!("{full}.weight");
        assert_eq!(names.stored(&full), "blk.12.ffn_down.weight", "{}", a.name);
        assert_eq!(names.full("blk.12.ffn_down.weight").unwrap(), full);
        for strange in ["blk.012.ffn_down.weight", "blk..ffn_down.weight", "blk.1.ffn_down", "blk.1.x.weight", ""] {
            assert_eq!(names.full(strange).unwrap(), strange);
        }
        assert!(names.full("rope_freqs.weight").is_none());
    }
}

/// 1e-5 is written as an f32, and is the 1e-5 of a `config.json`.
#[test]
fn floats_are_what_their_decimals_say() {
    let path = "tests/oracle/results/gguf/qwen3.q8_0.gguf";
    let bytes = std::fs::read(path).unwrap();
    let gguf = Gguf::parse(&bytes).unwrap();
    let config = config::config(&gguf).unwrap();
    let config = ModelConfig::parse(config.to_string().as_bytes()).unwrap();
    let folder = std::fs::read("tests/oracle/results/peft/qwen3/config.json").unwrap();
    let folder = ModelConfig::parse(&folder).unwrap();
    // The end of a text is in another file there.
    assert_eq!(ModelConfig { eos_token_ids: folder.eos_token_ids.clone(), ..config }, folder);
}
