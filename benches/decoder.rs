//! The decoder beside what the machine can do, measured in the same run: decode steps of mixed batches and a prefill, on a known
//! shape with random weights.
//!
//! `cargo bench --bench decoder -- [bf16|int8|f32]... [shape=qwen2-0.5b|llama-8b] [device=cpu|cuda:0] [adapters=N,...] [rows=N]...
//! [prefix=N,...]... [kv=f32|bf16|f16]... [eager] [--tries N]`. Every type of K and V named, every list of prefix lengths, which adapters
//! have in turn, and every number of adapters has its turn. Times depend on the machine: read the ratios.
#![allow(clippy::unwrap_used, missing_docs)]
mod shape;

use candle_core::{DType, Tensor};
use prefixd::config::{Device, DtypeChoice, KvCacheDtype, Quantize};
use prefixd::kv::{KvPool, PAGE_TOKENS, PageId, pages_for};
use prefixd::model::batch::{Batch, Rows};
use prefixd::model::{LoadOptions, Model};
use prefixd::ops::embed::RowSource;
use prefixd::ops::gpu::Gpu;
use prefixd::ops::limits;
use prefixd::ops::linear::Kind;
use prefixd::ops::sample::Filter;
use prefixd::ops::sample::device::{Block, Choices, Penalties};
use shape::{EIGHT_B, HALF_B, median};
use std::time::Instant;

const OWN: usize = 80;

/// What the machine can do.
struct Limits {
    /// Bytes a second.
    bandwidth: f64,
    /// Additions and multiplications a second.
    peak: f64,
}

fn main() {
    let given: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let tries = given.iter().position(|a| a == "--tries").and_then(|i| given.get(i + 1)?.parse().ok()).unwrap_or(7);
    let value = |name: &str| given.iter().find_map(|g| g.strip_prefix(name)?.strip_prefix('=').map(str::to_owned));
    let numbers = |list: &str| -> Vec<usize> { list.split(',').map(|n| n.parse().unwrap()).collect() };
    let rows: Vec<usize> = given.iter().filter_map(|g| g.strip_prefix("rows=")?.parse().ok()).collect();
    let prefixes: Vec<_> = given.iter().filter_map(|g| Some(numbers(g.strip_prefix("prefix=")?))).collect();
    let prefixes = if prefixes.is_empty() { vec![vec![32]] } else { prefixes };
    let adapters = numbers(value("adapters").as_deref().unwrap_or("8"));
    let device: Device = value("device").as_deref().unwrap_or("cpu").parse().unwrap();
    let shape = [HALF_B, EIGHT_B].into_iter().find(|s| Some(s.name.to_lowercase().replace(' ', "-")) == value("shape"));
    let shape = shape.unwrap_or(HALF_B);
    let kvs = [("f32", KvCacheDtype::F32), ("bf16", KvCacheDtype::Bf16), ("f16", KvCacheDtype::F16)];
    let named: Vec<_> = kvs.into_iter().filter(|(name, _)| given.contains(&format!("kv={name}"))).collect();
    let kvs = if named.is_empty() { vec![("their own type", KvCacheDtype::Auto)] } else { named };
    let kinds: Vec<&str> = ["bf16", "int8", "f32"].into_iter().filter(|k| given.iter().any(|g| g == k)).collect();
    let kinds = match (kinds.is_empty(), device) {
        (false, _) => kinds,
        (true, Device::Cpu) => vec!["bf16", "int8"],
        (true, _) => vec!["bf16"],
    };
    for (kind, (kv_name, kv_cache_dtype)) in kinds.into_iter().flat_map(|k| kvs.iter().map(move |kv| (k, *kv))) {
        let (of, bytes, dtype, quantize) = match kind {
            "bf16" => (Kind::Bf16, 2.0, DtypeChoice::Auto, Quantize::None),
            "int8" => (Kind::Int8, 1.0 + 4.0 / 256.0, DtypeChoice::Auto, Quantize::Int8),
            _ => (Kind::F32, 4.0, DtypeChoice::F32, Quantize::None),
        };
        let enforce_eager = given.iter().any(|g| g == "eager");
        let options = LoadOptions { device, dtype, quantize, kv_cache_dtype, enforce_eager, ..LoadOptions::default() };
        let model = Model::load(&shape.files(), options).unwrap();
        let limits = match model.gpu() {
            None => {
                let pool = model.threads();
                Limits { bandwidth: limits::read_bandwidth(pool), peak: limits::peak(of, pool) }
            }
            Some(gpu) => gpu_limits(gpu, if kind == "f32" { DType::F32 } else { DType::BF16 }),
        };
        let (where_, Limits { bandwidth, peak }) = (&model.info().device, limits);
        println!("\n{}, {kind}, K and V in {kv_name}, {where_}, {} threads:", shape.name, model.threads().threads());
        println!("{:.1} GB/s, peak {:.0} GFLOP/s", bandwidth / 1e9, peak / 1e9);
        let parameters = shape.parameters() as f64;
        for sequences in [1, 4, 8, 16, 32, 64].into_iter().filter(|n| rows.is_empty() || rows.contains(n)) {
            for (prefix, adapters) in prefixes.iter().flat_map(|p| adapters.iter().map(move |a| (p, *a))) {
                let (kv, mut batch, seen) = decode(&model, sequences, prefix, adapters);
                let (step, queued) = timed(tries, &model, &mut batch, &kv);
                let asked = allocation_counter::measure(|| drop(model.forward(&batch, &kv).unwrap()));
                let read = parameters * bytes + (seen * model.page_bytes() / PAGE_TOKENS) as f64;
                let floor = (read / bandwidth).max(2.0 * parameters * sequences as f64 / peak);
                println!(
                    "decode  {sequences:3} rows, {:2} adapters, prefix {prefix:?}: {:7.3} ms ({:.3} to queue it), {:8.1} tokens/s, {:6.1} GB/s, {:7.0} GFLOP/s, floor {:.2} of it; {} allocations",
                    sequences.min(adapters),
                    step * 1e3,
                    queued * 1e3,
                    sequences as f64 / step,
                    read / step / 1e9,
                    2.0 * parameters * sequences as f64 / step / 1e9,
                    floor / step,
                    asked.count_total
                );
            }
        }
        for tokens in [128, 512, 2048].into_iter().filter(|n| rows.is_empty() && *n <= 512 || rows.contains(n)) {
            let (kv, mut batch) = prefill(&model, tokens);
            let (step, _) = timed(tries.min(5), &model, &mut batch, &kv);
            // One row is sampled: the last layer's part behind attention, and the head, are for it alone.
            let once = (shape.hidden * (shape.vocab + shape.hidden + 3 * shape.inner)) as f64;
            let work = 2.0 * ((parameters - once) * tokens as f64 + once);
            println!(
                "prefill {tokens:3} rows: {:7.2} ms, {:8.0} tokens/s, {:7.0} GFLOP/s in linear layers, {:.2} of the peak",
                step * 1e3,
                tokens as f64 / step,
                work / step / 1e9,
                work / step / peak
            );
        }
    }
}

/// A copy of 2 GiB, counted both ways, and a product of 8192^3 by cuBLAS.
fn gpu_limits(gpu: &Gpu, dtype: DType) -> Limits {
    let draw = |rows: usize, columns: usize| {
        let drawn = Tensor::randn(0f32, 1.0, (rows, columns), &gpu.device()).unwrap();
        drawn.to_dtype(dtype).unwrap()
    };
    let (a, b) = (draw(8192, 8192), draw(8192, 8192));
    let large = Tensor::zeros((1 << 10, 1 << 19), DType::F32, &gpu.device()).unwrap();
    let best = |work: &dyn Fn()| {
        let times = (0..8).map(|_| {
            let run = || {
                work();
                Ok(())
            };
            gpu.timed(run).unwrap()
        });
        times.fold(f64::INFINITY, f64::min)
    };
    let copy = best(&|| drop(large.copy().unwrap()));
    let product = best(&|| drop(a.matmul(&b).unwrap()));
    Limits { bandwidth: (2u64 << 31) as f64 / copy, peak: 2.0 * 8192f64.powi(3) / product }
}

/// Medians of the seconds that a step takes, tokens included where they are chosen on a GPU, and of those after which all of it was
/// queued there.
fn timed(tries: usize, model: &Model, batch: &mut Batch, kv: &KvPool) -> (f64, f64) {
    let filter = Filter { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };
    let rows = batch.logit_rows.len();
    if model.gpu().is_some() {
        let mut choices = Choices::default();
        (0..rows).for_each(|row| choices.push(row, &filter, 0.0, &Penalties::NONE, [], &[]));
        batch.choose = vec![Block { rows: 0..rows, choices, wanted: Vec::new() }];
    }
    let mut queued = Vec::new();
    let step = median(tries, || {
        let began = Instant::now();
        let forward = model.forward(batch, kv).unwrap();
        let logits = forward.hidden.filter(|_| forward.chosen.is_none()).map(|hidden| model.logits(&hidden).unwrap());
        queued.push(began.elapsed().as_secs_f64());
        drop((logits, forward.chosen.map(|chosen| chosen.wait().unwrap())));
    });
    queued.sort_by(f64::total_cmp);
    (step, queued[queued.len() / 2])
}

fn run(first: usize, n: usize) -> Vec<PageId> {
    (first..first + n).map(|p| PageId(p as u32)).collect()
}

/// A pool of `pages` of noise.
fn noisy(model: &Model, pages: usize) -> KvPool {
    let (kv, info) = (model.kv_pool(pages).unwrap(), model.info());
    let width = 2 * info.num_layers * kv.layout().kv_heads * kv.layout().head_dim;
    let noise: Vec<f32> = (0..PAGE_TOKENS * width).map(|i| ((i * 40_503) & 1023) as f32 / 512.0 - 1.0).collect();
    run(0, pages).iter().for_each(|page| kv.store(&noise, PAGE_TOKENS, &[*page]).unwrap());
    kv
}

/// One step of a row for each of `sequences`, each with the prefix of one of `adapters`, whose lengths are `prefixes` in turn, and 80
/// own tokens; and how many slots of K and V it must read.
fn decode(model: &Model, sequences: usize, prefixes: &[usize], adapters: usize) -> (KvPool, Batch, usize) {
    let own = pages_for(OWN + 1);
    let of = |adapter: usize| prefixes[adapter % prefixes.len()];
    let starts: Vec<usize> = (0..=adapters).map(|a| (0..a).map(|b| pages_for(of(b))).sum()).collect();
    let kv = noisy(model, starts[adapters] + sequences * own);
    let mut batch = Batch::default();
    for s in 0..sequences {
        let adapter = s % adapters;
        batch.push(
            &Rows {
                inputs: &[RowSource::Token(7 + s as u32)],
                soft: &[],
                first: OWN,
                prefix_len: of(adapter),
                prefix_pages: &run(starts[adapter], pages_for(of(adapter))),
                own_pages: &run(starts[adapters] + s * own, own),
                wanted: 0..0,
                sampled: true,
            },
            model.info().hidden_size,
        );
    }
    let seen = (0..adapters.min(sequences)).map(of).sum::<usize>() + sequences * (OWN + 1);
    (kv, batch, seen)
}

/// One sequence of `tokens`, its last row sampled.
fn prefill(model: &Model, tokens: usize) -> (KvPool, Batch) {
    let kv = model.kv_pool(pages_for(tokens)).unwrap();
    let inputs: Vec<_> = (0..tokens as u32).map(|i| RowSource::Token(i * 97 % 120_000)).collect();
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
