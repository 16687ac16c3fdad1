#![allow(clippy::unwrap_used)]
use super::*;
use serde_json::Value;

fn cases() -> Value {
    serde_json::from_str(include_str!("cases.json")).unwrap()
}

fn strings(v: &Value) -> Vec<&str> {
    v.as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect()
}

#[test]
fn texts_agree_with_sacrebleu_and_rouge_score() {
    let cases = cases();
    let same = |got: f64, want: &Value, what: &str, case: &Value| {
        let want = want.as_f64().unwrap();
        assert!((got - want).abs() <= 1e-9 * want.max(1.0), "{what}: {got} {want} of {case}");
    };
    for case in cases["texts"].as_array().unwrap() {
        let predictions = strings(&case["predictions"]);
        let references: Vec<Vec<&str>> = case["references"].as_array().unwrap().iter().map(strings).collect();
        same(bleu(&predictions, &references), &case["bleu"], "bleu", case);
        let got = rouge(&predictions, &references);
        for (i, got) in [got.rouge1, got.rouge2, got.rouge_l].into_iter().enumerate() {
            same(got, &case["rouge"][i], "rouge", case);
        }
    }
}

#[test]
fn labels_agree_with_scikit_learn() {
    for case in cases()["labels"].as_array().unwrap() {
        let got = macro_f1(&strings(&case["said"]), &strings(&case["right"]));
        assert!((got - case["f1"].as_f64().unwrap()).abs() < 1e-12, "{got} {case}");
    }
}

#[test]
fn nothing_is_no_panic() {
    assert_eq!(
        (exact_match(&[], &[]), macro_f1(&[], &[]), bleu(&[], &[]), rouge(&[], &[])),
        (0.0, 0.0, 0.0, Rouge::default())
    );
    assert_eq!((bleu(&[""], &[vec![]]), perplexity(0.0, 0)), (0.0, 1.0));
    assert_eq!(exact_match(&["a", "b"], &[vec!["c", "a"], vec!["a"]]), 0.5);
}
