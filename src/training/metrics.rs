//! Figures that compare answers with targets, by the definitions that everyone quotes.
//!
//! `tests/oracle/metrics.py` has sacrebleu, rouge_score and scikit-learn say what they should be.
mod bleu;
mod rouge;

pub use bleu::bleu;
pub use rouge::{Rouge, rouge};

use std::collections::BTreeSet;

/// Share of predictions that equal one of their references.
pub fn exact_match(predictions: &[&str], references: &[Vec<&str>]) -> f64 {
    mean(predictions.iter().zip(references).map(|(p, all)| f64::from(u8::from(all.contains(p)))))
}

/// F1 of every label that is predicted or right, mean over them; a label that is never right and predicted counts 0
/// (scikit-learn's `f1_score(average="macro", zero_division=0)`).
pub fn macro_f1(predictions: &[&str], references: &[&str]) -> f64 {
    let labels: BTreeSet<&str> = predictions.iter().chain(references).copied().collect();
    mean(labels.into_iter().map(|label| {
        let (mut right, mut said, mut true_ones) = (0.0, 0.0, 0.0);
        for (p, r) in predictions.iter().zip(references) {
            said += f64::from(u8::from(*p == label));
            true_ones += f64::from(u8::from(*r == label));
            right += f64::from(u8::from(*p == label && *r == label));
        }
        2.0 * right / (said + true_ones)
    }))
}

/// e to the mean negative log-likelihood of `tokens` tokens.
pub fn perplexity(negative_log_likelihood: f64, tokens: usize) -> f64 {
    (negative_log_likelihood / tokens.max(1) as f64).exp()
}

/// 0 of nothing.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, n) = values.fold((0.0, 0usize), |(sum, n), v| (sum + v, n + 1));
    sum / n.max(1) as f64
}

#[cfg(test)]
mod tests;
