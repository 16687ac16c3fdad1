//! From rows of logits to tokens and scores.
pub mod on_device;

use super::batcher::LogitUse;
use super::request::TokenLogprob;
use super::sampler::{self, Sampled};
use super::scheduler::{Scheduler, SequenceId, Step};
use super::sequence::Sequence;
use crate::adapter::{Head, InputRow};
use crate::ops::Pool;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// What a row of logits becomes, on one of the pool's threads.
enum Row<'a> {
    Sample { sequence: &'a mut Sequence, token: Option<Sampled> },
    Score { index: usize, token: u32, top: usize, logprob: Option<TokenLogprob> },
}

/// Takes a block of rows of logits `[uses, width]`: scores go to their sequences, tokens to `sampled`. The vocabulary is wide,
/// so rows are shared out over the pool.
pub fn take(
    uses: &[LogitUse],
    logits: &[f32],
    scheduler: &Scheduler,
    sequences: &mut HashMap<SequenceId, Sequence>,
    eos: &[u32],
    pool: &Pool,
    sampled: &mut Vec<(SequenceId, Sampled)>,
) {
    let width = logits.len() / uses.len();
    if let [LogitUse::Pool { id }] = *uses {
        return sequences.get_mut(&id).into_iter().for_each(|s| s.pooled(logits.to_vec()));
    }
    let samples: HashMap<SequenceId, usize> = (0..uses.len())
        .filter_map(|i| if let LogitUse::Sample { id } = uses[i] { Some((id, i)) } else { None })
        .collect();
    let mut rows: Vec<(usize, Mutex<Row<'_>>)> = Vec::with_capacity(uses.len());
    for (i, usage) in uses.iter().enumerate() {
        let LogitUse::Score { id, index } = *usage else { continue };
        let (Some(s), Some(entry)) = (sequences.get(&id), scheduler.get(id)) else { continue };
        // Admission saw that only tokens are scored.
        let InputRow::Token(token) = entry.tokens()[index] else { continue };
        let top = s.top_logprobs.unwrap_or(0);
        rows.push((i, Mutex::new(Row::Score { index, token, top, logprob: None })));
    }
    for (id, sequence) in sequences.iter_mut() {
        let Some(i) = samples.get(id) else { continue };
        rows.push((*i, Mutex::new(Row::Sample { sequence, token: None })));
    }
    pool.for_each(rows.len(), |r| {
        let (i, row) = &rows[r];
        let logits = &logits[i * width..(i + 1) * width];
        match &mut *row.lock().unwrap_or_else(PoisonError::into_inner) {
            Row::Sample { sequence, token } => {
                let banned = sequence.banned(eos, 0);
                *token = Some(sequence.sampler.sample(logits, banned));
            }
            Row::Score { token, top, logprob, .. } => *logprob = Some(sampler::logprob(logits, *token, *top)),
        }
    });
    let mut done: Vec<_> =
        rows.into_iter().map(|(i, row)| (i, row.into_inner().unwrap_or_else(PoisonError::into_inner))).collect();
    done.sort_by_key(|(i, _)| *i);
    let mut scores = Vec::new();
    for (i, row) in done {
        match (uses[i], row) {
            (LogitUse::Sample { id }, Row::Sample { token: Some(token), .. }) => sampled.push((id, token)),
            (LogitUse::Score { id, .. }, Row::Score { index, logprob: Some(logprob), .. }) => {
                scores.push((id, index, logprob))
            }
            _ => {}
        }
    }
    for (id, index, logprob) in scores {
        sequences.get_mut(&id).into_iter().for_each(|s| s.scored(index, logprob.clone()));
    }
}

/// The heads of the step's sequences that are classified.
pub fn heads(step: &Step, sequences: &HashMap<SequenceId, Sequence>) -> HashMap<SequenceId, Arc<Head>> {
    let head = |id: SequenceId| Some((id, sequences.get(&id)?.head()?.clone()));
    step.sequences.iter().filter_map(|chunk| head(chunk.id)).collect()
}
