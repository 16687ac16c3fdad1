//! `prefix_attention`: paged attention over a ragged batch, full over the adapter's prefix, causal over own rows (or,
//! for an encoder, full over them too).
//!
//! For a query row of a sequence with prefix length P, own index t and head h:
//! o = sum_j softmax_j(cap(q . k_j * scale)) v_j over the P prefix slots and own slots 0..=t, where cap(s) is s or
//! c tanh(s / c). With a window of w the row at i = P + t sees slot j iff j > i - w: the prefix counts, and leaves
//! the window like any key.
//!
//! # Fixed splits
//! The keys of a sequence are cut at the prefix's end and at every 256 slots of either part. Each span
//! gives (m, l, o) = (max score, sum of exp(s - m), sum of exp(s - m) v), and spans merge in order by
//! log-sum-exp: m' = max(m_a, m_b), w = exp(m - m'), l' = sum w l, o' = sum w o; a span of which a row sees nothing is
//! skipped. Keys come from the pool also for rows of the same chunk. So a row's bits depend neither on
//! the chunk it was computed in nor on its neighbours.
//!
//! # Groups
//! A unit of work is one KV head and up to 16 rows of sequences with the same prefix: each page of the prefix is read once for
//! all of them and all query heads of the KV head, each own page once for the rows of its sequence.
//!
//! # Pages
//! K of a page is stored transposed, `[kv_heads, head_dim, PAGE]`: one 16-lane accumulator holds the scores of a
//! page. V is `[kv_heads, PAGE, head_dim]`. Slots past a sequence's end may hold anything, NaN included. Both are f32, bf16 or
//! f16; they are read as f32, exactly, and everything else is f32.
pub mod device;
mod element;
pub mod packed;
mod plan;
mod span;

pub use element::Element;
pub use packed::{PackedOnDevice, PackedPlan, PackedSequence, packed_attention};
pub use plan::Plan;

use super::{Machine, Pool, Shared, slice};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, DType, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};
use span::{QUERIES, Query, Span, add_span};
use std::ops::Range;
use std::sync::Arc;

/// Slots of a page.
pub const PAGE: usize = 16;
/// Slots after which a span ends.
const SPAN: usize = 256;
/// Query rows in one unit of work.
const ROWS: usize = 16;
/// Widest head.
pub const MAX_HEAD_DIM: usize = 256;

/// Shape of the K and V rows of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// KV heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl KvLayout {
    /// Elements of one page of K, or of V.
    pub fn page_len(self) -> usize {
        self.kv_heads * self.head_dim * PAGE
    }
}

/// One sequence of the batch, as attention sees it.
#[derive(Clone, Debug)]
pub struct SequenceView {
    /// Its rows in the packed batch.
    pub rows: Range<usize>,
    /// Own index of its first row in this batch.
    pub first: usize,
    /// Slots of the prefix.
    pub prefix_len: usize,
    /// Pages of the prefix within the plan's list.
    pub prefix_pages: Range<usize>,
    /// Own pages within the plan's list.
    pub own_pages: Range<usize>,
}

/// How a layer attends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Scores are multiplied by this.
    pub scale: f32,
    /// Scores s become c tanh(s / c).
    pub soft_cap: Option<f32>,
    /// Slots that a row sees, itself included.
    pub window: Option<usize>,
    /// A row sees no later one; `false`: all rows of a sequence see each other, and come in one batch.
    pub causal: bool,
}

struct PrefixAttention {
    plan: Arc<Plan>,
    attention: Attention,
    machine: Arc<Machine>,
}

/// `qkv` `[m, width]` with the query heads first, `keys` and `values` the slabs of one layer -> `[m, heads * head_dim]`.
pub fn prefix_attention(
    qkv: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    plan: &Arc<Plan>,
    attention: Attention,
    machine: &Arc<Machine>,
) -> Result<Tensor> {
    qkv.apply_op3(keys, values, PrefixAttention { plan: plan.clone(), attention, machine: machine.clone() })
}

impl CustomOp3 for PrefixAttention {
    fn name(&self) -> &'static str {
        "prefix_attention"
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        qkv_l: &Layout,
        keys: &CpuStorage,
        keys_l: &Layout,
        values: &CpuStorage,
        values_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        match keys.dtype() {
            DType::F32 => self.over::<f32>((qkv, qkv_l), (keys, keys_l), (values, values_l)),
            DType::BF16 => self.over::<bf16>((qkv, qkv_l), (keys, keys_l), (values, values_l)),
            DType::F16 => self.over::<f16>((qkv, qkv_l), (keys, keys_l), (values, values_l)),
            other => bail!("prefix_attention: K is {other:?}, must be f32, bf16 or f16"),
        }
    }
}

type Stored<'a> = (&'a CpuStorage, &'a Layout);

impl PrefixAttention {
    /// Over K and V of type `S`.
    fn over<S: Element>(&self, qkv: Stored<'_>, keys: Stored<'_>, values: Stored<'_>) -> Result<(CpuStorage, Shape)> {
        let plan = &*self.plan;
        let (m, width) = qkv.1.shape().dims2()?;
        let KvLayout { kv_heads, head_dim } = plan.layout;
        if plan.heads * head_dim > width || !plan.heads.is_multiple_of(kv_heads) || head_dim > MAX_HEAD_DIM {
            bail!("prefix_attention: {} heads over {kv_heads} of {head_dim} in rows of {width}", plan.heads);
        }
        let input = Input {
            qkv: slice(qkv.0, qkv.1, "prefix_attention")?,
            width,
            keys: slice::<S>(keys.0, keys.1, "prefix_attention")?,
            values: slice(values.0, values.1, "prefix_attention")?,
            plan,
            attention: self.attention,
        };
        plan.check(m, input.keys.len() / plan.layout.page_len())?;
        let mut out = vec![0f32; m * plan.heads * head_dim];
        input.run(&self.machine.pool, &mut out);
        Ok((CpuStorage::F32(out), (m, plan.heads * head_dim).into()))
    }
}

struct Input<'a, S> {
    qkv: &'a [f32],
    width: usize,
    keys: &'a [S],
    values: &'a [S],
    plan: &'a Plan,
    attention: Attention,
}

impl<S: Element> Input<'_, S> {
    fn run(&self, pool: &Pool, out: &mut [f32]) {
        let plan = self.plan;
        let heads = plan.layout.kv_heads;
        let out = Shared(out.as_mut_ptr());
        pool.for_each(plan.units.len() * heads, |i| {
            let (parts, head) = (&plan.parts[plan.units[i / heads].clone()], i % heads);
            let unit = Unit::new(self, parts, head);
            // SAFETY: (row, KV head) belongs to one unit of work.
            unsafe { unit.run(out) }
        });
    }
}

/// Rows of sequences with one prefix, and one KV head.
struct Unit<'a, S> {
    input: &'a Input<'a, S>,
    parts: &'a [(usize, Range<usize>)],
    head: usize,
}

/// A row of a unit.
struct Row {
    index: usize,
    /// Own position.
    position: usize,
    /// Own slots that it sees end here.
    end: usize,
}

impl<'a, S: Element> Unit<'a, S> {
    fn new(input: &'a Input<'a, S>, parts: &'a [(usize, Range<usize>)], head: usize) -> Self {
        Unit { input, parts, head }
    }

    /// # Safety
    /// `out` is `[m, heads * head_dim]`, and nobody else writes the elements of these rows' heads.
    unsafe fn run(&self, out: Shared<f32>) {
        let (plan, attention) = (self.input.plan, self.input.attention);
        let (group, dim) = (plan.heads / plan.layout.kv_heads, plan.layout.head_dim);
        let mut rows = Vec::with_capacity(ROWS);
        for (i, range) in self.parts {
            let s = &plan.sequences[*i];
            rows.extend(range.clone().map(|index| {
                let position = s.first + index - s.rows.start;
                Row { index, position, end: if attention.causal { position + 1 } else { s.first + s.rows.len() } }
            }));
        }
        let mut queries: Vec<Query<'_>> = Vec::with_capacity(rows.len() * group);
        for row in &rows {
            // SAFETY: the caller's; rows differ, and the heads of a group are neighbours.
            let out = unsafe {
                let start = (row.index * plan.heads + self.head * group) * dim;
                std::slice::from_raw_parts_mut(out.get().add(start), group * dim)
            };
            for (g, out) in out.chunks_exact_mut(dim).enumerate() {
                let q = &self.input.qkv[row.index * self.input.width + (self.head * group + g) * dim..][..dim];
                queries.push(Query { q, seen: 0..0, max: f32::NEG_INFINITY, sum: 0.0, out });
            }
        }
        let first = &plan.sequences[self.parts[0].0];
        let (prefix_len, pages) = (first.prefix_len, &plan.pages[first.prefix_pages.clone()]);
        // Slots before this one have left a row's window.
        let gone = |row: &Row| attention.window.map_or(0, |w| (prefix_len + row.position + 1).saturating_sub(w));
        self.spans(pages, &rows, &mut queries, |row| gone(row)..prefix_len);
        let mut done = 0;
        for (i, range) in self.parts {
            let rows = &rows[done..done + range.len()];
            let queries = &mut queries[done * group..(done + range.len()) * group];
            let pages = &plan.pages[plan.sequences[*i].own_pages.clone()];
            self.spans(pages, rows, queries, |row| gone(row).saturating_sub(prefix_len)..row.end);
            done += range.len();
        }
        for query in &mut queries {
            let scale = 1.0 / query.sum;
            query.out.iter_mut().for_each(|o| *o *= scale);
        }
    }

    /// Adds the spans of one part of the keys; `seen` tells which of its slots a row sees.
    fn spans(&self, pages: &[u32], rows: &[Row], queries: &mut [Query<'_>], seen: impl Fn(&Row) -> Range<usize>) {
        let (plan, attention) = (self.input.plan, self.input.attention);
        let group = queries.len() / rows.len();
        let end = rows.iter().map(|row| seen(row).end).max().unwrap_or(0);
        let first = rows.iter().map(|row| seen(row).start).min().unwrap_or(0);
        // Spans start where they always start, in the window or not: that keeps their bits.
        for start in (first / SPAN * SPAN..end).step_by(SPAN) {
            let span = Span {
                keys: self.input.keys,
                values: self.input.values,
                pages: &pages[start / PAGE..pages.len().min((start + SPAN) / PAGE)],
                page_len: plan.layout.page_len(),
                head: self.head * plan.layout.head_dim * PAGE,
                scale: attention.scale,
                soft_cap: attention.soft_cap,
            };
            // Rows that see nothing of it are no part of a block: it would move their maximum.
            let within = |row: &Row| {
                let seen = seen(row);
                seen.start.clamp(start, start + SPAN) - start..seen.end.clamp(start, start + SPAN) - start
            };
            for (row, queries) in rows.iter().zip(queries.chunks_exact_mut(group)) {
                queries.iter_mut().for_each(|q| q.seen = within(row));
            }
            let blocks = queries.chunk_by_mut(|a, b| a.seen.is_empty() == b.seen.is_empty());
            for block in blocks.filter(|block| !block[0].seen.is_empty()) {
                block.chunks_mut(QUERIES).for_each(|queries| add_span(&span, queries));
            }
        }
    }
}

#[cfg(test)]
mod tests;
