//! Corpus BLEU (Papineni et al. 2002) with sacrebleu's defaults: tokenizer 13a, exponential smoothing, case kept.
use std::collections::HashMap;

/// Longest n-gram.
const ORDER: usize = 4;

/// Of all predictions together, 0 to 100. A sentence may have any number of references.
pub fn bleu(predictions: &[&str], references: &[Vec<&str>]) -> f64 {
    let (mut right, mut total) = ([0usize; ORDER], [0usize; ORDER]);
    let (mut length, mut wanted) = (0, 0);
    for (prediction, references) in predictions.iter().zip(references) {
        let prediction = tokens(prediction);
        let references: Vec<Vec<String>> = references.iter().map(|r| tokens(r)).collect();
        length += prediction.len();
        // The closest reference, the shorter of two as close.
        let closest = references.iter().map(|r| (r.len().abs_diff(prediction.len()), r.len())).min();
        wanted += closest.map_or(0, |(_, len)| len);
        for n in 1..=ORDER {
            let mut most: HashMap<&[String], usize> = HashMap::new();
            for reference in &references {
                for (gram, count) in grams(reference, n) {
                    let most = most.entry(gram).or_default();
                    *most = count.max(*most);
                }
            }
            for (gram, count) in grams(&prediction, n) {
                total[n - 1] += count;
                right[n - 1] += count.min(most.get(gram).copied().unwrap_or(0));
            }
        }
    }
    if right.iter().all(|n| *n == 0) || total.contains(&0) {
        return 0.0;
    }
    let (mut logs, mut smooth) = (0.0, 1.0);
    for (right, total) in right.iter().zip(total) {
        let precision = if *right == 0 {
            // Each order without a hit counts half of the one before.
            smooth *= 2.0;
            1.0 / (smooth * total as f64)
        } else {
            *right as f64 / total as f64
        };
        logs += (100.0 * precision).ln();
    }
    let brevity = if length < wanted { (1.0 - wanted as f64 / length as f64).exp() } else { 1.0 };
    brevity * (logs / ORDER as f64).exp()
}

fn grams(tokens: &[String], n: usize) -> HashMap<&[String], usize> {
    let mut counts = HashMap::new();
    tokens.windows(n).for_each(|gram| *counts.entry(gram).or_default() += 1);
    counts
}

/// mteval-v13a's tokens: signs stand alone, but for full stops and commas between digits, and hyphens not after one.
fn tokens(line: &str) -> Vec<String> {
    let line = line.trim_end().replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    let line = line.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">");
    let mut text: Vec<char> = Vec::with_capacity(line.len() + 16);
    for c in [' '].into_iter().chain(line.chars()).chain([' ']) {
        match c {
            '{'..='~' | '['..='`' | ' '..='&' | '('..='+' | ':'..='@' | '/' => text.extend([' ', c, ' ']),
            _ => text.push(c),
        }
    }
    let stop = |c: char| matches!(c, '.' | ',');
    let digit = |c: char| c.is_ascii_digit();
    text = pairs(&text, |a, b| !digit(a) && stop(b), |a, b| vec![a, ' ', b, ' ']);
    text = pairs(&text, |a, b| stop(a) && !digit(b), |a, b| vec![' ', a, ' ', b]);
    text = pairs(&text, |a, b| digit(a) && b == '-', |a, b| vec![a, ' ', b, ' ']);
    text.into_iter().collect::<String>().split_whitespace().map(str::to_owned).collect()
}

/// Replaces neighbours that match, from the left, none of them twice.
fn pairs(text: &[char], is: impl Fn(char, char) -> bool, by: impl Fn(char, char) -> Vec<char>) -> Vec<char> {
    let (mut out, mut i) = (Vec::with_capacity(text.len() + 16), 0);
    while i < text.len() {
        match text.get(i + 1) {
            Some(&next) if is(text[i], next) => {
                out.extend(by(text[i], next));
                i += 2;
            }
            _ => {
                out.push(text[i]);
                i += 1;
            }
        }
    }
    out
}
