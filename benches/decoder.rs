//! The decoder on the CPU beside what the machine can do, measured in the same run: decode steps of mixed batches and a
//! prefill, on the shape of Qwen2-0.5B with random weights.
//!
//! `cargo bench --bench decoder -- [bf16|int8|f32]... [rows=N]... [prefix=N] [kv=f32|bf16|f16]... [--tries N]`. Every type of K
//! and V named has its turn. Times depend on the machine: read the ratios.
#![allow(clippy::unwrap_used, missing_docs)]
mod shape;

use candle_core::Tensor;
use prefixd::config::{DtypeChoice, KvCacheDtype, Quantize};
use prefixd::kv::{KvPool, PAGE_TOKENS, PageId, pages_for};
use prefixd::model::batch::{Batch, Rows};
use prefixd::model::{LoadOptions, Model};
use prefixd::ops::Pool;
use prefixd::ops::embed::RowSource;
use prefixd::ops::limits;
use prefixd::ops::linear::Kind;
use shape::{HALF_B, median};
use std::sync::Arc;

const ADAPTERS: usize = 8;
const OWN: usize = 80;

fn main() {
    let given: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let tries = given.iter().position(|a| a == "--tries").and_then(|i| given.get(i + 1)?.parse().ok()).unwrap_or(7);
    let rows: Vec<usize> = given.iter().filter_map(|g| g.strip_prefix("rows=")?.parse().ok()).collect();
    let prefix = given.iter().find_map(|g| g.strip_prefix("prefix=")?.parse().ok()).unwrap_or(32);
    let kvs = [("f32", KvCacheDtype::F32), ("bf16", KvCacheDtype::Bf16), ("f16", KvCacheDtype::F16)];
    let named: Vec<_> = kvs.into_iter().filter(|(name, _)| given.contains(&format!("kv={name}"))).collect();
    let kvs = if named.is_empty() { vec![kvs[0]] } else { named };
    let kinds: Vec<&str> = ["bf16", "int8", "f32"].into_iter().filter(|k| given.iter().any(|g| g == k)).collect();
    let kinds = if kinds.is_empty() { vec!["bf16", "int8"] } else { kinds };
    let pool = Pool::new(0);
    let bandwidth = limits::read_bandwidth(&pool);
    println!("{} threads, reads {:.1} GB/s", pool.threads(), bandwidth / 1e9);
    for (kind, (kv_name, kv_cache_dtype)) in kinds.into_iter().flat_map(|k| kvs.iter().map(move |kv| (k, *kv))) {
        let (of, bytes, dtype, quantize) = match kind {
            "bf16" => (Kind::Bf16, 2.0, DtypeChoice::Auto, Quantize::None),
            "int8" => (Kind::Int8, 1.0 + 4.0 / 256.0, DtypeChoice::Auto, Quantize::Int8),
            _ => (Kind::F32, 4.0, DtypeChoice::F32, Quantize::None),
        };
        let peak = limits::peak(of, &pool);
        let model =
            Model::load(&HALF_B.files(), LoadOptions { dtype, quantize, kv_cache_dtype, ..LoadOptions::default() })
                .unwrap();
        let parameters = HALF_B.parameters() as f64;
        println!("\n{kind}, K and V in {kv_name}: peak {:.0} GFLOP/s", peak / 1e9);
        for sequences in [1, 4, 8, 16, 32, 64].into_iter().filter(|n| rows.is_empty() || rows.contains(n)) {
            let (kv, batch) = decode(&model, sequences, prefix);
            let step = median(tries, || drop(model.logits(&model.forward(&batch, &kv).unwrap().unwrap()).unwrap()));
            let floor = (parameters * bytes / bandwidth).max(2.0 * parameters * sequences as f64 / peak);
            println!(
                "decode  {sequences:3} rows, {} adapters, prefix {prefix}: {:7.2} ms, {:7.1} tokens/s, {:5.1} GB/s, {:5.0} GFLOP/s, floor {:.2} of it",
                sequences.min(ADAPTERS),
                step * 1e3,
                sequences as f64 / step,
                parameters * bytes / step / 1e9,
                2.0 * parameters * sequences as f64 / step / 1e9,
                floor / step
            );
        }
        for tokens in [128, 512].into_iter().filter(|n| rows.is_empty() || rows.contains(n)) {
            let (kv, batch) = prefill(&model, tokens);
            let step =
                median(tries.min(5), || drop(model.logits(&model.forward(&batch, &kv).unwrap().unwrap()).unwrap()));
            let head = (HALF_B.vocab * HALF_B.hidden) as f64;
            let work = 2.0 * ((parameters - head) * tokens as f64 + head);
            println!(
                "prefill {tokens:3} rows: {:7.1} ms, {:6.0} tokens/s, {:5.0} GFLOP/s in linear layers, {:.2} of the peak",
                step * 1e3,
                tokens as f64 / step,
                work / step / 1e9,
                work / step / peak
            );
        }
    }
}

fn run(first: usize, n: usize) -> Vec<PageId> {
    (first..first + n).map(|p| PageId(p as u32)).collect()
}

/// One step of `sequences` rows, each with the prefix of one of 8 adapters, of `prefix_len`, and 80 own tokens.
fn decode(model: &Model, sequences: usize, prefix_len: usize) -> (KvPool, Batch) {
    let (prefix, own) = (pages_for(prefix_len), pages_for(OWN + 1));
    let kv = model.kv_pool(ADAPTERS * prefix + sequences * own).unwrap();
    let width = 2 * kv.layout().kv_heads * kv.layout().head_dim;
    let slots: Arc<[u32]> = (0..(kv.pages() * PAGE_TOKENS) as u32).collect();
    let noise = (0..slots.len() * width).map(|i| ((i * 40_503) & 1023) as f32 / 512.0 - 1.0).collect();
    let rows = Tensor::from_vec(noise, (slots.len(), width), &candle_core::Device::Cpu).unwrap();
    (0..model.info().num_layers).for_each(|l| kv.write(l, &rows, &slots, 0).unwrap());
    let mut batch = Batch::default();
    for s in 0..sequences {
        batch.push(
            &Rows {
                inputs: &[RowSource::Token(7 + s as u32)],
                soft: &[],
                first: OWN,
                prefix_len,
                prefix_pages: &run(s % ADAPTERS * prefix, prefix),
                own_pages: &run(ADAPTERS * prefix + s * own, own),
                wanted: 0..0,
                sampled: true,
            },
            model.info().hidden_size,
        );
    }
    (kv, batch)
}

/// One sequence of `tokens`, its last row sampled.
fn prefill(model: &Model, tokens: usize) -> (KvPool, Batch) {
    let kv = model.kv_pool(pages_for(tokens)).unwrap();
    let inputs: Vec<_> = (0..tokens as u32).map(|i| RowSource::Token(i * 97 % 150_000)).collect();
    let mut batch = Batch::default();
    batch.push(
        &Rows {
            inputs: &inputs,
            soft: &[],
            first: 0,
            prefix_len: 0,
            prefix_pages: &[],
            own_pages: &run(0, pages_for(tokens)),
            wanted: 0..0,
            sampled: true,
        },
        model.info().hidden_size,
    );
    (kv, batch)
}
