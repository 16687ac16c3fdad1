//! The work list of `kernels/prefix_attention.cu`: which block attends with which rows to which spans.
//!
//! A *unit* is up to [`capacity`] query vectors (a row and a head of a KV head's group) and a run of spans; each KV head runs it once. A
//! *whole* unit folds all spans of its rows and writes their results. A *split* unit writes (m, l, o) of each span to scratch, and a second
//! launch folds those of a row. Both fold the same spans in the same order, so the bits are the same, and what is split is a question of
//! load alone: one long sequence would leave most of a device idle. Rows of sequences with one prefix share split units for
//! its spans: the prefix is read once for all of them.
use super::super::{Attention, KvLayout, MAX_HEAD_DIM, PAGE, SPAN, SequenceView};
use candle_core::{Result, bail};
use std::collections::HashMap;
use std::ops::Range;

/// What the layers of one kind attend to in one step.
pub struct Step<'a> {
    /// Their page ranges index `table`.
    pub sequences: &'a [SequenceView],
    /// First slots of runs of [`PAGE`] slots: `page * PAGE`, or any row of packed ones.
    pub table: &'a [u32],
    /// Slots that K and V have.
    pub slots: usize,
    /// Their shape.
    pub layout: KvLayout,
    /// Query heads.
    pub heads: usize,
    /// Of the kind.
    pub attention: Attention,
}

/// When a row's spans are folded by a second launch. Changes no bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Where few long sequences would keep few of so many multiprocessors at work.
    Auto {
        /// Multiprocessors of the device.
        sms: usize,
    },
    /// Always.
    Always,
    /// Never; then prefixes are not shared either.
    Never,
}

/// When sequences share the units of their prefix. Changes no bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Where it saves more reads than it costs.
    Auto,
    /// Wherever two or more have rows that fill no unit of their own.
    Always,
    /// Never.
    Never,
}

/// How to cut the work.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// Over blocks.
    pub split: Split,
    /// Over sequences.
    pub group: Group,
    /// Bytes of scratch. What finds no room in it stays whole.
    pub scratch: usize,
}

/// Fields of `Unit` in the kernel.
pub(super) const UNIT: usize = 18;
/// Fields of `Row` in the kernel.
pub(super) const ROW: usize = 6;
/// Fields of `CombineRow` in the kernel.
pub(super) const COMBINE: usize = 3;
/// What a second launch costs, in slots of one KV head that could be read meanwhile. An estimate, not yet measured.
const LAUNCH: usize = 1024;

/// Query vectors of a unit: the kernel's row tiles hold 16 each, and its accumulators 256 elements of each of those.
pub fn capacity(head_dim: usize) -> usize {
    16 * (256 / width(head_dim)).clamp(1, 4)
}

/// `head_dim` with the zeros that the kernel adds.
pub(super) fn width(head_dim: usize) -> usize {
    [32, 64, 96, 128].into_iter().find(|w| head_dim <= *w).unwrap_or(MAX_HEAD_DIM)
}

/// The list, as the kernel reads it.
///
/// Its layout follows from `m` and `units` alone, and `units` is a power of two: a launch that was recorded for one step serves others.
#[derive(Debug)]
pub struct WorkList {
    /// `[units | rows | rows to combine]`; the table is not in it.
    pub(super) data: Vec<i32>,
    /// Units, the long ones first, then some of no rows.
    pub(super) units: usize,
    /// Whether there are rows to combine. The list has room for all of them; behind them are some of no parts.
    pub(super) combines: bool,
    /// Results of spans that scratch has room for, each of all heads.
    pub(super) room: usize,
    /// Query vectors of the largest unit.
    pub(super) vectors: usize,
    /// Rows of the step.
    pub(super) m: usize,
}

/// Slots that a row sees, of the prefix and of its own part.
#[derive(Clone, Copy)]
struct Seen([Range32; 2]);

#[derive(Clone, Copy)]
struct Range32 {
    lo: usize,
    hi: usize,
}

/// Rows of one sequence that fit a unit.
struct Block {
    sequence: usize,
    rows: Range<usize>,
}

impl Step<'_> {
    /// Everything that the kernel indexes by.
    fn check(&self) -> Result<()> {
        let KvLayout { kv_heads, head_dim } = self.layout;
        if kv_heads == 0 || !self.heads.is_multiple_of(kv_heads) || head_dim == 0 || head_dim > MAX_HEAD_DIM {
            bail!("prefix_attention: {} heads over {kv_heads} of {head_dim}", self.heads);
        }
        if self.attention.window == Some(0) {
            bail!("prefix_attention: a window of no slots");
        }
        let mut next = 0;
        for s in self.sequences {
            if s.rows.start != next || s.rows.end < next {
                bail!("prefix_attention: {s:?} does not follow row {next}");
            }
            next = s.rows.end;
            for (pages, len) in [(&s.prefix_pages, s.prefix_len), (&s.own_pages, s.first + s.rows.len())] {
                let table = self.table.get(pages.clone()).unwrap_or(&[]);
                if table.len() < len.div_ceil(PAGE) {
                    bail!("prefix_attention: {s:?} lacks pages");
                }
                let run = |(i, start): (usize, &u32)| *start as usize + PAGE.min(len - i * PAGE) <= self.slots;
                if !table[..len.div_ceil(PAGE)].iter().enumerate().all(run) {
                    bail!("prefix_attention: {s:?} lies outside of {} slots", self.slots);
                }
            }
        }
        let most = self.slots.max(self.table.len()).max(next).max(next.saturating_mul(self.heads));
        if most > i32::MAX as usize / 2 {
            bail!("prefix_attention: {next} rows of {} heads over {} slots are too many", self.heads, self.slots);
        }
        Ok(())
    }

    fn seen(&self, s: &SequenceView, row: usize) -> Seen {
        let position = s.first + row - s.rows.start;
        let Attention { window, causal, .. } = self.attention;
        // Slots before this one have left the row's window.
        let gone = window.map_or(0, |w| (s.prefix_len + position + 1).saturating_sub(w));
        let end = if causal { position + 1 } else { s.first + s.rows.len() };
        Seen([
            Range32 { lo: gone.min(s.prefix_len), hi: s.prefix_len },
            Range32 { lo: gone.saturating_sub(s.prefix_len), hi: end },
        ])
    }

    /// Spans that a row sees; those of the prefix count first.
    fn spans(&self, s: &SequenceView, row: usize) -> Range<usize> {
        let (Seen([prefix, own]), before) = (self.seen(s, row), s.prefix_len.div_ceil(SPAN));
        let start = if prefix.lo < prefix.hi { prefix.lo / SPAN } else { before + own.lo / SPAN };
        start..before + own.hi.div_ceil(SPAN)
    }

    fn block_spans(&self, block: &Block) -> Range<usize> {
        let s = &self.sequences[block.sequence];
        let spans = block.rows.clone().map(|row| self.spans(s, row));
        spans.reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or(0..0)
    }
}

impl WorkList {
    /// # Errors
    /// If a range of the step lies outside of what it is a range of.
    pub fn new(step: &Step<'_>, cut: Cut) -> Result<Self> {
        step.check()?;
        let group = step.heads / step.layout.kv_heads;
        let most = capacity(step.layout.head_dim);
        // More heads than a unit has room for: so many units share a row.
        let heads = group.div_ceil(group.div_ceil(most));
        let mut maker = Maker {
            step,
            heads: (0..group).step_by(heads).map(|h| h..group.min(h + heads)).collect(),
            rows_of_unit: most / heads,
            room: cut.scratch.saturating_sub(16) / (step.heads * (step.layout.head_dim + 2) * size_of::<f32>()),
            units: Vec::new(),
            rows: Vec::new(),
            combine: Vec::new(),
            partials: 0,
            vectors: 0,
        };
        let mut blocks = Vec::new();
        for (sequence, s) in step.sequences.iter().enumerate() {
            for start in s.rows.clone().step_by(maker.rows_of_unit) {
                blocks.push(Block { sequence, rows: start..s.rows.end.min(start + maker.rows_of_unit) });
            }
        }
        let split_over = match cut.split {
            Split::Never => usize::MAX,
            Split::Always => 0,
            Split::Auto { sms } => {
                let all: usize = blocks.iter().map(|b| step.block_spans(b).len()).sum();
                // Two blocks fit on a multiprocessor. A span more or less is no reason for a second launch.
                2 * (all * step.layout.kv_heads * maker.heads.len()).div_ceil(2 * sms.max(1)).max(1)
            }
        };
        let group = if cut.split == Split::Never { Group::Never } else { cut.group };
        let (groups, alone) = maker.groups(blocks, group);
        groups.iter().for_each(|blocks| maker.add_group(blocks));
        alone.iter().for_each(|block| maker.add_block(block, split_over));
        Ok(maker.list())
    }
}

struct Maker<'a> {
    step: &'a Step<'a>,
    /// Heads of a group, as units have them.
    heads: Vec<Range<usize>>,
    rows_of_unit: usize,
    /// Partial results that scratch has room for.
    room: usize,
    units: Vec<[i32; UNIT]>,
    rows: Vec<[i32; ROW]>,
    combine: Vec<[i32; COMBINE]>,
    partials: usize,
    vectors: usize,
}

/// Of every count and position here; `Step::check` and `Maker::room` saw that they fit.
fn int(n: usize) -> i32 {
    n as i32
}

impl Maker<'_> {
    /// Blocks of one prefix that share its units, and all others.
    fn groups(&self, blocks: Vec<Block>, group: Group) -> (Vec<Vec<Block>>, Vec<Block>) {
        let (mut groups, mut alone) = (Vec::<Vec<Block>>::new(), Vec::new());
        let mut known: HashMap<(&[u32], usize), usize> = HashMap::new();
        for block in blocks {
            let s = &self.step.sequences[block.sequence];
            // A full block gains nothing.
            if group == Group::Never || block.rows.len() == self.rows_of_unit || s.prefix_len == 0 {
                alone.push(block);
                continue;
            }
            let pages = &self.step.table[s.prefix_pages.clone()][..s.prefix_len.div_ceil(PAGE)];
            let index = *known.entry((pages, s.prefix_len)).or_insert(groups.len());
            if index == groups.len() {
                groups.push(Vec::new());
            }
            groups[index].push(block);
        }
        let (mut worth, mut room) = (Vec::new(), self.room);
        for blocks in groups {
            let partials = self.partials_of(&blocks);
            if blocks.len() > 1 && partials <= room && (group == Group::Always || self.saves(&blocks)) {
                room -= partials;
                worth.push(blocks);
            } else {
                alone.extend(blocks);
            }
        }
        (worth, alone)
    }

    fn partials_of(&self, blocks: &[Block]) -> usize {
        let rows = blocks.iter().flat_map(|b| b.rows.clone().map(|row| (b.sequence, row)));
        rows.map(|(sequence, row)| self.step.spans(&self.step.sequences[sequence], row).len()).sum()
    }

    /// Counted in slots of one KV head: a read of K and V of one has the bytes of half a vector's partial result.
    fn saves(&self, blocks: &[Block]) -> bool {
        let rows: usize = blocks.iter().map(|b| b.rows.len()).sum();
        let reads = blocks.len() - rows.div_ceil(self.rows_of_unit);
        let group: usize = self.heads.iter().map(Range::len).sum();
        let saved = reads * self.heads.len() * self.step.sequences[blocks[0].sequence].prefix_len;
        saved > 2 * 2 * group * self.partials_of(blocks) + LAUNCH
    }

    fn add_group(&mut self, blocks: &[Block]) {
        let (start, s) = (self.rows.len(), &self.step.sequences[blocks[0].sequence]);
        let prefix_spans = s.prefix_len.div_ceil(SPAN);
        for block in blocks {
            let rows = self.rows.len();
            self.add_rows(block, true);
            let own = self.step.block_spans(block);
            self.split(rows..self.rows.len(), block.sequence, own.start.max(prefix_spans)..own.end);
        }
        let first = blocks.iter().map(|b| self.step.block_spans(b).start).min().unwrap_or(0);
        for from in (start..self.rows.len()).step_by(self.rows_of_unit) {
            let rows = from..self.rows.len().min(from + self.rows_of_unit);
            self.split(rows, blocks[0].sequence, first.min(prefix_spans)..prefix_spans);
        }
    }

    fn add_block(&mut self, block: &Block, split_over: usize) {
        let (start, spans) = (self.rows.len(), self.step.block_spans(block));
        let partials = self.partials_of(std::slice::from_ref(block));
        let split = spans.len() > split_over && self.partials + partials <= self.room;
        self.add_rows(block, split);
        if split {
            self.split(start..self.rows.len(), block.sequence, spans);
        } else {
            self.add_unit(start..self.rows.len(), block.sequence, spans, false);
        }
    }

    fn add_rows(&mut self, block: &Block, split: bool) {
        let s = &self.step.sequences[block.sequence];
        for row in block.rows.clone() {
            let (Seen([prefix, own]), spans) = (self.step.seen(s, row), self.step.spans(s, row));
            let partial = int(self.partials) - int(spans.start);
            self.rows.push([int(row), int(prefix.lo), int(own.lo), int(prefix.hi), int(own.hi), partial]);
            if split {
                self.combine.push([int(row), int(self.partials), int(spans.len())]);
                self.partials += spans.len();
            }
        }
    }

    /// A unit a span.
    fn split(&mut self, rows: Range<usize>, sequence: usize, spans: Range<usize>) {
        spans.for_each(|span| self.add_unit(rows.clone(), sequence, span..span + 1, true));
    }

    fn add_unit(&mut self, rows: Range<usize>, sequence: usize, spans: Range<usize>, split: bool) {
        let s = &self.step.sequences[sequence];
        let all = &self.rows[rows.clone()];
        let of = |part: usize| all.iter().map(move |r| (r[1 + part], r[3 + part]));
        let any = |part: usize| {
            let some = of(part).filter(|(lo, hi)| lo < hi);
            some.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))).unwrap_or((0, 0))
        };
        let every = |part: usize| of(part).reduce(|a, b| (a.0.max(b.0), a.1.min(b.1))).unwrap_or((0, 0));
        let (any, every) = ([any(0), any(1)], [every(0), every(1)]);
        for heads in &self.heads {
            self.vectors = self.vectors.max(rows.len() * heads.len());
            self.units.push([
                int(rows.start),
                int(rows.len()),
                int(heads.start),
                int(heads.len()),
                int(spans.start),
                int(spans.end),
                int(s.prefix_len.div_ceil(SPAN)),
                int(s.prefix_pages.start),
                int(s.own_pages.start),
                any[0].0,
                any[1].0,
                any[0].1,
                any[1].1,
                every[0].0,
                every[1].0,
                every[0].1,
                every[1].1,
                i32::from(split),
            ]);
        }
    }

    fn list(mut self) -> WorkList {
        self.units.sort_by_key(|u| std::cmp::Reverse(u[5] - u[4]));
        let (units, m, combines) = (self.units.len().next_power_of_two(), self.rows.len(), !self.combine.is_empty());
        self.units.resize(units, [0; UNIT]);
        self.combine.resize(m, [0; COMBINE]);
        let mut data = self.units.concat();
        data.extend(self.rows.iter().flatten());
        data.extend(self.combine.iter().flatten());
        WorkList { data, units, combines, room: self.room, vectors: self.vectors, m }
    }
}

impl WorkList {
    /// Where the rows start.
    pub(super) fn rows_at(&self) -> usize {
        self.units * UNIT
    }

    /// Where the rows to combine start.
    pub(super) fn combine_at(&self) -> usize {
        self.rows_at() + self.m * ROW
    }
}

#[cfg(test)]
mod tests;
