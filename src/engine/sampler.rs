//! One request's way to choose tokens: its filters, its penalties, its own generator.
use super::request::{Sampling, TokenLogprob};
use crate::ops::sample::device::Penalties;
use crate::ops::sample::{self, Filter};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::collections::HashMap;

/// A token that was chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub id: u32,
    /// Its log-probability, if the request wants it: it costs a pass over the vocabulary.
    pub logprob: Option<TokenLogprob>,
}

/// State of one sequence's sampling. It survives preemption, so what is drawn does not depend on it.
pub struct Sampler {
    filter: Filter,
    sampling: Sampling,
    rng: StdRng,
    /// How often each token is in the output; 0: in the prompt only. Kept only if a penalty asks for it.
    seen: HashMap<u32, u32>,
    top_logprobs: Option<usize>,
    /// Logits with penalties applied; kept to be filled again.
    scratch: Vec<f32>,
}

impl Sampler {
    /// `prompt` counts for the repetition penalty.
    pub fn new(sampling: Sampling, prompt: &[u32], top_logprobs: Option<usize>) -> Self {
        let filter = Filter {
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            min_p: sampling.min_p,
        };
        let repetition = sampling.repetition_penalty != 1.0;
        let seen = if repetition { prompt.iter().map(|t| (*t, 0)).collect() } else { HashMap::new() };
        let rng = StdRng::seed_from_u64(sampling.seed);
        Sampler { filter, sampling, rng, seen, top_logprobs, scratch: Vec::new() }
    }

    /// Chooses a token from `logits` `[vocab]`; `banned` ones are not chosen.
    pub fn sample(&mut self, logits: &[f32], banned: &[u32]) -> Sampled {
        let plain = self.seen.is_empty() && banned.is_empty();
        if !plain {
            self.penalise(logits, banned);
        }
        let changed = if plain { logits } else { &self.scratch };
        let u = draw(&self.filter, &mut self.rng);
        let id = sample::draw(changed, &self.filter, u) as u32;
        self.took(id);
        Sampled { id, logprob: self.top_logprobs.map(|top| logprob(logits, id, top)) }
    }

    /// The next uniform number, for who chooses elsewhere: [`Sampler::sample`] draws its own.
    pub fn draw(&mut self) -> f64 {
        draw(&self.filter, &mut self.rng)
    }

    /// How tokens are filtered.
    pub fn filter(&self) -> &Filter {
        &self.filter
    }

    /// What makes seen tokens less likely, and the one in place `unread` of the device.
    pub fn penalties(&self, unread: Option<u32>) -> Penalties {
        let s = &self.sampling;
        let (repetition, presence, frequency) = (s.repetition_penalty, s.presence_penalty, s.frequency_penalty);
        Penalties { repetition, presence, frequency, pending: unread.filter(|_| self.counts()) }
    }

    /// Whether what was seen matters.
    fn counts(&self) -> bool {
        let s = &self.sampling;
        s.repetition_penalty != 1.0 || s.presence_penalty != 0.0 || s.frequency_penalty != 0.0
    }

    /// Tokens that penalties apply to, and how often each is in the output.
    pub fn seen(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.seen.iter().map(|(id, count)| (*id, *count))
    }

    /// How many of the most likely tokens are wanted beside each log-probability; `None`: no log-probability.
    pub fn top_logprobs(&self) -> Option<usize> {
        self.top_logprobs
    }

    /// A token was chosen, here or elsewhere.
    pub fn took(&mut self, id: u32) {
        if self.counts() {
            *self.seen.entry(id).or_insert(0) += 1;
        }
    }

    fn penalise(&mut self, logits: &[f32], banned: &[u32]) {
        self.scratch.clear();
        self.scratch.extend_from_slice(logits);
        let s = &self.sampling;
        for (&id, &count) in &self.seen {
            let Some(x) = self.scratch.get_mut(id as usize) else { continue };
            *x = if *x > 0.0 { *x / s.repetition_penalty } else { *x * s.repetition_penalty };
            if count > 0 {
                *x -= s.presence_penalty + s.frequency_penalty * count as f32;
            }
        }
        for id in banned {
            if let Some(x) = self.scratch.get_mut(*id as usize) {
                *x = f32::NEG_INFINITY;
            }
        }
    }
}

/// One draw a token, greedy ones none: the generator's state is the number of tokens drawn.
fn draw(filter: &Filter, rng: &mut StdRng) -> f64 {
    if filter.temperature > 0.0 { rng.random::<f64>() } else { 0.0 }
}

/// Log-probability of `id` under `logits` `[vocab]`, and of the `top` most likely tokens.
pub fn logprob(logits: &[f32], id: u32, top: usize) -> TokenLogprob {
    let norm = sample::log_sum_exp(logits);
    let top = sample::top_n(logits, top).into_iter().map(|(id, x)| (id, x - norm)).collect();
    TokenLogprob { id, logprob: logits[id as usize] - norm, top }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn ids(sampling: Sampling, n: usize) -> Vec<u32> {
        let mut s = Sampler::new(sampling, &[1], None);
        (0..n).map(|_| s.sample(&[1.0, 1.2, 1.1, 0.9], &[]).id).collect()
    }

    #[test]
    fn penalties_push_tokens_away() {
        let with = |f: fn(&mut Sampling)| {
            let mut s = Sampling::default();
            f(&mut s);
            ids(s, 4)
        };
        assert_eq!(with(|_| ()), [1, 1, 1, 1]);
        // The prompt's token 1 is pushed from the start: 1.2 / 1.3 < 1.1.
        assert_eq!(with(|s| s.repetition_penalty = 1.3), [2, 0, 1, 1]);
        assert_eq!(with(|s| s.presence_penalty = 0.15), [1, 2, 1, 1]);
        assert_eq!(with(|s| s.frequency_penalty = 0.15), [1, 2, 1, 0]);
    }

    #[test]
    fn a_seed_is_a_sequence() {
        let hot = |seed| ids(Sampling { temperature: 1.0, seed, ..Sampling::default() }, 64);
        assert_eq!(hot(1), hot(1));
        assert_ne!(hot(1), hot(2));
    }

    #[test]
    fn banned_tokens_are_not_chosen_and_logprobs_are_the_models() {
        let mut s = Sampler::new(Sampling::default(), &[], Some(2));
        let t = s.sample(&[0.0, 2.0, 1.0], &[1]).logprob.unwrap();
        let norm = (1.0 + 2f32.exp() + 1f32.exp()).ln();
        assert_eq!(t.id, 2);
        assert!((t.logprob - (1.0 - norm)).abs() < 1e-6);
        assert_eq!(t.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2]);
    }
}
