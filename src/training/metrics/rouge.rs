//! ROUGE as Google's `rouge_score` computes it.
use super::{ngrams, ratio};

/// Means of F-measures over a corpus, 0..1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rouge {
    /// Of words in common.
    pub rouge1: f64,
    /// Of pairs of neighbouring words in common.
    pub rouge2: f64,
    /// Of the longest common subsequence of words.
    pub rouge_l: f64,
}

/// ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), with the defaults of Google's `rouge_score`: no stemmer; words are runs of
/// `a-z0-9` in the lowercased text.
///
/// `F = 2 P R / (P + R) = 2 m / (a + b)`, where the prediction has `a` n-grams, the reference `b`, and `m` are common
/// to both; for ROUGE-L `m` is the length of the longest common subsequence, `a` and `b` are counts of words. Each
/// measure takes the best among the references of a prediction (`score_multi`), and is averaged over the predictions.
/// One without references, which `rouge_score` refuses, counts as 0.
pub fn rouge(predictions: &[&str], references: &[Vec<&str>]) -> Rouge {
    let pairs = predictions.iter().zip(references);
    let count = pairs.len().max(1) as f64;
    let mut mean = Rouge::default();
    for (prediction, references) in pairs {
        let prediction = prediction.to_lowercase();
        let prediction = words(&prediction);
        let mut best = Rouge::default();
        for reference in references {
            let reference = reference.to_lowercase();
            let reference = words(&reference);
            best.rouge1 = best.rouge1.max(of_ngrams(&prediction, &reference, 1));
            best.rouge2 = best.rouge2.max(of_ngrams(&prediction, &reference, 2));
            let common = longest_common(&prediction, &reference);
            best.rouge_l = best.rouge_l.max(ratio(2 * common, prediction.len() + reference.len()));
        }
        mean.rouge1 += best.rouge1 / count;
        mean.rouge2 += best.rouge2 / count;
        mean.rouge_l += best.rouge_l / count;
    }
    mean
}

/// The words of a lowercased text. Letters beyond ASCII part words, they are in none.
fn words(text: &str) -> Vec<&str> {
    text.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).collect()
}

fn of_ngrams(prediction: &[&str], reference: &[&str], n: usize) -> f64 {
    let (has, wants) = (ngrams(prediction, n), ngrams(reference, n));
    let common: usize = has.iter().map(|(gram, &count)| count.min(wants.get(gram).copied().unwrap_or(0))).sum();
    ratio(2 * common, has.values().sum::<usize>() + wants.values().sum::<usize>())
}

/// Length of the longest common subsequence, with two rows of the table in memory.
fn longest_common(a: &[&str], b: &[&str]) -> usize {
    // Place `j` of a row: the length with the words of `a` so far and the first `j` words of `b`.
    let mut above = vec![0; b.len() + 1];
    let mut row = above.clone();
    for x in a {
        for (j, y) in b.iter().enumerate() {
            row[j + 1] = if x == y { above[j] + 1 } else { above[j + 1].max(row[j]) };
        }
        std::mem::swap(&mut above, &mut row);
    }
    above[b.len()]
}
