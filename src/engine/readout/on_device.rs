//! The same where the logits are on a GPU: they stay there. Tokens and log-probabilities come back when they are asked for, which may be
//! after the next step was launched.
use super::super::batcher::LogitUse;
use super::super::request::TokenLogprob;
use super::super::runner::Prepared;
use super::super::sampler::Sampled;
use super::super::scheduler::{Scheduler, SequenceId};
use super::super::sequence::Sequence;
use crate::adapter::InputRow;
use crate::error::{Error, Result};
use crate::ops::sample::device::{self, Block, Choices, Logprobs, Of, Wanted};
use std::collections::HashMap;

/// Who gets a log-probability.
enum For {
    /// The step's sampled token of that number.
    Choice(usize),
    /// Own token `index` of a sequence, and which it is.
    Score(SequenceId, usize, u32),
}

/// Who gets what a step chooses.
pub struct Receivers {
    /// Whose tokens, in their places.
    whose: Vec<SequenceId>,
    /// Of each log-probability.
    scores: Vec<For>,
}

/// What a step has chosen, on its way.
pub struct Chosen {
    receivers: Receivers,
    there: device::Chosen,
}

impl Receivers {
    /// Has the batch choose from every row of logits of the vocabulary.
    pub fn plan(
        prepared: &mut Prepared,
        scheduler: &Scheduler,
        sequences: &mut HashMap<SequenceId, Sequence>,
        eos: &[u32],
    ) -> Result<Self> {
        let (mut whose, mut scores) = (Vec::new(), Vec::new());
        // A class is read on the processor.
        for block in prepared.blocks.iter().filter(|block| block.classifies.is_none()) {
            let (mut choices, mut wanted) = (Choices::default(), Vec::new());
            for (row, usage) in prepared.uses[block.uses.clone()].iter().enumerate() {
                match *usage {
                    LogitUse::Sample { id } => {
                        let (Some(s), Some(entry)) = (sequences.get_mut(&id), scheduler.get(id)) else { continue };
                        let unread = entry.unread();
                        let banned = s.banned(eos, usize::from(unread.is_some())).to_vec();
                        let sampler = &mut s.sampler;
                        let u = sampler.draw();
                        if let Some(top) = sampler.top_logprobs() {
                            wanted.push(Wanted { row, of: Of::Choice(choices.len()), top });
                            scores.push(For::Choice(whose.len()));
                        }
                        choices.push(row, sampler.filter(), u, &sampler.penalties(unread), sampler.seen(), &banned);
                        whose.push(id);
                    }
                    LogitUse::Score { id, index } => {
                        let (Some(s), Some(entry)) = (sequences.get(&id), scheduler.get(id)) else { continue };
                        // Admission saw that only tokens are scored.
                        let InputRow::Token(token) = entry.tokens()[index] else { continue };
                        wanted.push(Wanted { row, of: Of::Token(token), top: s.top_logprobs.unwrap_or(0) });
                        scores.push(For::Score(id, index, token));
                    }
                    LogitUse::Pool { .. } => return Err(Error::internal("a class is not read from the vocabulary")),
                }
            }
            prepared.batch.choose.push(Block { rows: block.uses.clone(), choices, wanted });
        }
        Ok(Receivers { whose, scores })
    }

    /// The step is launched, and this is what it chose.
    pub fn of(self, there: device::Chosen) -> Chosen {
        Chosen { receivers: self, there }
    }
}

impl Chosen {
    /// Whose tokens they are, in their places on the device.
    pub fn whose(&self) -> &[SequenceId] {
        &self.receivers.whose
    }

    /// Waits for the step. Scores go to their sequences; the tokens are returned, for those that are still there.
    pub fn wait(self, sequences: &mut HashMap<SequenceId, Sequence>) -> Result<Vec<(SequenceId, Sampled)>> {
        let (ids, logprobs) = self.there.wait()?;
        let Receivers { whose, scores } = self.receivers;
        let mut sampled: Vec<_> =
            whose.into_iter().zip(&ids).map(|(id, token)| (id, Sampled { id: *token, logprob: None })).collect();
        for (receiver, Logprobs { logprob, top }) in scores.into_iter().zip(logprobs) {
            match receiver {
                For::Choice(i) => sampled[i].1.logprob = Some(TokenLogprob { id: ids[i], logprob, top }),
                For::Score(id, index, token) => {
                    let scored = TokenLogprob { id: token, logprob, top };
                    sequences.get_mut(&id).into_iter().for_each(|s| s.scored(index, scored.clone()));
                }
            }
        }
        sampled.retain(|(id, _)| sequences.contains_key(id));
        sampled.iter().for_each(|(id, token)| {
            sequences.get_mut(id).into_iter().for_each(|s| s.sampler.took(token.id));
        });
        Ok(sampled)
    }
}
