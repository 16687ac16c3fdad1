//! The kernel: up to four queries and one span of keys.
//!
//! Each score is one sum over ascending d, each element of the weighted sum of V one over ascending slots, whatever the other
//! queries are. A query's slots that it does not see have the weight 0, which leaves its sums as they are.
use super::{Element, PAGE, SPAN};
use crate::ops::float;
use crate::ops::lanes::Lanes;
use std::ops::Range;

/// Queries that share each load of K and V.
pub(super) const QUERIES: usize = 4;

/// Consecutive slots of one sequence and KV head.
pub(super) struct Span<'a, S> {
    pub keys: &'a [S],
    pub values: &'a [S],
    pub pages: &'a [u32],
    pub page_len: usize,
    /// First element of the head within a page.
    pub head: usize,
    pub scale: f32,
    pub soft_cap: Option<f32>,
}

/// A query on its way through the spans.
pub(super) struct Query<'a> {
    /// `[head_dim]`
    pub q: &'a [f32],
    /// Slots of the span that it sees; not empty.
    pub seen: Range<usize>,
    /// Largest score so far.
    pub max: f32,
    /// Sum of exponentials relative to it.
    pub sum: f32,
    /// Sum of V, weighted alike, `[head_dim]`.
    pub out: &'a mut [f32],
}

impl<S> Span<'_, S> {
    #[inline(always)]
    fn page(&self, i: usize) -> usize {
        self.pages[i] as usize * self.page_len + self.head
    }
}

lanes! {
    /// Scores of the span, their softmax sums, and their merge into what the queries have.
    pub(super) fn add_span<V, S: Element>(span: &Span<'_, S>, queries: &mut [Query<'_>]) {
        match queries {
            [a, b, c, d] => add::<V, S, 4>(span, [a, b, c, d]),
            [a, b, c] => add::<V, S, 3>(span, [a, b, c]),
            [a, b] => add::<V, S, 2>(span, [a, b]),
            [a] => add::<V, S, 1>(span, [a]),
            _ => {}
        }
    }
}

#[inline(always)]
fn add<V: Lanes, S: Element, const M: usize>(span: &Span<'_, S>, mut queries: [&mut Query<'_>; M]) {
    let first = queries.iter().map(|q| q.seen.start).min().unwrap_or(0);
    let end = queries.iter().map(|q| q.seen.end).max().unwrap_or(0);
    let (first_page, pages) = (first / PAGE, end.div_ceil(PAGE));
    let mut scores = [[0f32; SPAN]; M];
    let mut p = first_page;
    while p < pages {
        p += match pages - p {
            0..2 => products::<V, S, M, 1>(span, &queries, p, &mut scores),
            2..4 => products::<V, S, M, 2>(span, &queries, p, &mut scores),
            _ => products::<V, S, M, 4>(span, &queries, p, &mut scores),
        };
    }
    let (mut old, mut new) = ([0f32; M], [0f32; M]);
    for ((scores, query), (old, new)) in scores.iter_mut().zip(&mut queries).zip(old.iter_mut().zip(&mut new)) {
        (*old, *new) = softmax(span, &mut scores[first_page * PAGE..pages * PAGE], first_page * PAGE, query);
    }
    let dim = queries[0].q.len();
    let mut d = 0;
    while d < dim {
        d += match dim - d {
            64.. => weighted::<V, S, M, 4>(span, &scores, first..end, d, &old, &new, &mut queries),
            16.. => weighted::<V, S, M, 1>(span, &scores, first..end, d, &old, &new, &mut queries),
            _ => narrow::<V, S, M>(span, &scores, first..end, d, &old, &new, &mut queries),
        };
    }
}

/// q . k of P pages, from page `p` on. Returns P.
#[inline(always)]
fn products<V: Lanes, S: Element, const M: usize, const P: usize>(
    span: &Span<'_, S>,
    queries: &[&mut Query<'_>; M],
    p: usize,
    scores: &mut [[f32; SPAN]; M],
) -> usize {
    let dim = queries[0].q.len();
    let q: [&[f32]; M] = std::array::from_fn(|m| &queries[m].q[..dim]);
    let k: [&[S]; P] = std::array::from_fn(|i| &span.keys[span.page(p + i)..][..dim * PAGE]);
    let mut sums = [[V::zero(); P]; M];
    for d in 0..dim {
        // A loop, not `from_fn`: the instructions of a load are not put into a closure.
        let mut lanes = [V::zero(); P];
        for (lanes, k) in lanes.iter_mut().zip(k) {
            *lanes = S::load(&k[d * PAGE..]);
        }
        for (sums, q) in sums.iter_mut().zip(q) {
            let q = V::splat(q[d]);
            sums.iter_mut().zip(lanes).for_each(|(s, k)| *s = q.mul_add(k, *s));
        }
    }
    for (scores, sums) in scores.iter_mut().zip(&sums) {
        sums.iter().enumerate().for_each(|(i, s)| s.store(&mut scores[(p + i) * PAGE..]));
    }
    P
}

/// Products become exponentials, relative to the larger of the span's maximum and the query's, which moves there. `at`: slot
/// of the first. Returns the factors of what the query has and of what the span adds.
#[inline(always)]
fn softmax<S>(span: &Span<'_, S>, scores: &mut [f32], at: usize, query: &mut Query<'_>) -> (f32, f32) {
    let mut max = [f32::NEG_INFINITY; PAGE];
    for (i, chunk) in scores.chunks_exact_mut(PAGE).enumerate() {
        for (l, (m, s)) in max.iter_mut().zip(chunk).enumerate() {
            let slot = at + i * PAGE + l;
            let mut score = *s * span.scale;
            if let Some(cap) = span.soft_cap {
                score = cap * float::tanh(score / cap);
            }
            // What is not seen may be NaN.
            *s = if slot >= query.seen.start && slot < query.seen.end { score } else { f32::NEG_INFINITY };
            *m = if *s > *m { *s } else { *m };
        }
    }
    let max = max.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
    let max = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let mut sums = [0f32; PAGE];
    for chunk in scores.chunks_exact_mut(PAGE) {
        for (sum, s) in sums.iter_mut().zip(chunk) {
            *s = float::exp(*s - max);
            *sum += *s;
        }
    }
    let sum: f32 = sums.iter().sum();
    let merged = if query.max > max { query.max } else { max };
    let (old, new) = (float::exp(query.max - merged), float::exp(max - merged));
    query.sum = query.sum * old + sum * new;
    query.max = merged;
    (old, new)
}

/// 16 N elements of the weighted sum of V, from `d` on, merged into the queries. Returns 16 N.
#[inline(always)]
fn weighted<V: Lanes, S: Element, const M: usize, const N: usize>(
    span: &Span<'_, S>,
    weights: &[[f32; SPAN]; M],
    slots: Range<usize>,
    d: usize,
    old: &[f32; M],
    new: &[f32; M],
    queries: &mut [&mut Query<'_>; M],
) -> usize {
    let dim = queries[0].q.len();
    let mut sums = [[V::zero(); N]; M];
    let mut slot = slots.start;
    while slot < slots.end {
        let end = slots.end.min((slot / PAGE + 1) * PAGE);
        let page = &span.values[span.page(slot / PAGE)..][..PAGE * dim];
        let rows = page.chunks_exact(dim).skip(slot % PAGE);
        for (v, slot) in rows.zip(slot..end) {
            let v = &v[d..d + N * PAGE];
            let mut lanes = [V::zero(); N];
            for (lanes, v) in lanes.iter_mut().zip(v.chunks_exact(PAGE)) {
                *lanes = S::load(v);
            }
            for (sums, weights) in sums.iter_mut().zip(weights) {
                let w = V::splat(weights[slot]);
                sums.iter_mut().zip(lanes).for_each(|(s, v)| *s = w.mul_add(v, *s));
            }
        }
        slot = end;
    }
    for (m, query) in queries.iter_mut().enumerate() {
        let (old, new) = (V::splat(old[m]), V::splat(new[m]));
        let out = query.out[d..d + N * PAGE].chunks_exact_mut(PAGE);
        for (out, sum) in out.zip(&sums[m]) {
            sum.mul(new).mul_add(V::splat(1.0), V::load(out).mul(old)).store(out);
        }
    }
    N * PAGE
}

/// The same for the last elements of a head whose width is no multiple of 16, in vectors of which the rest is left alone. Returns how many.
#[inline(always)]
fn narrow<V: Lanes, S: Element, const M: usize>(
    span: &Span<'_, S>,
    weights: &[[f32; SPAN]; M],
    slots: Range<usize>,
    d: usize,
    old: &[f32; M],
    new: &[f32; M],
    queries: &mut [&mut Query<'_>; M],
) -> usize {
    let dim = queries[0].q.len();
    let mut sums = [V::zero(); M];
    for slot in slots {
        let page = &span.values[span.page(slot / PAGE)..][..PAGE * dim];
        let v = &page[slot % PAGE * dim + d..];
        let lanes = if v.len() >= PAGE {
            // Of the next row too.
            S::load(v)
        } else {
            let mut padded = [v[0]; PAGE];
            padded[..v.len()].copy_from_slice(v);
            S::load(&padded)
        };
        for (sum, weights) in sums.iter_mut().zip(weights) {
            *sum = V::splat(weights[slot]).mul_add(lanes, *sum);
        }
    }
    for (m, query) in queries.iter_mut().enumerate() {
        let mut sum = [0f32; PAGE];
        sums[m].store(&mut sum);
        for (out, sum) in query.out[d..dim].iter_mut().zip(sum) {
            *out = *out * old[m] + sum * new[m];
        }
    }
    dim - d
}
