//! The launches of `kernels/sample.cu`: rows of logits on the device become tokens and log-probabilities there.
//!
//! The choice is [`draw`](super::draw)'s of the penalised logits, but for targets that lie within the kernel's fixed point of
//! an edge; its header has the bound.
mod choices;

pub use choices::{Choices, Penalties};

use crate::ops::gpu::{Buffer, Carried, Gpu, Grid, Later, Plain, View, Words};
use candle_core::{Result, Tensor, bail};
use choices::{Change, Choice};
use std::ops::Range;
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

/// A row, a place or a count. What does not fit is beyond any vocabulary and any number of rows.
fn number(v: usize) -> u32 {
    u32::try_from(v).unwrap_or(NONE)
}

/// Which token's log-probability is asked for.
#[derive(Clone, Copy, Debug)]
pub enum Of {
    /// This one's.
    Token(u32),
    /// That of the token which this choice of the same block takes, counted from 0.
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

/// What becomes of some of a step's rows of logits, which are there at once.
pub struct Block {
    /// Which of them.
    pub rows: Range<usize>,
    /// Tokens to choose; rows count from the first of these.
    pub choices: Choices,
    /// Log-probabilities to compute, likewise.
    pub wanted: Vec<Wanted>,
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

/// What a step chooses and computes, as it lies among the words that the step carries.
pub struct Plan {
    layout: Layout,
    /// Words that must be there.
    end: usize,
    /// Of each log-probability that is wanted, how many more.
    tops: Vec<usize>,
}

/// What the launches of a plan depend on, up to what they read from the device.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Layout {
    blocks: Vec<Planned>,
    /// Tokens that are chosen.
    chosen: usize,
    /// The word at which changes start, and room for how many there is: a power of two.
    changes_at: usize,
    changes: usize,
    /// Pairs of a list of tokens.
    width: usize,
    /// Bytes of the buffer of scores: it changes with them alone.
    room: usize,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Planned {
    rows: Range<usize>,
    /// Places of its tokens.
    tokens: Range<usize>,
    /// Places of its scores.
    scores: Range<usize>,
    /// Where its lists start among the words.
    choices_at: usize,
    wanted_at: usize,
}

/// What a step has chosen, on its way to the host.
pub struct Chosen {
    tokens: Later<u32>,
    /// If any are wanted.
    bits: Option<Later<u32>>,
    width: usize,
    tops: Vec<usize>,
}

impl Sampling {
    /// For steps of up to as many tokens as `before` has room for, where they go when a step has ended.
    ///
    /// # Errors
    /// When the device has no memory for it.
    pub fn new(gpu: &Gpu, before: &Arc<Buffer>) -> Result<Self> {
        let room = |bytes: usize| Ok::<_, candle_core::Error>(Arc::new(Buffer::poisoned(gpu, bytes)?));
        // Tests outgrow that of scores.
        let scores = if cfg!(debug_assertions) { 4 } else { 1 << 16 };
        Ok(Sampling { gpu: gpu.clone(), tokens: room(before.bytes())?, before: before.clone(), scores: room(scores)? })
    }

    /// Adds to `words` what to choose from the `blocks` of a step, after all work on the last one. Tokens get their places, and
    /// log-probabilities their order, from the first block to the last.
    ///
    /// # Errors
    /// If there are no such rows, places or choices, or too many tokens are to be listed.
    pub fn plan(&mut self, blocks: &[Block], words: &mut Words) -> Result<Plan> {
        let room = self.tokens.bytes() / size_of::<u32>();
        let (mut planned, mut tops, mut chosen, mut changes) = (Vec::new(), Vec::new(), 0, Vec::new());
        for Block { rows, choices, wanted } in blocks {
            let (n, first) = (rows.len(), number(changes.len()));
            if let Some(c) = choices.rows.iter().find(|c| c.row as usize >= n) {
                bail!("sample: row {} of {n} rows of logits", c.row);
            }
            if let Some(c) = choices.rows.iter().find(|c| c.pending != NONE && c.pending as usize >= room) {
                bail!("sample: a token in place {} of {room}", c.pending);
            }
            let raw = wanted.iter().map(|w| w.raw(n, choices.len())).collect::<Result<Vec<_>>>()?;
            let moved = |c: &Choice| Choice { begin: first + c.begin, end: first + c.end, ..*c };
            planned.push(Planned {
                rows: rows.clone(),
                tokens: chosen..chosen + choices.len(),
                scores: tops.len()..tops.len() + raw.len(),
                choices_at: words.add(&choices.rows.iter().map(moved).collect::<Vec<_>>()),
                wanted_at: words.add(&raw),
            });
            chosen += choices.len();
            changes.extend_from_slice(&choices.changes);
            tops.extend(wanted.iter().map(|w| w.top));
        }
        if chosen > room {
            bail!("sample: {chosen} tokens in a step, {room} have room");
        }
        // Their number changes from step to step, and what lies behind them must not move with it.
        if !changes.is_empty() {
            changes.resize(changes.len().next_power_of_two(), Change { id: 0, count: 0 });
        }
        let (changes_at, changes) = (words.add(&changes), changes.len());
        // Few graphs, whatever is asked for.
        let width = if tops.iter().any(|top| *top > 0) { MOST_TOP } else { 0 };
        Buffer::make_room(&mut self.scores, &self.gpu, tops.len() * (1 + 2 * width) * size_of::<u32>())?;
        let layout = Layout { blocks: planned, chosen, changes_at, changes, width, room: self.scores.bytes() };
        Ok(Plan { layout, end: words.len(), tops })
    }

    /// Chooses the tokens of a block of `plan` from its logits `[rows, vocab]`, and computes what is wanted of their log-probabilities. The
    /// plan's words went over in `carried`, with the pass that gave these logits.
    ///
    /// # Errors
    /// If logits or words are not those of the plan, or the vocabulary is too wide.
    pub fn choose(&self, plan: &Plan, block: usize, logits: &Tensor, carried: &Carried) -> Result<()> {
        let (rows, layout) = (logits.dims2()?.0, &plan.layout);
        let Some(Planned { rows: own, tokens, scores, choices_at, wanted_at }) = layout.blocks.get(block) else {
            bail!("sample: block {block} of {}", layout.blocks.len())
        };
        if rows != own.len() {
            bail!("sample: {rows} rows of logits, planned for {}", own.len());
        }
        if plan.end > carried.len() {
            bail!("sample: {} words were carried, the plan has {}", carried.len(), plan.end);
        }
        let [choices, changes, wanted] = [*choices_at, layout.changes_at, *wanted_at].map(|word| carried.word(word));
        let grid = |blocks: usize| Grid { blocks: [number(blocks), 1, 1], threads: THREADS, shared: SHARED };
        self.gpu.with("sample", &[logits], |views| {
            let (view, vocab) = (&views[0], vocabulary(&views[0])?);
            let call = self.gpu.call("sample", logits.dtype()).view(view).buffer(choices.0, choices.1, 4);
            let call = call.buffer(changes.0, changes.1, 4).buffer(&self.before, 0, 4);
            let call = call.buffer(&self.tokens, tokens.start, 4).int(vocab);
            // SAFETY: the kernel's arguments; `plan` checked rows and places and wrote as many choices and changes as it says, and as many words
            // were carried.
            unsafe { call.launch(grid(tokens.len())) }
        })?;
        if scores.is_empty() {
            return Ok(());
        }
        self.gpu.with("logprobs", &[logits], |views| {
            let (view, vocab) = (&views[0], vocabulary(&views[0])?);
            let call = self.gpu.call("logprobs", logits.dtype()).view(view).buffer(wanted.0, wanted.1, 4);
            let call = call.buffer(&self.tokens, tokens.start, 4);
            let call = call.buffer(&self.scores, scores.start * (1 + 2 * layout.width), 4).int(vocab).int(layout.width);
            // SAFETY: the kernel's arguments; `plan` checked rows, choices and the width, and made room for all that is wanted.
            unsafe { call.launch(grid(scores.len())) }
        })
    }

    /// Ends a step all of whose blocks were chosen from: rows and penalties of the next one may name its tokens by their places.
    pub fn end(&self, plan: &Plan) -> Result<()> {
        self.before.copy(&self.tokens, plan.layout.chosen * size_of::<u32>())
    }

    /// What the last step has chosen, of which this was the plan.
    pub fn read(&self, plan: Plan) -> Result<Chosen> {
        let Plan { layout: Layout { chosen, width, .. }, tops, .. } = plan;
        let bits = match tops.len() {
            0 => None,
            n => Some(self.scores.read_later(0, n * (1 + 2 * width))?),
        };
        Ok(Chosen { tokens: self.tokens.read_later(0, chosen)?, bits, width, tops })
    }
}

impl Plan {
    /// Equal ones have equal launches, up to what those read from the device.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Of each block, its rows.
    pub fn blocks(&self) -> impl Iterator<Item = &Range<usize>> {
        self.layout.blocks.iter().map(|block| &block.rows)
    }
}

impl Chosen {
    /// Waits for the tokens, in the order of their places, and the log-probabilities, in the order in which they were wanted.
    pub fn wait(self) -> Result<(Vec<u32>, Vec<Logprobs>)> {
        let (tokens, width) = (self.tokens.wait()?, self.width);
        let read = |(bits, top): (&[u32], &usize)| {
            let (ids, logprobs) = bits[1..].split_at(width);
            // A small vocabulary may have fewer.
            let listed = ids.iter().zip(logprobs).take(*top).filter(|(id, _)| **id != NONE);
            let top = listed.map(|(id, x)| (*id, f32::from_bits(*x))).collect();
            Logprobs { logprob: f32::from_bits(bits[0]), top }
        };
        let bits = self.bits.map_or(Ok(Vec::new()), Later::wait)?;
        Ok((tokens, bits.chunks_exact(1 + 2 * width).zip(&self.tops).map(read).collect()))
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
