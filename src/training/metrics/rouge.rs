//! ROUGE (Lin 2004) as the package `rouge_score` computes it without its stemmer.
use super::mean;
use std::collections::HashMap;

/// F-measures, 0 to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rouge {
    /// Of words.
    pub rouge1: f64,
    /// Of pairs of words.
    pub rouge2: f64,
    /// Of the longest common subsequence.
    pub rouge_l: f64,
}

/// Mean over the predictions; of several references the best one counts, for each figure by itself.
pub fn rouge(predictions: &[&str], references: &[Vec<&str>]) -> Rouge {
    let all: Vec<Rouge> = predictions.iter().zip(references).map(|(p, r)| best(p, r)).collect();
    Rouge {
        rouge1: mean(all.iter().map(|r| r.rouge1)),
        rouge2: mean(all.iter().map(|r| r.rouge2)),
        rouge_l: mean(all.iter().map(|r| r.rouge_l)),
    }
}

fn best(prediction: &str, references: &[&str]) -> Rouge {
    let prediction = words(prediction);
    references.iter().fold(Rouge::default(), |best, reference| {
        let reference = words(reference);
        Rouge {
            rouge1: best.rouge1.max(overlap(&prediction, &reference, 1)),
            rouge2: best.rouge2.max(overlap(&prediction, &reference, 2)),
            rouge_l: best.rouge_l.max(f_measure(common(&prediction, &reference), prediction.len(), reference.len())),
        }
    })
}

/// Lower case, runs of ASCII letters and digits.
fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    lower.split(|c: char| !c.is_ascii_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_owned).collect()
}

fn overlap(a: &[String], b: &[String], n: usize) -> f64 {
    let count = |words: &[String]| {
        let mut counts: HashMap<Vec<String>, usize> = HashMap::new();
        words.windows(n).for_each(|gram| *counts.entry(gram.to_vec()).or_default() += 1);
        counts
    };
    let (a, b) = (count(a), count(b));
    let both = a.iter().map(|(gram, n)| b.get(gram).map_or(0, |m| *n.min(m))).sum();
    f_measure(both, a.values().sum(), b.values().sum())
}

fn f_measure(both: usize, a: usize, b: usize) -> f64 {
    if both == 0 {
        return 0.0;
    }
    let (precision, recall) = (both as f64 / a as f64, both as f64 / b as f64);
    2.0 * precision * recall / (precision + recall)
}

/// Length of the longest common subsequence.
fn common(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0usize; b.len() + 1];
    for x in a {
        let mut diagonal = 0;
        for (j, y) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if x == y { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}
