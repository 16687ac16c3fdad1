//! The launches of `kernels/sample.cu`: rows of logits on the device become tokens and log-probabilities there.
//!
//! The choice is [`draw`](super::draw)'s of the penalised logits, but for targets that lie within the kernel's fixed point of
//! an edge; its header has the bound.
use super::Filter;
use crate::ops::gpu::{Buffer, Carried, Gpu, Grid, Later, Plain, View, Words};
use candle_core::{Result, Tensor, bail};
use std::cmp::Reverse;
use std::sync::Arc;

/// The widest vocabulary whose weights sum to less than 2^64.
pub const MOST_TOKENS: usize = 1 << 19;
/// The most tokens that one row's log-probabilities can list.
pub const MOST_TOP: usize = 20;
/// In a change's count: the token is not to be chosen. In a `from`: the token is given. In a `pending`: there is none.
const NONE: u32 = u32::MAX;
/// Threads of a block, which a histogram's bins are made for.
const THREADS: u32 = 1024;
/// Two histograms of 2048 bins of 8 bytes.
const SHARED: u32 = 2 * 2048 * 8;

/// What makes a token less likely the more often it was seen.
#[derive(Clone, Copy, Debug)]
pub struct Penalties {
    /// Divides positive logits and multiplies others, of tokens in the prompt too. 1 changes nothing.
    pub repetition: f32,
    /// Taken off once. 0 changes nothing.
    pub presence: f32,
    /// Taken off for each time. 0 changes nothing.
    pub frequency: f32,
    /// The place of a token that the step before chose: it was seen once more than is known.
    pub pending: Option<u32>,
}

impl Penalties {
    /// Change nothing.
    pub const NONE: Self = Penalties { repetition: 1.0, presence: 0.0, frequency: 0.0, pending: None };
}

/// As the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Choice {
    u: f64,
    row: u32,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition: f32,
    presence: f32,
    frequency: f32,
    begin: u32,
    end: u32,
    pending: u32,
    /// What an f64 in an array wants.
    unused: u32,
}
// SAFETY: one f64 and twelve fields of 4 bytes leave no padding, and all of them are numbers.
unsafe impl Plain for Choice {}

/// As the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy)]
struct Change {
    id: u32,
    count: u32,
}
// SAFETY: two numbers of 4 bytes.
unsafe impl Plain for Change {}

/// As the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy)]
struct RawWanted {
    row: u32,
    token: u32,
    from: u32,
    top: u32,
}
// SAFETY: four numbers of 4 bytes.
unsafe impl Plain for RawWanted {}

/// The tokens to choose from a block of rows.
#[derive(Default)]
pub struct Choices {
    rows: Vec<Choice>,
    changes: Vec<Change>,
}

impl Choices {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// One more: from row `row` of the logits, with `u` in [0, 1). `seen` has each token that `penalties` apply to once, and how
    /// often it is in the output, 0 if only in the prompt; `banned` ones are not chosen.
    pub fn push(
        &mut self,
        row: usize,
        filter: &Filter,
        u: f64,
        penalties: &Penalties,
        seen: impl IntoIterator<Item = (u32, u32)>,
        banned: &[u32],
    ) {
        let begin = self.changes.len();
        self.changes.extend(seen.into_iter().map(|(id, count)| Change { id, count: count.min(NONE - 2) }));
        self.changes.extend(banned.iter().map(|id| Change { id: *id, count: NONE }));
        // The kernel takes each id once, and searches by it. A ban outweighs a count.
        self.changes[begin..].sort_unstable_by_key(|c| (c.id, Reverse(c.count)));
        let mut end = begin;
        for i in begin..self.changes.len() {
            if end == begin || self.changes[end - 1].id != self.changes[i].id {
                self.changes[end] = self.changes[i];
                end += 1;
            }
        }
        self.changes.truncate(end);
        let Penalties { repetition, presence, frequency, pending } = *penalties;
        self.rows.push(Choice {
            u,
            row: number(row),
            temperature: filter.temperature,
            top_k: number(filter.top_k),
            top_p: filter.top_p,
            min_p: filter.min_p,
            repetition,
            presence,
            frequency,
            begin: number(begin),
            end: number(end),
            pending: pending.unwrap_or(NONE),
            unused: 0,
        });
    }
}

/// A row, a place or a count. What does not fit is beyond any vocabulary and any number of rows.
fn number(v: usize) -> u32 {
    u32::try_from(v).unwrap_or(NONE)
}

/// Which token's log-probability is asked for.
#[derive(Clone, Copy, Debug)]
pub enum Of {
    /// This one's.
    Token(u32),
    /// That of the token which this choice of the same plan takes, counted from 0.
    Choice(usize),
}

/// Log-probabilities to compute from one row.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Row of the logits.
    pub row: usize,
    /// Of which token.
    pub of: Of,
    /// How many of the most likely tokens besides, at most [`MOST_TOP`].
    pub top: usize,
}

impl Wanted {
    /// As the kernel reads it, of `rows` rows and `chosen` choices.
    fn raw(&self, rows: usize, chosen: usize) -> Result<RawWanted> {
        let (token, from) = match self.of {
            Of::Token(token) => (token, NONE),
            Of::Choice(i) if i < chosen => (0, number(i)),
            Of::Choice(i) => bail!("logprobs: choice {i} of {chosen}"),
        };
        if self.row >= rows {
            bail!("logprobs: row {} of {rows} rows of logits", self.row);
        }
        if self.top > MOST_TOP {
            bail!("logprobs: {} tokens of a row, at most {MOST_TOP} can be listed", self.top);
        }
        Ok(RawWanted { row: number(self.row), token, from, top: number(self.top) })
    }
}

/// What [`Wanted`] asks for, under the model's own distribution: without penalties and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the token.
    pub logprob: f32,
    /// The most likely ones, best first, smaller ids first among equals.
    pub top: Vec<(u32, f32)>,
}

/// Chooses tokens, a step after the other. What it needs on the device is kept from step to step.
pub struct Sampling {
    gpu: Gpu,
    /// Tokens of the step at hand, u32.
    tokens: Arc<Buffer>,
    /// Tokens of the step before: what the next one's rows and penalties may name.
    before: Arc<Buffer>,
    scores: Arc<Buffer>,
}

/// What to choose and what to compute from one block of rows of logits, as it lies among the words that a step carries.
pub struct Plan {
    /// Rows of the block.
    rows: usize,
    /// Place of the first token.
    at: usize,
    /// Tokens to choose.
    count: usize,
    /// Where lists start among the words, and where all end.
    choices_at: usize,
    changes_at: usize,
    wanted_at: usize,
    end: usize,
    /// Of each that is wanted, how many more.
    tops: Vec<usize>,
}

/// Log-probabilities on their way to the host.
pub struct Scores {
    bits: Later<u32>,
    width: usize,
    tops: Vec<usize>,
}

impl Sampling {
    /// Tokens that `before` has room for.
    pub fn most(before: &Buffer) -> usize {
        before.bytes() / size_of::<u32>()
    }

    /// For steps of about `rows` tokens, of which [`Sampling::most`] go to `before` when a step has ended.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn new(gpu: &Gpu, before: &Arc<Buffer>, rows: usize) -> Result<Self> {
        let room = |bytes: usize| Ok::<_, candle_core::Error>(Arc::new(Buffer::poisoned(gpu, bytes)?));
        Ok(Sampling {
            gpu: gpu.clone(),
            tokens: room(before.bytes())?,
            before: before.clone(),
            scores: room(rows * 4)?,
        })
    }

    /// Adds to `words` what to choose and what is wanted of a block of `rows` rows of logits; its tokens get the places from `at` on.
    ///
    /// # Errors
    /// If there are no such rows, places or choices, or too many tokens are to be listed.
    pub fn plan(
        &self,
        rows: usize,
        at: usize,
        choices: &Choices,
        wanted: &[Wanted],
        words: &mut Words,
    ) -> Result<Plan> {
        let (count, room) = (choices.len(), Self::most(&self.tokens));
        if let Some(c) = choices.rows.iter().find(|c| c.row as usize >= rows) {
            bail!("sample: row {} of {rows} rows of logits", c.row);
        }
        if let Some(c) = choices.rows.iter().find(|c| c.pending != NONE && c.pending as usize >= room) {
            bail!("sample: a token in place {} of {room}", c.pending);
        }
        if at + count > room {
            bail!("sample: {} tokens in a step, {room} have room", at + count);
        }
        let raw = wanted.iter().map(|w| w.raw(rows, count)).collect::<Result<Vec<_>>>()?;
        let choices_at = words.add(&choices.rows);
        let changes_at = words.add(&choices.changes);
        let wanted_at = words.add(&raw);
        let tops = wanted.iter().map(|w| w.top).collect();
        Ok(Plan { rows, at, count, choices_at, changes_at, wanted_at, end: words.len(), tops })
    }

    /// Chooses the tokens of `plan` from logits `[rows, vocab]`; its words went over in `carried`, with the pass that gave these logits. Then
    /// computes what is wanted of the log-probabilities of these rows.
    pub fn choose(&mut self, logits: &Tensor, plan: &Plan, carried: &Carried) -> Result<Option<Scores>> {
        let rows = logits.dims2()?.0;
        if rows != plan.rows {
            bail!("sample: {rows} rows of logits, planned for {}", plan.rows);
        }
        if plan.end > carried.len() {
            bail!("sample: {} words were carried, the plan has {}", carried.len(), plan.end);
        }
        self.gpu.with("sample", &[logits], |views| {
            let (logits, vocab) = (&views[0], vocabulary(&views[0])?);
            let [choices, changes] = [plan.choices_at, plan.changes_at].map(|word| carried.word(word));
            let tokens = &self.tokens;
            let call = self.gpu.call("sample", logits.dtype()).view(logits).buffer(choices.0, choices.1, 4);
            let call = call.buffer(changes.0, changes.1, 4).buffer(&self.before, 0, 4).buffer(tokens, plan.at, 4);
            let grid = Grid { blocks: [number(plan.count), 1, 1], threads: THREADS, shared: SHARED };
            // SAFETY: the kernel's arguments; `plan` checked rows and places and wrote as many choices and changes as it says, and as many words
            // were carried.
            unsafe { call.int(vocab).launch(grid) }
        })?;
        if plan.tops.is_empty() { Ok(None) } else { self.score(logits, plan, carried).map(Some) }
    }

    fn score(&mut self, logits: &Tensor, plan: &Plan, carried: &Carried) -> Result<Scores> {
        let tops = plan.tops.clone();
        let width = tops.iter().copied().max().unwrap_or(0);
        let words = tops.len() * (1 + 2 * width);
        Buffer::make_room(&mut self.scores, &self.gpu, words * size_of::<u32>())?;
        self.gpu.with("logprobs", &[logits], |views| {
            let (logits, vocab) = (&views[0], vocabulary(&views[0])?);
            let wanted = carried.word(plan.wanted_at);
            let call = self.gpu.call("logprobs", logits.dtype()).view(logits).buffer(wanted.0, wanted.1, 4);
            let call = call.buffer(&self.tokens, plan.at, 4).buffer(&self.scores, 0, 4);
            let grid = Grid { blocks: [number(tops.len()), 1, 1], threads: THREADS, shared: SHARED };
            // SAFETY: the kernel's arguments; rows, choices and the width were checked, and there is room for all that is wanted.
            unsafe { call.int(vocab).int(width).launch(grid) }
        })?;
        Ok(Scores { bits: self.scores.read_later(0, words)?, width, tops })
    }

    /// Ends the step: its `chosen` tokens are on their way to the host, and the next one's rows may name them by their places.
    pub fn finish(&mut self, chosen: usize) -> Result<Later<u32>> {
        self.before.copy(&self.tokens, chosen * size_of::<u32>())?;
        self.tokens.read_later(0, chosen)
    }
}

impl Scores {
    /// Waits for them, one for each that was wanted.
    pub fn wait(self) -> Result<Vec<Logprobs>> {
        let (bits, width) = (self.bits.wait()?, self.width);
        let read = |(bits, top): (&[u32], &usize)| {
            let (ids, logprobs) = bits[1..].split_at(width);
            // A small vocabulary may have fewer.
            let listed = ids.iter().zip(logprobs).take(*top).filter(|(id, _)| **id != NONE);
            let top = listed.map(|(id, x)| (*id, f32::from_bits(*x))).collect();
            Logprobs { logprob: f32::from_bits(bits[0]), top }
        };
        Ok(bits.chunks_exact(1 + 2 * width).zip(&self.tops).map(read).collect())
    }
}

/// The vocabulary of logits `[rows, vocab]`, if the kernels can have it.
fn vocabulary(logits: &View<'_>) -> Result<usize> {
    match logits.dims2()? {
        (_, 0) => bail!("sample: there are no logits"),
        (_, vocab) if vocab > MOST_TOKENS => bail!("sample: {vocab} tokens, at most {MOST_TOKENS} are supported"),
        (_, vocab) => Ok(vocab),
    }
}

#[cfg(all(test, feature = "emulate"))]
mod tests;
