//! A request's result does not depend on what shares its batch: the same tokens and, on the CPU, the same bits, over
//! random mixes of adapters, lengths, sampling settings, chunk sizes, preemptions and cache hits.
use crate::support::{Answer, ask_all, embedded, halved, int8, request};
use prefixd::adapter::{InputRow, KvRows, Prefix, SoftPrompt};
use prefixd::config::EngineConfig;
use prefixd::engine::request::{Request, Sampling};
use prefixd::engine::{Engine, Stats};
use prefixd::model::Model;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use std::sync::Arc;

/// One prefix of each kind, of awkward lengths: none, stored rows, virtual tokens, text, stored rows with text.
fn prefixes(model: &Model) -> Vec<Option<Arc<Prefix>>> {
    let info = model.info();
    let noise = |n: usize| -> Arc<[f32]> { (0..n).map(|i| ((i * 7919 % 1009) as f32 / 1009.0 - 0.5) * 0.8).collect() };
    let stored =
        |len: usize| KvRows { len, data: noise(len * 2 * info.num_layers * info.num_kv_heads * info.head_dim) };
    let text = |n: u32| (0..n).map(|i| InputRow::Token(5 + i * 3)).collect::<Vec<_>>();
    let soft = |n: u32| (0..n).map(InputRow::Soft).collect::<Vec<_>>();
    let new = |kv, rows, soft| Some(Arc::new(Prefix::new(kv, rows, soft).unwrap()));
    let none: Arc<[f32]> = Vec::new().into();
    vec![
        None,
        new(Some(stored(20)), vec![], none.clone()),
        new(None, soft(9), noise(9 * info.hidden_size)),
        new(None, text(33), none.clone()),
        new(Some(stored(16)), text(5), none),
    ]
}

#[derive(Clone, Debug)]
struct Ask {
    prefix: usize,
    /// Prompts are cuts of one text, so equal leading blocks happen.
    prompt: usize,
    new: usize,
    temperature: f32,
    seed: u64,
    scored: bool,
    penalty: f32,
}

fn ask() -> impl Strategy<Value = Ask> {
    (
        0..6usize,
        1..90usize,
        1..20usize,
        prop::sample::select(vec![0.0f32, 0.7, 1.5]),
        0..4u64,
        any::<bool>(),
        1.0f32..1.4,
    )
        .prop_map(|(prefix, prompt, new, temperature, seed, scored, penalty)| Ask {
            prefix,
            prompt,
            new,
            temperature,
            seed,
            scored,
            penalty,
        })
}

/// Virtual tokens that stand in the middle of a prompt instead of before it.
fn inserted(hidden: usize) -> Arc<SoftPrompt> {
    let rows = (0..INSERTED * hidden).map(|i| ((i * 6151 % 997) as f32 / 997.0 - 0.5) * 0.8).collect();
    Arc::new(SoftPrompt::new(rows, INSERTED))
}

const INSERTED: usize = 21;

fn build(ask: &Ask, prefixes: &[Option<Arc<Prefix>>], soft: &Arc<SoftPrompt>) -> Request {
    let tokens: Vec<u32> = (0..ask.prompt as u32).map(|i| 10 + i * 37 % 900).collect();
    let mut r = request(prefixes.get(ask.prefix).cloned().flatten(), &tokens, ask.new);
    let middle = ask.prefix == prefixes.len();
    if middle {
        let at = ask.prompt / 2;
        r.input.splice(at..at, (0..INSERTED as u32).map(InputRow::Soft));
        r.soft = Some(soft.clone());
    }
    r.sampling = Sampling {
        temperature: ask.temperature,
        seed: ask.seed,
        top_k: 50,
        repetition_penalty: ask.penalty,
        ..Sampling::default()
    };
    // Virtual tokens have no log-probability: what follows them has.
    r.score_from = (ask.scored && ask.prompt > 1).then_some(if middle { ask.prompt / 2 + INSERTED } else { 1 });
    r
}

#[test]
fn a_mixed_batch_gives_the_bits_of_single_requests() {
    let stats = mixes(embedded, 12);
    assert!(stats.iter().any(|s| s.preemptions > 0), "no mix was preempted");
    assert!(stats.iter().all(|s| s.cached_tokens > 0), "no cache was hit");
    assert!(stats.iter().any(|s| s.prefix_evictions > 0), "no prefix was evicted");
}

/// With int8 weights too: a row is rounded by itself.
#[test]
fn a_mixed_batch_gives_the_bits_of_single_requests_on_int8() {
    mixes(int8, 4);
}

/// With K and V in f16 too: a value is rounded by itself, when it is written.
#[test]
fn a_mixed_batch_gives_the_bits_of_single_requests_on_halves() {
    mixes(halved, 4);
}

fn mixes(model: fn() -> Model, cases: u32) -> Vec<Stats> {
    let prefixes = prefixes(&model());
    let soft = inserted(model().info().hidden_size);
    let alone =
        Engine::start(model(), &EngineConfig { kv_tokens: 4096, prefix_caching: false, ..EngineConfig::default() });
    let alone = alone.unwrap();
    // A small pool, so that mixes are preempted; small steps, so that prompts are cut.
    let engines: Vec<Engine> = [(512, 16, 7), (384, 64, 64), (4096, 512, 64)]
        .into_iter()
        .map(|(kv_tokens, max_batch_tokens, max_sequences)| {
            let config = EngineConfig { kv_tokens, max_batch_tokens, max_sequences, ..EngineConfig::default() };
            Engine::start(model(), &config).unwrap()
        })
        .collect();
    let cases = ProptestConfig { cases, max_shrink_iters: 40, failure_persistence: None, ..ProptestConfig::default() };
    let mixes = prop::collection::vec(ask(), 2..24);
    TestRunner::new(cases)
        .run(&mixes, |asks| {
            let single: Vec<Answer> =
                asks.iter().map(|a| ask_all(&alone.handle(), vec![build(a, &prefixes, &soft)]).remove(0)).collect();
            for (i, engine) in engines.iter().enumerate() {
                let mixed = ask_all(&engine.handle(), asks.iter().map(|a| build(a, &prefixes, &soft)).collect());
                for ((ask, one), all) in asks.iter().zip(&single).zip(&mixed) {
                    prop_assert_eq!(one.bits(), all.bits(), "engine {}: {:?}", i, ask);
                    prop_assert_eq!((&one.text, one.finish.reason), (&all.text, all.finish.reason));
                }
            }
            Ok(())
        })
        .unwrap();
    let stats: Vec<_> = engines.iter().map(|e| e.handle().stats()).collect();
    println!("{stats:#?}");
    stats
}

/// A receiver that is dropped gives everything back within a step or two, and the others' bits stay.
#[test]
fn a_cancelled_request_returns_its_pages() {
    let engine =
        Engine::start(embedded(), &EngineConfig { kv_tokens: 1024, prefix_caching: false, ..EngineConfig::default() });
    let running = engine.unwrap();
    let engine = running.handle();
    let tokens: Vec<u32> = (10..40).collect();
    let before = ask_all(&engine, vec![request(None, &tokens, 100)]).remove(0);
    let gone: Vec<_> = (0..5).map(|_| engine.submit(request(None, &tokens, 200)).unwrap()).collect();
    let kept = engine.submit(request(None, &tokens, 100)).unwrap();
    drop(gone);
    assert_eq!(crate::support::collect(kept).bits(), before.bits());
    let ended = std::time::Instant::now();
    while engine.stats().running > 0 {
        assert!(ended.elapsed().as_secs() < 20, "{:?}", engine.stats());
        std::thread::yield_now();
    }
    let s = engine.stats();
    assert_eq!(s.kv_pages_available, s.kv_pages_total);
}
