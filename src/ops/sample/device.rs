//! The launches of `kernels/sample.cu`: rows of logits on the device become tokens and log-probabilities there.
//!
//! The choice is [`draw`](super::draw)'s of the penalised logits, but for targets that lie within the kernel's fixed point of
//! an edge; its header has the bound.
use super::Filter;
use crate::ops::gpu::{Buffer, Fresh, Gpu, Grid, KernelOp, Plain, View};
use candle_core::{DType, Result, Shape, Tensor, bail};
use std::cmp::Reverse;
use std::sync::Arc;

/// The widest vocabulary whose weights sum to less than 2^64.
pub const MOST_TOKENS: usize = 1 << 19;
/// The most tokens that one row's log-probabilities can list.
pub const MOST_TOP: usize = 20;
/// In a change's count: the token is not to be chosen. In a `from`: the token is given.
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
}

impl Penalties {
    /// Change nothing.
    pub const NONE: Self = Penalties { repetition: 1.0, presence: 0.0, frequency: 0.0 };
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
}
// SAFETY: one f64 and ten fields of 4 bytes leave no padding, and all of them are numbers.
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

/// The tokens to choose in one step. Cleared and filled again by the next.
#[derive(Default)]
pub struct Choices {
    rows: Vec<Choice>,
    changes: Vec<Change>,
}

impl Choices {
    /// Forgets all.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.changes.clear();
    }

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
        self.changes.extend(seen.into_iter().map(|(id, count)| Change { id, count: count.min(NONE - 1) }));
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
        let Penalties { repetition, presence, frequency } = *penalties;
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
    /// That of the token which this choice of the same step takes, counted from 0.
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

/// What [`Wanted`] asks for, under the model's own distribution: without penalties and temperature.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the token.
    pub logprob: f32,
    /// The most likely ones, best first, smaller ids first among equals.
    pub top: Vec<(u32, f32)>,
}

/// Where a step's parameters lie on the device; kept from step to step.
pub struct Sampling {
    gpu: Gpu,
    choices: Arc<Buffer>,
    changes: Arc<Buffer>,
    wanted: Arc<Buffer>,
}

impl Sampling {
    /// Room for steps of `rows` rows; it grows when one is larger.
    pub fn new(gpu: &Gpu, rows: usize) -> Result<Self> {
        let room = |bytes: usize| Ok::<_, candle_core::Error>(Arc::new(Buffer::poisoned(gpu, bytes)?));
        Ok(Sampling {
            gpu: gpu.clone(),
            choices: room(rows * size_of::<Choice>())?,
            changes: room(rows * 1024)?,
            wanted: room(rows * size_of::<RawWanted>())?,
        })
    }

    /// logits `[rows, vocab]` -> the tokens `[choices]`, u32, on the device.
    pub fn tokens(&mut self, logits: &Tensor, choices: &Choices) -> Result<Tensor> {
        let rows = logits.dims2()?.0;
        if let Some(c) = choices.rows.iter().find(|c| c.row as usize >= rows) {
            bail!("sample: row {} of {rows} rows of logits", c.row);
        }
        put(&self.gpu, &mut self.choices, &choices.rows)?;
        put(&self.gpu, &mut self.changes, &choices.changes)?;
        let (rows, changes) = (self.choices.clone(), self.changes.clone());
        self.gpu.apply1(Sample { choices: rows, changes, len: choices.len() }, logits)
    }

    /// logits `[rows, vocab]` and the step's `tokens` -> log-probabilities, on the host.
    pub fn logprobs(&mut self, logits: &Tensor, tokens: &Tensor, wanted: &[Wanted]) -> Result<Vec<Logprobs>> {
        let (rows, chosen) = (logits.dims2()?.0, tokens.dims1()?);
        let width = wanted.iter().map(|w| w.top).max().unwrap_or(0);
        if width > MOST_TOP {
            bail!("logprobs: {width} tokens of a row, at most {MOST_TOP} can be listed");
        }
        let raw = |w: &Wanted| {
            let (token, from) = match w.of {
                Of::Token(token) => (token, NONE),
                Of::Choice(i) if i < chosen => (0, number(i)),
                Of::Choice(i) => bail!("logprobs: choice {i} of {chosen}"),
            };
            if w.row >= rows {
                bail!("logprobs: row {} of {rows} rows of logits", w.row);
            }
            Ok(RawWanted { row: number(w.row), token, from, top: number(w.top) })
        };
        put(&self.gpu, &mut self.wanted, &wanted.iter().map(raw).collect::<Result<Vec<_>>>()?)?;
        let op = Score { wanted: self.wanted.clone(), len: wanted.len(), width };
        let bits = self.gpu.apply2(op, logits, tokens)?.to_vec2::<u32>()?;
        let read = |(bits, w): (&Vec<u32>, &Wanted)| {
            let (ids, logprobs) = bits[1..].split_at(width);
            // A small vocabulary may have fewer.
            let listed = ids.iter().zip(logprobs).take(w.top).filter(|(id, _)| **id != NONE);
            let top = listed.map(|(id, x)| (*id, f32::from_bits(*x))).collect();
            Logprobs { logprob: f32::from_bits(bits[0]), top }
        };
        Ok(bits.iter().zip(wanted).map(read).collect())
    }
}

/// Uploads `values`, after all work that reads the last ones.
fn put<T: Plain>(gpu: &Gpu, buffer: &mut Arc<Buffer>, values: &[T]) -> Result<()> {
    let bytes = size_of_val(values);
    if bytes > buffer.bytes() {
        *buffer = Arc::new(Buffer::poisoned(gpu, bytes.next_power_of_two())?);
    }
    buffer.write(0, values)
}

/// The vocabulary of logits `[rows, vocab]`, if the kernels can have it.
fn vocabulary(logits: &View<'_>) -> Result<usize> {
    match logits.dims2()? {
        (_, 0) => bail!("sample: there are no logits"),
        (_, vocab) if vocab > MOST_TOKENS => bail!("sample: {vocab} tokens, at most {MOST_TOKENS} are supported"),
        (_, vocab) => Ok(vocab),
    }
}

struct Sample {
    choices: Arc<Buffer>,
    changes: Arc<Buffer>,
    len: usize,
}

impl KernelOp for Sample {
    const NAME: &'static str = "sample";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let logits = &inputs[0];
        let vocab = vocabulary(logits)?;
        let mut tokens = gpu.fresh(DType::U32, self.len)?;
        let call = gpu.call("sample", logits.dtype()).view(logits).buffer(&self.choices, 0, 1);
        let grid = Grid { blocks: [number(self.len), 1, 1], threads: THREADS, shared: SHARED };
        // SAFETY: the kernel's arguments; `Sampling` checked the rows, and wrote as many choices and changes as they say.
        unsafe { call.buffer(&self.changes, 0, 1).fresh(&mut tokens).int(vocab).launch(grid)? };
        Ok((tokens, self.len.into()))
    }
}

struct Score {
    wanted: Arc<Buffer>,
    len: usize,
    width: usize,
}

impl KernelOp for Score {
    const NAME: &'static str = "logprobs";

    fn run(&self, gpu: &Gpu, inputs: &[View<'_>]) -> Result<(Fresh, Shape)> {
        let (logits, tokens) = (&inputs[0], &inputs[1]);
        let (vocab, columns) = (vocabulary(logits)?, 1 + 2 * self.width);
        if tokens.dtype() != DType::U32 {
            bail!("logprobs: the tokens are {:?}", tokens.dtype());
        }
        let mut out = gpu.fresh(DType::U32, self.len * columns)?;
        let call = gpu.call("logprobs", logits.dtype()).view(logits).buffer(&self.wanted, 0, 1).view(tokens);
        let grid = Grid { blocks: [number(self.len), 1, 1], threads: THREADS, shared: SHARED };
        // SAFETY: the kernel's arguments; `Sampling` checked the rows, the choices and the width.
        unsafe { call.fresh(&mut out).int(vocab).int(self.width).launch(grid)? };
        Ok((out, (self.len, columns).into()))
    }
}

#[cfg(all(test, feature = "emulate"))]
mod tests;
