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
use crate::ops::gpu::{Carried, Later};
use crate::ops::sample::device::{Choices, Logprobs, Of, Plan, Sampling, Scores, Wanted};
use candle_core::Tensor;
use std::collections::HashMap;

/// Who gets a log-probability.
enum For {
    /// The step's sampled token of that number.
    Choice(usize),
    /// Own token `index` of a sequence, and which it is.
    Score(SequenceId, usize, u32),
}

/// What a step chooses, planned before it runs: it goes to the device with the step's rows.
pub struct Choosing<'a> {
    sampling: &'a mut Sampling,
    /// Whose tokens, in their places.
    whose: Vec<SequenceId>,
    receivers: Vec<For>,
    /// Of blocks of logits that are still to come.
    plans: std::vec::IntoIter<Plan>,
    /// One for each of `receivers`, in this order.
    scores: Vec<Scores>,
}

/// What a step has chosen, on its way.
pub struct Chosen {
    whose: Vec<SequenceId>,
    receivers: Vec<For>,
    scores: Vec<Scores>,
    tokens: Later<u32>,
}

impl<'a> Choosing<'a> {
    /// Plans what becomes of every row of logits, and has the batch carry it.
    pub fn plan(
        prepared: &mut Prepared,
        sampling: &'a mut Sampling,
        scheduler: &Scheduler,
        sequences: &mut HashMap<SequenceId, Sequence>,
        eos: &[u32],
    ) -> Result<Self> {
        let (mut whose, mut receivers, mut plans) = (Vec::new(), Vec::new(), Vec::new());
        // A class is read on the processor.
        for block in prepared.blocks.iter().filter(|block| block.classifies.is_none()) {
            let (mut choices, mut wanted, at) = (Choices::default(), Vec::new(), whose.len());
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
                            receivers.push(For::Choice(whose.len()));
                        }
                        choices.push(row, sampler.filter(), u, &sampler.penalties(unread), sampler.seen(), &banned);
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
            plans.push(sampling.plan(block.uses.len(), at, &choices, &wanted, &mut prepared.batch.carried)?);
        }
        Ok(Choosing { sampling, whose, receivers, plans: plans.into_iter(), scores: Vec::new() })
    }

    /// As [`super::take`], from the next block's logits `[uses, vocab]` on the device.
    pub fn take(&mut self, logits: &Tensor, carried: &Carried) -> Result<()> {
        let plan = self.plans.next().ok_or_else(|| Error::internal("a block of logits that nobody planned"))?;
        self.scores.extend(self.sampling.choose(logits, &plan, carried)?);
        Ok(())
    }

    /// All of the step is launched.
    pub fn finish(self) -> Result<Chosen> {
        if self.plans.len() > 0 {
            return Err(Error::internal("a planned block of logits did not come"));
        }
        let tokens = self.sampling.finish(self.whose.len())?;
        Ok(Chosen { whose: self.whose, receivers: self.receivers, scores: self.scores, tokens })
    }
}

impl Chosen {
    /// Whose tokens they are, in their places on the device.
    pub fn whose(&self) -> &[SequenceId] {
        &self.whose
    }

    /// Waits for the step. Scores go to their sequences; the tokens are returned, for those that are still there.
    pub fn wait(self, sequences: &mut HashMap<SequenceId, Sequence>) -> Result<Vec<(SequenceId, Sampled)>> {
        let Chosen { whose, receivers, scores, tokens } = self;
        let ids = tokens.wait()?;
        let mut sampled: Vec<_> =
            whose.into_iter().zip(&ids).map(|(id, token)| (id, Sampled { id: *token, logprob: None })).collect();
        let scores = scores.into_iter().map(Scores::wait).collect::<candle_core::Result<Vec<_>>>()?;
        for (receiver, Logprobs { logprob, top }) in receivers.into_iter().zip(scores.into_iter().flatten()) {
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
