//! Scores of predictions against references, as the usual Python packages compute them.
//!
//! Every function takes two lists and walks them in pairs; what the longer one has beyond the other is left out.
//! Without any pair a score is 0. `tests/oracle/metrics.py` records what sacrebleu, rouge-score and scikit-learn say,
//! and the tests here hold these functions to it.
mod bleu;
mod rouge;
#[cfg(test)]
mod tests;

pub use bleu::bleu;
pub use rouge::{Rouge, rouge};

use std::collections::{BTreeMap, HashMap};

/// Share of predictions that equal one of their references, whitespace around either aside: `equal / pairs`, 0..1. Of
/// labels it is the accuracy.
pub fn exact_match(predictions: &[&str], references: &[Vec<&str>]) -> f64 {
    let pairs = predictions.iter().zip(references);
    let equal = pairs.clone().filter(|(p, all)| all.iter().any(|r| r.trim() == p.trim())).count();
    ratio(equal, pairs.len())
}

/// The plain mean of the labels' F1, 0..1 (`sklearn.metrics.f1_score` with `average="macro", zero_division=0`).
///
/// `F1 = 2 tp / (2 tp + fp + fn)` of each label that occurs in the predictions or in the references. A rare label
/// weighs as much as a common one; one that is never right counts as 0.
pub fn macro_f1(predictions: &[&str], references: &[&str]) -> f64 {
    // Of each label: how often right, and how often it occurs on either side, which is 2 tp + fp + fn. Ordered, so that
    // the sum is the same to the bit every time.
    let mut labels = BTreeMap::<&str, (usize, usize)>::new();
    for (&prediction, &reference) in predictions.iter().zip(references) {
        let predicted = labels.entry(prediction).or_default();
        predicted.0 += usize::from(prediction == reference);
        predicted.1 += 1;
        labels.entry(reference).or_default().1 += 1;
    }
    let sum: f64 = labels.values().map(|&(right, occurs)| ratio(2 * right, occurs)).sum();
    if labels.is_empty() { 0.0 } else { sum / labels.len() as f64 }
}

/// `exp(sum_nll / tokens)`: how many tokens the model is torn between at each place, on average. `sum_nll` is the sum
/// of the tokens' negative log-likelihoods in nats. Without tokens it is undefined: NaN.
pub fn perplexity(sum_nll: f64, tokens: usize) -> f64 {
    if tokens == 0 { f64::NAN } else { (sum_nll / tokens as f64).exp() }
}

/// `part / whole`, and 0 of nothing.
fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// How often each run of `n` words occurs.
fn ngrams<'a>(words: &'a [&'a str], n: usize) -> HashMap<&'a [&'a str], usize> {
    let mut counts = HashMap::new();
    // `windows` has no runs of nothing.
    for gram in words.windows(n.max(1)) {
        *counts.entry(gram).or_default() += 1;
    }
    counts
}
