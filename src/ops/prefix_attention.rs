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
//! log-sum-exp: m' = max(m_a, m_b), w = exp(m - m'), l' = sum w l, o' = sum w o; an empty side (m = -inf) is
//! skipped. Keys come from the pool also for rows of the same chunk. So a row's bits depend neither on
//! the chunk it was computed in nor on its neighbours.
//!
//! # Pages
//! K of a page is stored transposed, `[kv_heads, head_dim, PAGE]`: one 16-lane accumulator holds the scores of a
//! page. V is `[kv_heads, PAGE, head_dim]`. Slots past a sequence's end may hold anything, NaN included.
mod packed;

pub use packed::{PackedPlan, PackedSequence, packed_attention};

use super::{Pool, Shared, f32_slice, float, linear::Cpu};
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
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

/// The work list of one step; every layer uses the same.
pub struct Plan {
    sequences: Vec<SequenceView>,
    pages: Vec<u32>,
    /// (sequence, KV head, rows), the long ones first.
    work: Vec<(usize, usize, Range<usize>)>,
    layout: KvLayout,
    heads: usize,
}

impl Plan {
    /// `heads` query heads read `layout.kv_heads` KV heads, `heads / kv_heads` each.
    pub fn new(sequences: Vec<SequenceView>, pages: Vec<u32>, layout: KvLayout, heads: usize) -> Self {
        let mut work = Vec::new();
        for (i, s) in sequences.iter().enumerate() {
            for start in s.rows.clone().step_by(ROWS) {
                let rows = start..s.rows.end.min(start + ROWS);
                work.extend((0..layout.kv_heads).map(|head| (i, head, rows.clone())));
            }
        }
        let cost = |(i, _, rows): &(usize, usize, Range<usize>)| {
            let s: &SequenceView = &sequences[*i];
            rows.len() * (s.prefix_len + s.first + rows.end - s.rows.start)
        };
        work.sort_by_key(|w| std::cmp::Reverse(cost(w)));
        Plan { sequences, pages, work, layout, heads }
    }
}

struct PrefixAttention {
    plan: Arc<Plan>,
    attention: Attention,
    cpu: Arc<Cpu>,
}

/// `qkv` `[m, width]` with the query heads first, `keys` and `values` the slabs of one layer -> `[m, heads * head_dim]`.
pub fn prefix_attention(
    qkv: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    plan: &Arc<Plan>,
    attention: Attention,
    cpu: &Arc<Cpu>,
) -> Result<Tensor> {
    qkv.apply_op3(keys, values, PrefixAttention { plan: plan.clone(), attention, cpu: cpu.clone() })
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
        let plan = &*self.plan;
        let (m, width) = qkv_l.shape().dims2()?;
        let KvLayout { kv_heads, head_dim } = plan.layout;
        if plan.heads * head_dim > width || !plan.heads.is_multiple_of(kv_heads) || head_dim > MAX_HEAD_DIM {
            bail!("prefix_attention: {} heads over {kv_heads} of {head_dim} in rows of {width}", plan.heads);
        }
        let input = Input {
            qkv: f32_slice(qkv, qkv_l, "prefix_attention")?,
            width,
            keys: f32_slice(keys, keys_l, "prefix_attention")?,
            values: f32_slice(values, values_l, "prefix_attention")?,
            plan,
            attention: self.attention,
        };
        plan.check(m, input.keys.len() / plan.layout.page_len())?;
        let mut out = vec![0f32; m * plan.heads * head_dim];
        input.run(&self.cpu.pool, &mut out);
        Ok((CpuStorage::F32(out), (m, plan.heads * head_dim).into()))
    }
}

impl Plan {
    /// Everything that the kernel indexes by.
    fn check(&self, rows: usize, pages: usize) -> Result<()> {
        let mut next = 0;
        for s in &self.sequences {
            let own = s.first + s.rows.len();
            let table = |r: &Range<usize>| self.pages.get(r.clone()).map_or(0, <[u32]>::len) * PAGE;
            if s.rows.start != next || table(&s.prefix_pages) < s.prefix_len || table(&s.own_pages) < own {
                bail!("prefix_attention: {s:?} does not follow row {next} or lacks pages");
            }
            next = s.rows.end;
        }
        if next != rows || self.pages.iter().any(|p| *p as usize >= pages) {
            bail!("prefix_attention: {next} rows planned, {rows} given, {pages} pages");
        }
        Ok(())
    }
}

struct Input<'a> {
    qkv: &'a [f32],
    width: usize,
    keys: &'a [f32],
    values: &'a [f32],
    plan: &'a Plan,
    attention: Attention,
}

impl Input<'_> {
    fn run(&self, pool: &Pool, out: &mut [f32]) {
        let plan = self.plan;
        let (group, dim) = (plan.heads / plan.layout.kv_heads, plan.layout.head_dim);
        let out = Shared(out.as_mut_ptr());
        pool.for_each(plan.work.len(), |i| {
            let (sequence, kv_head, rows) = &plan.work[i];
            for row in rows.clone() {
                // SAFETY: (row, kv_head) belongs to one unit of work, and its heads are neighbours.
                let out = unsafe {
                    let start = (row * plan.heads + kv_head * group) * dim;
                    std::slice::from_raw_parts_mut(out.get().add(start), group * dim)
                };
                self.row(&plan.sequences[*sequence], *kv_head, row, out);
            }
        });
    }

    /// All query heads of one row that read `kv_head`; `out` `[group, head_dim]`.
    fn row(&self, s: &SequenceView, kv_head: usize, row: usize, out: &mut [f32]) {
        let (plan, dim) = (self.plan, self.plan.layout.head_dim);
        let position = s.first + row - s.rows.start;
        let own = if self.attention.causal { position + 1 } else { s.first + s.rows.len() };
        // Slots before this one have left the window.
        let seen = self.attention.window.map_or(0, |w| (s.prefix_len + position + 1).saturating_sub(w));
        for (g, out) in out.chunks_exact_mut(dim).enumerate() {
            let head = kv_head * (plan.heads / plan.layout.kv_heads) + g;
            let query = &self.qkv[row * self.width + head * dim..][..dim];
            let mut sum = Partial { max: f32::NEG_INFINITY, sum: 0.0 };
            let parts = [(&s.prefix_pages, s.prefix_len, seen), (&s.own_pages, own, seen.saturating_sub(s.prefix_len))];
            for (pages, len, seen) in parts {
                // Spans start where they always start, in the window or not: that keeps their bits.
                for start in (seen / SPAN * SPAN..len).step_by(SPAN) {
                    let first = seen.saturating_sub(start);
                    if first >= len - start {
                        continue;
                    }
                    let pages = &plan.pages[pages.clone()][start / PAGE..];
                    let len = SPAN.min(len - start);
                    let span = Span {
                        keys: self.keys,
                        values: self.values,
                        pages: &pages[..len.div_ceil(PAGE)],
                        first,
                        len,
                        page_len: plan.layout.page_len(),
                        head: kv_head * dim * PAGE,
                        scale: self.attention.scale,
                        soft_cap: self.attention.soft_cap,
                    };
                    add_span(&span, query, &mut sum, out);
                }
            }
            let scale = 1.0 / sum.sum;
            out.iter_mut().for_each(|o| *o *= scale);
        }
    }
}

/// Consecutive slots of one sequence and KV head.
struct Span<'a> {
    keys: &'a [f32],
    values: &'a [f32],
    pages: &'a [u32],
    /// Slots before it are not seen.
    first: usize,
    len: usize,
    page_len: usize,
    /// First element of the head within a page.
    head: usize,
    scale: f32,
    soft_cap: Option<f32>,
}

/// Largest score so far, and the sum of exponentials relative to it.
struct Partial {
    max: f32,
    sum: f32,
}

simd! {
    /// Scores of the span, its softmax sums, and their merge into (`total`, `out`).
    fn add_span(span: &Span<'_>, query: &[f32], total: &mut Partial, out: &mut [f32]) {
        let dim = query.len();
        let mut scores = [f32::NEG_INFINITY; SPAN];
        let page = |i: usize| span.pages[i] as usize * span.page_len + span.head;
        // Four pages at a time hide the latency of the additions; each score is its own sum over ascending d.
        let mut p = span.first / PAGE;
        while p < span.pages.len() {
            let last = span.pages.len() - 1;
            let k: [&[f32]; 4] = std::array::from_fn(|i| &span.keys[page((p + i).min(last))..][..dim * PAGE]);
            let mut acc = [[0f32; PAGE]; 4];
            for (d, q) in query.iter().enumerate() {
                for (acc, k) in acc.iter_mut().zip(k) {
                    for (a, k) in acc.iter_mut().zip(&k[d * PAGE..(d + 1) * PAGE]) {
                        *a += q * k;
                    }
                }
            }
            for (i, acc) in acc.iter().enumerate().take(span.pages.len() - p) {
                for (l, a) in acc.iter().enumerate() {
                    let slot = (p + i) * PAGE + l;
                    // Slots past the end may hold NaN.
                    let seen = slot >= span.first && slot < span.len;
                    scores[slot] = if seen { a * span.scale } else { f32::NEG_INFINITY };
                }
            }
            p += 4;
        }
        let padded = &mut scores[..span.pages.len() * PAGE];
        if let Some(cap) = span.soft_cap {
            for s in padded.iter_mut().filter(|s| **s > f32::NEG_INFINITY) {
                *s = cap * float::tanh(*s / cap);
            }
        }
        let mut max = [f32::NEG_INFINITY; PAGE];
        for chunk in padded.chunks_exact(PAGE) {
            max.iter_mut().zip(chunk).for_each(|(m, s)| *m = if *s > *m { *s } else { *m });
        }
        let max = max.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        let max = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let mut sums = [0f32; PAGE];
        for chunk in padded.chunks_exact_mut(PAGE) {
            for (sum, s) in sums.iter_mut().zip(chunk) {
                *s = float::exp(*s - max);
                *sum += *s;
            }
        }
        let sum: f32 = sums.iter().sum();
        // Merge: both sides relative to the larger maximum.
        let merged = if total.max > max { total.max } else { max };
        let (old, new) = (float::exp(total.max - merged), float::exp(max - merged));
        total.sum = total.sum * old + sum * new;
        total.max = merged;
        let mut d = 0;
        while d < dim {
            d += if dim - d >= 64 {
                weighted::<64>(span, &scores, d, dim, old, new, out)
            } else if dim - d >= 16 {
                weighted::<16>(span, &scores, d, dim, old, new, out)
            } else {
                weighted::<1>(span, &scores, d, dim, old, new, out)
            };
        }
    }
}

/// Elements `d..d + N` of the span's weighted sum of V, over ascending slots, merged into `out`. Returns N. Slots
/// that are not seen have the weight 0.
#[inline(always)]
fn weighted<const N: usize>(
    span: &Span<'_>,
    p: &[f32; SPAN],
    d: usize,
    dim: usize,
    old: f32,
    new: f32,
    out: &mut [f32],
) -> usize {
    let mut acc = [0f32; N];
    for (slots, &page) in p[..span.len].chunks(PAGE).zip(span.pages) {
        let v = &span.values[page as usize * span.page_len + span.head..][..PAGE * dim];
        for (p, v) in slots.iter().zip(v.chunks_exact(dim)) {
            for (a, v) in acc.iter_mut().zip(&v[d..d + N]) {
                *a += p * v;
            }
        }
    }
    for (o, a) in out[d..d + N].iter_mut().zip(acc) {
        *o = *o * old + a * new;
    }
    N
}

#[cfg(test)]
mod tests;
