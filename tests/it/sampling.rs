//! What a request gets is what its settings make of the model's logits, token for token, whatever else is in the batch: judged by a
//! loop that runs each text anew and has no cache, no batch and no step planned ahead.
use crate::support::{ask_all, load, logits, request};
use prefixd::config::{DtypeChoice, EngineConfig};
use prefixd::engine::Engine;
use prefixd::engine::request::{FinishReason, Request, Sampling, TokenLogprob};
use prefixd::model::{LoadOptions, Model, source};
use prefixd::ops::sample::{Filter, draw, log_sum_exp, top_n};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::collections::HashMap;

const MODEL: &str = "tests/oracle/results/peft/qwen3_tied";

/// Tokens with their log-probabilities, and why they end.
fn expected(model: &Model, prompt: &[u32], request: &Request) -> (Vec<TokenLogprob>, FinishReason) {
    let (sampling, stopping) = (&request.sampling, &request.stopping);
    let filter = Filter {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
    };
    let mut rng = StdRng::seed_from_u64(sampling.seed);
    let (mut text, mut out, mut scores) = (prompt.to_vec(), Vec::new(), Vec::new());
    while out.len() < stopping.max_new_tokens {
        let mut row = logits(model, None, &text).pop().unwrap();
        let bare = row.clone();
        let mut counts: HashMap<u32, u32> = HashMap::new();
        out.iter().for_each(|id| *counts.entry(*id).or_insert(0) += 1);
        for (id, x) in (0u32..).zip(&mut row) {
            let count = counts.get(&id).copied().unwrap_or(0);
            if count > 0 || prompt.contains(&id) {
                *x = if *x > 0.0 { *x / sampling.repetition_penalty } else { *x * sampling.repetition_penalty };
            }
            if count > 0 {
                *x -= sampling.presence_penalty + sampling.frequency_penalty * count as f32;
            }
            if out.len() < stopping.min_new_tokens && model.eos_token_ids().contains(&id) {
                *x = f32::NEG_INFINITY;
            }
        }
        let u = if filter.temperature > 0.0 { rng.random() } else { 0.0 };
        let id = draw(&row, &filter, u) as u32;
        // Of the model's own distribution.
        let (norm, top) = (log_sum_exp(&bare), top_n(&bare, request.top_logprobs.unwrap_or(0)));
        let top = top.into_iter().map(|(id, x)| (id, x - norm)).collect();
        scores.push(TokenLogprob { id, logprob: bare[id as usize] - norm, top });
        out.push(id);
        text.push(id);
        if model.eos_token_ids().contains(&id) {
            return (scores, FinishReason::Stop);
        }
    }
    (scores, FinishReason::Length)
}

#[test]
fn sampled_tokens_follow_from_the_logits() {
    // On the processor, whatever the engine runs on.
    let model = Model::load(&source::resolve(MODEL).unwrap(), LoadOptions::default()).unwrap();
    let mut rng = StdRng::seed_from_u64(7);
    let mut pick = |of: &[f32]| of[rng.random_range(0..of.len())];
    let asks: Vec<(Vec<u32>, Request)> = (0..72u64)
        .map(|i| {
            // Some begin alike, so that they share blocks.
            let prompt: Vec<u32> = (0..5 + i as u32 % 4 * 9).map(|t| 5 + t * 7 % 50).collect();
            let mut r = request(None, &prompt, 1 + i as usize * 5 % 28);
            r.sampling = Sampling {
                temperature: pick(&[0.0, 0.7, 20.0, 20.0]),
                top_k: pick(&[0.0, 0.0, 40.0]) as usize,
                top_p: pick(&[1.0, 0.9]),
                min_p: pick(&[0.0, 0.01]),
                repetition_penalty: pick(&[1.0, 1.4, 3.0]),
                presence_penalty: pick(&[0.0, 1.0]),
                frequency_penalty: pick(&[0.0, 0.7]),
                seed: i,
            };
            r.top_logprobs = Some(i as usize % 2 * 4);
            r.stopping.ignore_eos = false;
            r.stopping.min_new_tokens = pick(&[0.0, 3.0, 9.0]) as usize;
            (prompt, r)
        })
        .collect();
    let want: Vec<_> = asks.iter().map(|(prompt, r)| expected(&model, prompt, r)).collect();
    let ends = want.iter().filter(|(_, reason)| *reason == FinishReason::Stop).count();
    println!("{ends} of {} end by themselves", want.len());
    assert!(ends > 2 && ends < want.len());
    // Once all in one step, which takes two blocks of logits.
    for (kv_tokens, max_batch_tokens, max_sequences) in [(8192, 2048, 72), (160, 24, 7)] {
        let config = EngineConfig { kv_tokens, max_batch_tokens, max_sequences, ..EngineConfig::default() };
        let engine = Engine::start(load(MODEL, DtypeChoice::F32), &config).unwrap();
        let got = ask_all(&engine.handle(), asks.iter().map(|(_, r)| r.clone()).collect());
        for (i, (got, (tokens, reason))) in got.iter().zip(&want).enumerate() {
            let ids = |tokens: &[TokenLogprob]| -> Vec<u32> { tokens.iter().map(|t| t.id).collect() };
            let chosen = ids(&got.tokens);
            assert_eq!((chosen, got.finish.reason), (ids(tokens), *reason), "{i}: {:?}", asks[i].1.sampling);
            assert_eq!(got.finish.usage.generated, tokens.len());
            for (got, want) in got.tokens.iter().zip(tokens) {
                let close = |a: f32, b: f32| (a - b).abs() < 1e-4;
                let tops = got.top.iter().zip(&want.top);
                let close = tops.fold(close(got.logprob, want.logprob), |all, (got, want)| all && close(got.1, want.1));
                assert!(close && got.top.len() == want.top.len(), "{i}: {got:?}, not {want:?}");
            }
        }
        while engine.handle().stats().running > 0 {
            std::thread::yield_now();
        }
        let stats = engine.handle().stats();
        assert_eq!(stats.kv_pages_available, stats.kv_pages_total);
        assert_eq!(stats.preemptions > 0, kv_tokens == 160, "{stats:?}");
    }
}
