//! The same where the logits are on a GPU: they stay there, and only tokens and log-probabilities come back.
use super::super::batcher::LogitUse;
use super::super::request::TokenLogprob;
use super::super::sampler::Sampled;
use super::super::scheduler::{Scheduler, SequenceId};
use super::super::sequence::Sequence;
use crate::adapter::InputRow;
use crate::error::{Error, Result};
use crate::ops::sample::device::{Choices, Logprobs, Of, Sampling, Wanted};
use candle_core::Tensor;
use std::collections::HashMap;

/// Who gets a log-probability.
enum For {
    /// The sampled token of that choice.
    Choice(usize),
    /// Own token `index` of a sequence, and which it is.
    Score(SequenceId, usize, u32),
}

/// As [`super::take`], from rows of logits `[uses, vocab]` on the device.
pub fn take(
    uses: &[LogitUse],
    logits: &Tensor,
    sampling: &mut Sampling,
    scheduler: &Scheduler,
    sequences: &mut HashMap<SequenceId, Sequence>,
    eos: &[u32],
    sampled: &mut Vec<(SequenceId, Sampled)>,
) -> Result<()> {
    let (mut choices, mut whose) = (Choices::default(), Vec::new());
    let (mut wanted, mut receivers) = (Vec::new(), Vec::new());
    for (row, usage) in uses.iter().enumerate() {
        match *usage {
            LogitUse::Sample { id } => {
                let Some(sequence) = sequences.get_mut(&id) else { continue };
                let banned = sequence.banned(eos).to_vec();
                let sampler = &mut sequence.sampler;
                let u = sampler.draw();
                choices.push(row, sampler.filter(), u, &sampler.penalties(), sampler.seen(), &banned);
                if let Some(top) = sampler.top_logprobs() {
                    wanted.push(Wanted { row, of: Of::Choice(whose.len()), top });
                    receivers.push(For::Choice(whose.len()));
                }
                whose.push(id);
            }
            LogitUse::Score { id, index } => {
                let (Some(s), Some(entry)) = (sequences.get(&id), scheduler.get(id)) else { continue };
                // Admission saw that only tokens are scored.
                let InputRow::Token(token) = entry.tokens()[index] else { continue };
                wanted.push(Wanted { row, of: Of::Token(token), top: s.top_logprobs.unwrap_or(0) });
                receivers.push(For::Score(id, index, token));
            }
            LogitUse::Pool { .. } => return Err(Error::internal("a class is not read from the vocabulary")),
        }
    }
    let tokens = sampling.tokens(logits, &choices)?;
    let ids = tokens.to_vec1::<u32>()?;
    let logprobs = if wanted.is_empty() { Vec::new() } else { sampling.logprobs(logits, &tokens, &wanted)? };
    let start = sampled.len();
    for (id, token) in whose.into_iter().zip(&ids) {
        sequences.get_mut(&id).into_iter().for_each(|s| s.sampler.took(*token));
        sampled.push((id, Sampled { id: *token, logprob: None }));
    }
    for (receiver, Logprobs { logprob, top }) in receivers.into_iter().zip(logprobs) {
        match receiver {
            For::Choice(i) => sampled[start + i].1.logprob = Some(TokenLogprob { id: ids[i], logprob, top }),
            For::Score(id, index, token) => {
                let scored = TokenLogprob { id: token, logprob, top };
                sequences.get_mut(&id).into_iter().for_each(|s| s.scored(index, scored.clone()));
            }
        }
    }
    Ok(())
}
