//! The base with its weights rounded to int8, beside the same base as it is.
use crate::served::{Served, prompt};
use crate::support::{apart, embedded, int8, logits};
use prefixd::config::{Config, Quantize};
use serde_json::Value;

/// Logits move by a little, and do move; what decoding would choose stays.
#[test]
fn logits_stay_close() {
    let (whole, rounded) = (embedded(), int8());
    assert_eq!((whole.info().dtype, rounded.info().dtype), ("bf16", "int8"));
    let tokens: Vec<u32> = (0..80).map(|i| 10 + i * 37 % 900).collect();
    let (want, got) = (logits(&whole, None, &tokens), logits(&rounded, None, &tokens));
    let best = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i);
    let same = want.iter().zip(&got).filter(|(want, got)| best(want) == best(got)).count();
    let relative = apart(&want, &got);
    println!(
        "int8: logits off by {relative:.4} of their deviation, the best one equal in {same} of {} rows",
        want.len()
    );
    assert!(relative > 1e-4 && relative < 0.05, "{relative}");
    assert!(same * 100 >= want.len() * 90, "{same}");
}

/// The shipped adapters, trained on the base as it is, do their tasks on it: of their 20 examples each, at least 18.
#[tokio::test(flavor = "multi_thread")]
async fn adapters_of_the_whole_base_serve_on_it() {
    let served = Served::with(Config { quantize: Quantize::Int8, ..Config::default() }).await;
    let mut client = served.inference().await;
    for id in ["sentiment", "slots", "answer", "booking"] {
        let examples = std::fs::read_to_string(format!("adapters/{id}/examples.jsonl")).unwrap();
        let (mut right, mut all) = (0, 0);
        for line in examples.lines() {
            let example: Value = serde_json::from_str(line).unwrap();
            let answer = client.generate(prompt(id, example["input"].as_str().unwrap())).await.unwrap().into_inner();
            right += usize::from(answer.choices[0].text.trim() == example["target"].as_str().unwrap().trim());
            all += 1;
        }
        println!("int8: {id} {right} of {all}");
        assert!(all == 20 && right >= 18, "{id}: {right} of {all}");
    }
}
