//! Corpus BLEU with sacrebleu's defaults.
use super::{ngrams, ratio};
use std::collections::HashMap;

/// The longest n-grams that count.
const ORDER: usize = 4;

/// Corpus BLEU, 0..100 (Papineni et al. 2002), with the defaults of `sacrebleu.corpus_bleu` (Post 2018): tokeniser 13a,
/// case kept, n-grams of 1 to 4 words, exponential smoothing.
///
/// `100 * BP * (p1 p2 p3 p4)^(1/4)`, where `pn` is the share of the predictions' n-grams that occur in a reference,
/// each at most as often as in the reference that has it most; all counts are summed over the corpus first. With `c`
/// words in the predictions and `r` in the references, `BP = min(1, exp(1 - r / c))`; among several references the
/// closest in length counts, the shorter of two that are equally close. The k-th `pn` without a match becomes
/// `1 / (2^k * n-grams)` (Chen and Cherry 2014, method 3). 0 if no word matches, or if no prediction has four words.
///
/// Each prediction may have its own number of references. One that has none, which sacrebleu refuses, matches nothing
/// and adds nothing to `r`.
pub fn bleu(predictions: &[&str], references: &[Vec<&str>]) -> f64 {
    let (mut matched, mut total) = ([0; ORDER], [0; ORDER]);
    let (mut length, mut wanted_length) = (0, 0);
    for (prediction, references) in predictions.iter().zip(references) {
        let prediction = tokenize(prediction);
        let prediction = words(&prediction);
        let references: Vec<_> = references.iter().map(|text| tokenize(text)).collect();
        let references: Vec<_> = references.iter().map(|text| words(text)).collect();

        length += prediction.len();
        let lengths = references.iter().map(Vec::len);
        wanted_length += lengths.min_by_key(|&n| (n.abs_diff(prediction.len()), n)).unwrap_or(0);
        for (n, (matched, total)) in (1..).zip(matched.iter_mut().zip(&mut total)) {
            let mut allowed = HashMap::new();
            for (gram, count) in references.iter().flat_map(|words| ngrams(words, n)) {
                let most: &mut usize = allowed.entry(gram).or_default();
                *most = count.max(*most);
            }
            for (gram, count) in ngrams(&prediction, n) {
                *total += count;
                *matched += count.min(allowed.get(gram).copied().unwrap_or(0));
            }
        }
    }
    score(&matched, &total, length, wanted_length)
}

/// BLEU from the counts of a corpus.
fn score(matched: &[usize; ORDER], total: &[usize; ORDER], length: usize, wanted_length: usize) -> f64 {
    if matched[0] == 0 || total.contains(&0) {
        return 0.0;
    }
    let mut smoothing = 1.0;
    let mut sum = 0.0;
    for (&matched, &total) in matched.iter().zip(total) {
        let precision = if matched == 0 {
            smoothing *= 2.0;
            1.0 / (smoothing * total as f64)
        } else {
            ratio(matched, total)
        };
        sum += precision.ln();
    }
    let brevity = (1.0 - wanted_length as f64 / length as f64).min(0.0);
    100.0 * (brevity + sum / ORDER as f64).exp()
}

/// The tokeniser of mteval-v13a, as sacrebleu has it: words and marks come back with whitespace between them.
///
/// Only marks of ASCII are split off. A full stop or comma stays with its digits in `1,000.5`, a hyphen stays where no
/// digit is before it, an apostrophe stays always.
fn tokenize(text: &str) -> String {
    let text = text.trim_end_matches(is_space).replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    // In this order: `&amp;lt;` becomes `<`.
    let text = text.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">");
    // The spaces around stand for neighbours of the first and the last character.
    let mut spaced = String::with_capacity(text.len() + 2);
    spaced.push(' ');
    for c in text.chars() {
        if c.is_ascii_punctuation() && !matches!(c, '\'' | ',' | '-' | '.') {
            spaced.extend([' ', c, ' ']);
        } else {
            spaced.push(c);
        }
    }
    spaced.push(' ');
    let stop = |c: char| matches!(c, '.' | ',');
    let digit = |c: char| c.is_ascii_digit();
    let text = part(&spaced, |a, b| !digit(a) && stop(b), |a, b| [a, ' ', b, ' ']);
    let text = part(&text, |a, b| stop(a) && !digit(b), |a, b| [' ', a, ' ', b]);
    part(&text, |a, b| digit(a) && b == '-', |a, b| [a, ' ', b, ' '])
}

/// Writes neighbours that `fits` as `spaced` has them, from left to right. No character is part of two such pairs, as
/// in a replacement by a regular expression.
fn part(text: &str, fits: impl Fn(char, char) -> bool, spaced: impl Fn(char, char) -> [char; 4]) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / 2);
    let mut chars = text.chars().peekable();
    while let Some(a) = chars.next() {
        match chars.next_if(|&b| fits(a, b)) {
            Some(b) => out.extend(spaced(a, b)),
            None => out.push(a),
        }
    }
    out
}

fn words(text: &str) -> Vec<&str> {
    text.split(is_space).filter(|word| !word.is_empty()).collect()
}

/// Whitespace in Python's sense: the four separators of ASCII belong to it.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}
