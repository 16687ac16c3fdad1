//! Criterion benches on the embedded model: a decode step of a mixed batch, and the load of an adapter.
//!
//! `cargo bench`. Times depend on the machine; compare runs on one machine only.
#![allow(clippy::unwrap_used, missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use prefixd::adapter::{InputRow, KvRows, Prefix, load_folder};
use prefixd::config::EngineConfig;
use prefixd::engine::request::{Event, Request, Sampling, Stopping};
use prefixd::engine::{Engine, EngineHandle};
use prefixd::kv::{PAGE_TOKENS, PageId, pages_for};
use prefixd::model::batch::{Batch, Rows};
use prefixd::model::{LoadOptions, Model, source};
use prefixd::ops::embed::RowSource;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

fn model() -> Model {
    Model::load(&source::resolve("embedded").unwrap(), LoadOptions::default()).unwrap()
}

/// One step of `sequences` decoding rows, each with a prefix of 20 of one of 8 adapters and 40 own tokens.
fn decode_step(c: &mut Criterion) {
    let model = model();
    let hidden = model.info().hidden_size;
    let mut group = c.benchmark_group("decode_step");
    for sequences in [1u32, 8, 32] {
        let (prefix_pages, own_pages) = (pages_for(20) as u32, pages_for(41) as u32);
        let kv = model.kv_pool((8 * prefix_pages + sequences * own_pages) as usize).unwrap();
        let zeros = vec![0f32; (kv.pages() * PAGE_TOKENS) * 2 * kv.layout().kv_heads * kv.layout().head_dim];
        let width = 2 * kv.layout().kv_heads * kv.layout().head_dim;
        let rows = candle_core::Tensor::from_vec(zeros, (kv.pages() * PAGE_TOKENS, width), &candle_core::Device::Cpu);
        let (rows, slots) = (rows.unwrap(), (0..(kv.pages() * PAGE_TOKENS) as u32).collect::<Arc<[u32]>>());
        (0..model.info().num_layers).for_each(|l| kv.write(l, &rows, &slots, 0).unwrap());
        let mut batch = Batch::default();
        for s in 0..sequences {
            let run = |first: u32, n: u32| (first..first + n).map(PageId).collect::<Vec<_>>();
            batch.push(
                &Rows {
                    inputs: &[RowSource::Token(7 + s)],
                    soft: &[],
                    first: 40,
                    prefix_len: 20,
                    prefix_pages: &run(s % 8 * prefix_pages, prefix_pages),
                    own_pages: &run(8 * prefix_pages + s * own_pages, own_pages),
                    wanted: 0..0,
                    sampled: true,
                },
                hidden,
            );
        }
        group.throughput(Throughput::Elements(u64::from(sequences)));
        group.bench_with_input(BenchmarkId::from_parameter(sequences), &batch, |b, batch| {
            b.iter(|| model.logits(&model.forward(batch, &kv).unwrap().hidden.unwrap()).unwrap());
        });
    }
    group.finish();
}

/// Reading, checking and compiling a prefix-tuning adapter of the repository, and a prefix that is new each time.
fn adapter_load(c: &mut Criterion) {
    let model = model();
    let (shape, tokenizer) = (model.shape(), model.tokenizer().clone());
    let mut group = c.benchmark_group("adapter_load");
    group.bench_function("read_and_check", |b| {
        b.iter(|| load_folder(black_box(Path::new("adapters/slots")), &shape, &tokenizer).unwrap());
    });
    let info = model.info().clone();
    let engine = Engine::start(model, &EngineConfig::default()).unwrap();
    let handle = engine.handle();
    let mut runtime = 0f32;
    let tokio = tokio::runtime::Builder::new_current_thread().build().unwrap();
    group.bench_function("compile_stored_prefix_of_20", |b| {
        b.iter(|| {
            runtime += 1.0;
            let data = vec![runtime * 1e-6; 20 * 2 * info.num_layers * info.num_kv_heads * info.head_dim];
            let prefix = Prefix::new(Some(KvRows { len: 20, data: data.into() }), Vec::new(), Vec::new().into());
            let prefix = Arc::new(prefix.unwrap());
            let digest = prefix.digest;
            tokio.block_on(handle.prepare(prefix, false)).unwrap();
            handle.forget(digest);
        });
    });
    group.finish();
}

fn generate(engine: &EngineHandle, tokens: usize) -> usize {
    let request = |i: u32| Request {
        id: "bench".into(),
        tenant: "".into(),
        prefix: None,
        input: vec![InputRow::Token(5 + i); 30],
        soft: None,
        head: None,
        sampling: Sampling::default(),
        stopping: Stopping { max_new_tokens: tokens, ignore_eos: true, ..Stopping::default() },
        score_from: None,
        top_logprobs: None,
        deadline: None,
        arrival: Instant::now(),
    };
    let receivers: Vec<_> = (0..16).map(|i| engine.submit(request(i)).unwrap()).collect();
    let count = |mut r: tokio::sync::mpsc::Receiver<Event>| {
        let mut n = 0;
        while let Some(event) = r.blocking_recv() {
            n += usize::from(matches!(event, Event::Token { .. }));
        }
        n
    };
    receivers.into_iter().map(count).sum()
}

/// 16 requests of 32 tokens through the whole engine: schedule, run, sample, detokenise.
fn engine_end_to_end(c: &mut Criterion) {
    let engine = Engine::start(model(), &EngineConfig::default()).unwrap();
    let mut group = c.benchmark_group("engine");
    group.throughput(Throughput::Elements(16 * 32));
    group.sample_size(20);
    group.bench_function("16_requests_of_32_tokens", |b| b.iter(|| generate(&engine.handle(), 32)));
    group.finish();
}

criterion_group!(benches, decode_step, adapter_load, engine_end_to_end);
criterion_main!(benches);
