//! Against the records of `tests/oracle/metrics.py`, and what the packages refuse.
#![allow(clippy::unwrap_used)]
use super::*;
use serde_json::Value;

fn strings(list: &Value) -> Vec<&str> {
    list.as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect()
}

#[track_caller]
fn same(case: &Value, key: &str, got: f64) {
    let want = case[key].as_f64().unwrap();
    assert!((got - want).abs() <= 1e-9 * want.abs(), "{key}: {got}, not {want}, of {case}");
}

fn records() -> Value {
    serde_json::from_str(include_str!("metrics.json")).unwrap()
}

#[test]
fn texts_score_as_in_sacrebleu_and_rouge_score() {
    let records = records();
    let cases = records["texts"].as_array().unwrap();
    assert!(cases.len() >= 40);
    for case in cases {
        let predictions = strings(&case["predictions"]);
        let references: Vec<_> = case["references"].as_array().unwrap().iter().map(strings).collect();
        same(case, "bleu", bleu(&predictions, &references));
        let got = rouge(&predictions, &references);
        same(case, "rouge1", got.rouge1);
        same(case, "rouge2", got.rouge2);
        same(case, "rougeL", got.rouge_l);
        let firsts: Vec<_> = references.iter().map(|r| vec![r[0]]).collect();
        same(case, "exact_match", exact_match(&predictions, &firsts));
    }
}

#[test]
fn labels_score_as_in_scikit_learn() {
    for case in records()["labels"].as_array().unwrap() {
        let (predictions, references) = (strings(&case["predictions"]), strings(&case["references"]));
        // Exact match of labels is their accuracy, but for white space around them, which it does not count.
        if predictions.iter().chain(&references).all(|label| label.trim() == *label) {
            let right: Vec<_> = references.iter().map(|r| vec![*r]).collect();
            same(case, "accuracy", exact_match(&predictions, &right));
        }
        same(case, "macro_f1", macro_f1(&predictions, &references));
    }
}

#[test]
fn perplexity_is_the_geometric_mean_of_inverse_probabilities() {
    for case in records()["perplexities"].as_array().unwrap() {
        let probabilities: Vec<_> =
            case["probabilities"].as_array().unwrap().iter().map(|p| p.as_f64().unwrap()).collect();
        let nll = probabilities.iter().map(|p| -p.ln()).sum();
        same(case, "perplexity", perplexity(nll, probabilities.len()));
    }
    assert!(perplexity(0.0, 0).is_nan() && perplexity(1.0, 0).is_nan());
}

#[test]
fn nothing_scores_nothing() {
    assert_eq!((exact_match(&[], &[]), macro_f1(&[], &[]), bleu(&[], &[])), (0.0, 0.0, 0.0));
    assert_eq!(exact_match(&["a", "b"], &[vec!["c", " a "], vec![]]), 0.5);
    assert_eq!(rouge(&[], &[]), Rouge::default());
    // No references at all, as against an empty one.
    assert_eq!(bleu(&["a b c d", ""], &[vec![], vec![]]), 0.0);
    assert_eq!(rouge(&["a b c d", ""], &[vec![], vec![]]), Rouge::default());
    let half = rouge(&["a b", "a b"], &[vec!["a b"], vec![]]);
    assert_eq!(half, Rouge { rouge1: 0.5, rouge2: 0.5, rouge_l: 0.5 });
}

#[test]
fn what_has_no_partner_is_left_out() {
    assert_eq!((exact_match(&["a", "b"], &[vec!["a"]]), macro_f1(&["a"], &["a", "b"])), (1.0, 1.0));
    assert_eq!(bleu(&["a b c d", "e"], &[vec!["a b c d"]]), 100.0);
    assert_eq!(rouge(&["a b"], &[vec!["a b"], vec!["c"]]), Rouge { rouge1: 1.0, rouge2: 1.0, rouge_l: 1.0 });
}
